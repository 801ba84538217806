"""Writing litgpt's folder: packed query, key and value, zeros where nothing was trained, and what is refused.

That litgpt loads and merges what is written here is in test_litgpt_producer.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from hypothesis import assume, given
from hypothesis import strategies as st
from models import State, assert_float32_close, assert_same_bits, own
from safetensors.torch import save_file
from strategies import Case, Maker, cases, make_update, tensors_of
from test_litgpt import factors, folder_of, values, yaml
from writer_cases import said

import loratool
from loratool import Adapter, Target, Targeted
from loratool.conventions.flat_yaml import read_flat_yaml
from loratool.updates import Lora, Update

HEADS, GROUPS, SIZE, WIDTH, INNER, VOCAB, LAYERS = 4, 2, 3, 8, 10, 5, 2
ROWS = (HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE)  # of query, key, value
MODEL = {
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_query_groups": GROUPS,
    "head_size": SIZE,
    "padded_vocab_size": VOCAB,
    "mlp_class_name": "LLaMAMLP",
}
H, L = "transformer.h", "model.layers"
WEIGHTS, HYPER = "lit_model.pth.lora", "hyperparameters.yaml"

# -- tools ------------------------------------------------------------------------------------------------------------


def base_state() -> State:
    """The linear layers of a small model of litgpt's."""
    state = {"lm_head.weight": values(VOCAB, WIDTH), "transformer.wte.weight": values(VOCAB, WIDTH, seed=1)}
    for n in range(LAYERS):
        state |= {
            f"{H}.{n}.attn.qkv.weight": values(sum(ROWS), WIDTH, seed=n),
            f"{H}.{n}.attn.proj.weight": values(WIDTH, ROWS[0], seed=n),
            f"{H}.{n}.mlp.fc_1.weight": values(INNER, WIDTH, seed=n),
            f"{H}.{n}.mlp.fc_2.weight": values(INNER, WIDTH, seed=10 + n),
            f"{H}.{n}.mlp.proj.weight": values(WIDTH, INNER, seed=n),
        }
    return state


RENAMED = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"}
RENAMED |= {"mlp.proj": "mlp.down_proj", "lm_head": "lm_head"}


def theirs(state: State, layers: str = L) -> State:
    """The same model as transformers has it."""
    found: State = {}
    for name, value in state.items():
        module = name.removesuffix(".weight")
        number, below = (module.split(".", 3)[2:]) if module.startswith(H) else ("", module)
        prefix = f"{layers}.{number}." if number else ""
        if below == "attn.qkv":
            for part, rows in zip("qkv", value.split(ROWS), strict=True):
                found[f"{prefix}self_attn.{part}_proj.weight"] = rows
        elif below in RENAMED:
            found[f"{prefix}{RENAMED[below]}.weight"] = value
    return found


def base_at(folder: Path, state: State, model: Mapping[str, Any] | None = MODEL) -> Path:
    folder.mkdir()
    save_file(own(state), folder / "model.safetensors")
    if model is not None:
        (folder / "model_config.yaml").write_text(yaml({key: x for key, x in model.items() if x is not None}))
    return folder


def adapter_of(*items: tuple[Target, Update]) -> Adapter:
    return Adapter(tuple(Targeted(target, update) for target, update in items))


def lora(name: str, shape: tuple[int, int], rows: tuple[int, int] | None = None, **options: Any) -> tuple[Target, Lora]:
    """A LoRA of a tensor, or of a range of its rows."""
    height = shape[0] if rows is None else rows[1] - rows[0]
    rank, dtype = options.pop("rank", 2), options.pop("dtype", "F32")
    seed = options.pop("seed", sum(map(ord, name)))
    made = make_update("lora", (height, shape[1]), Maker(seed, dtype), rank, **options)
    assert isinstance(made, Lora)
    return Target(name, shape, rows), made


def written(out: Path) -> State:
    state: State = torch.load(out / WEIGHTS, weights_only=True)["model"]
    return state


def hyper(out: Path) -> Mapping[str, str]:
    found = read_flat_yaml(out / HYPER)
    assert found is not None
    return found.lines


def merged(base: Path, adapter: object) -> State:
    with tempfile.TemporaryDirectory() as folder:
        loratool.merge(base / "model.safetensors", adapter, Path(folder, "out.safetensors"), allow_unchanged=True)  # type: ignore[arg-type]
        return tensors_of(Path(folder, "out.safetensors"))


def assert_same_model(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value.is_floating_point() and value.numel():
            assert_float32_close(got[name], value, name=name)


def refused(adapter: Adapter, tmp_path: Path, base: Path | None, **options: Any) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.convert(adapter, tmp_path / "refused", "litgpt", base=base, **options)
    assert not (tmp_path / "refused").exists()
    return caught.value


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", ["101", "010", "111", "000"])
def test_what_litgpt_wrote_is_written_again(trained: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All layers of all flags: the same names, bits and numbers."""
    base = base_at(tmp_path / "base", base_state())
    state: State = {}
    for name, weight in base_state().items():
        module, rank = name.removesuffix(".weight"), 2
        if module.endswith("attn.qkv"):
            rows = sum(size for size, digit in zip(ROWS, trained, strict=True) if digit == "1")
            state |= factors(module, values(rank * trained.count("1"), WIDTH), values(rows, rank)) if rows else {}
        elif not module.endswith("wte"):
            state |= factors(module, values(rank, weight.shape[1]), values(weight.shape[0], rank))
    state = {name: value.to(dtype) for name, value in state.items()}
    flags = dict(zip(("lora_query", "lora_key", "lora_value"), (digit == "1" for digit in trained), strict=True))
    others = {"lora_projection": True, "lora_mlp": True, "lora_head": True}
    given_by = {"lora_r": 2, "lora_alpha": 7, "lora_dropout": 0.0, **flags, **others}
    source = folder_of(tmp_path / "run", state, given_by, MODEL)
    report = loratool.convert(source, tmp_path / "out", "litgpt", base=base)
    assert_same_bits(written(tmp_path / "out"), state)
    lines = hyper(tmp_path / "out")
    assert {key: lines[key] for key in given_by} == {
        key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in given_by.items()
    }
    assert not [note for note in report.notes if "zeros" in note or "rank" in note]
    again = loratool.load(tmp_path / "out")
    assert [item.target for item in again.updates] == [item.target for item in loratool.load(source).updates]
    assert again.doubts == ()


def test_one_lora_of_all_of_qkv(tmp_path: Path) -> None:
    """A is repeated, B cut: exact."""
    base = base_at(tmp_path / "base", base_state())
    one = lora(f"{H}.0.attn.qkv.weight", (24, WIDTH), alpha=6.0)
    loratool.convert(adapter_of(one), tmp_path / "out", "litgpt", base=base)
    state = written(tmp_path / "out")
    assert torch.equal(state[f"{H}.0.attn.qkv.lora_A"], one[1].A.read().repeat(3, 1))
    assert torch.equal(state[f"{H}.0.attn.qkv.lora_B"], one[1].B.read())
    assert (hyper(tmp_path / "out")["lora_r"], hyper(tmp_path / "out")["lora_alpha"]) == ("2", "6")
    assert_same_model(merged(base, tmp_path / "out"), merged(base, adapter_of(one)))


def test_every_layer_of_a_kind_has_factors(tmp_path: Path) -> None:
    """What is not trained is zeros, in the dtype of the others: litgpt loads nothing else."""
    base = base_at(tmp_path / "base", base_state())
    made = adapter_of(
        lora(f"{H}.0.attn.qkv.weight", (24, WIDTH), (12, 18), dtype="BF16"),
        lora(f"{H}.1.attn.qkv.weight", (24, WIDTH), (18, 24), dtype="BF16"),
        lora(f"{H}.1.mlp.fc_2.weight", (INNER, WIDTH), dtype="BF16"),
    )
    report = loratool.convert(made, tmp_path / "out", "litgpt", base=base)
    state = written(tmp_path / "out")
    modules = {f"{H}.{n}.{below}" for n in range(2) for below in ("attn.qkv", "mlp.fc_1", "mlp.fc_2", "mlp.proj")}
    assert state.keys() == {f"{module}.{part}" for module in modules for part in ("lora_A", "lora_B")}
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert state[f"{H}.0.attn.qkv.lora_A"].shape == (4, WIDTH)
    assert state[f"{H}.0.attn.qkv.lora_B"].shape == (12, 2)
    assert not state[f"{H}.0.attn.qkv.lora_A"][2:].any()
    assert not state[f"{H}.0.attn.qkv.lora_B"][6:].any()
    assert state[f"{H}.0.attn.qkv.lora_B"][:6].all()
    assert not state[f"{H}.0.mlp.proj.lora_A"].any()
    assert [key for key, value in hyper(tmp_path / "out").items() if value == "true"] == [
        "lora_key", "lora_value", "lora_mlp",
    ]  # fmt: skip
    assert any("7 are zeros, such as the key of transformer.h.1.attn.qkv" in note for note in report.notes)
    assert any("rounds the base to the dtype of the factors, BF16" in note for note in report.notes)
    assert_same_model(merged(base, tmp_path / "out"), merged(base, made))


def test_one_rank_scale_and_dtype(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", base_state())
    made = adapter_of(
        lora(f"{H}.0.attn.proj.weight", (WIDTH, 12), rank=1, alpha=2.0, dtype="BF16"),
        lora(f"{H}.1.attn.proj.weight", (WIDTH, 12), rank=3, alpha=6.0, dtype="F16"),
        lora("lm_head.weight", (VOCAB, WIDTH), rank=2, rule="alpha/sqrt(rank)", alpha=0.1),
        lora("lm_head.weight", (VOCAB, WIDTH), rank=1, seed=5),
    )
    report = loratool.convert(made, tmp_path / "out", "litgpt", base=base)
    state = written(tmp_path / "out")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {value.shape[0] for name, value in state.items() if name.endswith("lora_A")} == {3}
    assert any(note.startswith("one rank, 3, and one scale, 2: B of 1 updates") for note in report.notes)
    assert any("all factors are F32" in note for note in report.notes)
    assert_same_model(merged(base, tmp_path / "out"), merged(base, made))


@given(cases(("lora", "lora-mid"), base_dtypes=("F32",)))
def test_any_lora_of_a_matrix(case: Case) -> None:
    """Several of one layer, of ranges of rows, with a core: none is lost."""
    items = [item for item in case.adapter.updates if len(item.target.shape) == 2 and not item.target.stacked]
    assume(items)
    names = {f"layers.{n}.weight": f"{H}.{n}.mlp.fc.weight" for n in range(3)}
    items = [replace(item, target=replace(item.target, name=names[item.target.name], layout="")) for item in items]
    state = {f"{H}.{n}.mlp.{part}.weight": values(3, 2) for n in range(3) for part in ("fc", "proj")}
    state |= {item.target.name: values(*item.target.shape) for item in items}
    with tempfile.TemporaryDirectory() as folder:
        base = base_at(Path(folder, "base"), state, MODEL | {"n_layer": 3, "mlp_class_name": "GptNeoxMLP"})
        loratool.convert(Adapter(tuple(items)), Path(folder, "out"), "litgpt", base=base)
        assert_same_model(merged(base, Path(folder, "out")), merged(base, Adapter(tuple(items))))


@given(st.data())
def test_any_rows_of_qkv(data: st.DataObject) -> None:
    """Ranges that begin and end anywhere, over each other, of several ranks and scales."""
    items = []
    for number in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, 23))
        rows = (start, data.draw(st.integers(start + 1, 24)))
        rank, alpha = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1.0, -2.0, 0.3)))
        layer = data.draw(st.integers(0, 1))
        items.append(lora(f"{H}.{layer}.attn.qkv.weight", (24, WIDTH), rows, rank=rank, alpha=alpha, seed=number))
    with tempfile.TemporaryDirectory() as folder:
        base = base_at(Path(folder, "base"), base_state())
        loratool.convert(adapter_of(*items), Path(folder, "out"), "litgpt", base=base)
        assert_same_model(merged(base, Path(folder, "out")), merged(base, adapter_of(*items)))


# -- transformers' names ----------------------------------------------------------------------------------------------


def hugging_face(layers: str = L) -> Adapter:
    """As PEFT has it: some of q, k, v in some layers, all of different ranks and scales."""
    return adapter_of(
        lora(f"{layers}.0.self_attn.q_proj.weight", (ROWS[0], WIDTH), rank=3, alpha=1.5),
        lora(f"{layers}.0.self_attn.v_proj.weight", (ROWS[2], WIDTH), rank=1, alpha=2.0),
        lora(f"{layers}.1.self_attn.v_proj.weight", (ROWS[2], WIDTH), rank=2, alpha=2.0),
        lora(f"{layers}.1.self_attn.o_proj.weight", (WIDTH, ROWS[0])),
        lora(f"{layers}.1.mlp.gate_proj.weight", (INNER, WIDTH)),
        lora(f"{layers}.0.mlp.up_proj.weight", (INNER, WIDTH)),
        lora(f"{layers}.0.mlp.down_proj.weight", (WIDTH, INNER)),
    )


@pytest.mark.parametrize("layers", [L, "language_model.model.layers", "model.language_model.layers"])
def test_from_transformers_names_and_back(layers: str, tmp_path: Path) -> None:
    """Written for litgpt, the adapter does the same to litgpt's base as before to transformers'; read back, as well."""
    mine = base_at(tmp_path / "mine", base_state())
    hf = base_at(tmp_path / "hf", theirs(base_state(), layers))
    made = hugging_face(layers)
    loratool.convert(made, tmp_path / "out", "litgpt", base=hf)
    want = merged(hf, made)
    assert_same_model(merged(hf, tmp_path / "out"), want)
    assert_same_model(theirs(merged(mine, tmp_path / "out"), layers), want)
    back = loratool.load(tmp_path / "out", base=hf)
    assert {item.target.name for item in back.updates} >= made.targets().keys()
    assert any("mapped to those of transformers" in note for note in back.notes)
    loratool.convert(tmp_path / "out", tmp_path / "peft", "peft", base=hf)
    assert_same_model(merged(hf, tmp_path / "peft"), want)


def test_the_base_shows_how_qkv_divides(tmp_path: Path) -> None:
    """transformers' base has query, key and value apart: model_config.yaml is not needed to read."""
    hf = base_at(tmp_path / "hf", theirs(base_state()))
    loratool.convert(hugging_face(), tmp_path / "out", "litgpt", base=hf)
    (tmp_path / "out" / "model_config.yaml").unlink()
    assert loratool.load(tmp_path / "out").doubts
    assert_same_model(merged(hf, tmp_path / "out"), merged(hf, hugging_face()))


MOE = {
    "mixtral": ("block_sparse_moe.experts.{}.w{}", "block_sparse_moe.gate", ("1", "3", "2")),
    "qwen": ("mlp.experts.{}.{}_proj", "mlp.gate", ("gate", "up", "down")),
}


@pytest.mark.parametrize("family", MOE)
def test_experts(family: str, tmp_path: Path) -> None:
    pattern, gate, words = MOE[family]
    shapes = {f"{L}.0.{gate}.weight": (12, WIDTH)}
    for expert in range(12):
        for word, shape in zip(words, ((3, WIDTH), (3, WIDTH), (WIDTH, 3)), strict=True):
            shapes[f"{L}.0.{pattern.format(expert, word)}.weight"] = shape
    model = MODEL | {"n_layer": 1, "n_expert": 12, "mlp_class_name": "LLaMAMoE"}
    hf = base_at(tmp_path / "hf", {name: values(*shape) for name, shape in shapes.items()}, model)
    made = adapter_of(*(lora(name, shape) for name, shape in shapes.items() if ".3." not in name))
    report = loratool.convert(made, tmp_path / "out", "litgpt", base=hf)
    assert any("3 are zeros, such as transformer.h.0.mlp.experts.3.fc_1" in note for note in report.notes)
    state = written(tmp_path / "out")
    assert len(state) == 2 * 37
    for word, ours in zip(words, ("fc_1", "fc_2", "proj"), strict=True):
        update = made.targets()[f"{L}.0.{pattern.format(11, word)}.weight"][0].update
        assert torch.equal(state[f"{H}.0.mlp.experts.11.{ours}.lora_A"], update.components()["A"].read())
    assert_same_model(merged(hf, tmp_path / "out"), merged(hf, made))


# -- the files beside the weights -------------------------------------------------------------------------------------


def test_the_folder(tmp_path: Path) -> None:
    """What litgpt's fine-tuning copies is copied; its merge finds the base."""
    base = base_at(tmp_path / 'a "base" é\\\u0085', base_state())
    one = adapter_of(lora("lm_head.weight", (VOCAB, WIDTH), rank=1, rule="none", alpha=1e-05))
    report = loratool.convert(one, tmp_path / "bare", "litgpt", base=base)
    assert {file.name for file in report.files} == {WEIGHTS, HYPER, "model_config.yaml"}
    assert any("tokenizer_config.json, lit_model.pth, tokenizer.json or tok" in note for note in report.notes)
    for name in ("tokenizer.json", "tokenizer_config.json", "lit_model.pth", "config.json", "README.md"):
        (base / name).write_text("{}")
    report = loratool.convert(one, tmp_path / "out", "litgpt", base=base)
    (note,) = said(report)
    assert note.startswith("hyperparameters.yaml has the base's path")
    copied = {"model_config.yaml", "tokenizer.json", "tokenizer_config.json", "config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {WEIGHTS, HYPER} | copied
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    lines = hyper(tmp_path / "out")
    assert lines["checkpoint_dir"] == f'"{tmp_path}/a \\"base\\" é\\\\\\U00000085"'
    assert lines["lora_alpha"] == "1.0e-05"
    assert lines["precision"] == "null"


def test_a_single_file_as_the_base(tmp_path: Path) -> None:
    """litgpt's own base is a pickle."""
    base = base_at(tmp_path / "base", {"x.weight": values(2)})
    torch.save(base_state(), base / "lit_model.pth")
    made = adapter_of(lora(f"{H}.1.mlp.proj.weight", (WIDTH, INNER)))
    loratool.convert(made, tmp_path / "out", "litgpt", base=base / "lit_model.pth")
    assert len(written(tmp_path / "out")) == 12
    assert hyper(tmp_path / "out")["checkpoint_dir"] == f'"{base}"'


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", base_state())
    loratool.save(adapter_of(lora("lm_head.weight", (VOCAB, WIDTH))), tmp_path / "a.safetensors")
    out = ("convert", tmp_path / "a.safetensors", "--to", "litgpt", "-o", tmp_path / "out")
    failed = cli(*out)
    assert failed.code == 2
    assert "only the base shows" in failed.err
    assert "--base takes the folder" in failed.err
    report = cli(*out, "--base", base, "--json").json
    assert (report["to"], report["updates"]) == ("litgpt", 1)
    assert [Path(file).name for file in report["files"]] == [WEIGHTS, HYPER, "model_config.yaml"]
    assert cli("inspect", tmp_path / "out", "--json").json["convention"] == "litgpt"


# -- what does not fit ------------------------------------------------------------------------------------------------


def whole(form: str, shape: tuple[int, ...]) -> Update:
    return make_update(form, shape, Maker(7))


MISFITS: dict[str, tuple[tuple[Target, Update], str]] = {
    "dora": ((Target("lm_head.weight", (VOCAB, WIDTH)), whole("dora0-lora", (VOCAB, WIDTH))), "LoRA and nothing else"),
    "loha": ((Target("lm_head.weight", (VOCAB, WIDTH)), whole("loha", (VOCAB, WIDTH))), "LoRA and nothing else"),
    "whole": ((Target("lm_head.weight", (VOCAB, WIDTH)), whole("replace", (VOCAB, WIDTH))), "LoRA and nothing else"),
    "embedding": (lora("transformer.wte.weight", (VOCAB, WIDTH)), "its model has none of that name"),
    "old": (lora(f"{H}.1.attn.attn.weight", (24, WIDTH)), "interleaved layout of an old litgpt"),
    "a layer too many": (lora(f"{H}.2.attn.proj.weight", (WIDTH, 12)), "its model has none of that name"),
    "another mlp": (lora(f"{H}.0.mlp.fc.weight", (INNER, WIDTH)), "its model has none of that name"),
}
EXTRA = {f"{H}.1.attn.attn.weight": (24, 8), f"{H}.2.attn.proj.weight": (8, 12), f"{H}.0.mlp.fc.weight": (10, 8)}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits(name: str, tmp_path: Path) -> None:
    item, why = MISFITS[name]
    base = base_at(tmp_path / "base", base_state() | {extra: values(*shape) for extra, shape in EXTRA.items()})
    fits = lora(f"{H}.0.attn.proj.weight", (WIDTH, 12))
    error = refused(adapter_of(fits, item), tmp_path, base)
    assert error.code == "E-UNSUPPORTED"
    assert item[0].name in error.message
    assert why in error.message
    assert fits[0].name not in error.message
    assert "--bake" not in error.hint
    assert "--bake" not in refused(adapter_of(fits, item), tmp_path, base, bake=True).hint


def test_all_misfits_are_reported_at_once(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", base_state())
    items = [MISFITS["dora"][0], MISFITS["embedding"][0]]
    assert len(refused(adapter_of(*items), tmp_path, base).problems) == 2


def without(*ends: str) -> State:
    return {name: value for name, value in base_state().items() if not name.endswith(ends)}


QKV = (lora(f"{H}.0.attn.qkv.weight", (24, WIDTH)),)
MLP = (lora(f"{H}.0.mlp.proj.weight", (WIDTH, INNER)),)
HEAD = (lora("lm_head.weight", (VOCAB, WIDTH)),)
FLAT = f"{H}.1.mlp.fc_1.weight"
BASES: dict[str, tuple[tuple[tuple[Target, Lora], ...], State, Mapping[str, Any] | None, str, str]] = {
    "no config": (MLP, base_state(), None, "E-UNSUPPORTED", "model_config.yaml, which the base's folder lacks"),
    "other heads": (QKV, base_state(), MODEL | {"n_head": 6}, "E-SHAPE", "has 24 rows, model_config.yaml makes it 30"),
    "other head": (HEAD, base_state(), MODEL | {"padded_vocab_size": 8}, "E-UNSUPPORTED", "has 8 rows, this one 5"),
    "flat": (MLP, base_state() | {FLAT: values(INNER)}, MODEL, "E-UNSUPPORTED", f"no {FLAT.removesuffix('.weight')}"),
    "part of a base": (MLP, without("1.mlp.fc_2.weight"), MODEL, "E-UNSUPPORTED", "no transformer.h.1.mlp.fc_2"),
    "part of qkv": (QKV, without("1.attn.qkv.weight"), MODEL, "E-UNSUPPORTED", "no transformer.h.1.attn.qkv"),
    "more layers": (MLP, base_state(), MODEL | {"n_layer": 3}, "E-UNSUPPORTED", "no transformer.h.2.mlp.fc_1"),
    "absurd numbers": (MLP, base_state(), MODEL | {"n_layer": 999_999_999}, "E-SHAPE", "n_layer 999999999"),
    "unknown mlp": (MLP, base_state(), MODEL | {"mlp_class_name": "New"}, "E-UNSUPPORTED", "mlp_class_name is 'New'"),
    "no numbers": (MLP, base_state(), MODEL | {"n_layer": None}, "E-CONFIG", "there is no n_layer"),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_that_do_not_do(name: str, tmp_path: Path) -> None:
    items, state, model, code, message = BASES[name]
    error = refused(adapter_of(*items), tmp_path, base_at(tmp_path / "base", state, model))
    assert error.code == code
    assert message in error.message
    assert error.hint or name in ("no numbers", "other head")


def test_names_that_two_layers_share(tmp_path: Path) -> None:
    """A model with two language models: which of them litgpt has is not known, so neither is read into."""
    hf = base_at(tmp_path / "hf", theirs(base_state()))
    loratool.convert(hugging_face(), tmp_path / "out", "litgpt", base=hf)
    both = base_at(tmp_path / "both", theirs(base_state()) | theirs(base_state(), "model.language_model.layers"))
    with pytest.raises(loratool.Mismatch, match="the base has no 'transformer"):
        loratool.merge(both, tmp_path / "out", tmp_path / "merged")

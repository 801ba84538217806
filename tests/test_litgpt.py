"""litgpt's layout, built by hand: packed query, key and value, the numbers beside the file, and what is refused.

The layouts are those that test_litgpt_producer.py gets from litgpt itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from models import State, assert_rounded, assert_same_bits, own, read
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.checkpoint import open_checkpoint
from loratool.conventions import choose, matching
from loratool.conventions.flat_yaml import read_flat_yaml

RANK, ALPHA, WIDTH, HEADS, GROUPS, SIZE = 2, 6, 8, 4, 2, 3
SCALE = ALPHA / RANK
QKV, PROJ = "transformer.h.0.attn.qkv", "transformer.h.0.attn.proj"
ROWS = (HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE)  # of query, key, value
HYPER = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_query": True, "lora_key": False, "lora_value": True}
MODEL = {"n_head": HEADS, "n_query_groups": GROUPS, "head_size": SIZE}


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed))


def factors(module: str, A: Tensor, B: Tensor) -> State:
    return {f"{module}.lora_A": A, f"{module}.lora_B": B}


def packed(trained: str = "101", sizes: tuple[int, ...] = ROWS, rank: int = RANK, width: int = WIDTH) -> State:
    """Factors of the trained ones of query, key and value."""
    rows = sum(size for size, digit in zip(sizes, trained, strict=True) if digit == "1")
    return factors(QKV, values(rank * trained.count("1"), width), values(rows, rank))


def proj() -> State:
    return factors(PROJ, values(RANK, 12), values(WIDTH, RANK))


def dense(state: State, trained: str, sizes: tuple[int, ...] = ROWS) -> Tensor:
    """[rows of all three, in] in float64: B_i @ A_i for the trained ones, zeros for the others."""
    A, B = state[f"{QKV}.lora_A"].double(), state[f"{QKV}.lora_B"].double()
    blocks, row, block, rank = [], 0, 0, B.shape[1]
    for size, digit in zip(sizes, trained, strict=True):
        if digit == "0":
            blocks.append(torch.zeros(size, A.shape[1], dtype=torch.float64))
            continue
        blocks.append(B[row : row + size] @ A[block * rank : (block + 1) * rank])
        row, block = row + size, block + 1
    return torch.cat(blocks)


def yaml(content: Mapping[str, Any]) -> str:
    plain = {True: "true", False: "false", None: "null"}
    return "".join(
        f"{key}: {plain[value] if isinstance(value, bool | None) else value}\n" for key, value in content.items()
    )


def folder_of(
    place: Path,
    state: State,
    hyper: Mapping[str, Any] | None = HYPER,
    model: Mapping[str, Any] | None = MODEL,
    name: str = "lit_model.pth.lora",
) -> Path:
    """A folder as `litgpt finetune_lora` leaves it; the path of its weights."""
    place.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state}, place / name)
    for file, content in (("hyperparameters.yaml", hyper), ("model_config.yaml", model)):
        if content is not None:
            (place / file).write_text(yaml(content))
    return place / name


def base_at(path: Path, state: State) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(own(state), path)
    return path


def base_state() -> State:
    return {
        f"{QKV}.weight": values(sum(ROWS), WIDTH),
        f"{PROJ}.weight": values(WIDTH, 12),
        "lm_head.weight": values(5, 8),
    }


def refused(call: Callable[[], object]) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        call()
    return caught.value


# --- formulas -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    trained=st.sampled_from(["".join(digits) for digits in itertools.product("01", repeat=3)][1:]),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    size=st.integers(1, 3),
    rank=st.integers(1, 3),
    width=st.integers(1, 5),
)
def test_query_key_value(
    tmp_path_factory: pytest.TempPathFactory,
    trained: str,
    groups: int,
    per_group: int,
    size: int,
    rank: int,
    width: int,
) -> None:
    """Every choice of the three, with any grouping of the heads."""
    place = tmp_path_factory.mktemp("qkv")
    sizes = (groups * per_group * size, groups * size, groups * size)
    hyper = {"lora_r": rank, "lora_alpha": ALPHA}
    hyper |= {f"lora_{part}": digit == "1" for part, digit in zip(("query", "key", "value"), trained, strict=True)}
    model = {"n_head": groups * per_group, "n_query_groups": groups, "head_size": size}
    state = packed(trained, sizes, rank, width)
    adapter = folder_of(place / "adapter", state, hyper, model)
    weight = values(sum(sizes), width)
    base = base_at(place / "base.safetensors", {f"{QKV}.weight": weight})
    loratool.merge(base, adapter, place / "merged.safetensors")
    got = load_file(place / "merged.safetensors")[f"{QKV}.weight"]
    assert_rounded(got, weight.double() + ALPHA / rank * dense(state, trained, sizes))


def test_every_layer(tmp_path: Path) -> None:
    """Linear layers, an expert and the gate of a mixture, the head; and a name with a prefix."""
    modules = [PROJ, "lm_head", "transformer.h.1.mlp.fc", "transformer.h.1.mlp.fc_1", "transformer.h.1.mlp.proj"]
    modules += ["transformer.h.2.mlp.gate", "transformer.h.2.mlp.experts.10.fc_2", "transformer.h.2.mlp.experts.2.proj"]
    base = {f"{module}.weight": values(5, 4, seed=number) for number, module in enumerate(modules)}
    state: State = {}
    for number, module in enumerate(modules):
        state |= factors(module, values(RANK, 4, seed=number), values(5, RANK, seed=number))
    adapter = folder_of(tmp_path / "adapter", state)
    place = base_at(tmp_path / "base.safetensors", base)
    loratool.merge(place, adapter, tmp_path / "merged.safetensors")
    got = load_file(tmp_path / "merged.safetensors")
    for module in modules:
        delta = SCALE * state[f"{module}.lora_B"].double() @ state[f"{module}.lora_A"].double()
        assert_rounded(got[f"{module}.weight"], base[f"{module}.weight"] + delta, name=module)


def test_wrapped_checkpoint(tmp_path: Path) -> None:
    """Every linear layer lies under `linear`, trained or not; a module of that name elsewhere stays."""
    base = base_state() | {
        "lm_head.bias": values(5),
        "transformer.wte.weight": values(5, 8),
        "other.linear.weight": values(2),
    }
    wrapped = {
        name.replace(".weight", ".linear.weight").replace("head.bias", "head.linear.bias")
        if name.startswith((QKV, PROJ, "lm_head"))
        else name: value
        for name, value in base.items()
    }
    path = folder_of(tmp_path / "run", wrapped | packed(), name="wrapped.pth")
    report = loratool.extract(path, tmp_path / "a.safetensors", base_out=tmp_path / "base")
    assert report.convention == "litgpt"
    assert set(report.adapter.base.tensors) == {f"{QKV}.weight"}
    got = read(tmp_path / "base")
    assert_same_bits(got, base)
    assert [item.target.rows for item in report.adapter.updates] == [(0, 12), (18, 24)]
    loratool.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged")
    exact = base[f"{QKV}.weight"].double() + SCALE * dense(packed(), "101")
    assert_rounded(read(tmp_path / "merged")[f"{QKV}.weight"], exact)


def test_base_names_beside_factors(tmp_path: Path) -> None:
    """What litgpt's merge has in memory: the base's own names and the factors in one dict."""
    path = folder_of(tmp_path / "run", base_state() | packed(), name="all.pth")
    loratool.extract(path, tmp_path / "a.safetensors", base_out=tmp_path / "base")
    assert_same_bits(read(tmp_path / "base"), base_state())


def test_inspect(tmp_path: Path, cli: Cli) -> None:
    document = cli("inspect", folder_of(tmp_path / "run", packed() | proj()), "--json").json
    assert (document["convention"], document["what"], document["notes"]) == ("litgpt", "adapter", [])
    layers = [(x["target"], x["part"], x["rank"], x["alpha"], x["scale"], x["shape"]) for x in document["layers"]]
    assert layers == [
        (f"{PROJ}.weight", "", 2, 6, 3, [8, 12]),
        (f"{QKV}.weight", "rows 0:12", 2, 6, 3, [24, 8]),
        (f"{QKV}.weight", "rows 18:24", 2, 6, 3, [24, 8]),
    ]


def test_folder_with_the_adapter_alone_is_opened(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "run", packed())
    assert choose(open_checkpoint(path.parent)).NAME == "litgpt"
    torch.save(base_state(), path.parent / "lit_model.pth")
    assert refused(lambda: open_checkpoint(path.parent)).code == "E-AMBIGUOUS"


# --- what the side files and shapes say ---------------------------------------------------------


def test_without_hyperparameters(tmp_path: Path) -> None:
    """Shapes may say which were trained; alpha they never do."""
    path = folder_of(tmp_path / "q", packed("100"), hyper=None)
    [item] = loratool.load(path, alpha=ALPHA).updates
    assert item.target.rows == (0, 12)
    error = refused(lambda: loratool.save(loratool.load(path), tmp_path / "x.safetensors"))
    assert error.code == "E-ALPHA"
    error = refused(lambda: loratool.load(path, alpha=1, scaling="alpha"))
    assert "always alpha/rank" in error.message
    path = folder_of(tmp_path / "kv", packed("011"), hyper=None)
    assert [item.target.rows for item in loratool.load(path, alpha=ALPHA).updates] == [(12, 18), (18, 24)]
    path = folder_of(tmp_path / "qv", packed("101"), hyper=None)
    [doubt] = loratool.load(path, alpha=ALPHA).doubts
    assert "--enable-lora 110 or 101" in doubt
    for digits, rows in (("110", (12, 18)), ("101", (18, 24))):
        loaded = loratool.load(path, alpha=ALPHA, enable_lora=digits)
        assert loaded.doubts == ()
        assert [item.target.rows for item in loaded.updates] == [(0, 12), rows]
    error = refused(lambda: loratool.load(path, alpha=ALPHA, enable_lora="111"))
    assert "--enable-lora says 111" in error.message


def test_extract_asks_for_alpha_alone(tmp_path: Path, cli: Cli) -> None:
    path = folder_of(tmp_path / "run", base_state() | packed("100"), hyper=None, name="all.pth")
    result = cli("extract", path, "-o", tmp_path / "a.safetensors")
    assert result.code == 2
    assert "error[E-ALPHA]" in result.err
    assert "always alpha/rank" in result.err
    assert cli("extract", path, "-o", tmp_path / "a.safetensors", "--alpha", 6).code == 0


def test_without_model_config(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "run", packed(), model=None)
    loaded = loratool.load(path)
    assert "put model_config.yaml of the base beside the file" in loaded.doubts[0]
    base = base_at(tmp_path / "base.safetensors", base_state())
    error = refused(lambda: loratool.merge(base, path, tmp_path / "out.safetensors"))
    assert "model_config.yaml" in error.message
    assert loratool.load(folder_of(tmp_path / "proj", proj(), model=None)).doubts == ()


def test_an_alpha_beside_the_files_own_is_refused(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "run", packed())
    for alpha in (ALPHA, ALPHA + 1):
        error = refused(lambda alpha=alpha: loratool.load(path, alpha=alpha))  # type: ignore[misc]
        assert error.code == "E-OPTION"
        assert "lora_alpha of hyperparameters.yaml" in error.message


WRONG = {
    "rank of another adapter": ({"lora_r": 4}, {}, "E-RANK", "lora_r is 4, the factors have rank 2"),
    "alpha missing": ({"lora_alpha": None}, {}, "E-CONFIG", "lora_alpha is 'null', not a number"),
    "flag missing": ({"lora_key": ...}, {}, "E-CONFIG", "there is no lora_key"),
    "flag is no flag": ({"lora_key": "maybe"}, {}, "E-CONFIG", "not true or false"),
    "other parts trained": ({"lora_key": True}, {}, "E-SHAPE", "hyperparameters.yaml says 111"),
    "head size missing": ({}, {"head_size": ...}, "E-CONFIG", "there is no head_size"),
    "heads of no number": ({}, {"n_head": 0}, "E-CONFIG", "n_head is '0', not a positive whole number"),
    "other heads": ({}, {"n_head": 5}, "E-SHAPE", "hyperparameters.yaml says 101"),
}


@pytest.mark.parametrize("name", WRONG)
def test_side_files_that_are_wrong(tmp_path: Path, name: str) -> None:
    hyper, model, code, message = WRONG[name]
    files = [
        {key: value for key, value in (right | wrong).items() if value is not ...}
        for right, wrong in ((HYPER, hyper), (MODEL, model))
    ]
    path = folder_of(tmp_path / "run", packed(), *files)
    error = refused(lambda: loratool.load(path))
    assert error.code == code
    assert message in error.message


def test_flat_yaml(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        '# head\na: 4  # four\n"b": true\nnested:\n  a: 5\n- item\nf: 1.5e1\nempty:\nurl: http://x:1/#y\n...\n'
    )
    found = read_flat_yaml(path)
    assert found is not None
    assert (found.whole("a"), found.flag("b"), found.number("f")) == (4, True, 15.0)
    assert found.lines["nested"] == found.lines["empty"] == ""
    assert found.lines["url"] == "http://x:1/#y"
    for call in (lambda: found.whole("f"), lambda: found.whole("nested"), lambda: found.number("b")):
        assert refused(call).code == "E-CONFIG"
    path.write_text("a: 1\na: 2\n")
    assert "a is in it twice" in refused(lambda: read_flat_yaml(path)).message
    path.write_bytes(b"a: \xff\n")
    assert "not UTF-8" in refused(lambda: read_flat_yaml(path)).message
    path.write_bytes(b"a" * 1_000_001)
    assert refused(lambda: read_flat_yaml(path)).code == "E-LIMIT"
    assert read_flat_yaml(tmp_path / "none.yaml") is None


# --- refusals -----------------------------------------------------------------------------------


def test_the_old_interleaved_layout(tmp_path: Path) -> None:
    old = {name.replace("attn.qkv", "attn.attn"): value for name, value in packed().items()}
    error = refused(lambda: loratool.load(folder_of(tmp_path / "old", old)))
    assert error.code == "E-UNSUPPORTED"
    assert "attn.attn interleaves" in error.message
    base = base_at(tmp_path / "base.safetensors", {"transformer.h.0.attn.attn.weight": values(24, 8)})
    new = folder_of(tmp_path / "new", packed())
    error = refused(lambda: loratool.merge(base, new, tmp_path / "out.safetensors"))
    assert error.code == "E-UNSUPPORTED"
    assert "the interleaved layout of an old litgpt" in error.message


def test_broken_pairs_are_all_reported(tmp_path: Path) -> None:
    state = {f"{PROJ}.lora_A": values(2, 3), "lm_head.lora_B": values(3, 2)} | factors(QKV, values(3, 4), values(4, 2))
    error = refused(lambda: loratool.load(folder_of(tmp_path / "a", state)))
    assert sorted(problem.code for problem in error.problems) == ["E-COMPONENTS", "E-COMPONENTS", "E-SHAPE"]
    state = factors(PROJ, values(2 * RANK, 12), values(WIDTH, RANK)) | packed("110", (12, 7, 6))
    error = refused(lambda: loratool.load(folder_of(tmp_path / "b", state)))
    assert [problem.where for problem in error.problems] == [PROJ, QKV]
    assert "only attn.qkv is packed" in error.message
    state = packed("100", (11, 6, 6))
    error = refused(lambda: loratool.load(folder_of(tmp_path / "c", state, hyper=None), alpha=1))
    assert "fit no choice of [12, 6, 6] rows" in error.message


def test_unused_tensors_are_refused(tmp_path: Path) -> None:
    state = packed() | {"transformer.ln_f.weight": values(8)}
    error = refused(lambda: loratool.load(folder_of(tmp_path / "a", state)))
    assert error.code == "E-COMPONENTS"
    assert f"but not that of {QKV}" in error.message
    state = packed() | base_state() | {f"{PROJ}.linear.weight": values(8, 12)}
    error = refused(lambda: loratool.load(folder_of(tmp_path / "b", state)))
    assert error.code == "E-NAMES"
    index = {f"{QKV}.lora_ind": torch.arange(18), f"{QKV}._lora_ind": torch.arange(18)}
    assert len(loratool.load(folder_of(tmp_path / "c", packed() | index)).updates) == 2


def test_another_base(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "run", packed())
    other = base_at(tmp_path / "a.safetensors", {f"{QKV}.weight": values(30, 8)})
    error = refused(lambda: loratool.merge(other, path, tmp_path / "out.safetensors"))
    assert error.code == "E-SHAPE"
    assert "is [30, 8]" in error.message
    assert "model_config.yaml and the factors make it [24, 8]" in error.message
    other = base_at(tmp_path / "b.safetensors", {"transformer.h.0.attn.qkx.weight": values(24, 8)})
    assert refused(lambda: loratool.merge(other, path, tmp_path / "out.safetensors")).code == "E-TARGET"
    assert not (tmp_path / "out.safetensors").exists()


def test_options_that_mean_nothing(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "run", packed())
    for options in ({"already_merged": True}, {"layout": {"*": "in_out"}}, {"adapter": "x"}):
        assert "means nothing" in refused(lambda options=options: loratool.load(path, **options)).message  # type: ignore[misc]


# --- detection ----------------------------------------------------------------------------------


def test_own_files_are_litgpt_alone(tmp_path: Path) -> None:
    for number, state in enumerate((packed(), proj(), factors("lm_head", values(2, 3), values(4, 2)))):
        for name in ("lit_model.pth.lora", "any.pt"):
            source = open_checkpoint(folder_of(tmp_path / f"{number}{name}", state, name=name))
            assert [convention.NAME for convention in matching(source)] == ["litgpt"]


FOREIGN = {
    "a plain litgpt checkpoint": base_state(),
    "loralib on GPT-2": factors("transformer.h.0.attn.c_attn", values(4, 8), values(16, 2)),
    "another wrapper": {"l.lora_A": values(2, 3), "l.lora_B": values(4, 2), "l.linear.weight": values(4, 3)},
    "plain": {"l.linear.weight": values(4, 3), "l.lora.A": values(3, 2), "l.lora.B": values(2, 4)},
    "PEFT": {
        f"base_model.model.{PROJ}.lora_A.weight": values(2, 3),
        f"base_model.model.{PROJ}.lora_B.weight": values(4, 2),
    },
    "PEFT-wrapped": {f"{PROJ}.lora_A.default.weight": values(2, 3), f"{PROJ}.lora_B.default.weight": values(4, 2)},
    "mlx": {f"{PROJ}.lora_a": values(3, 2), f"{PROJ}.lora_b": values(2, 4)},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_not_litgpt(tmp_path: Path, name: str) -> None:
    source = open_checkpoint(folder_of(tmp_path / "a", FOREIGN[name], name="a.pt"))
    assert "litgpt" not in [convention.NAME for convention in matching(source)]

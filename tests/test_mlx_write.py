"""What is written for mlx-lm, without mlx-lm: round trips, the files' exact content, and what does not fit.

test_mlx_peer.py loads the same layouts with mlx-lm.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from hypothesis import assume, given
from models import State, edit_json, gpt_oss, mixtral, read, save_base
from safetensors.torch import load_file, save_file
from strategies import Case, Maker, cases, make_update, tensors_of
from torch import Tensor
from writer_cases import said

import loratool
from loratool import Adapter, Target, Targeted
from loratool.adapter import BaseIdentity
from loratool.conventions.mlx_names import keys_and_layers

Q, V = (Target(f"model.layers.0.self_attn.{name}_proj.weight", (6, 4)) for name in "qv")
LATER = Target("model.layers.1.self_attn.q_proj.weight", (6, 4))
TABLE = Target("model.embed_tokens.weight", (7, 4), layout="embedding")
STACK = Target("model.layers.0.mlp.switch_mlp.up_proj.weight", (3, 5, 4))
NORM = Target("model.norm.weight", (4,))


def item(target: Target, form: str = "lora", *, seed: int = 1, dtype: str = "F32", **options: Any) -> Targeted:
    return Targeted(target, make_update(form, target.region, Maker(seed, dtype, target.experts), **options))


def written(folder: Path, *items: Targeted, **options: Any) -> tuple[State, dict[str, Any], loratool.ConvertReport]:
    report = loratool.convert(Adapter(items), folder / "mlx", "mlx", **options)
    assert {file.name for file in report.files} == {"adapter_config.json", "adapters.safetensors"}
    config = json.loads((folder / "mlx" / "adapter_config.json").read_text())
    return load_file(folder / "mlx" / "adapters.safetensors"), config, report


def saved(
    folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, kind: str = "mlx"
) -> Path:
    folder.mkdir()
    save_file(dict(state), folder / "model.safetensors", metadata={"format": kind})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def base_of(*targets: Target) -> State:
    return {target.name: torch.ones(target.shape) for target in targets}


# -- round trips ------------------------------------------------------------------------------------------------------


def test_one_rank_and_scale_are_written_as_they_are(tmp_path: Path) -> None:
    """The factors' own bits and dtypes, turned as MLX has them, and the scale to its last bit."""
    same = {"rank": 3, "rule": "none", "alpha": 0.1}  # 0.1 is alpha / 3 for no alpha
    items = [
        item(Q, dtype="BF16", **same),
        item(TABLE, dtype="F16", **same),
        item(replace(STACK, experts=3), seed=2, **same),
    ]
    state, config, report = written(tmp_path, *items)
    linear, table, stack = (entry.update.components() for entry in items)
    want = {
        "model.layers.0.self_attn.q_proj.lora_a": linear["A"].read().T,
        "model.layers.0.self_attn.q_proj.lora_b": linear["B"].read().T,
        "model.embed_tokens.lora_a": table["B"].read(),
        "model.embed_tokens.lora_b": table["A"].read(),
        "model.layers.0.mlp.switch_mlp.up_proj.lora_a": stack["A"].read(),
        "model.layers.0.mlp.switch_mlp.up_proj.lora_b": stack["B"].read(),
    }
    assert state.keys() == want.keys()
    for name, value in want.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value)
    keys = sorted(entry.target.name.removesuffix(".weight") for entry in items)
    assert config == {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 3, "scale": 0.1, "dropout": 0.0, "keys": keys},
        "model": "",
        "num_layers": -1,
    }
    assert said(report) == ()
    back = {entry.target: entry.update for entry in loratool.load(tmp_path / "mlx").updates}
    assert {*back} == {entry.target for entry in items}
    for entry in items:
        assert back[entry.target].scaling is not None
        assert back[entry.target].scaling.scale == 0.1  # type: ignore[union-attr]
        for part, ref in entry.update.components().items():
            assert torch.equal(back[entry.target].components()[part].read(), ref.read())


def test_an_embedding_is_one_by_its_name_too(tmp_path: Path) -> None:
    """Some conventions do not tell embeddings from Linear layers; MLX's wrapper has other shapes."""
    state, _, _ = written(tmp_path, item(replace(TABLE, layout="")))
    assert state["model.embed_tokens.lora_a"].shape == (7, 2)
    assert state["model.embed_tokens.lora_b"].shape == (2, 4)


def test_dora(tmp_path: Path) -> None:
    items = [item(Q, "dora0-lora"), item(TABLE, "dora0-lora", seed=2)]
    state, config, _ = written(tmp_path, *items)
    assert config["fine_tune_type"] == "dora"
    for entry, name in zip(items, ("layers.0.self_attn.q_proj", "embed_tokens"), strict=True):
        assert torch.equal(state[f"model.{name}.m"], entry.update.components()["magnitude"].read())
    assert state["model.embed_tokens.m"].shape == (7,)  # one for each token
    assert {entry.update.kind for entry in loratool.load(tmp_path / "mlx").updates} == {"dora"}


def test_whole_tensors_are_a_full_fine_tune(tmp_path: Path) -> None:
    items = [item(NORM, "replace", dtype="BF16"), item(STACK, "replace"), item(Q, "replace")]
    state, config, report = written(tmp_path, *items)
    assert config == {"fine_tune_type": "full", "model": "", "num_layers": -1}
    for entry in items:
        assert torch.equal(state[entry.target.name], entry.update.components()["value"].read())
    assert said(report) == ()
    back = loratool.load(tmp_path / "mlx")
    assert {(entry.target, entry.update.kind) for entry in back.updates} == {(e.target, "replace") for e in items}
    again = loratool.convert(tmp_path / "mlx", tmp_path / "again", "mlx")
    assert [file.read_bytes() for file in again.files] == [file.read_bytes() for file in report.files]


def test_what_mlx_wrote_is_written_again(tmp_path: Path) -> None:
    """Its own names, kinds and scale; a base that is named in it stays named."""
    adapter = Adapter((item(Q), item(TABLE), item(replace(STACK, experts=3))), BaseIdentity("org/model"))
    loratool.convert(adapter, tmp_path / "one", "mlx")
    loratool.convert(tmp_path / "one", tmp_path / "two", "mlx")
    for file in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["model"] == "org/model"


# -- what is folded ---------------------------------------------------------------------------------------------------


def merged(base: Path, adapter: Path | Adapter) -> State:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out" if base.is_dir() else "out.safetensors")
        loratool.merge(base, adapter, out)
        return tensors_of(out)


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        bound = 2.0**-20 * float(value.double().abs().max() + 1) if value.numel() else 0.0
        assert value.numel() == 0 or float((got[name].double() - value.double()).abs().max()) <= bound, name


def test_ranks_and_scales_become_one(tmp_path: Path) -> None:
    items = [item(Q, rank=2, alpha=4.0), item(V, rank=2, alpha=4.0, seed=2), item(LATER, rank=3, alpha=12.0, seed=3)]
    state, config, report = written(tmp_path, *items)
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (3, 2.0)
    assert {value.shape[1 if name.endswith("a") else 0] for name, value in state.items()} == {3}
    assert any("one rank, 3, and one scale, 2: B of 1 updates was scaled, exactly" in note for note in report.notes)
    base = saved(tmp_path / "base", base_of(Q, V, LATER))
    assert_same(merged(base, tmp_path / "mlx"), merged(base, Adapter(tuple(items))))


def test_parts_become_wholes(tmp_path: Path) -> None:
    items = [
        item(replace(Q, rows=(1, 3))),
        item(Q, rank=1, seed=2),
        item(replace(STACK, expert=0), seed=3),
        item(replace(STACK, expert=2, rows=(2, 4)), rank=3, alpha=5.0, seed=4),
    ]
    state, _, report = written(tmp_path, *items)
    assert state["model.layers.0.mlp.switch_mlp.up_proj.lora_a"].shape == (3, 3, 4)
    assert not state["model.layers.0.mlp.switch_mlp.up_proj.lora_b"][1].any()
    assert any(note.startswith("1 tensors had several LoRAs") for note in report.notes)
    assert any("in 1 stacks; an expert without one has zeros" in note for note in report.notes)
    base = saved(tmp_path / "base", base_of(Q, STACK))
    assert_same(merged(base, tmp_path / "mlx"), merged(base, Adapter(tuple(items))))


def test_float64_is_rounded_once(tmp_path: Path) -> None:
    entry = item(Q, dtype="F64")
    state, _, report = written(tmp_path, entry)
    assert torch.equal(state[f"{Q.name[:-7]}.lora_a"], entry.update.components()["A"].read().float().T)
    assert said(report) == ("2 float64 tensors are rounded to float32: mlx-lm loads no larger floats",)


def of_layers(case: Case) -> tuple[Adapter, State]:
    """The case with names of layers, and every matrix as MLX stores it."""
    items = [
        replace(entry, target=replace(entry.target, name=entry.target.name.replace(".weight", ".fc.weight"), layout=""))
        for entry in case.adapter.updates
    ]
    return Adapter(tuple(items)), {name.replace(".weight", ".fc.weight"): value for name, value in case.base.items()}


@given(cases(base_dtypes=("F32",)))
def test_whatever_is_in_it_arrives(case: Case) -> None:
    """mlx-lm holds an adapter, or holds it baked; the merged model is the same."""
    adapter, state = of_layers(case)
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder, "base.safetensors"), Path(folder, "out")
        save_file(state, base)
        try:
            loratool.convert(adapter, out, "mlx", base=base)
        except loratool.Unsupported:
            assert loratool.convert(adapter, out, "mlx", base=base, bake=True).baked
        assert_same(merged(base, out), merged(base, adapter))


@given(cases(("lora", "lora-mid"), base_dtypes=("F32",)))
def test_mlx_holds_every_lora_of_matrices(case: Case) -> None:
    """Of ranges of rows, of single experts, several of one tensor: nothing is refused, with a base or without."""
    adapter, state = of_layers(case)
    adapter = replace(adapter, updates=tuple(item for item in adapter.updates if len(item.target.matrix) == 2))
    assume(adapter.updates)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base.safetensors")
        save_file(state, base)
        loratool.convert(adapter, Path(folder, "one"), "mlx", base=base)
        loratool.convert(adapter, Path(folder, "two"), "mlx")
        want = merged(base, adapter)
        assert_same(merged(base, Path(folder, "one")), want)
        assert_same(merged(base, Path(folder, "two")), want)


# -- keys -------------------------------------------------------------------------------------------------------------

BOTH = ["model.layers.0.q", "model.layers.0.v", "model.layers.1.q", "model.layers.1.v", "model.embed", "head"]
KEYS: dict[str, tuple[list[str], list[str], tuple[list[str], int]]] = {
    "all layers": (BOTH[:4], BOTH, (["q", "v"], 2)),
    "the last": (BOTH[2:3], BOTH, (["q"], 1)),
    "the first": (BOTH[:1], BOTH, (BOTH[:1], -1)),
    "one is not in all": (BOTH[:3], BOTH, (BOTH[:3], -1)),
    "one that not all have": (BOTH[:3], [*BOTH[:3], "head"], (["q", "v"], 2)),
    "beside the layers": (["head", *BOTH[2:4]], BOTH, (["head", "q", "v"], 1)),
    "none in a layer": (["head"], BOTH, (["head"], -1)),
    "a layer has the name of one beside": (["q", *BOTH[2:3]], [*BOTH, "q"], (["q"], 1)),
    "a layer has the name of one beside it": (["v", *BOTH[2:3]], [*BOTH, "v"], (["model.layers.1.q", "v"], -1)),
    "two stacks": (BOTH[2:3], [*BOTH, "vision.layers.0.q"], (BOTH[2:3], -1)),
    "no base": (BOTH[:4], [], (BOTH[:4], -1)),
    "ten layers": ([f"layers.{n}.q" for n in range(2, 11)], [f"layers.{n}.q" for n in range(11)], (["q"], 9)),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_hit_the_adapted_modules_and_no_others(case: str) -> None:
    modules, known, want = KEYS[case]
    assert keys_and_layers(modules, [f"{name}.weight" for name in known]) == want


def test_keys_are_those_of_a_layer_where_the_base_shows_its_layers(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", base_of(Q, V, LATER))
    _, config, _ = written(tmp_path, item(LATER), base=base)
    assert config["num_layers"] == 1
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj"]
    assert config["model"] == ""  # a path of this machine means nothing elsewhere


# -- experts of transformers ------------------------------------------------------------------------------------------


def experts_of(base: Path, *endings: str, form: str = "lora") -> Adapter:
    found = {name: value for name, value in read(base).items() if name.endswith(endings)}
    assert found
    items = []
    for seed, (name, value) in enumerate(found.items()):
        shape = tuple(value.shape)
        target = Target(name, shape, experts=shape[0] if len(shape) == 3 else None)
        target = replace(target, layout="in_out" if len(shape) == 3 else "")
        items.append(Targeted(target, make_update(form, target.region, Maker(seed, experts=target.experts))))
    return Adapter(tuple(items))


@pytest.mark.parametrize(
    ("make", "endings", "want"),
    [
        (mixtral, ("experts.0.w1.weight", "experts.2.w1.weight", "w2.weight", "gate.weight"), 3),
        (gpt_oss, ("experts.gate_up_proj", "experts.down_proj"), 3),
    ],
)
def test_experts_are_stacked_as_mlx_has_them(make: Any, endings: tuple[str, ...], want: int, tmp_path: Path) -> None:
    base = save_base(make(), tmp_path / "base")
    adapter = experts_of(base, *endings)
    report = loratool.convert(adapter, tmp_path / "mlx", "mlx", base=base)
    assert report.adapter.targets().keys() == adapter.targets().keys()
    state = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert len(state) == 2 * want
    assert sum(value.dim() == 3 for value in state.values()) == 2 * (3 if make is gpt_oss else 2)
    assert not any("experts.0" in name for name in state)
    assert_same(merged(base, tmp_path / "mlx"), merged(base, adapter))
    keys = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert {f"model.layers.0.{key}" for key in keys} == {name[:-7] for name in state}


def test_experts_of_a_model_that_no_map_lists_are_refused(tmp_path: Path) -> None:
    """mlx-lm has those of dots1 under other names than those of Qwen, though transformers has them under the same."""
    base = save_base(mixtral(), tmp_path / "base")
    adapter = experts_of(base, "w1.weight")
    edit_json(base / "config.json", model_type="dots1")
    with pytest.raises(loratool.Unsupported, match="stacks the experts"):
        loratool.convert(adapter, tmp_path / "mlx", "mlx", base=base)


def test_baked_experts_are_whole_stacks(tmp_path: Path) -> None:
    base = save_base(mixtral(), tmp_path / "base")
    adapter = experts_of(base, "experts.1.w3.weight", "q_proj.weight", form="loha")
    report = loratool.convert(adapter, tmp_path / "mlx", "mlx", base=base, bake=True)
    assert len(report.baked) == 2
    state = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert sorted(state) == [
        "model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight",
    ]  # fmt: skip
    assert_same(merged(base, tmp_path / "mlx"), merged(base, adapter))


def test_baked_experts_that_can_not_go_back_are_refused(tmp_path: Path) -> None:
    """gate and up lie in turn in gpt-oss's tensor: a new gate alone is no part of it that a merge replaces."""
    base = save_base(gpt_oss(), tmp_path / "base")
    adapter = experts_of(base, "experts.gate_up_proj", form="loha")
    with pytest.raises(loratool.Unsupported, match="other tensors, and they can not be moved"):
        loratool.convert(adapter, tmp_path / "mlx", "mlx", base=base, bake=True)


# -- what does not fit ------------------------------------------------------------------------------------------------

EXPERT = Target("model.layers.0.mlp.experts.1.up_proj.weight", (5, 4))
PACKED = Target("model.layers.0.mlp.experts.gate_up_proj", (3, 10, 4), experts=3)
MISFITS: dict[str, tuple[list[Targeted], str, str]] = {
    "loha": ([item(Q, "loha")], "no loha update", "--bake"),
    "lokr": ([item(Q, "lokr")], "no lokr update", "--bake"),
    "a difference": ([item(NORM, "add")], "no add update", "--bake"),
    "rows": ([item(TABLE, "replace_rows")], "no replace_rows update", "--bake"),
    "dora on loha": ([item(Q, "dora0-loha")], "DoRA on LoRA only", "--bake"),
    "dora along columns": ([item(TABLE, "dora1-lora")], "norm along another axis", "--bake"),
    "dora of rows": ([item(replace(Q, rows=(0, 2)), "dora0-lora")], "DoRA of whole layers only", "--bake"),
    "dora of experts": ([item(replace(STACK, experts=3), "dora0-lora")], "DoRA of whole layers only", "--bake"),
    "lora and dora": ([item(Q), item(V), item(LATER, "dora0-lora")], "2 others are LoRA without a magnitude", "--bake"),
    "dora and lora": ([item(Q, "dora0-lora"), item(V, "dora0-lora"), item(LATER)], "2 others are DoRA", "--bake"),
    "lora beside a whole tensor": ([item(Q), item(NORM, "replace")], "model.norm.weight is one", "--bake"),
    "a whole expert": ([item(replace(STACK, expert=1), "replace")], "whole tensors only", "--bake"),
    "lora on a replacement": ([item(Q, "replace"), item(Q)], "whole tensors only, and once", "--bake"),
    "a convolution": ([item(Target("conv.weight", (4, 3, 2)))], "matrices and stacks", "--bake"),
    "a bare parameter": ([item(Target("model.table", (6, 4)))], "the weights of layers", "--bake"),
    "a parameter of the model": ([item(Target("weight", (6, 4)))], "the weights of layers", "--bake"),
    "Conv1D": ([item(Target("h.0.c_attn.weight", (4, 6), layout="in_out"))], r"stores \[in, out\]", "mlx_lm.convert"),
    "a whole convolution": (
        [item(Target("mixer.conv1d.weight", (4, 1, 3)), "replace")], "input channels of a convolution last", "mlx_lm",
    ),
    "an expert without its base": ([item(EXPERT)], "stacks the experts", "--base BASE, its config.json"),
    "packed experts without their base": ([item(PACKED)], "stacks the experts", "--base BASE, its config.json"),
}  # fmt: skip


def test_a_router_keeps_its_name(tmp_path: Path) -> None:
    """Mixtral's in transformers has the name of Qwen's in MLX."""
    state, _, _ = written(tmp_path, item(Target("model.layers.0.mlp.gate.weight", (3, 4))))
    assert sorted(state) == ["model.layers.0.mlp.gate.lora_a", "model.layers.0.mlp.gate.lora_b"]


@pytest.mark.parametrize("case", MISFITS)
def test_what_mlx_can_not_hold(case: str, tmp_path: Path) -> None:
    items, message, hint = MISFITS[case]
    with pytest.raises(loratool.Unsupported, match=message) as caught:
        loratool.convert(Adapter(tuple(items)), tmp_path / "mlx", "mlx")
    assert hint in caught.value.hint
    assert not (tmp_path / "mlx").exists()


def test_all_misfits_are_named_at_once(tmp_path: Path) -> None:
    items = (item(Q, "loha"), item(V), item(TABLE, "dora1-lora"), item(NORM, "replace"))
    with pytest.raises(loratool.Unsupported) as caught:
        loratool.convert(Adapter(items), tmp_path / "mlx", "mlx")
    text = str([problem.message for problem in caught.value.problems])
    assert all(entry.target.name in text for entry in items)


def test_what_does_not_fit_can_be_baked_all_of_it(tmp_path: Path) -> None:
    """One whole tensor makes it a full fine-tune, where there is no LoRA."""
    base = saved(tmp_path / "base", base_of(Q, V, TABLE))
    items = (item(Q, "loha"), item(V), item(TABLE))
    report = loratool.convert(Adapter(items), tmp_path / "mlx", "mlx", base=base, bake=True)
    assert {*report.baked} == {Q.name, V.name, TABLE.name}
    assert_same(merged(base, tmp_path / "mlx"), merged(base, Adapter(items)))


@pytest.mark.parametrize(
    ("entry", "config", "message"),
    [
        (item(NORM, "replace"), {"text_config": {"model_type": "qwen3_next"}}, r"weight \+ 1"),
        (item(Target("model.new.weight", (4,)), "replace"), {}, "that the base lacks"),
        (item(Target(Q.name, (8, 4)), "replace"), {}, "in another shape"),
    ],
)
def test_what_does_not_fit_the_base(entry: Targeted, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", base_of(NORM, Q, EXPERT), config)
    with pytest.raises(loratool.Unsupported, match=message):
        loratool.convert(Adapter((entry,)), tmp_path / "mlx", "mlx", base=base, bake=True)
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(("kind", "count"), [("pt", 1), ("mlx", 0)])
def test_names_that_mlx_may_not_have_are_noted(kind: str, count: int, tmp_path: Path) -> None:
    target = Target("model.language_model.layers.0.q_proj.weight", (6, 4))
    base = saved(tmp_path / "base", base_of(target), kind=kind)
    _, _, report = written(tmp_path, item(target), base=base)
    assert sum("model.language_model." in note and "mlx_lm.convert" in note for note in report.notes) == count


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    loratool.save(Adapter((item(Q, rank=2), item(V, rank=3))), tmp_path / "a.lora.safetensors")
    result = cli("convert", tmp_path / "a.lora.safetensors", "--to", "mlx", "-o", tmp_path / "mlx", "--json")
    assert result.code == 0
    assert (result.json["convention"], result.json["to"], result.json["updates"]) == ("native", "mlx", 2)
    assert any("one rank, 3" in note for note in result.json["notes"])
    assert cli("inspect", tmp_path / "mlx", "--json").json["convention"] == "mlx"
    refused = cli("convert", tmp_path / "a.lora.safetensors", "--to", "mlx", "-o", tmp_path / "x", "--uniform")
    assert refused.code == 2
    assert "--uniform means nothing to mlx" in refused.err

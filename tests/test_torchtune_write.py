"""What is written for torchtune: its names and its order of rows, one rank and scale, and refusals by name.

That torchtune itself loads and merges it is test_torchtune_peer.py's part. Here its merge is done by hand.
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
from models import State, assert_rounded, assert_same_bits, read
from safetensors.torch import save_file
from strategies import Case, Maker, base_for, cases, make_update, tensors_of
from test_convert import adapter_of, components, lora, refused, update_of
from test_torchtune import (
    ALPHA,
    HEAD_DIM,
    INNER,
    MODEL_TYPES,
    RANK,
    WIDTH,
    all_modules,
    base_state,
    factors,
    in_transformers,
    merged,
    save_adapter,
    save_transformers,
    values,
)
from torch import Tensor
from writer_cases import said

import loratool
from loratool import Adapter, Target, Targeted

FILES = {"adapter_config.json", "adapter_model.pt"}


def written(folder: Path) -> State:
    assert {path.name for path in folder.iterdir()} == FILES
    state = torch.load(folder / "adapter_model.pt", weights_only=True)
    assert isinstance(state, dict)
    return state


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config, dict)
    return config


def by_hand(state: Mapping[str, Tensor], folder: Path) -> State:
    """torchtune's merge of what was written, in float64."""
    config, adapter = config_of(folder), written(folder)
    assert {value.shape[0] for name, value in adapter.items() if name.endswith("lora_a.weight")} == {config["r"]}
    return merged(state, adapter, config["lora_alpha"])


def on_transformers(base: State, model_type: str, dora: bool, **scale: Any) -> Adapter:
    """An adapter of every matrix of a base with transformers' names, as PEFT trains it: one update per tensor."""
    names = [name for name in base if name.endswith(("_proj.weight", "lm_head.weight"))]
    assert len(names) == (9 if model_type == "phi3" else 15)
    form = "dora0-lora" if dora else "lora"
    updates = [make_update(form, tuple(base[name].shape), Maker(n), RANK, **scale) for n, name in enumerate(names)]
    return Adapter(tuple(Targeted(Target(n, tuple(base[n].shape)), u) for n, u in zip(names, updates, strict=True)))


# -- names and rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_its_own_file_comes_out_as_it_went_in(dora: bool, with_base: bool, tmp_path: Path) -> None:
    state = base_state()
    adapter = factors(state, *all_modules(), dora=dora)
    adapter = {name: value.bfloat16() if "w1" in name else value for name, value in adapter.items()}
    torch.save(state, tmp_path / "base.pt")
    file = save_adapter(adapter, tmp_path / "epoch_0", base_model_name_or_path="some/base")
    base = tmp_path / "base.pt" if with_base else None
    report = loratool.convert(file, tmp_path / "out", "torchtune", base=base)
    assert said(report) == ()
    assert_same_bits(written(tmp_path / "out"), adapter)
    assert config_of(tmp_path / "out") == {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"],
        "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
    }


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_names_and_rows_come_back_from_a_transformers_base(model_type: str, dora: bool, tmp_path: Path) -> None:
    state = base_state()
    adapter = factors(state, *all_modules(), dora=dora)
    base = save_transformers(state, tmp_path / "base", model_type)
    loaded = loratool.load(save_adapter(adapter, tmp_path / "epoch_0"), base=base)
    loratool.convert(loaded, tmp_path / "out", "torchtune", base=base)
    assert_same_bits(written(tmp_path / "out"), adapter)
    again = loratool.load(tmp_path / "out", base=base)
    assert [item.target for item in again.updates] == [item.target for item in loaded.updates]
    assert str(components(again)) == str(components(loaded))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_adapter_of_a_transformers_base(model_type: str, dora: bool, tmp_path: Path) -> None:
    """B's rows and the magnitudes of q_proj and k_proj arrive in torchtune's order; phi3's matrices are taken apart."""
    state = base_state()
    before = in_transformers(state, model_type)
    base = save_transformers(state, tmp_path / "base", model_type)
    adapter = on_transformers(before, model_type, dora)
    loratool.merge(base, adapter, tmp_path / "want")
    report = loratool.convert(adapter, tmp_path / "out", "torchtune", base=base)
    assert any(model_type in note for note in report.notes)
    got, want = in_transformers(by_hand(state, tmp_path / "out"), model_type), read(tmp_path / "want")
    assert sum(not torch.equal(want[name], before[name]) for name in want) == len(adapter.updates)
    for name, value in want.items():
        assert_rounded(value, got[name], name=name)
    loratool.merge(base, tmp_path / "out", tmp_path / "back")
    assert_same_bits(read(tmp_path / "back"), read(tmp_path / "want"))


def test_a_part_of_a_stacked_matrix_is_padded_in_its_module(tmp_path: Path) -> None:
    """Rows 6:30 of phi3's [q; k; v] are the end of q and the start of k."""
    state = base_state(1)
    base = save_transformers(state, tmp_path / "base", "phi3")
    name, shape = "model.layers.0.self_attn.qkv_proj.weight", (8 * HEAD_DIM, WIDTH)
    adapter = adapter_of(x=[(Target(name, shape, (6, 30)), lora(shape=(24, WIDTH)))])
    adapter = Adapter(tuple(replace(item, target=replace(item.target, name=name)) for item in adapter.updates))
    loratool.convert(adapter, tmp_path / "out", "torchtune", base=base)
    got = written(tmp_path / "out")
    assert {key.split(".")[3] for key in got} == {"q_proj", "k_proj"}
    assert torch.equal(got["layers.0.attn.q_proj.lora_b.weight"][:6], torch.zeros(6, 2))
    loratool.merge(base, adapter, tmp_path / "want")
    loratool.merge(base, tmp_path / "out", tmp_path / "got")
    assert_same_bits(read(tmp_path / "got"), read(tmp_path / "want"))


def test_a_bare_model_s_names_are_found(tmp_path: Path) -> None:
    """A base without the prefix `model.`, as transformers saves its LlamaModel."""
    state = base_state(1)
    base = save_transformers(state, tmp_path / "base", "llama")
    bare = {name.removeprefix("model."): value for name, value in read(base).items()}
    save_file(bare, base / "model.safetensors")
    adapter = on_transformers(bare | {f"x{n}_proj.weight": values(1, 1) for n in range(7)}, "llama", False)
    adapter = Adapter(tuple(item for item in adapter.updates if item.target.name[0] != "x"))
    loratool.convert(adapter, tmp_path / "out", "torchtune", base=base)
    assert len(written(tmp_path / "out")) == 2 * 8
    loratool.merge(base, adapter, tmp_path / "want")
    loratool.merge(base, tmp_path / "out", tmp_path / "got")
    assert_same_bits(read(tmp_path / "got"), read(tmp_path / "want"))


# -- rank, scale, parts -----------------------------------------------------------------------------------------------


def test_one_rank_and_one_scale(tmp_path: Path) -> None:
    made = adapter_of(
        a__weight=lora(1, rank=2, alpha=4.0),
        b__weight=lora(2, rank=4, alpha=8.0, dtype="BF16"),
        c__weight=lora(3, rank=1, alpha=8.0),
        d__weight=[(Target("", (6, 4)), update_of("dora0-lora", alpha=1.0))],
    )
    state = base_for(made, 1, ["F32"])
    save_file(state, tmp_path / "base.safetensors")
    report = loratool.convert(made, tmp_path / "out", "torchtune")
    assert (config_of(tmp_path / "out")["r"], config_of(tmp_path / "out")["lora_alpha"]) == (4, 8)
    assert any(note.startswith("one rank, 4, and one scale, 2") and note.endswith("exactly") for note in report.notes)
    assert any("use_dora" in note and "3 (a.weight ...)" in note for note in report.notes)
    assert written(tmp_path / "out")["b.lora_b.weight"].dtype == torch.bfloat16
    loratool.merge(tmp_path / "base.safetensors", made, tmp_path / "want.safetensors")
    want, got = tensors_of(tmp_path / "want.safetensors"), by_hand(state, tmp_path / "out")
    for item in made.updates:
        assert_rounded(want[item.target.name], got[item.target.name], name=item.target.name)


@pytest.mark.parametrize(("rule", "alpha"), [("alpha/sqrt(rank)", 3.0), ("none", 0.1), ("alpha", -2.0)])
def test_any_rule_becomes_alpha_by_rank(rule: str, alpha: float, tmp_path: Path) -> None:
    made = adapter_of(
        a__weight=lora(1, rank=3, rule=rule, alpha=alpha), b__weight=lora(2, rank=3, rule=rule, alpha=alpha)
    )
    assert said(loratool.convert(made, tmp_path / "out", "torchtune")) == ()
    back = components(loratool.load(tmp_path / "out"))
    for name, (scaling, tensors) in components(made).items():
        assert back[name][0].scale == pytest.approx(scaling.scale, rel=1e-15)  # type: ignore[attr-defined]
        assert all(map(torch.equal, back[name][1], tensors))


def test_several_loras_of_one_tensor_become_one(tmp_path: Path) -> None:
    target = Target("", (6, 4))
    made = adapter_of(
        a__weight=[(target, lora(1)), (target, lora(2, rank=1)), (replace(target, rows=(1, 3)), lora(3, (2, 4)))]
    )
    state = base_for(made, 1, ["F32"])
    save_file(state, tmp_path / "base.safetensors")
    report = loratool.convert(made, tmp_path / "out", "torchtune")
    assert any("several LoRAs" in note for note in report.notes)
    loratool.merge(tmp_path / "base.safetensors", made, tmp_path / "want.safetensors")
    want, got = tensors_of(tmp_path / "want.safetensors"), by_hand(state, tmp_path / "out")
    assert_rounded(want["a.weight"], got["a.weight"])


def merge_experts(base: State, folder: Path, module: str) -> State:
    config, adapter, result = config_of(folder), written(folder), {k: v.double() for k, v in base.items()}
    for matrix in ("gate", "up", "down"):
        a, b = (adapter[f"{module}.lora_{matrix}_{part}"].double() for part in "ab")  # [E, in, rank], [E, rank, out]
        result[f"{module}.{matrix}_proj"] += config["lora_alpha"] / config["r"] * torch.bmm(a, b)
    return result


def test_experts(tmp_path: Path) -> None:
    """All at once, or one by one; the matrix without LoRA gets zeros, since torchtune's merge wants all three."""
    module, make = "layers.0.mlp.experts", Maker(5, "BF16", 3)
    base = {
        f"{module}.{m}_proj": values(3, *size) for m, size in {"gate": (5, 7), "up": (5, 7), "down": (7, 5)}.items()
    }
    up = Target(f"{module}.up_proj", (3, 5, 7), experts=3, layout="in_out")
    down = Target(f"{module}.down_proj", (3, 7, 5), expert=1, layout="in_out")
    made = Adapter((
        Targeted(up, make_update("lora", (5, 7), make, 2, alpha=4.0)),
        Targeted(down, lora(1, (7, 5), rank=2, alpha=4.0)),
        Targeted(replace(down, expert=2, rows=(2, 4)), lora(2, (2, 5), rank=1, alpha=1.0)),
    ))  # fmt: skip
    save_file(base, tmp_path / "base.safetensors")
    report = loratool.convert(made, tmp_path / "out", "torchtune")
    assert any(f"1 modules without LoRA ({module}.gate_proj ...) hold zeros" in note for note in report.notes)
    assert written(tmp_path / "out")[f"{module}.lora_up_a"].dtype == torch.bfloat16
    assert written(tmp_path / "out")[f"{module}.lora_gate_a"].shape == (3, 5, 2)
    assert config_of(tmp_path / "out")["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    loratool.merge(tmp_path / "base.safetensors", made, tmp_path / "want.safetensors")
    want, got = tensors_of(tmp_path / "want.safetensors"), merge_experts(base, tmp_path / "out", module)
    for name, value in want.items():
        assert_rounded(value, got[name], name=name)
    loratool.convert(tmp_path / "out", tmp_path / "again", "torchtune")
    assert_same_bits(written(tmp_path / "again"), written(tmp_path / "out"))


# -- what torchtune wants besides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["torchtune", "llama", "phi3"])
def test_layers_without_lora_hold_zeros_where_the_base_shows_them(names: str, tmp_path: Path) -> None:
    state = base_state(3)
    modules = ["layers.1.attn.q_proj", "layers.1.mlp.w2"]
    adapter = factors(state, *modules)
    file = save_adapter(adapter, tmp_path / "epoch_0")
    if names == "torchtune":
        base = tmp_path / "base.pt"
        torch.save(state, base)
    else:
        base = save_transformers(state, tmp_path / "base", names)
    report = loratool.convert(file, tmp_path / "out", "torchtune", base=base)
    assert any("10 modules without LoRA" in note for note in report.notes)
    got = written(tmp_path / "out")
    wanted = {f"layers.{n}.{part}" for n in range(3) for part in ("attn.q_proj", "mlp.w1", "mlp.w2", "mlp.w3")}
    assert {key.rpartition(".lora")[0] for key in got} == wanted
    for name, value in got.items():
        assert torch.equal(value, adapter[name]) if name in adapter else not value.any()
        module = state[name.rpartition(".lora")[0] + ".weight"]
        assert value.shape == ((RANK, module.shape[1]) if "lora_a" in name else (module.shape[0], RANK))


@pytest.mark.parametrize("dora", [False, True])
def test_layers_without_lora_are_named_where_they_can_not_be_filled(dora: bool, tmp_path: Path) -> None:
    state = base_state(3)
    torch.save(state, tmp_path / "base.pt")
    adapter = factors(state, "layers.0.attn.q_proj", "layers.2.attn.k_proj", dora=dora)
    file = save_adapter(adapter, tmp_path / "epoch_0")
    report = loratool.convert(file, tmp_path / "out", "torchtune", base=tmp_path / "base.pt" if dora else None)
    notes = [note for note in report.notes if "torchtune's recipes refuse it" in note]
    assert len(notes) == 1
    assert f"{4 if dora else 2} modules (layers.0.attn.k_proj.weight ...)" in notes[0]
    assert ("--base" in notes[0]) != dora
    assert_same_bits(written(tmp_path / "out"), adapter)


def test_a_bias_under_dora_is_warned_of(tmp_path: Path) -> None:
    """torchtune's forward multiplies it with the magnitude, which neither PEFT's nor its own merge does."""
    dora = [(Target("", (6, 4)), update_of("dora0-lora"))]
    made = adapter_of(q__weight=dora, k__weight=dora, v__weight=lora())
    state = base_for(made, 1, ["F32"])
    for biased in ("q", "v"):
        save_file(state | {f"{biased}.bias": values(6)}, tmp_path / f"{biased}.safetensors")
        report = loratool.convert(made, tmp_path / biased, "torchtune", base=tmp_path / f"{biased}.safetensors")
        assert any("bias of 1 DoRA layers (q.weight ...)" in note for note in report.notes) == (biased == "q")


# -- what does not fit ------------------------------------------------------------------------------------------------

WHOLE, ROWS = Target("", (6, 4)), Target("", (6, 4), rows=(0, 3))
STACK = Target("", (3, 6, 4), experts=3, layout="in_out")


def of_experts(form: str = "lora") -> Any:
    return make_update(form, (6, 4), Maker(1, "F32", 3))


MISFITS: dict[str, tuple[Adapter, str]] = {
    "loha": (adapter_of(b__weight=[(WHOLE, update_of("loha"))]), "LoRA and DoRA only"),
    "a whole tensor": (adapter_of(a__weight=lora(), b__weight=update_of("replace")), "LoRA and DoRA only"),
    "a difference": (adapter_of(a__weight=lora(), b__bias=update_of("add", (6,))), "LoRA and DoRA only"),
    "dora of loha": (adapter_of(b__weight=[(WHOLE, update_of("dora0-loha"))]), "not on loha"),
    "dora over the outputs": (adapter_of(b__weight=[(WHOLE, update_of("dora1-lora"))]), "over the inputs"),
    "dora of rows": (adapter_of(b__weight=[(ROWS, update_of("dora0-lora", (3, 4)))]), "some of their rows"),
    "dora of experts": (adapter_of(m__experts__up_proj=[(STACK, of_experts("dora0-lora"))]), "no DoRA of experts"),
    "an embedding": (adapter_of(b__weight=[(replace(WHOLE, layout="embedding"), lora())]), "no LoRA on embeddings"),
    "the other way round": (adapter_of(b__weight=[(replace(WHOLE, layout="in_out"), lora())]), "[out, in]"),
    "a convolution": (adapter_of(b__weight=lora(shape=(6, 4, 3))), "Linear layers only"),
    "a bare parameter": (adapter_of(b__kernel=lora()), "Linear layers only"),
    "the model itself": (adapter_of(weight=lora()), "Linear layers only"),
    "one linear expert": (adapter_of(m__experts__0__w1__weight=lora()), "all experts together"),
    "experts by another name": (adapter_of(m__experts__w1=[(STACK, of_experts())]), "its own experts"),
    "experts elsewhere": (adapter_of(m__mlp__up_proj=[(STACK, of_experts())]), "its own experts"),
    "experts the other way": (adapter_of(m__experts__up_proj=[(replace(STACK, layout=""), of_experts())]), "[in, out]"),
    "transformers' names": (adapter_of(model__layers__0__self_attn__v_proj__weight=lora()), "depends on the model"),
    "transformers' own": (adapter_of(model__layers__0__self_attn__kv_a_proj__weight=lora()), "depends on the model"),
    "transformers' head": (adapter_of(lm_head__weight=lora()), "depends on the model"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_torchtune_can_not_hold(case: str, tmp_path: Path) -> None:
    adapter, why = MISFITS[case]
    error = refused(adapter, tmp_path, "torchtune")
    assert isinstance(error, loratool.Unsupported)
    assert "torchtune can not hold the " in error.message
    assert why in error.message
    assert ("--base BASE" if "transformers" in case else "loratool merge") in error.hint
    assert "--bake" not in error.hint


def test_all_misfits_are_named_at_once(tmp_path: Path) -> None:
    made = adapter_of(
        b__weight=[(WHOLE, update_of("loha"))], c__kernel=lora(), model__layers__0__mlp__up_proj__weight=lora()
    )
    assert len(refused(made, tmp_path, "torchtune").problems) == 3


def test_baking_does_not_help(tmp_path: Path) -> None:
    made = adapter_of(b__weight=[(WHOLE, update_of("loha"))])
    save_file(base_for(made, 1, ["F32"]), tmp_path / "base.safetensors")
    error = refused(made, tmp_path, "torchtune", base=tmp_path / "base.safetensors", bake=True)
    assert "LoRA and DoRA only" in error.message


def a_base(tmp_path: Path, model_type: str = "llama", more: State | None = None, **config: Any) -> Path:
    base = save_transformers(base_state(1), tmp_path / "base", model_type, **config)
    save_file(read(base) | (more or {}), base / "model.safetensors")
    return base


@pytest.mark.parametrize(
    ("name", "model_type", "config", "why"),
    [
        ("model.layers.0.self_attn.v_proj.weight", "t5", {}, "'t5' are not mapped"),
        ("model.layers.0.self_attn.q_proj.weight", "llama", {"head_dim": 8}, "4 heads of 8"),
        ("model.layers.0.self_attn.qkv_proj.weight", "phi3", {"num_key_value_heads": 4}, "in parts of [24, 24, 24]"),
        ("model.layers.0.mlp.router.weight", "llama", {}, "no such module"),
        ("vision.layers.0.self_attn.q_proj.weight", "llama", {}, "no such module"),
        ("model.layers.0.self_attn.qkv_proj.weight", "llama", {}, "no such module"),
    ],
)
def test_what_a_transformers_base_does_not_allow(
    name: str, model_type: str, config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    base = a_base(tmp_path, model_type, {"model.layers.0.mlp.router.weight": values(3, WIDTH)}, **config)
    if name not in read(base):
        save_file(read(base) | {name: values(24, WIDTH)}, base / "model.safetensors")
    shape = tuple(read(base)[name].shape)
    made = Adapter((Targeted(Target(name, shape), lora(shape=shape)),))
    error = refused(made, tmp_path, "torchtune", base=base)
    assert isinstance(error, loratool.Unsupported)
    assert why in error.message, error.message


def test_without_the_base_s_config_the_rows_are_not_guessed(tmp_path: Path) -> None:
    base = a_base(tmp_path)
    (base / "config.json").unlink()
    name = "model.layers.0.mlp.gate_proj.weight"
    made = Adapter((Targeted(Target(name, (INNER, WIDTH)), lora(shape=(INNER, WIDTH))),))
    error = refused(made, tmp_path, "torchtune", base=base)
    assert "config.json" in error.hint
    assert "how many heads" in error.message


def test_the_uniform_option_means_nothing(tmp_path: Path) -> None:
    assert (
        "--uniform means nothing to torchtune"
        in refused(adapter_of(a__weight=lora()), tmp_path, "torchtune", uniform=True).message
    )


# -- everything -------------------------------------------------------------------------------------------------------


@given(cases(("lora", "lora-mid", "dora0-lora", "dora0-lora-mid"), base_dtypes=("F32",)))
def test_whatever_fits_arrives(case: Case) -> None:
    """Ranges of rows, single experts, several of one tensor, any rule and dtype: the merge is the same."""
    items, state = [], {}
    for name, group in case.adapter.targets().items():
        stacked = group[0].target.stacked
        own = name.replace(".weight", ".experts.up_proj") if stacked else name.replace(".weight", ".fc.weight")
        layout = "in_out" if stacked else ""
        if len(group[0].target.matrix) != 2:
            continue
        items += [replace(i, target=replace(i.target, name=own, layout=layout)) for i in group]
        state[own] = case.base[name]
    assume(items)
    adapter = Adapter(tuple(items))
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder, "base.safetensors"), Path(folder, "out")
        save_file(state, base)
        loratool.merge(base, adapter, Path(folder, "want.safetensors"))
        try:
            loratool.convert(adapter, out, "torchtune", base=base)
        except loratool.Unsupported as error:
            if "some of their rows" in str(error) or "no DoRA of experts" in str(error):
                return
            raise
        again = [item for item in loratool.load(out).updates if item.target.name in state]
        loratool.merge(base, Adapter(tuple(again)), Path(folder, "got.safetensors"))
        want, got = tensors_of(Path(folder, "want.safetensors")), tensors_of(Path(folder, "got.safetensors"))
        for name, value in want.items():
            bound = 4 * 2.0**-23 * float(value.double().abs().max() + 1)
            assert float((got[name].double() - value.double()).abs().max()) <= bound, name


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    state = base_state(1)
    base = save_transformers(state, tmp_path / "base", "llama")
    adapter = on_transformers(in_transformers(base_state(2), "llama"), "llama", False)
    adapter = Adapter(tuple(item for item in adapter.updates if ".1." not in item.target.name))
    loratool.save(adapter, tmp_path / "a.safetensors")
    out = tmp_path / "out"
    report = cli("convert", tmp_path / "a.safetensors", "--to", "torchtune", "-o", out, "--base", base, "--json").json
    assert (report["convention"], report["to"], report["updates"]) == ("native", "torchtune", 8)
    assert {Path(file).name for file in report["files"]} == FILES
    result = cli("convert", tmp_path / "a.safetensors", "--to", "torchtune", "-o", tmp_path / "other")
    assert result.code == 2
    assert "--base BASE" in result.err

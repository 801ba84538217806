"""LyCORIS's IA3 and GLoRA, whose change depends on the base's weights: their formulas, and which base GLoRA is of."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from models import State, assert_float32_close, assert_rounded, changed
from safetensors.torch import load_file, save_file
from test_quantised import NAME, SHAPE, dequantised, fp8_base
from torch import Tensor

import loratool

SHAPES = {"fc": (8, 6), "conv": (8, 6, 3, 3), "point": (8, 6, 1, 1), "tall": (700, 300)}  # the last: several blocks


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def base_of(dtype: torch.dtype = torch.float32) -> State:
    """Weights with an output and an input that are all zeros."""
    state = {f"{name}.weight": values(*shape).to(dtype) for name, shape in SHAPES.items()}
    for W in state.values():
        W[2], W[:, 1] = 0, 0
    return state


def ia3(layer: str, on_input: int) -> State:
    """w, with a -1 that takes a row or column away, and a 0 that leaves it."""
    shape = SHAPES[layer]
    w = values(shape[on_input], seed=5)
    w[0], w[3] = -1, 0
    w = w if len(shape) == 2 else w.reshape(1, -1, *[1] * len(shape[2:]))
    return {f"lycoris_{layer}.weight": w, f"lycoris_{layer}.on_input": torch.tensor(on_input)}


def glora(layer: str, rank: int = 2, alpha: float = 3.0) -> State:
    out, inputs, *kernel = SHAPES[layer]
    ones = [1] * len(kernel)
    parts = {
        "a1.weight": values(inputs, rank, *ones, seed=1),
        "a2.weight": values(rank, inputs, *ones, seed=2),
        "b1.weight": values(out, rank, *ones, seed=3),
        "b2.weight": values(rank, inputs, *kernel, seed=4),
        "alpha": torch.tensor(alpha),
    }
    return {f"lycoris_{layer}.{part}": value for part, value in parts.items()}


def of_ia3(W: Tensor, lora: State, layer: str) -> Tensor:
    w, on_input = (lora[f"lycoris_{layer}.{part}"] for part in ("weight", "on_input"))
    W, w = W.double(), w.double().flatten()
    return (
        (W.transpose(1, -1) * (1 + w)).transpose(1, -1) if on_input else (W.transpose(0, -1) * (1 + w)).transpose(0, -1)
    )


def of_glora(W: Tensor, lora: State, layer: str, scale: float = 1.5) -> Tensor:
    a1, a2, b1, b2 = (lora[f"lycoris_{layer}.{part}.weight"].double() for part in ("a1", "a2", "b1", "b2"))
    W = W.double()
    sent = torch.einsum("oi...,ij,jp->op...", W, a1.flatten(1), a2.flatten(1))
    return W + scale * (sent + torch.einsum("or,ri...->oi...", b1.flatten(1), b2))


CASES = {
    **{f"ia3-{layer}-{side}": (ia3, of_ia3, layer, side) for layer in SHAPES for side in (0, 1)},
    **{f"glora-{layer}": (glora, of_glora, layer, None) for layer in SHAPES},
}


def case(name: str, base: State) -> tuple[State, str, Tensor]:
    """By name: the file, the tensor that changes, and what it becomes in float64."""
    make, truth, layer, side = CASES[name]
    lora = make(layer) if side is None else make(layer, side)  # type: ignore[operator]
    return lora, f"{layer}.weight", truth(base[f"{layer}.weight"], lora, layer)


def placed(base: State, lora: State, folder: Path, metadata: dict[str, str] | None = None) -> tuple[Path, Path, Path]:
    """The base, the adapter, and a place for the output."""
    files = (folder / "base.safetensors", folder / "lora.safetensors", folder / "out.safetensors")
    save_file(base, files[0])
    save_file(lora, files[1], metadata)
    return files


@pytest.mark.parametrize("reproducible", [False, True], ids=["usual", "reproducible"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_merges_to_its_formula(name: str, dtype: torch.dtype, reproducible: bool, tmp_path: Path) -> None:
    base = base_of(dtype)
    lora, target, want = case(name, base)
    file, adapter, out = placed(base, lora, tmp_path)
    loratool.merge(file, adapter, out, reproducible=reproducible)
    got = load_file(out)
    assert changed(base, got) == {target}
    assert_float32_close(got[target], want, name=name) if dtype == torch.float32 else assert_rounded(got[target], want)


@pytest.mark.parametrize("side", [0, 1])
def test_what_ia3_leaves_alone_keeps_its_bits_and_what_it_takes_away_is_zero(side: int, tmp_path: Path) -> None:
    base = base_of()
    file, adapter, out = placed(base, ia3("fc", side), tmp_path)
    loratool.merge(file, adapter, out)
    got, W = load_file(out)["fc.weight"].transpose(0, side), base["fc.weight"].transpose(0, side)
    assert torch.equal(got[3], W[3])
    assert not got[0].any()
    assert W[0].any()


def test_another_adapter_of_the_same_weight_is_refused(tmp_path: Path) -> None:
    """Whether it would be multiplied as well, no trainer says: one after the other is an order."""
    base = base_of()
    file, adapter, out = placed(base, ia3("fc", 0), tmp_path)
    for lora in (glora("fc"), ia3("fc", 1)):
        save_file(lora, tmp_path / "other.safetensors")
        with pytest.raises(loratool.Mismatch, match="change the same elements") as caught:
            loratool.merge(file, [(adapter, 0.5), (tmp_path / "other.safetensors", 1.0)], out)
        assert caught.value.code == "E-OVERLAP"
    loratool.merge(file, [(adapter, 0.5), (tmp_path / "other.safetensors", 0.0)], out)
    W = base["fc.weight"]
    assert_float32_close(load_file(out)["fc.weight"], W + 0.5 * (of_ia3(W, ia3("fc", 0), "fc") - W))
    loratool.merge(out, tmp_path / "other.safetensors", tmp_path / "both.safetensors", onto_merged=True)
    assert_float32_close(
        load_file(tmp_path / "both.safetensors")["fc.weight"], of_ia3(load_file(out)["fc.weight"], ia3("fc", 1), "fc")
    )


def test_a_third_of_a_projection(tmp_path: Path) -> None:
    """OpenCLIP has query, key and value in one tensor; the adapter has a module for each."""
    name = "transformer.resblocks.0.attn.in_proj_weight"
    key = "lora_te_text_model_encoder_layers_0_self_attn"
    W, w = values(18, 6), values(6, seed=3)
    lora = {f"{key}_k_proj.weight": w, f"{key}_k_proj.on_input": torch.tensor(0)}
    lora |= {k.replace("lycoris_fc", f"{key}_v_proj"): v for k, v in glora("fc").items()}
    lora[f"{key}_v_proj.b1.weight"] = values(6, 2)
    file, adapter, out = placed({name: W}, lora, tmp_path)
    loratool.merge(file, adapter, out)
    v = {k.replace(f"{key}_v_proj", "lycoris_v"): x for k, x in lora.items()}
    want = torch.cat([W[:6].double(), W[6:12].double() * (1 + w.double()[:, None]), of_glora(W[12:], v, "v")])
    assert_float32_close(load_file(out)[name], want)
    loratool.convert(adapter, tmp_path / "a.lora.safetensors", "native", base=file)
    loratool.merge(file, tmp_path / "a.lora.safetensors", tmp_path / "again.safetensors")
    assert torch.equal(load_file(out)[name], load_file(tmp_path / "again.safetensors")[name])
    loratool.convert(adapter, tmp_path / "b.safetensors", "lycoris", base=file, as_component="te1")
    loratool.merge(file, tmp_path / "b.safetensors", tmp_path / "third.safetensors")
    assert_float32_close(load_file(tmp_path / "third.safetensors")[name], want)


@pytest.mark.parametrize("layout", ["deepseek", "small-blocks"])
def test_a_quantised_base_counts_as_the_numbers_it_stands_for(layout: str, tmp_path: Path) -> None:
    state = fp8_base(tmp_path / "base", layout)
    w = values(SHAPE[0], seed=1)
    module = f"lycoris_{NAME.removesuffix('.weight').replace('.', '_')}"
    save_file({f"{module}.weight": w, f"{module}.on_input": torch.tensor(0)}, tmp_path / "lora.safetensors")
    loratool.merge(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "out", dtype="fp32")
    got = {key: value for path in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(path).items()}
    assert_float32_close(got[NAME], dequantised(state, NAME, layout).double() * (1 + w.double()[:, None]))


def test_its_factors_are_of_no_base(tmp_path: Path) -> None:
    """Written with one base's shapes, it merges into another base of these: eight numbers, none of them a weight's."""
    file, adapter, out = placed(base_of(), ia3("fc", 0), tmp_path)
    native, other = tmp_path / "a.lora.safetensors", base_of(torch.bfloat16)
    loratool.convert(adapter, native, "native", base=file)
    assert loratool.validate(native) == []
    assert not loratool.load(native).base.tensors
    assert native.stat().st_size < 1024
    other["fc.weight"] *= 3
    save_file(other, tmp_path / "other.safetensors")
    loratool.merge(tmp_path / "other.safetensors", native, out, reproducible=True)
    assert_rounded(load_file(out)["fc.weight"], of_ia3(other["fc.weight"], ia3("fc", 0), "fc"))


# -- without the base --------------------------------------------------------------------------------------------------


def both() -> State:
    return ia3("fc", 0) | glora("conv")


def test_without_the_base_it_can_be_looked_at(tmp_path: Path) -> None:
    file, adapter, _ = placed(base_of(), both(), tmp_path)
    summary = loratool.inspect(adapter)
    found = {layer.target: (layer.kind, layer.shape, layer.rank, layer.scale) for layer in summary.layers}
    assert found == {
        "lycoris_fc.weight": ("scale", (8,), None, None),
        "lycoris_conv.weight": ("lora", (8, 6, 3, 3), 2 + 2 * 9, 1.5),
    }
    assert any(note.startswith("IA3 has one side of each weight: only the base") for note in summary.notes)
    assert any(note.startswith("GLoRA's delta has the base's weights in it") for note in summary.notes)
    known = loratool.inspect(adapter, base=file)
    assert {layer.target: layer.shape for layer in known.layers} == {"fc.weight": (8, 6), "conv.weight": (8, 6, 3, 3)}
    assert [layer.kind for layer in known.layers] == ["lora", "scale"]


def test_without_the_base_it_is_not_written(tmp_path: Path) -> None:
    _, adapter, _ = placed(base_of(), both(), tmp_path)
    out = tmp_path / "a.lora.safetensors"
    read = loratool.load(adapter)
    for act in (
        lambda: loratool.convert(adapter, out, "native"),
        lambda: loratool.convert(read, out, "native"),
        lambda: loratool.save(read, out),
    ):
        with pytest.raises(loratool.LoratoolError) as caught:
            act()
        said = [problem.message for problem in caught.value.problems]
        assert any(message.startswith("IA3 has one side of each weight") for message in said)
        assert any(message.startswith("GLoRA's delta has the base's weights in it") for message in said)
        assert all("base" in problem.hint for problem in caught.value.problems)
        assert not out.exists()
    product = next(item.update for item in read.updates if item.update.kind == "lora")
    with pytest.raises(loratool.ChoiceNeeded, match="which are not known"):
        product.components()["B"].read()


# -- of one base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["convert", "save"])
def test_written_with_its_base_it_is_of_that_base(way: str, tmp_path: Path) -> None:
    base = base_of()
    file, adapter, out = placed(base, both(), tmp_path)
    native = tmp_path / "a.lora.safetensors"
    if way == "convert":
        report = loratool.convert(adapter, native, "native", base=file)
        assert sum("it is for no other base" in note for note in report.notes) == 1
    else:
        loratool.save(loratool.load(adapter, base=file), native)
    assert loratool.validate(native) == []
    assert loratool.load(native).base.tensors.keys() == {"conv.weight"}
    loratool.merge(file, native, tmp_path / "by-way.safetensors")
    loratool.merge(file, adapter, out)
    want, got = load_file(out), load_file(tmp_path / "by-way.safetensors")
    assert all(torch.equal(want[name], got[name]) for name in base)
    base["conv.weight"] = base["conv.weight"] * 2
    save_file(base, tmp_path / "other.safetensors")
    with pytest.raises(loratool.Mismatch, match="not the base that the adapter was trained on: conv"):
        loratool.merge(tmp_path / "other.safetensors", native, tmp_path / "never.safetensors")


def test_read_with_one_base_it_is_not_merged_into_another(tmp_path: Path) -> None:
    base = base_of()
    file, adapter, out = placed(base, both(), tmp_path)
    read = loratool.load(adapter, base=file)
    base["conv.weight"] = base["conv.weight"] + 1
    save_file(base, tmp_path / "other.safetensors")
    for act in (
        lambda: loratool.merge(tmp_path / "other.safetensors", read, out),
        lambda: loratool.convert(read, tmp_path / "a.lora.safetensors", "native", base=tmp_path / "other.safetensors"),
    ):
        with pytest.raises(loratool.Mismatch) as caught:
            act()
        assert {problem.code for problem in caught.value.problems} == {"E-BASE-MISMATCH"}
        assert "conv.weight" in str(caught.value)
    assert not out.exists()


def test_it_goes_where_differences_and_loras_go(tmp_path: Path) -> None:
    file, adapter, out = placed(base_of(), both(), tmp_path)
    loratool.convert(adapter, tmp_path / "again.safetensors", "lycoris", base=file, as_component="unet")
    loratool.merge(file, tmp_path / "again.safetensors", tmp_path / "by-way.safetensors")
    loratool.merge(file, adapter, out)
    want, got = load_file(out), load_file(tmp_path / "by-way.safetensors")
    for name in want:
        assert_float32_close(got[name], want[name].double(), name=name)


@pytest.mark.parametrize("which", ["base.safetensors", "lora.safetensors"])
@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_a_file_replaced_between_reading_and_writing_is_noticed(verb: str, which: str, tmp_path: Path) -> None:
    file, adapter, out = placed(base_of(), ia3("fc", 0), tmp_path)
    module = importlib.import_module(f"loratool.{verb}")
    if verb == "merge":
        plan = loratool.plan(file, adapter, out)
    else:
        plan = module.plan_convert(adapter, out, "native", module.Choices(), base=file, options=module.Options())
    shutil.copy2(tmp_path / which, tmp_path / "twin")
    (tmp_path / "twin").replace(tmp_path / which)
    with pytest.raises(loratool.InvalidFile) as caught:
        getattr(module, f"run_{verb}")(plan)
    assert caught.value.problems[0].code == "E-CHANGED"
    assert not out.exists()


# -- taken out again ---------------------------------------------------------------------------------------------------


def test_it_is_taken_out_with_the_base_or_as_what_it_was_there(tmp_path: Path) -> None:
    base = base_of()
    file, adapter, out = placed(base, both(), tmp_path)
    native, record, back = (tmp_path / name for name in ("a.lora.safetensors", "out.undo", "back.safetensors"))
    loratool.merge(file, adapter, out, undo=record)
    for options in ({}, {"undo": record}):
        with pytest.raises(loratool.Mismatch, match="computed from the base's weights") as caught:
            loratool.unmerge(out, adapter, back, **options)
        assert len(caught.value.problems) == 1
        assert "--base BASE" in caught.value.problems[0].hint
    loratool.convert(adapter, native, "native", base=file)
    ways = {
        "base": (adapter, {"base": file}),
        "undo": (native, {"undo": record}),
        "loaded": (loratool.load(adapter, base=file), {"undo": record}),
    }
    for way, (given, options) in ways.items():
        loratool.unmerge(out, given, tmp_path / f"by-{way}.safetensors", **options)
        got = load_file(tmp_path / f"by-{way}.safetensors")
        assert all(torch.equal(got[name], base[name]) for name in base), way
    with pytest.raises(loratool.AnswerIsNo, match="without the base this can not be taken out"):
        loratool.unmerge(out, native, back)
    assert loratool.verify(out, file, adapter).answer


# -- scales, and what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "scale", "said"),
    [
        (None, 1.5, "no metadata says whether it was trained with rs_lora"),
        ({"algo": "glora"}, 1.5, "GLoRA as a LoRA with this base's weights in it"),
        ({"algo": "glora", "rs_lora": "True"}, 3 / 2**0.5, "trained with alpha / sqrt(rank)"),
    ],
    ids=["unknown", "told", "rs_lora"],
)
def test_rs_lora_is_in_the_metadata_only(
    arguments: dict[str, str] | None, scale: float, said: str, tmp_path: Path
) -> None:
    base = base_of()
    metadata = None if arguments is None else {"ss_network_args": json.dumps(arguments)}
    file, adapter, out = placed(base, glora("fc"), tmp_path, metadata)
    report = loratool.merge(file, adapter, out)
    assert any(said in note for note in report.plan.notes)
    assert_float32_close(load_file(out)["fc.weight"], of_glora(base["fc.weight"], glora("fc"), "fc", scale))


IA3, GLORA = ia3("fc", 0), glora("fc")
BAD: dict[str, tuple[State, str, str]] = {
    "ia3-length": ({**IA3, "lycoris_fc.weight": values(7)}, "E-SHAPE", "7 numbers, for the outputs"),
    "ia3-side": ({**IA3, "lycoris_fc.on_input": torch.tensor(1)}, "E-SHAPE", "8 numbers, for the inputs of the base's"),
    "ia3-flag": ({**IA3, "lycoris_fc.on_input": torch.tensor(2)}, "E-SHAPE", "on_input is 2, neither 0 nor 1"),
    "ia3-flags": ({**IA3, "lycoris_fc.on_input": torch.ones(2)}, "E-SHAPE", "must be one number"),
    "ia3-matrix": ({**IA3, "lycoris_fc.weight": values(8, 6)}, "E-SHAPE", "is [8, 6], not one row of numbers"),
    "ia3-empty": ({**IA3, "lycoris_fc.weight": values(0)}, "E-SHAPE", "is [0], not one row of numbers"),
    "ia3-half": ({"lycoris_fc.on_input": torch.tensor(1)}, "E-COMPONENTS", "lycoris_fc has no weight"),
    "ia3-other-half": ({**IA3, "lycoris_conv.weight": values(8)}, "E-COMPONENTS", "lycoris_conv has no on_input"),
    "ia3-magnitude": ({**IA3, "lycoris_fc.dora_scale": values(8, 1)}, "E-COMPONENTS", "has a dora_scale"),
    "glora-half": ({k: v for k, v in GLORA.items() if "a2" not in k}, "E-COMPONENTS", "has no a2.weight"),
    "glora-mixed": ({**GLORA, **IA3}, "E-COMPONENTS", "parts of GLoRA and IA3"),
    "glora-old": ({**GLORA, "lycoris_fc.a1.weight": values(2, 6)}, "E-SHAPE", "they must be a1 [in, rank]"),
    "glora-kernel": ({**GLORA, "lycoris_fc.a1.weight": values(6, 2, 3, 3)}, "E-SHAPE", "only b2 with a kernel"),
    "glora-vector": ({**GLORA, "lycoris_fc.b1.weight": values(8)}, "E-SHAPE", "they must be matrices"),
    "glora-empty": ({**GLORA, "lycoris_fc.b1.weight": values(0, 2)}, "E-SHAPE", "they must be a1 [in, rank]"),
    "glora-out": ({**GLORA, "lycoris_fc.b1.weight": values(9, 2)}, "E-SHAPE", "make [9, 6], the base has [8, 6]"),
    "glora-magnitude": ({**GLORA, "lycoris_fc.dora_scale": values(8, 1)}, "E-COMPONENTS", "has a dora_scale"),
    "glora-core": ({**GLORA, "lycoris_fc.bm.weight": values(2, 2)}, "E-UNSUPPORTED", "GLoRA with a Tucker core"),
    "nan": ({**IA3, "lycoris_fc.weight": torch.full((8,), torch.nan)}, "E-NONFINITE", "NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    lora, code, message = BAD[name]
    file, adapter, out = placed(base_of(), lora, tmp_path)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(file, adapter, out)
    assert code in {problem.code for problem in caught.value.problems}
    assert message in str(caught.value)
    assert "lora.safetensors" in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("shape", [(8,), (8, 6, 2), ()], ids=str)
def test_a_base_of_another_shape_is_a_typed_error(shape: tuple[int, ...], tmp_path: Path) -> None:
    for lora in (IA3, GLORA):
        file, adapter, out = placed({"fc.weight": torch.ones(shape)}, lora, tmp_path)
        if lora is IA3 and len(shape) == 3:
            loratool.merge(file, adapter, out)  # a convolution, whose outputs they are
            out.unlink()
            continue
        with pytest.raises(loratool.LoratoolError, match="the base"):
            loratool.merge(file, adapter, out)

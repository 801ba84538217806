"""Bases in fewer than 16 bits: fp8 that is a float like any other, weights with scales, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import (
    Maker,
    State,
    files_of,
    make_update,
    one,
    raw,
    rounded,
    same_bits,
    save_sharded,
    small_blocks,
    tensors_of,
)
from torch import Tensor

import loratool
from loratool import Adapter, LoratoolError, Target, Targeted
from loratool.checkpoint import open_checkpoint
from loratool.identity import identity_of
from loratool.quantised import logical
from loratool.updates import Scaling

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
TOP = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
NAME = "model.layers.0.q_proj.weight"
OTHER = "model.layers.1.q_proj.weight"
STEM = NAME.removesuffix(".weight")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("example")


def refused(act: Callable[[], object]) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        act()
    return caught.value


def values(*shape: int, seed: int = 0, size: float = 0.02) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def array(value: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return value.double().numpy()


def lora(shape: tuple[int, ...], seed: int = 1, name: str = NAME) -> Adapter:
    return one("lora", shape, seed=seed, name=name)


def delta(adapter: Adapter) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The change of an adapter's only update, in float64."""
    update = adapter.updates[0].update
    scale = update.scaling
    assert scale is not None
    parts = {name: array(ref.read()) for name, ref in update.components().items()}
    return scale.factor * (parts["B"] @ parts["A"])


# --- fp8 without a scale ---------------------------------------------------------------------------------------------


@given(dtype=st.sampled_from(tuple(FP8)), rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 999))
def test_plain_fp8_is_rounded_once(fresh: Callable[[], Path], dtype: str, rows: int, columns: int, seed: int) -> None:
    folder, W = fresh(), values(rows, columns, seed=seed, size=1).to(FP8[dtype])
    adapter = lora((rows, columns), seed)
    save_sharded({NAME: W, "norm": values(3)}, folder / "base")
    with small_blocks(16):
        loratool.merge(folder / "base", adapter, folder / "out", reproducible=True)
    found = tensors_of(folder / "out")[NAME]
    assert found.dtype == FP8[dtype]
    wanted = rounded(array(W) + delta(adapter), dtype)
    assert np.array_equal(array(found.float()), wanted)


@given(dtype=st.sampled_from(tuple(FP8)), seed=st.integers(0, 999), size=st.sampled_from((0.01, 1.0, 60.0)))
def test_an_undo_record_restores_plain_fp8(fresh: Callable[[], Path], dtype: str, seed: int, size: float) -> None:
    folder, W = fresh(), values(12, 8, seed=seed, size=size).to(FP8[dtype])
    W.view(-1)[:2] = torch.tensor([-0.0, TOP[dtype]]).to(FP8[dtype])
    adapter = lora((12, 8), seed)
    (item,) = adapter.updates
    B = item.update.B.read()  # type: ignore[attr-defined]
    B[0] = 0  # the largest number stays
    adapter = Adapter((replace(item, update=replace(item.update, B=loratool.TensorRef.of(B))),))  # type: ignore[call-arg]
    save_sharded({NAME: W}, folder / "base")
    loratool.merge(folder / "base", adapter, folder / "out", undo=folder / "undo.safetensors")
    report = loratool.unmerge(folder / "out", adapter, folder / "back", undo=folder / "undo.safetensors")
    assert report.exact
    assert same_bits(tensors_of(folder / "back"), {NAME: W})


@pytest.mark.parametrize(("dtype", "last"), [("F8_E4M3", 464.0), ("F8_E5M2", 61439.0)])
def test_what_rounds_to_the_largest_fp8_number_is_kept_and_more_is_refused(
    dtype: str, last: float, tmp_path: Path
) -> None:
    W = torch.full((2, 2), TOP[dtype]).to(FP8[dtype])
    save_sharded({NAME: W}, tmp_path / "base")

    def merge(top: float, out: str) -> Tensor:
        update = make_update("add", (2, 2), Maker(0))
        update = replace(update, value=loratool.TensorRef.of(torch.full((2, 2), top - TOP[dtype])))
        adapter = Adapter((Targeted(Target(NAME, (2, 2)), replace(update, factors=Scaling())),))
        loratool.merge(tmp_path / "base", adapter, tmp_path / out, allow_unchanged=True)
        return tensors_of(tmp_path / out)[NAME]

    assert raw(merge(last, "kept")) == raw(W)
    error = refused(lambda: merge(last + 8, "out"))
    assert (error.code, error.problems[0].rule) == ("E-NONFINITE", "R-061")


def test_plain_fp8_can_be_written_wider(tmp_path: Path) -> None:
    W, untouched = values(8, 4, size=1).to(FP8["F8_E4M3"]), values(4, 4).to(FP8["F8_E5M2"])
    adapter = lora((8, 4))
    save_sharded({NAME: W, OTHER: untouched}, tmp_path / "base")
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", dtype="bf16")
    found = tensors_of(tmp_path / "out")
    assert np.array_equal(array(found[NAME]), rounded(array(W.float()) + delta(adapter), "BF16"))
    assert raw(found[OTHER]) == raw(untouched.bfloat16())


# --- fp8 with scales -------------------------------------------------------------------------------------------------


def spread(scale: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """A scale for each element, by indexing; the independent formula for all layouts."""
    rows, columns = (torch.arange(length) // side for length, side in zip(shape, tile, strict=True))
    return scale.reshape(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))[rows][:, columns]


def quantise(W: Tensor, tile: tuple[int, int], dtype: str = "F8_E4M3") -> tuple[Tensor, Tensor]:
    """Codes and scales [tile rows, tile columns], one tile after the other."""
    codes = torch.empty_like(W, dtype=FP8[dtype])
    rows, columns = range(0, len(W), tile[0]), range(0, W.shape[1], tile[1])
    scale = torch.empty(len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            part = (slice(row, row + tile[0]), slice(column, column + tile[1]))
            peak = W[part].abs().max()
            scale[i, j] = peak / TOP[dtype] if peak else 1
            codes[part] = (W[part] / scale[i, j]).to(FP8[dtype])
    return codes, scale


SHAPE = (300, 200)
# layout: name of the scale, tile, shape of the stored scale
LAYOUTS: Mapping[str, tuple[str, tuple[int, int], tuple[int, ...]]] = {
    "deepseek": ("weight_scale_inv", (128, 128), (3, 2)),
    "small-blocks": ("weight_scale_inv", (64, 32), (5, 7)),
    "channel": ("weight_scale", (1, 200), (300, 1)),
    "channel-flat": ("weight_scale", (1, 200), (300,)),
    "tensor": ("weight_scale", (300, 200), (1,)),
    "tensor-scalar": ("weight_scale_inv", (300, 200), ()),
    "group": ("weight_scale", (1, 50), (300, 4)),
}


def fp8_base(folder: Path, layout: str, shards: int = 2, dtype: torch.dtype = torch.float32) -> State:
    """Two quantised weights, an embedding and a norm that are not; each weight and its scale in different shards."""
    suffix, tile, shape = LAYOUTS[layout]
    state: State = {}
    for name, seed in ((NAME, 1), (OTHER, 2)):
        codes, scale = quantise(values(*SHAPE, seed=seed), tile)
        state |= {name: codes, name.replace("weight", suffix): scale.reshape(shape).to(dtype)}
    state |= {"embed.weight": values(7, 200).bfloat16(), "norm.weight": values(200).bfloat16()}
    save_sharded(state, folder, shards)
    method = {"quant_method": "fp8", "weight_block_size": [*tile] if "block" in layout else None}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": method}))
    return state


def dequantised(state: State, name: str, layout: str) -> Tensor:
    suffix, tile, _ = LAYOUTS[layout]
    return state[name].float() * spread(state[name.replace("weight", suffix)].float(), SHAPE, tile)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_fp8_is_dequantised(layout: str, tmp_path: Path) -> None:
    state = fp8_base(tmp_path / "base", layout)
    adapter = lora(SHAPE)
    with small_blocks(40_000):  # rows that are no multiple of a tile's
        report = loratool.merge(tmp_path / "base", adapter, tmp_path / "out", dtype="fp32")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == {NAME, OTHER, "embed.weight", "norm.weight"}
    assert raw(found[OTHER]) == raw(dequantised(state, OTHER, layout))
    wanted = array(dequantised(state, NAME, layout)) + delta(adapter)
    assert np.array_equal(array(found[NAME]), rounded(wanted, "F32")) or np.allclose(
        array(found[NAME]), wanted, rtol=2e-7
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert report.receipt.dropped.keys() == state.keys() - found.keys()
    assert report.survival[NAME].share == pytest.approx(1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_fp8_is_quantised_again(layout: str, tmp_path: Path) -> None:
    state = fp8_base(tmp_path / "base", layout)
    suffix, tile, shape = LAYOUTS[layout]
    adapter = lora(SHAPE)
    with small_blocks(40_000):
        report = loratool.merge(tmp_path / "base", adapter, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    scale_name = NAME.replace("weight", suffix)
    merged = torch.from_numpy(array(dequantised(state, NAME, layout)) + delta(adapter)).float()
    codes, scale = quantise(merged, tile)
    assert torch.allclose(found[scale_name], scale.reshape(shape), rtol=1e-6)
    # The reference sums in another order: a code next to a tie may differ, by one.
    wrong = (found[NAME].view(torch.int8).int() - codes.view(torch.int8).int()).abs()
    assert wrong.max() <= 1
    assert (wrong > 0).sum() <= 10
    half_step = merged.abs() * 2**-4 + spread(scale, SHAPE, tile) * 2**-10
    assert ((dequantised(found, NAME, layout) - merged).abs() <= half_step * 1.001).all()
    untouched = {name: value for name, value in state.items() if name not in (NAME, scale_name)}
    assert same_bits({name: found[name] for name in untouched}, untouched)
    for file in (tmp_path / "base").iterdir():  # names, order, header, config
        one, two = file.read_bytes(), (tmp_path / "out" / file.name).read_bytes()
        assert len(one) == len(two)
        assert file.suffix == ".safetensors" or one == two
        assert one[: one.find(b"}}") + 2] == two[: two.find(b"}}") + 2]
    assert report.survival.keys() == {NAME}
    assert report.receipt.tensors.keys() == {NAME, scale_name}


@pytest.mark.parametrize("layout", ["deepseek", "channel", "tensor"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_share_of_a_change_that_survives(layout: str, size: float, tmp_path: Path, cli: Cli) -> None:
    state = fp8_base(tmp_path / "base", layout)
    adapter = lora(SHAPE)
    (item,) = adapter.updates
    weak = replace(item.update, factors=replace(item.update.scaling, rule="none", alpha=None, scale=size))  # type: ignore[call-arg]
    loratool.save(Adapter((replace(item, update=weak),)), tmp_path / "a.safetensors")
    result = cli("merge", tmp_path / "base", tmp_path / "a.safetensors", "-o", tmp_path / "out", "--json")
    share = result.json["survival"]["tensors"][NAME]["share"]
    before = array(dequantised(state, NAME, layout))
    asked = delta(Adapter((replace(item, update=weak),)))
    kept = array(dequantised(tensors_of(tmp_path / "out"), NAME, layout)) - before
    assert share == pytest.approx((kept * asked).sum() / (asked**2).sum(), abs=1e-3)
    warned = any("keep less than 90%" in note and NAME in note for note in result.json["notes"])
    assert warned == (share < 0.9)
    assert (share < 0.9) == (size < 1)


def test_tiles_that_no_update_reaches_keep_codes_and_scales(tmp_path: Path) -> None:
    state = fp8_base(tmp_path / "base", "deepseek")
    state[NAME] = (state[NAME].float() / 2).to(FP8["F8_E4M3"])  # so that no scale is the one that quantising gives
    save_sharded(state, tmp_path / "base", 2)
    update = make_update("lora", (30, 200), Maker(3))
    loratool.merge(tmp_path / "base", Adapter((Targeted(Target(NAME, SHAPE, (140, 170)), update),)), tmp_path / "out")
    found, scale = tensors_of(tmp_path / "out"), NAME.replace("weight", "weight_scale_inv")
    for rows, tile in ((slice(0, 128), 0), (slice(256, 300), 2)):
        assert raw(found[NAME][rows]) == raw(state[NAME][rows])
        assert raw(found[scale][tile]) == raw(state[scale][tile])
    assert raw(found[scale][1]) != raw(state[scale][1])


def test_scales_that_are_powers_of_two_stay_such(tmp_path: Path) -> None:
    state = fp8_base(tmp_path / "base", "deepseek")
    config = {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    loratool.merge(tmp_path / "base", lora(SHAPE), tmp_path / "out")
    scale = tensors_of(tmp_path / "out")[NAME.replace("weight", "weight_scale_inv")]
    assert (torch.frexp(scale).mantissa == 0.5).all()
    merged = dequantised(state, NAME, "deepseek").numpy() + delta(lora(SHAPE))
    peak = np.abs(merged[:128, :128]).max()
    assert peak / 448 <= scale[0, 0] < 2 * peak / 448


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_unmerge_with_the_base_gives_a_quantised_base_back(dtype: str, shards: int, tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", "deepseek", shards)
    adapter = lora(SHAPE)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", dtype=dtype)
    report = loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back", base=tmp_path / "base")
    assert report.exact
    assert files_of(tmp_path / "back") == files_of(tmp_path / "base")
    error = refused(lambda: loratool.unmerge(tmp_path / "out", adapter, tmp_path / "alone"))
    assert error.code == "E-NOT-EXACT"
    assert "--base" in str(error)


def test_an_unmerge_refuses_a_base_with_other_scales(tmp_path: Path) -> None:
    state = fp8_base(tmp_path / "base", "deepseek")
    adapter = lora(SHAPE)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", dtype="bf16")
    scale = OTHER.replace("weight", "weight_scale_inv")
    save_sharded({**state, scale: state[scale] * 2}, tmp_path / "base", 2)
    error = refused(lambda: loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back", base=tmp_path / "base"))
    assert error.code == "E-BASE-MISMATCH"
    assert scale in str(error)


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_no_undo_record_of_quantised_weights(dtype: str, tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", "deepseek")
    error = refused(
        lambda: loratool.merge(tmp_path / "base", lora(SHAPE), tmp_path / "out", undo=tmp_path / "u", dtype=dtype)
    )
    assert error.code == "E-OPTION"
    assert "--base" in str(error)
    # A weight of the same base that is not quantised has one.
    plain = lora((7, 200), name="embed.weight")
    loratool.merge(tmp_path / "base", plain, tmp_path / "out", undo=tmp_path / "u.safetensors")
    loratool.unmerge(tmp_path / "out", plain, tmp_path / "back", undo=tmp_path / "u.safetensors", exact=True)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "base")


def test_an_interrupted_merge_of_a_quantised_base_is_resumed(tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", "deepseek", 3)
    both = Adapter((*lora(SHAPE).updates, *lora(SHAPE, 2, OTHER).updates))
    whole = loratool.merge(tmp_path / "base", both, tmp_path / "whole", threads=1)

    left: list[str] = []

    def kill(step: loratool.Progress) -> None:
        if step.done > 0.8 * step.total:  # what a kill would leave is set aside, because an exception clears up
            (scratch,) = tmp_path.glob(".out.partial-*")
            left.append(scratch.name)
            shutil.copytree(scratch, tmp_path / "left")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loratool.merge(tmp_path / "base", both, tmp_path / "out", threads=1, progress=kill)
    (tmp_path / "left").rename(tmp_path / left[0])
    steps: list[loratool.Progress] = []
    report = loratool.merge(tmp_path / "base", both, tmp_path / "out", threads=1, resume=True, progress=steps.append)
    done = [0, *(step.done for step in steps)]
    assert max(now - last for last, now in pairwise(done)) > 60_000, "no file was kept"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert report.survival == whole.survival


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_make_no_difference(threads: int, tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", "tensor")
    both = Adapter((*lora(SHAPE).updates, *lora(SHAPE, 2, OTHER).updates))
    loratool.merge(tmp_path / "base", both, tmp_path / "one", threads=1)
    loratool.merge(tmp_path / "base", both, tmp_path / "out", threads=threads)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_bf16_scales_stay_bf16(tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", "channel", dtype=torch.bfloat16)
    loratool.merge(tmp_path / "base", lora(SHAPE), tmp_path / "out")
    assert tensors_of(tmp_path / "out")[NAME.replace("weight", "weight_scale")].dtype == torch.bfloat16


def test_stacked_experts_with_scales(tmp_path: Path) -> None:
    """[experts, rows, columns], tiles of 128 x 128 in each; the adapter changes one expert."""
    pairs = [quantise(values(256, 130, seed=n), (128, 128)) for n in range(3)]
    codes, scale = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    save_sharded({"experts.up": codes, "experts.up_scale_inv": scale}, tmp_path / "base")
    update = make_update("lora", (256, 130), Maker(3))
    adapter = Adapter((Targeted(Target("experts.up", (3, 256, 130), expert=1), update),))
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    merged = array(codes[1].float() * spread(scale[1], (256, 130), (128, 128))) + delta(adapter)
    wanted, new = quantise(torch.from_numpy(merged).float(), (128, 128))
    assert torch.allclose(found["experts.up_scale_inv"][1], new, rtol=1e-6)
    assert (found["experts.up"][1].view(torch.int8) != wanted.view(torch.int8)).sum() <= 10
    for n in (0, 2):
        assert raw(found["experts.up"][n]) == raw(codes[n])
        assert raw(found["experts.up_scale_inv"][n]) == raw(scale[n])


def test_activation_scales_go_with_the_quantisation(tmp_path: Path) -> None:
    state = fp8_base(tmp_path / "base", "tensor")
    state[NAME.replace("weight", "input_scale")] = torch.tensor([0.5])
    save_sharded(state, tmp_path / "base", 2)
    loratool.merge(tmp_path / "base", lora(SHAPE), tmp_path / "kept")
    assert tensors_of(tmp_path / "kept").keys() == state.keys()
    loratool.merge(tmp_path / "base", lora(SHAPE), tmp_path / "out", dtype="bf16")
    assert not [name for name in tensors_of(tmp_path / "out") if "scale" in name]


def test_int8_with_scales_is_read_and_not_written(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (6, 8), dtype=torch.int8)
    scale = values(6, 1).abs().bfloat16()
    save_sharded({NAME: codes, NAME + "_scale": scale}, tmp_path / "base")
    unnamed = refused(lambda: loratool.plan(tmp_path / "base", lora((6, 8)), tmp_path / "out", dtype="bf16"))
    assert "nothing names the method" in str(unnamed)
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    error = refused(lambda: loratool.merge(tmp_path / "base", lora((6, 8)), tmp_path / "out"))
    assert (error.code, "--dtype bf16" in str(error)) == ("E-QUANTISED", True)
    loratool.merge(tmp_path / "base", lora((6, 8)), tmp_path / "out", dtype="bf16")
    wanted = rounded(array(codes.float() * scale.float()) + delta(lora((6, 8))), "BF16")
    assert np.array_equal(array(tensors_of(tmp_path / "out")[NAME]), wanted)


def test_what_is_baked_for_another_convention_is_the_dequantised_merge(tmp_path: Path) -> None:
    fp8_base(tmp_path / "base", "deepseek")
    beside = one("lora", SHAPE, name=OTHER)
    adapter = Adapter((*one("loha", SHAPE, name=NAME).updates, *beside.updates))  # PEFT has the two in no one adapter
    report = loratool.convert(adapter, tmp_path / "peft", "peft", base=tmp_path / "base", bake=True)
    assert report.baked == (NAME,)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "direct", dtype="fp32")
    loratool.merge(tmp_path / "base", tmp_path / "peft", tmp_path / "baked", dtype="fp32")
    assert same_bits(tensors_of(tmp_path / "baked"), tensors_of(tmp_path / "direct"))


# --- bitsandbytes, as it stores weights ------------------------------------------------------------------------------


def four_bits(
    shape: tuple[int, int], block: int, nested: bool, facts: Mapping[str, Any] | None = None
) -> tuple[State, Tensor]:
    """The parts of a 4-bit weight with random codes, and its numbers by the formula, one by one."""
    generator = np.random.default_rng(0)
    count = shape[0] * shape[1]
    blocks = -(-count // block)
    codes = generator.integers(0, 16, count + count % 2, dtype=np.uint8)
    table = np.sort(generator.standard_normal(16)).astype(np.float32)
    absmax = generator.random(blocks).astype(np.float32)
    state: State = {
        NAME: torch.from_numpy(codes[0::2] * 16 + codes[1::2]).reshape(-1, 1),
        f"{NAME}.quant_map": torch.from_numpy(table),
        f"{NAME}.absmax": torch.from_numpy(absmax),
    }
    known = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [*shape]}
    if nested:
        inner = generator.integers(0, 256, blocks, dtype=np.uint8)
        outer, levels = generator.random(-(-blocks // 3)), generator.standard_normal(256)
        known |= {"nested_blocksize": 3, "nested_dtype": "float32", "nested_offset": 0.25}
        state |= {
            f"{NAME}.absmax": torch.from_numpy(inner),
            f"{NAME}.nested_absmax": torch.from_numpy(outer).float(),
            f"{NAME}.nested_quant_map": torch.from_numpy(levels).float(),
        }
        of = [levels.astype(np.float32)[i] * outer.astype(np.float32)[n // 3] for n, i in enumerate(inner)]
        absmax = (np.array(of, np.float32) + np.float32(0.25)).astype(np.float32)
    text = json.dumps({**known, **(facts or {})}).encode()
    state[f"{NAME}.quant_state.bitsandbytes__nf4"] = torch.tensor([*text], dtype=torch.uint8)
    numbers = np.array([table[codes[i]] * absmax[i // block] for i in range(count)], np.float32)
    return state, torch.from_numpy(numbers).reshape(shape)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "block"), [((12, 10), 16), ((7, 9), 4), ((1, 5), 64)])
def test_four_bits_are_dequantised(shape: tuple[int, int], block: int, nested: bool, tmp_path: Path) -> None:
    state, W = four_bits(shape, block, nested)
    save_sharded({**state, OTHER: values(4, 4)}, tmp_path / "base")
    with small_blocks(128):  # rows that begin in the middle of a byte, and of a block
        loratool.merge(tmp_path / "base", lora((4, 4), name=OTHER), tmp_path / "copied", dtype="fp32")
        loratool.merge(tmp_path / "base", lora(shape), tmp_path / "merged", dtype="bf16")
    assert raw(tensors_of(tmp_path / "copied")[NAME]) == raw(W)
    assert np.array_equal(array(tensors_of(tmp_path / "merged")[NAME]), rounded(array(W) + delta(lora(shape)), "BF16"))
    loratool.merge(tmp_path / "base", lora((4, 4), name=OTHER), tmp_path / "kept")  # untouched, it stays packed
    assert same_bits({name: tensors_of(tmp_path / "kept")[name] for name in state}, state)
    error = refused(lambda: loratool.merge(tmp_path / "base", lora(shape), tmp_path / "out"))
    assert (error.code, "--dtype bf16" in str(error)) == ("E-QUANTISED", True)
    report = loratool.unmerge(tmp_path / "merged", lora(shape), tmp_path / "back", base=tmp_path / "base")
    assert report.exact
    assert files_of(tmp_path / "back") == files_of(tmp_path / "base")


DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
BROKEN: Mapping[str, Callable[[State], Any]] = {
    "no table": lambda s: s.pop(f"{NAME}.quant_map"),
    "a table of 8": lambda s: s.update({f"{NAME}.quant_map": torch.zeros(8)}),
    "no absmax": lambda s: s.pop(f"{NAME}.absmax"),
    "too few scales": lambda s: s.update({f"{NAME}.absmax": torch.zeros(2, dtype=torch.uint8)}),
    "half the codes": lambda s: s.update({NAME: torch.zeros(30, 1, dtype=torch.uint8)}),
    "no outer table": lambda s: s.pop(f"{NAME}.nested_quant_map"),
    "no JSON": lambda s: s.update({f"{NAME}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
    "other dtype": lambda s: s.update({f"{NAME}.quant_state.bitsandbytes__nf4": torch.zeros(2)}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_four_bit_weights_are_refused(how: str, tmp_path: Path) -> None:
    state, _ = four_bits((12, 10), 16, nested=True)
    BROKEN[how](state)
    save_sharded(state, tmp_path / "base")
    error = refused(lambda: loratool.merge(tmp_path / "base", lora((12, 10)), tmp_path / "out", dtype="bf16"))
    assert error.code == "E-QUANTISED"
    assert NAME in str(error)


@pytest.mark.parametrize(
    "facts",
    [
        {"blocksize": 0},
        {"shape": [12]},
        {"shape": []},
        {"shape": "x"},
        {"nested_blocksize": 0},
        {"shape": [-12, -10]},
        {"deep": DEEP},
    ],
)
def test_a_quant_state_that_contradicts_its_parts_is_refused(facts: Any, tmp_path: Path) -> None:
    save_sharded(four_bits((12, 10), 16, nested=True, facts=facts)[0], tmp_path / "base")
    error = refused(lambda: loratool.merge(tmp_path / "base", lora((12, 10)), tmp_path / "out", dtype="bf16"))
    assert error.code == "E-QUANTISED"


def test_eight_bits_are_dequantised(tmp_path: Path) -> None:
    codes, absmax = torch.randint(-127, 128, (6, 8), dtype=torch.int8), values(6).abs()
    state = {NAME: codes, f"{STEM}.SCB": absmax, f"{STEM}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_sharded(state, tmp_path / "base")
    loratool.merge(tmp_path / "base", lora((6, 8)), tmp_path / "out", dtype="bf16")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == {NAME}
    wanted = array(codes) * array(absmax)[:, None] / 127 + delta(lora((6, 8)))
    assert np.array_equal(array(found[NAME]), rounded(wanted, "BF16"))
    for name, wrong in (("SCB", values(5)), ("weight_format", torch.tensor(2, dtype=torch.uint8))):
        save_sharded({**state, f"{STEM}.{name}": wrong}, tmp_path / "base")
        error = refused(lambda: loratool.merge(tmp_path / "base", lora((6, 8)), tmp_path / "other", dtype="bf16"))
        assert error.code == "E-QUANTISED"


# --- what does not fit, and what is not read -------------------------------------------------------------------------

U8 = torch.zeros(16, 8, dtype=torch.uint8)
I32 = torch.zeros(4, 8, dtype=torch.int32)
FOREIGN: Mapping[str, tuple[State, str]] = {
    "gptq": ({"qweight": I32, "qzeros": I32, "scales": values(4, 8), "g_idx": I32.view(32)}, "GPTQ"),
    "awq": ({"qweight": I32, "qzeros": I32, "scales": values(4, 8)}, "AWQ"),
    "nvfp4": (
        {"weight_packed": U8, "weight_scale": values(16, 1).to(FP8["F8_E4M3"]), "weight_global_scale": values(1)},
        "nvfp4",
    ),
    "modelopt": (
        {"weight": U8, "weight_scale": values(16, 1).to(FP8["F8_E4M3"]), "weight_scale_2": values(1)},
        "nvfp4",
    ),
    "packed": ({"weight_packed": I32, "weight_scale": values(4, 1), "weight_shape": I32[0, :2]}, "packed integers"),
    "hqq": ({"W_q": U8, "scale": values(4, 1), "zero": values(4, 1)}, "HQQ"),
    "mlx": ({"weight": I32.view(torch.uint32), "scales": values(4, 2), "biases": values(4, 2)}, "MLX"),
    "packed-fp4": ({"weight": U8.view(torch.int8), "weight_scale_inv": values(16, 1)}, "I8"),
    "unnamed-fp8": ({"weight": values(16, 8).to(FP8["F8_E4M3"]), "weight_scale": values(4, 2)}, "names the method"),
    "unnamed-int8": ({"weight": values(16, 8).to(torch.int8), "weight_scale": values(16, 1)}, "names the method"),
    "mxfp8": ({"weight": values(16, 32).to(FP8["F8_E4M3"]), "weight_scale": U8[:, :1]}, "weight_scale"),
    "unknown": ({"weight": values(16, 8).to(FP8["F8_E4M3"]), "wscale": values(1)}, "wscale"),
    "zero-points": (
        {"weight": U8.view(torch.int8), "weight_scale": values(16, 1), "weight_zero_point": U8.view(torch.int8)[:, :1]},
        "zero points",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", FOREIGN)
def test_other_methods_are_refused_by_name_with_a_remedy(method: str, tmp_path: Path) -> None:
    parts, title = FOREIGN[method]
    state = {f"{STEM}.{name}": value.clone() for name, value in parts.items()}
    state[OTHER] = values(16, 8).bfloat16()
    save_sharded(state, tmp_path / "base")
    error = refused(lambda: loratool.merge(tmp_path / "base", lora((16, 8)), tmp_path / "out"))
    assert error.code == "E-QUANTISED"
    assert len(error.problems) == 1
    assert title in str(error)
    assert "16-bit" in (error.problems[0].hint or "")
    # Beside them other weights can be merged into, and all of this is copied.
    loratool.merge(tmp_path / "base", lora((16, 8), name=OTHER), tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    del state[OTHER], found[OTHER]
    assert same_bits(found, state)


def test_a_peft_adapter_on_foreign_weights_is_refused_by_name(tmp_path: Path) -> None:
    save_sharded({f"{STEM}.{name}": value.clone() for name, value in FOREIGN["gptq"][0].items()}, tmp_path / "base")
    prefix = f"base_model.model.{STEM}"
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"{prefix}.lora_A.weight": values(2, 32), f"{prefix}.lora_B.weight": values(8, 2)},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    error = refused(lambda: loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))
    assert error.code == "E-QUANTISED"
    assert "GPTQ" in str(error)


def test_mxfp4_experts_are_refused_and_attention_is_not(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = torch.zeros(2, 8, 1, 16, dtype=torch.uint8), torch.zeros(2, 8, 1, dtype=torch.uint8)
    state = {f"{experts}_blocks": blocks, f"{experts}_scales": scales, NAME: values(16, 8).bfloat16()}
    save_sharded(state, tmp_path / "base")
    update = make_update("lora", (32, 8), Maker(0))
    adapter = Adapter((Targeted(Target(experts, (2, 32, 8), expert=0), update),))
    error = refused(lambda: loratool.merge(tmp_path / "base", adapter, tmp_path / "out"))
    assert error.code == "E-QUANTISED"
    assert "mxfp4" in str(error)
    assert "Mxfp4Config(dequantize=True)" in str(error)
    loratool.merge(tmp_path / "base", lora((16, 8)), tmp_path / "out", dtype="fp32")
    found = tensors_of(tmp_path / "out")
    assert raw(found[f"{experts}_blocks"]) == raw(blocks)


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (7,), (1, 3, 2)])
def test_scales_that_fit_no_tiling_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    state = fp8_base(tmp_path / "base", "deepseek")
    save_sharded({**state, NAME + "_scale_inv": torch.ones(shape)}, tmp_path / "base", 2)
    error = refused(lambda: loratool.merge(tmp_path / "base", lora(SHAPE), tmp_path / "out"))
    assert error.code == "E-QUANTISED"
    assert NAME in str(error)
    assert str(list(shape)) in str(error)


@pytest.mark.parametrize("function", ["blake3", "sha256"])
@pytest.mark.parametrize("style", LAYOUTS)
def test_an_adapter_of_a_quantised_base_is_pinned_to_codes_and_scales(
    style: str, function: str, tmp_path: Path
) -> None:
    state = fp8_base(tmp_path / "base", style)
    base = logical(open_checkpoint(tmp_path / "base"))
    identity = identity_of(base.tensors[NAME], function)
    (scale,) = identity.parts
    assert (identity.dtype, identity.shape) == ("F8_E4M3", SHAPE)
    assert identity.digest == loratool.TensorRef.of(state[NAME]).digest(function)
    pinned = replace(lora(SHAPE), base=loratool.BaseIdentity("", {NAME: identity}))
    loratool.save(pinned, tmp_path / "a.lora.safetensors")
    assert loratool.load(tmp_path / "a.lora.safetensors").base == pinned.base
    loratool.merge(tmp_path / "base", tmp_path / "a.lora.safetensors", tmp_path / "out")
    zero = f"{function}:" + "0" * 64
    for other in (
        replace(identity, digest=zero),
        replace(identity, dtype="F8_E5M2"),
        replace(identity, parts={}),
        replace(identity, parts={scale: replace(identity.parts[scale], digest=zero)}),
        replace(identity, parts={scale: replace(identity.parts[scale], dtype="F16")}),
        replace(identity, parts={"other": identity.parts[scale]}),
    ):
        wrong = replace(pinned, base=loratool.BaseIdentity("", {NAME: other}))
        error = refused(lambda adapter=wrong: loratool.merge(tmp_path / "base", adapter, tmp_path / "other"))  # type: ignore[misc]
        assert error.code == "E-BASE-MISMATCH"


@pytest.mark.parametrize("style", LAYOUTS)
def test_a_base_with_other_scales_is_another_base(style: str, tmp_path: Path) -> None:
    state = fp8_base(tmp_path / "base", style)
    known = {NAME: identity_of(logical(open_checkpoint(tmp_path / "base")).tensors[NAME])}
    pinned = replace(lora(SHAPE), base=loratool.BaseIdentity("", known))
    scales = {name: value for name, value in state.items() if name.startswith(NAME) and name != NAME}
    assert len(scales) == 1
    save_sharded({**state, **{name: value * 2 for name, value in scales.items()}}, tmp_path / "base", 2)
    error = refused(lambda: loratool.merge(tmp_path / "base", pinned, tmp_path / "out"))
    assert error.code == "E-BASE-MISMATCH"
    assert "other bytes in its weight_scale" in str(error)


def test_what_is_not_quantised_is_left_alone(tmp_path: Path) -> None:
    save_sharded({NAME: values(4, 4), "ids": torch.arange(4), "scale": values(1)}, tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "base")
    assert logical(checkpoint) is checkpoint


def test_an_extracted_adapter_knows_the_scales_of_its_base(tmp_path: Path) -> None:
    """A wrapped model with 8-bit weights: what is bound is what the numbers come from, not the bytes of codes alone."""
    codes, scale = quantise(values(8, 6, seed=1), (1, 6))
    prefix = "base_model.model.fc."
    state = {f"{prefix}base_layer.weight": codes, f"{prefix}base_layer.weight_scale": scale.reshape(8, 1)}
    state |= {f"{prefix}lora_A.default.weight": values(2, 6), f"{prefix}lora_B.default.weight": values(8, 2)}
    save_file(state, tmp_path / "wrapped.safetensors")
    out, base = tmp_path / "a.lora.safetensors", tmp_path / "base"
    loratool.extract(tmp_path / "wrapped.safetensors", out, alpha=4, scaling="alpha/rank", base_out=base)
    assert loratool.validate(out) == []
    known = loratool.load(out).base.tensors["fc.weight"]
    assert (known.dtype, known.shape, {*known.parts}) == ("F8_E4M3", (8, 6), {"weight_scale"})
    loratool.merge(base, out, tmp_path / "merged", dtype="fp32")
    stored = load_file(base / "model.safetensors")
    save_file({**stored, "fc.weight_scale": stored["fc.weight_scale"] * 2}, base / "model.safetensors")
    assert refused(lambda: loratool.merge(base, out, tmp_path / "other", dtype="fp32")).code == "E-BASE-MISMATCH"

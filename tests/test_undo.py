"""The undo record: every bit of the base comes back, on any machine; and a damaged record is an error, never a base."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import zstandard
from blake3 import blake3
from conftest import Cli, container, opened, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import (
    DTYPES,
    FORMS,
    MATRIX_FORMS,
    Case,
    Maker,
    cases,
    make_update,
    one,
    raw,
    same_bits,
    save_sharded,
    seeds,
    small_blocks,
    tensors_of,
)
from torch import Tensor

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.errors import LoratoolError
from loratool.layout import NewTensor, Weighted
from loratool.updates import Add, Dora, Lora, Replace, ReplaceRows, Scaling, Update

blocks: ModuleType = importlib.import_module("loratool.blocks")
undo: ModuleType = importlib.import_module("loratool.undo")

Fresh = Callable[[], Path]
Moved = Callable[[Tensor], Tensor]
Parts = Sequence[tuple[Adapter, float]]

NARROW = ("BF16", "F16")
TINY = Adapter((Targeted(Target("l.weight", (6, 4)), make_update("lora", (6, 4), Maker(1))),))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Makes a new folder for every example."""
    return lambda: tmp_path_factory.mktemp("example")


# --- one tensor, without files ---------------------------------------------------------------------------------------


class Held:
    """What `restore` needs of a record's tensor, in memory."""

    def __init__(self, recorder: Any) -> None:
        self.height, self.blocks = recorder.height, recorder.blocks
        self.norms = tuple(map(TensorRef.of, recorder.norms))

    def read_blocks(self) -> Iterator[bytes]:
        yield from self.blocks


def weighted(target: Target, *updates: tuple[Update, float]) -> tuple[Weighted, ...]:
    return tuple(Weighted(Targeted(target, update), weight) for update, weight in updates)


def merge_tensor(W: Tensor, updates: tuple[Weighted, ...], dtype: str = "") -> tuple[Tensor, Held]:
    """Merge one tensor; return it with its record."""
    stored = TensorRef.of(W, "l.weight")
    recorder, out = undo.TensorRecorder(), io.BytesIO()
    tensor = NewTensor("l.weight", stored, dtype or stored.dtype, stored.shape, updates, True, stored)
    blocks.compute(tensor, out, lambda _: None, recorder=recorder)
    return of_bytes(out.getvalue(), DTYPES[tensor.dtype], W.shape), Held(recorder)


def unmerge_tensor(merged: Tensor, record: Held, updates: tuple[Weighted, ...], dtype: str) -> Tensor:
    ref, out = TensorRef.of(merged, "l.weight"), io.BytesIO()
    blocks.restore(NewTensor("l.weight", ref, dtype, ref.shape, updates), record, out, lambda _: None)
    return of_bytes(out.getvalue(), DTYPES[dtype], merged.shape)


def of_bytes(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def there_and_back(W: Tensor, updates: tuple[Weighted, ...], dtype: str = "", wrong: Any = None) -> Held:
    """Merge, unmerge (as another machine would, with `wrong`), and demand every bit."""
    merged, record = merge_tensor(W, updates, dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (wrong or {}).items():
            patch.setattr(blocks, name, value)
        back = unmerge_tensor(merged, record, updates, TensorRef.of(W).dtype)
    assert (back.dtype, back.shape) == (W.dtype, W.shape)
    assert raw(back) == raw(W)
    return record


def moving(move: Moved) -> dict[str, Any]:
    """A machine whose arithmetic gives other last bits: `move` changes the predicted numbers."""
    original = blocks._predict

    def predict(*arguments: Any) -> tuple[Tensor, Tensor]:
        predicted, band = original(*arguments)
        return move(predicted), band

    return {"_predict": predict}


def one_unit(seed: int) -> Moved:
    """Each number moved to a neighbour, up or down, or left, at random."""
    generator = torch.Generator().manual_seed(seed)

    def move(values: Tensor) -> Tensor:
        way = torch.randint(-1, 2, values.shape, generator=generator).to(values.dtype) * torch.inf
        return torch.where(way.isnan(), values, torch.nextafter(values, way))

    return move


def up(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, torch.inf))


def down(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, -torch.inf))


MACHINES: dict[str, Callable[[], dict[str, Any]]] = {
    "same": dict,
    "one unit": lambda: moving(one_unit(7)),
    "all up": lambda: moving(up),
    "all down": lambda: moving(down),
    "float64": lambda: {"compute_dtype": lambda tensor: "F64"},
}
machines = pytest.mark.parametrize("machine", MACHINES)


def values(*shape: int, dtype: str = "BF16", std: float = 0.5, seed: int = 3) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std
    return made.to(DTYPES[dtype])


@machines
@pytest.mark.parametrize("base", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("form", FORMS)
def test_every_kind_and_dtype(form: str, base: str, machine: str) -> None:
    for shape in [(6, 4), (6, 4, 3)]:
        update = make_update(form, shape, Maker(1, "F32"))
        W = values(*shape, dtype=base)
        with small_blocks(16):
            there_and_back(W, weighted(Target("l.weight", shape), (update, 1.0)), wrong=MACHINES[machine]())


@machines
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("form", MATRIX_FORMS)
def test_many_numbers(form: str, dtype: str, machine: str) -> None:
    """Enough of them that some lie beside a rounding boundary."""
    update = make_update(form, (96, 64), Maker(2, dtype), rank=8)
    updates = weighted(Target("l.weight", (96, 64)), (update, 0.5))
    there_and_back(values(96, 64, dtype=dtype), updates, wrong=MACHINES[machine]())


@machines
@pytest.mark.parametrize(("base", "out"), [(a, b) for a in ("BF16", "F16", "F32", "F64") for b in DTYPES if a != b])
def test_conversions(base: str, out: str, machine: str) -> None:
    for form in ("lora", "dora0-lora", "replace"):
        updates = weighted(Target("l.weight", (6, 4)), (make_update(form, (6, 4), Maker(4)), 1.0))
        there_and_back(values(6, 4, dtype=base), updates, out, MACHINES[machine]())
    there_and_back(values(6, 4, dtype=base), (), out)  # no update at all: only the dtype


@machines
def test_several_updates_with_weights(machine: str) -> None:
    forms = ["lora", "loha", "lokr-both", "add", "lora", "replace"]
    made = [make_update(form, (24, 16), Maker(n, "F16"), rank=4) for n, form in enumerate(forms)]
    updates = weighted(Target("l.weight", (24, 16)), *zip(made, [1.0, -0.5, 0.3, 2.0, -1.0, 0.5], strict=True))
    for dtype in DTYPES:
        there_and_back(values(24, 16, dtype=dtype), updates, wrong=MACHINES[machine]())


@machines
@pytest.mark.parametrize("weight", [0.5, -0.5, 2.0, 1e-3])
def test_dora_with_a_weight(weight: float, machine: str) -> None:
    for axis in (0, 1):
        updates = weighted(Target("l.weight", (48, 32)), (make_update(f"dora{axis}-lora", (48, 32), Maker(5)), weight))
        there_and_back(values(48, 32), updates, wrong=MACHINES[machine]())


@machines
def test_dora_whose_weight_nearly_cancels(machine: str) -> None:
    """W' = (1 - w) W + w f (W + D), and (1 - w) + w f can be next to nothing: the band must say how much it hides."""
    B, A = values(64, 4, dtype="F32", std=0.02), values(4, 256, dtype="F32", std=0.1, seed=4)
    W = values(64, 256, std=0.02)
    norm = (W.float() + B @ A).norm(dim=1)
    for weight, share in ((2.0, 0.5), (0.5, -1.0), (-1.0, 2.0)):
        for nearly in (1.0, 1.0 + 2.0**-18, 1.0 + 2.0**-12):
            magnitude = norm * share * nearly
            update = Dora(Lora(TensorRef.of(A), TensorRef.of(B), Scaling(rank=4)), TensorRef.of(magnitude), 0)
            there_and_back(W, weighted(Target("l.weight", (64, 256)), (update, weight)), wrong=MACHINES[machine]())


@machines
def test_rows_and_experts(machine: str) -> None:
    make = Maker(6, experts=3)
    W = values(3, 6, 4)
    every = Targeted(Target("l.weight", (3, 6, 4), experts=3), make_update("dora0-lora", (6, 4), make))
    with small_blocks(16):
        there_and_back(W, (Weighted(every, 0.5),), wrong=MACHINES[machine]())
        some = tuple(
            Weighted(Targeted(Target("l.weight", (3, 6, 4), rows, n), make_update(form, region, Maker(n))), 1.0)
            for n, rows, region, form in [(0, (1, 3), (2, 4), "lora"), (2, None, (6, 4), "dora1-loha")]
        )
        there_and_back(W, some, wrong=MACHINES[machine]())
        fused = tuple(
            Weighted(Targeted(Target("l.weight", (6, 4), rows), make_update(form, (rows[1] - rows[0], 4), Maker(9))), w)
            for rows, form, w in [((0, 2), "lora", 1.0), ((3, 4), "dora0-lora", 0.5), ((4, 6), "replace", 0.25)]
        )
        there_and_back(values(6, 4), fused, wrong=MACHINES[machine]())


def test_an_expert_that_nothing_touches_keeps_its_nan_payloads() -> None:
    bits = torch.tensor([0x7FC1, -1, 0x7F80, -0x80, 0x7F81, 0, -0x8000, 1], dtype=torch.int16)
    W = torch.stack([bits.view(torch.bfloat16).reshape(2, 4), values(2, 4)])
    target = Target("l.weight", (2, 2, 4), expert=1)
    there_and_back(W, (Weighted(Targeted(target, make_update("lora", (2, 4), Maker(1))), 1.0),))


# --- numbers that are hard ------------------------------------------------------------------------------------------

HARD = {
    "BF16": [0.0, -0.0, 1e-40, -1e-40, 2.0**-133, 2.0**-126, 3e38, -3e38, 1.0, 1.0078125, -0.99609375, 65504.0],
    "F16": [0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, 6e4, -6e4, 65440.0, 1.0, 1.0009765625, 2047.0, 1e-7],
    "F32": [0.0, -0.0, 1e-45, -1e-45, 2.0**-126, 3e38, -3e38, 1.0, 1.0 + 2.0**-23, -1.0 + 2.0**-24, 1e-38, 16777216.0],
}


@machines
@pytest.mark.parametrize("dtype", HARD)
def test_hard_numbers(dtype: str, machine: str) -> None:
    """Zeros of both signs, subnormals, the largest ones; deltas of 0, half a unit, a little more or less."""
    W = torch.tensor(HARD[dtype], dtype=torch.float64).to(DTYPES[dtype]).repeat(16, 1)
    unit = torch.finfo(DTYPES[dtype]).eps
    half = (W.double().abs() * unit / 2).float()
    # also the very multiples of half a unit of each number: their sums lie on the boundaries
    _, exponent = torch.frexp(W.double())
    exact = torch.ldexp(torch.full_like(W, 0.5, dtype=torch.float64), exponent - 1 + torch.frexp(torch.tensor(unit))[1])
    deltas = [torch.zeros_like(half), -torch.zeros_like(half), half, -half, exact.float(), -exact.float(), 1.5 * half]
    deltas += [torch.nextafter(d, torch.full_like(d, e)) for d in (half, exact.float()) for e in (0.0, 1e30)]
    for value in deltas:
        update = Add(TensorRef.of(value.float() * 0.25), Scaling(scale=1.0))
        there_and_back(W, weighted(Target("l.weight", tuple(W.shape)), (update, 4.0)), wrong=MACHINES[machine]())


@machines
def test_a_zero_of_either_sign_is_no_difference_between_machines(machine: str) -> None:
    """Whether 0 * -1 + 0 * 1 is +0 or -0 depends on the kernel."""
    W = torch.tensor([[0.0, -0.0, 1.0, -1.0]] * 4, dtype=torch.bfloat16)
    for sign in (1.0, -1.0):
        update = Lora(TensorRef.of(torch.ones(1, 4)), TensorRef.of(torch.zeros(4, 1) * sign), Scaling(rank=1))
        updates = weighted(Target("l.weight", (4, 4)), (update, 1.0))
        there_and_back(W, updates, wrong=MACHINES[machine]())
        flipped = moving(lambda p: torch.where(p == 0, -p, p))
        there_and_back(W, updates, wrong=flipped)


def test_subnormals_are_flushed_or_not() -> None:
    """One machine has gradual underflow, the other flushes: the band has an absolute part."""
    W = torch.tensor([[0.0, 2.0**-133, -(2.0**-133), 2.0**-126, -(2.0**-130), 2.0**-127, 1e-37, 1.0]] * 8)
    W = W.to(torch.bfloat16)
    B, A = values(8, 2, dtype="F32", std=1e-20), values(2, 8, dtype="F32", std=1e-19)
    for scale in (1.0, 1e-3, 0.1):
        update = Lora(TensorRef.of(A), TensorRef.of(B), Scaling(rank=2, scale=scale))
        updates = weighted(Target("l.weight", (8, 8)), (update, 1.0))
        flushing = moving(lambda p: torch.where(p.abs() < torch.finfo(p.dtype).tiny, p * 0.0, p))
        for wrong in (flushing, *(make() for make in MACHINES.values())):
            there_and_back(W, updates, wrong=wrong)


def extreme(B: float, A: float) -> Update:
    """Factors whose squares leave float32, while their product is an ordinary number."""
    rows, columns = values(64, 2, dtype="F32"), values(2, 64, dtype="F32", seed=4)
    return Lora(TensorRef.of(columns * A), TensorRef.of(rows * B), Scaling(rank=2))


@machines
@pytest.mark.parametrize(("B", "A"), [(1e-25, 1e25), (1e25, 1e-25), (1e-19, 1e19)])
def test_factors_whose_squares_leave_float32(B: float, A: float, machine: str) -> None:
    updates = weighted(Target("l.weight", (64, 64)), (extreme(B, A), 1.0))
    there_and_back(values(64, 64), updates, wrong=MACHINES[machine]())
    predicted, band, truth = predictions(values(64, 64), updates)
    assert bool(((predicted - truth).abs() <= band).all())


def test_a_band_of_nan_makes_literals() -> None:
    true = torch.tensor([1.0, 3.38e38, -0.0, 5e-324], dtype=torch.float64).to(torch.bfloat16)
    for bad in (torch.nan, torch.inf):
        predicted = true.float() * 1.25
        block = undo.encode_block(true, predicted, torch.full((4,), bad))
        for other in (predicted, predicted * 2, torch.full((4,), torch.nan)):
            assert raw(undo.decode_block(block, other.clone(), torch.bfloat16)) == raw(true)


@given(data=st.data())
def test_a_block_is_what_it_was(data: st.DataObject) -> None:
    """Any bits, any prediction within the band, any dtype."""
    dtype = DTYPES[data.draw(st.sampled_from(tuple(DTYPES)))]
    width = torch.finfo(dtype).bits
    ints = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    count = data.draw(st.integers(0, 40))
    some = st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    true = torch.tensor(data.draw(st.lists(some, min_size=count, max_size=count)), dtype=ints).view(dtype)
    compute = torch.float32 if width == 16 else torch.float64
    shift = torch.tensor(data.draw(st.lists(st.integers(-140, 140), min_size=count, max_size=count)), dtype=ints)
    near = (true.view(ints) + shift).view(dtype).to(compute)
    predicted = near + near.abs() * torch.finfo(dtype).eps * data.draw(st.sampled_from((0.0, 0.5, 0.25, -0.5)))
    band = predicted.abs() * data.draw(st.sampled_from((0.0, 1e-7, 1e-3)))
    block = undo.encode_block(true, predicted.clone(), band.clone())
    for share in (0.0, 1.0, -1.0, 0.3):
        other = torch.where(band > 0, predicted + band * share, predicted)
        assert raw(undo.decode_block(block, other, dtype)) == raw(true)


# --- the band -------------------------------------------------------------------------------------------------------


def predictions(W: Tensor, updates: tuple[Weighted, ...], dtype: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Of one whole merged matrix: predicted and band in the compute dtype, and the prediction in float64."""
    merged, record = merge_tensor(W, updates, dtype)
    ref = TensorRef.of(merged)
    tensor = NewTensor("l.weight", ref, TensorRef.of(W).dtype, ref.shape, updates)
    made = []
    for force in (None, "F64"):
        with pytest.MonkeyPatch.context() as patch:
            if force:
                patch.setattr(blocks, "compute_dtype", lambda tensor: "F64")
            opened = [blocks._open(w, tensor, 0, len(W)) for w in blocks._ordered(tensor, 0)]
            norms = iter(record.norms)
            for update in opened:
                if hasattr(update.block, "norm"):
                    update.block.norm = next(norms).read()
            rows = merged.reshape(len(W), -1).to(DTYPES[blocks.compute_dtype(tensor)])
            made.append(blocks._predict(tensor, opened, rows, torch.empty_like(rows), 0, len(W)))
    (predicted, band), (truth, _) = made
    return predicted.double(), band.double(), truth.double()


def test_the_band_grows_with_the_number_of_updates() -> None:
    """Each subtraction rounds a number as large as the prediction."""
    count = 60
    made = [Add(TensorRef.of(values(32, 32, dtype="F32", std=1e-9, seed=n)), Scaling()) for n in range(count)]
    updates = weighted(Target("l.weight", (32, 32)), *((update, 1.0) for update in made))
    _, band, truth = predictions(values(32, 32), updates)
    assert bool((band >= 2 * count * 2.0**-24 * truth.abs()).all())


# --- files ----------------------------------------------------------------------------------------------------------


def round_trip(base: Path, parts: Parts, folder: Path, merging: Any = None, unmerging: Any = None) -> Path:
    """Merge with a record, unmerge without the base; the report and the bits say that it is exact."""
    out, record, back = folder / "out", folder / "r.undo.safetensors", folder / "back"
    if base.is_file():
        out, back = folder / "out.safetensors", folder / "back.safetensors"
    loratool.merge(base, parts, out, undo=record, **(merging or {}))
    report = loratool.unmerge(out, [adapter for adapter, _ in parts], back, undo=record, **(unmerging or {}))
    assert report.exact
    assert report.to_json()["error_bound"] == 0
    assert not [path for path in folder.iterdir() if ".partial-" in path.name]
    return back


@settings(max_examples=30)
@given(case=cases(), seed=seeds, data=st.data())
def test_any_adapters(case: Case, seed: int, data: st.DataObject, fresh: Fresh) -> None:
    folder = fresh()
    base = save_sharded(case.base, folder / "base", data.draw(st.sampled_from((1, 2))))
    weight = data.draw(st.sampled_from((1.0, 0.5, -1.0, 0.0, 0.3, 2.0)))
    dtype = data.draw(st.sampled_from(("keep", "keep", "bf16", "fp16", "fp32")))
    with small_blocks(data.draw(st.sampled_from((8, 32, 1 << 20)))):
        back = round_trip(base, [(case.adapter, weight)], folder, {"dtype": dtype})
    assert same_bits(tensors_of(back), case.base)


def test_several_adapters_at_once(tmp_path: Path) -> None:
    state = {"a.weight": values(16, 8), "b.weight": values(16, 8, dtype="F16"), "c.weight": values(16, 8, dtype="F32")}
    base = save_sharded(state, tmp_path / "base", 2)
    parts: list[tuple[Adapter, float]] = []
    for n, (form, weight) in enumerate([("lora", 1.0), ("loha", -0.5), ("lokr", 0.0), ("add", 2.0)]):
        items = [
            Targeted(Target(name, (16, 8)), make_update(form, (16, 8), Maker(n))) for name in ("a.weight", "c.weight")
        ]
        parts.append((Adapter(tuple(items)), weight))
    parts.append((one("dora0-lora", (16, 8), seed=8, name="b.weight"), 0.5))
    for dtype in ("keep", "bf16", "fp16", "fp32"):
        folder = tmp_path / dtype
        folder.mkdir()
        back = round_trip(base, parts, folder, {"dtype": dtype})
        assert same_bits(tensors_of(back), state)


def test_replaced_resized_and_new_tensors(tmp_path: Path) -> None:
    state = {
        "embed.weight": values(10, 4),
        "head.weight": values(6, 4, dtype="F16"),
        "norm.weight": values(4, dtype="F32"),
    }
    state["scalar"] = values()
    base = save_sharded(state, tmp_path / "base")
    index = torch.tensor([0, 3, 9])
    adapter = Adapter(
        (
            Targeted(Target("embed.weight", (10, 4)), ReplaceRows(TensorRef.of(index), TensorRef.of(values(3, 4)))),
            Targeted(Target("head.weight", (8, 4)), Replace(TensorRef.of(values(8, 4, dtype="F32")))),  # resized
            Targeted(Target("new.weight", (2, 2)), Replace(TensorRef.of(values(2, 2, dtype="F32")))),
            Targeted(Target("norm.weight", (4,)), Replace(TensorRef.of(values(4, dtype="F32", seed=8)))),
            Targeted(Target("scalar", ()), Replace(TensorRef.of(values(dtype="F32", seed=9)))),
        )
    )
    back = round_trip(base, [(adapter, 1.0)], tmp_path, {"allow_new": True})
    assert same_bits(tensors_of(back), state)
    assert tensors_of(tmp_path / "out")["head.weight"].shape == (8, 4)


@pytest.mark.parametrize("legacy", [False, True])
def test_tied_pickles(tmp_path: Path, legacy: bool) -> None:
    shared = values(10, 4, dtype="F32")
    state = {"embed.weight": shared, "head.weight": shared, "l.weight": values(6, 4)}
    torch.save(state, tmp_path / "base.pt", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "base").mkdir()
    (tmp_path / "base.pt").rename(tmp_path / "base" / "pytorch_model.bin")
    both = Adapter((*TINY.updates, *one("lora", (10, 4), name="embed.weight").updates))
    try:
        back = round_trip(tmp_path / "base", [(both, 1.0)], tmp_path)
    except loratool.Mismatch as error:  # tied tensors may ask for more; then there is nothing to undo
        pytest.fail(str(error))
    assert same_bits(tensors_of(back), {name: value.clone() for name, value in state.items()})


def test_single_files(tmp_path: Path) -> None:
    save_file({"l.weight": values(6, 4), "z": values(3)}, tmp_path / "base.safetensors", metadata={"format": "pt"})
    back = round_trip(tmp_path / "base.safetensors", [(TINY, 1.0)], tmp_path)
    assert back.read_bytes() == (tmp_path / "base.safetensors").read_bytes()


def test_one_and_four_threads(tmp_path: Path) -> None:
    """Of the merge, and of torch: another split of the GEMM, and another order of the blocks."""
    state = {f"l.{n}.weight": values(96, 80, seed=n) for n in range(6)}
    base = save_sharded(state, tmp_path / "base", 2)
    items = [
        Targeted(Target(name, (96, 80)), make_update("lora", (96, 80), Maker(n), 8)) for n, name in enumerate(state)
    ]
    parts = [(Adapter(tuple(items)), 0.7)]
    records, threads = [], torch.get_num_threads()
    try:
        for first, second in ((1, 4), (4, 1)):
            folder = tmp_path / f"{first}"
            folder.mkdir()
            torch.set_num_threads(first)
            with small_blocks(4096):
                loratool.merge(base, parts, folder / "out", undo=folder / "undo", threads=first)
                torch.set_num_threads(second)
                back = loratool.unmerge(
                    folder / "out", [parts[0][0]], folder / "back", undo=folder / "undo", threads=second
                )
            assert back.exact
            assert same_bits(tensors_of(folder / "back"), state)
            records.append((folder / "undo").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert records[0] == records[1]


def test_merge_and_unmerge_may_use_other_block_sizes(tmp_path: Path) -> None:
    base = save_sharded({"l.weight": values(6, 4)}, tmp_path / "base")
    with small_blocks(16):
        loratool.merge(base, TINY, tmp_path / "out", undo=tmp_path / "undo")
    loratool.unmerge(tmp_path / "out", TINY, tmp_path / "back", undo=tmp_path / "undo")
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(base))


def test_a_thousand_cycles() -> None:
    """Each base that came back goes into the next merge."""
    W = first = values(12, 8, std=0.02)
    target = Target("l.weight", (12, 8))
    updates = [weighted(target, (make_update(form, (12, 8), Maker(n)), 0.7)) for n, form in enumerate(FORMS)]
    digest = blake3(raw(first)).hexdigest()
    for n in range(1000):
        used = updates[n % len(updates)]
        merged, record = merge_tensor(W, used)
        assert raw(merged) != raw(W)
        W = unmerge_tensor(merged, record, used, "BF16")
    assert blake3(raw(W)).hexdigest() == digest


def test_cycles_of_files(tmp_path: Path) -> None:
    base = first = save_sharded({"l.weight": values(6, 4)}, tmp_path / "base")
    for n in range(20):
        folder = tmp_path / f"{n}"
        folder.mkdir()
        base = round_trip(base, [(TINY, 1.0)], folder)
        assert tree(base) == tree(first)


# --- damaged and foreign records -------------------------------------------------------------------------------------


class Made:
    """A small merge with its record, to damage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = {"l.weight": values(6, 4, std=0.02), "m.weight": values(6, 4, std=0.02, seed=9)}
        self.base = save_sharded(self.state, folder / "base")
        items = [
            Targeted(Target("l.weight", (6, 4)), make_update("lora", (6, 4), Maker(1))),
            Targeted(Target("m.weight", (6, 4)), make_update("dora0-lora", (6, 4), Maker(2))),
        ]
        self.adapter = Adapter(tuple(items))
        self.merged, self.record = folder / "merged", folder / "merged.undo.safetensors"
        with small_blocks(24):
            loratool.merge(self.base, self.adapter, self.merged, undo=self.record)
        self.bytes = self.record.read_bytes()
        self.header, self.data = opened(self.bytes)

    @property
    def manifest(self) -> dict[str, Any]:
        document = json.loads(self.header["__metadata__"]["loratool.undo"])
        assert isinstance(document, dict)
        return document

    def with_manifest(self, manifest: object) -> bytes:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        return container({**self.header, "__metadata__": {"loratool.undo": text}}, self.data)

    def with_tensors(self, tensors: Mapping[str, tuple[str, bytes]], manifest: object) -> bytes:
        """A record of other stored tensors, each (dtype, bytes)."""
        header: dict[str, Any] = {"__metadata__": {"loratool.undo": json.dumps(manifest)}}
        data = b""
        for name, (dtype, content) in tensors.items():
            shape = [len(content) // (8 if dtype == "F64" else 1)]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        return container(header, data)

    def stored(self) -> dict[str, tuple[str, bytes]]:
        found = {}
        for name, entry in self.header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found[name] = (entry["dtype"], self.data[start:stop])
        return found

    def with_blocks(self, name: str, contents: Sequence[bytes]) -> bytes:
        manifest, stored = self.manifest, self.stored()
        manifest["tensors"][name]["blocks"] = [len(content) for content in contents]
        stored[f"{name}.blocks"] = ("U8", b"".join(contents))
        return self.with_tensors(stored, manifest)

    def blocks_of(self, name: str) -> list[bytes]:
        content, found = self.stored()[f"{name}.blocks"][1], []
        for size in self.manifest["tensors"][name]["blocks"]:
            found.append(content[:size])
            content = content[size:]
        return found

    def outcome(self, content: bytes, adapter: Adapter | None = None, merged: Path | None = None) -> str:
        """The error's code, or "exact"; fails if something wrong was written, or anything left behind."""
        path, back = self.folder / "bad.undo.safetensors", self.folder / "back"
        path.write_bytes(content)
        try:
            loratool.unmerge(merged or self.merged, adapter or self.adapter, back, undo=path)
        except LoratoolError as error:
            assert not back.exists()
            assert not [p for p in self.folder.iterdir() if ".partial-" in p.name]
            return error.code
        assert same_bits(tensors_of(back), self.state), "wrong bytes were written"
        for part in back.iterdir():
            part.unlink()
        back.rmdir()
        return "exact"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def test_the_record_restores(made: Made) -> None:
    assert made.outcome(made.bytes) == "exact"
    assert made.outcome(made.with_blocks("l.weight", made.blocks_of("l.weight"))) == "exact"


def test_no_truncated_record_restores(made: Made) -> None:
    for length in range(0, len(made.bytes), 3):
        assert made.outcome(made.bytes[:length]) != "exact"
    for more in (b"\0", b" " * 8):
        assert made.outcome(made.bytes + more) != "exact"


def test_a_record_of_another_merge(made: Made, tmp_path: Path) -> None:
    loratool.merge(made.base, [(made.adapter, 0.5)], tmp_path / "out", undo=tmp_path / "undo")
    assert made.outcome((tmp_path / "undo").read_bytes()) == "E-UNDO"
    other = replace(made.adapter, updates=made.adapter.updates[:1])
    assert made.outcome(made.bytes, adapter=other) == "E-RECEIPT"
    assert made.outcome(made.bytes, merged=made.base) == "E-RECEIPT"
    assert made.outcome(made.bytes, merged=tmp_path / "out") in ("E-UNDO", "E-RECEIPT")
    assert made.outcome((made.merged / "model.safetensors").read_bytes()) == "E-UNDO"  # no record at all


def test_swapped_tensors(made: Made) -> None:
    stored, manifest = made.stored(), made.manifest
    stored["l.weight.blocks"], stored["m.weight.blocks"] = stored["m.weight.blocks"], stored["l.weight.blocks"]
    entries = manifest["tensors"]
    entries["l.weight"]["blocks"], entries["m.weight"]["blocks"] = (
        entries["m.weight"]["blocks"],
        entries["l.weight"]["blocks"],
    )
    assert made.outcome(made.with_tensors(stored, manifest)) in ("E-UNDO", "E-NOT-EXACT")
    manifest = made.manifest
    entries = manifest["tensors"]
    entries["l.weight"], entries["m.weight"] = entries["m.weight"], entries["l.weight"]
    assert made.outcome(made.with_manifest(manifest)) == "E-UNDO"
    contents = made.blocks_of("l.weight")
    assert made.outcome(made.with_blocks("l.weight", contents[::-1])) in ("E-UNDO", "E-NOT-EXACT")


JUNK = [None, True, -1, 1.5, 2**53, 2**70, 10**400, "1", "", [], {}, [None], [[]], ["x"], [1, -1], {"a": 1}]


def test_lying_numbers(made: Made) -> None:
    for key, lies in {
        "height": [0, 1, 5, 1000],
        "norms": [1, 2, 2**40],
        "blocks": [[], [0], [1], [2**52, 2**52], made.manifest["tensors"]["l.weight"]["blocks"] + [0]],
        "shape": [[4, 6], [24], [6, 4, 1], [2**40, 2**40], [6]],
        "dtype": ["F16", "U8", "I16", "F4", "XX"],
        "base": ["", "blake3:" + "0" * 64],
    }.items():
        for lie in lies:
            manifest = made.manifest
            manifest["tensors"]["l.weight"][key] = lie
            assert made.outcome(made.with_manifest(manifest)) in ("E-UNDO", "E-NOT-EXACT"), (key, lie)
    manifest = made.manifest
    manifest["tensors"]["m.weight"]["norms"] = 0
    assert made.outcome(made.with_manifest(manifest)) == "E-UNDO"
    manifest = made.manifest
    manifest["tensors"]["x.weight"] = manifest["tensors"]["l.weight"]
    assert made.outcome(made.with_manifest(manifest)) == "E-UNDO"
    del manifest["tensors"]["x.weight"], manifest["tensors"]["l.weight"]
    assert made.outcome(made.with_manifest(manifest)) == "E-UNDO"


def test_lying_norms(made: Made) -> None:
    dtype, content = made.stored()["m.weight.norm.0"]
    for bad in (content[:-8], content + bytes(8), bytes(48), b"\xff" * 48, content[8:] + content[:8]):
        stored = {**made.stored(), "m.weight.norm.0": (dtype, bad)}
        assert made.outcome(made.with_tensors(stored, made.manifest)) in ("E-UNDO", "E-NOT-EXACT")
    stored = {**made.stored(), "m.weight.norm.0": ("U8", content)}
    assert made.outcome(made.with_tensors(stored, made.manifest)) == "E-UNDO"
    for name in ("stray", "m.weight.norm.1"):
        stored = {**made.stored(), name: ("U8", b"x")}
        assert made.outcome(made.with_tensors(stored, made.manifest)) == "E-UNDO"


def plain_of(content: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(content)


def test_lying_blocks(made: Made) -> None:
    """Blocks that are sound zstd, and nothing else: counts, masks and streams that contradict each other."""
    first, *rest = made.blocks_of("l.weight")
    plain = plain_of(first)
    lies = [b"", plain[:4], plain[:8], plain[:-1], plain + b"\0", b"\xff" * 8 + plain[8:], bytes(8) + plain[8:]]
    lies += [bytes([*plain[:8], plain[8] ^ 0xFF, *plain[9:]]), bytes(len(plain)), b"\xff" * len(plain)]
    lies += [plain[:4] + b"\xff\xff\xff\x7f" + plain[8:], plain + b"\x80" * 24]
    for lie in lies:
        for level in (1, 19):
            content = zstandard.ZstdCompressor(level=level).compress(lie)
            assert made.outcome(made.with_blocks("l.weight", [content, *rest])) in ("E-UNDO", "E-NOT-EXACT")
    for content in (b"", b"\0", first[:-1], first[1:], b"\x28\xb5\x2f\xfd", first * 2, first + b"x"):
        assert made.outcome(made.with_blocks("l.weight", [content, *rest])) in ("E-UNDO", "E-NOT-EXACT"), content
    for content in ([first], [first, *rest, first], [first, *rest, b""]):
        assert made.outcome(made.with_blocks("l.weight", content)) == "E-UNDO"


def test_a_difference_that_leads_out_of_the_dtype() -> None:
    predicted = torch.full((8,), -torch.nan).float()
    for step in (127, -127):
        plain = undo._COUNTS.pack(8, 0) + b"\xff" + bytes([step & 0xFF]) * 8
        for top in (torch.full((8,), torch.nan), -torch.full((8,), torch.nan), predicted):
            try:
                undo.decode_block(zstandard.ZstdCompressor().compress(plain), top.clone(), torch.bfloat16)
            except ValueError:
                continue


SPEC = Path(__file__).parent.parent / "spec"
VECTORS = json.loads((SPEC / "vectors" / "undo-1.0" / "blocks.json").read_text())


def guess_of(case: Any) -> tuple[Tensor, str]:
    """A vector's prediction in the compute dtype, and the dtype's name."""
    width = len(case["guess"][0]) // 2 if case["guess"] else 2
    data = b"".join(int(text, 16).to_bytes(width, "little") for text in case["guess"])
    guess = of_bytes(data, DTYPES[case["dtype"]], (len(case["guess"]),))
    return guess.to(torch.float32 if width == 2 else torch.float64), case["dtype"]


@pytest.mark.parametrize("case", VECTORS["valid"], ids=lambda case: case["name"])
def test_valid_blocks_of_the_spec(case: Any) -> None:
    guess, dtype = guess_of(case)
    restored = undo.decode_block(bytes.fromhex(case["block"]), guess, DTYPES[dtype])
    width = restored.element_size()
    assert raw(restored) == b"".join(int(text, 16).to_bytes(width, "little") for text in case["restored"])


@pytest.mark.parametrize("case", VECTORS["invalid"], ids=lambda case: case["name"])
def test_invalid_blocks_of_the_spec(case: Any) -> None:
    guess, dtype = guess_of(case)
    with pytest.raises(ValueError, match=r"."):  # what `restore` turns into E-UNDO
        undo.decode_block(bytes.fromhex(case["block"]), guess, DTYPES[dtype])


def test_the_vectors_are_those_of_their_generator() -> None:
    call = [sys.executable, str(SPEC / "vectors" / "generate_undo.py"), "--check"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema(made: Made) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((SPEC / "schema" / "undo-1.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert not [*validator.iter_errors(made.manifest)]
    for key in made.manifest:
        assert [*validator.iter_errors({**made.manifest, key: None})]
    for key in made.manifest["tensors"]["l.weight"]:
        for junk in (None, -1, 1.5, "x"):
            manifest = made.manifest
            manifest["tensors"]["l.weight"][key] = junk
            assert [*validator.iter_errors(manifest)], (key, junk)


def test_every_rule_of_the_spec_has_a_vector_or_a_waiver() -> None:
    text = (SPEC / "UNDO.md").read_text()
    rules = set(re.findall(r"\*\*(U-\d{3})\*\*", text))
    waived = text.split("### Waivers")[1].split("| rule | why |")[1]
    named: set[str] = set()
    for first, last in re.findall(r"(U-\d{3})(?: to (U-\d{3}))?", waived):
        named |= {rule for rule in rules if first <= rule <= (last or first)}
    assert rules == named | {case["rule"] for case in VECTORS["invalid"]}


HUGE = 1 << 30


def bombs() -> dict[str, bytes]:
    compressor = zstandard.ZstdCompressor(level=3)
    streamed = zstandard.ZstdCompressor(level=3).compressobj()
    unsized = b"".join(streamed.compress(bytes(1 << 20)) for _ in range(1024)) + streamed.flush()
    lying = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\0\0"
    return {"sized": compressor.compress(bytes(HUGE)), "unsized": unsized, "lying": lying}


def test_a_bomb_takes_no_memory(made: Made, tmp_path: Path) -> None:
    _, *rest = made.blocks_of("l.weight")
    found = bombs()
    for name, bomb in found.items():
        (tmp_path / name).write_bytes(made.with_blocks("l.weight", [bomb, *rest]))
    script = """
        import json, resource, sys
        from pathlib import Path
        import torch, zstandard, loratool
        from loratool.errors import LoratoolError
        base, adapter, folder, *names = sys.argv[1:]
        loratool.unmerge(base, adapter, Path(folder) / "warm", undo=base + ".undo.safetensors")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        codes = []
        for name in names:
            try:
                loratool.unmerge(base, adapter, Path(folder) / "back", undo=Path(folder) / name)
            except LoratoolError as error:
                codes.append(error.code)
            except MemoryError:
                codes.append("MemoryError")
        print(json.dumps([codes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
    """
    saved = tmp_path / "a.lora.safetensors"
    loratool.save(made.adapter, saved)
    call = [sys.executable, "-c", textwrap.dedent(script), str(made.merged), str(saved), str(tmp_path), *found]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    codes, grown = json.loads(done.stdout)
    assert codes == ["E-UNDO"] * len(found)
    assert grown < 64 << 10, "KiB: no more than the block's own size is needed"
    assert not (tmp_path / "back").exists()


def test_duplicate_keys(made: Made) -> None:
    text = json.dumps(made.manifest)
    for key in ("format", "receipt", "tensors", "l.weight", "height", "blocks"):
        twice = text.replace(f'"{key}":', f'"{key}": 1, "{key}":', 1)
        assert made.outcome(made.with_manifest(twice)) == "E-DUPLICATE", key
    escaped = text.replace('"receipt":', '"rec\\u0065ipt": "x", "receipt":')
    assert made.outcome(made.with_manifest(escaped)) == "E-DUPLICATE"


def test_versions(made: Made) -> None:
    for version in ("2.0", "0.9", "10.0", "", "11.0"):
        assert made.outcome(made.with_manifest({**made.manifest, "version": version})) == "E-VERSION", version


# --- what a merge refuses, and what it leaves behind ------------------------------------------------------------------


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save_sharded({"l.weight": values(6, 4)}, tmp_path / "base")
    loratool.save(TINY, tmp_path / "a.lora.safetensors")
    return tmp_path


def test_an_existing_record_is_refused_first(work: Path) -> None:
    (work / "undo").write_text("mine")
    with pytest.raises(LoratoolError) as caught:
        loratool.merge(work / "base", TINY, work / "out", undo=work / "undo")
    assert caught.value.code == "E-EXISTS"
    assert (work / "undo").read_text() == "mine"
    assert left(work) == {"base", "a.lora.safetensors", "undo"}


@pytest.mark.parametrize("where", ["out", "out/undo", "missing/undo", "x/../out"])
def test_places_where_a_record_can_not_be(work: Path, where: str) -> None:
    (work / "x").mkdir()
    with pytest.raises(LoratoolError):
        loratool.merge(work / "base", TINY, work / "out", undo=work / where)
    assert left(work) == {"base", "a.lora.safetensors", "x"}


def test_no_digests_no_record(work: Path, cli: Cli) -> None:
    with pytest.raises(LoratoolError):
        loratool.merge(work / "base", TINY, work / "out", undo=work / "undo", digests=False)
    done = cli(
        "merge", work / "base", work / "a.lora.safetensors", "-o", work / "out", "--undo", work / "u", "--no-digests"
    )
    assert done.code == 2
    assert left(work) == {"base", "a.lora.safetensors"}


def test_the_command_line(work: Path, cli: Cli) -> None:
    adapter = work / "a.lora.safetensors"
    assert cli("merge", work / "base", adapter, "-o", work / "out", "--undo", work / "u").code == 0
    done = cli("unmerge", work / "out", adapter, "--undo", work / "u", "-o", work / "back", "--json", "--exact")
    assert done.code == 0
    assert done.json["exact"] is True
    assert same_bits(tensors_of(work / "back"), tensors_of(work / "base"))
    both = cli("unmerge", work / "out", adapter, "--undo", work / "u", "--base", work / "base", "-o", work / "b2")
    assert both.code == 2
    assert not (work / "b2").exists()


def test_a_failing_merge_leaves_no_record(work: Path) -> None:
    huge = Adapter(
        (Targeted(Target("l.weight", (6, 4)), Add(TensorRef.of(torch.full((6, 4), 1e38)), Scaling(scale=100.0))),)
    )
    with pytest.raises(LoratoolError) as caught:
        loratool.merge(work / "base", huge, work / "out", undo=work / "undo")
    assert caught.value.code == "E-NONFINITE"

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loratool.merge(work / "base", TINY, work / "out", undo=work / "undo", progress=stop)
    assert left(work) == {"base", "a.lora.safetensors"}


@pytest.mark.parametrize("place", ["add", "finish"])
def test_a_record_that_can_not_be_written_leaves_no_merge(
    work: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(undo.UndoWriter, place, full)
    with pytest.raises(LoratoolError):
        loratool.merge(work / "base", TINY, work / "out", undo=work / "undo")
    assert left(work) == {"base", "a.lora.safetensors"}


def test_a_record_taken_meanwhile_leaves_no_merge(work: Path) -> None:
    with pytest.raises(LoratoolError) as caught:
        loratool.merge(
            work / "base", TINY, work / "out", undo=work / "undo", progress=lambda _: (work / "undo").write_text("mine")
        )
    assert caught.value.code == "E-EXISTS"
    assert (work / "undo").read_text() == "mine"
    assert left(work) == {"base", "a.lora.safetensors", "undo"}


def test_a_failing_unmerge_leaves_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exact way back that is not exact is refused: here the prediction is far off."""
    loratool.merge(work / "base", TINY, work / "out", undo=work / "undo")
    for name, value in moving(lambda p: p * 1.1).items():
        monkeypatch.setattr(blocks, name, value)
    with pytest.raises(LoratoolError) as caught:
        loratool.unmerge(work / "out", TINY, work / "back", undo=work / "undo")
    assert caught.value.code in ("E-NOT-EXACT", "E-UNDO")
    assert not (work / "back").exists()


def test_records_are_the_same_every_time(work: Path) -> None:
    for name in ("1", "2"):
        loratool.merge(work / "base", TINY, work / f"out{name}", undo=work / name)
    assert (work / "1").read_bytes() == (work / "2").read_bytes()

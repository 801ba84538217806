"""The undo record: every bit of the base comes back, on any machine; and a damaged record is an error, never a base."""

from __future__ import annotations

import importlib
import io
import json
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import reference_undo
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
from loratool.rounding import bits
from loratool.updates import Add, Dora, Lora, Replace, ReplaceRows, Scale, Scaling, Update
from loratool.updates.lora import LoraBlock

blocks: ModuleType = importlib.import_module("loratool.blocks")
undoing: ModuleType = importlib.import_module("loratool.undoing")
rounding: ModuleType = importlib.import_module("loratool.rounding")
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


def merge_tensor(
    W: Tensor, updates: tuple[Weighted, ...], dtype: str = "", reproducible: bool = False
) -> tuple[Tensor, Held]:
    """Merge one tensor; return it with its record."""
    stored = TensorRef.of(W, "l.weight")
    recorder, out = undo.TensorRecorder(), io.BytesIO()
    tensor = NewTensor("l.weight", stored, dtype or stored.dtype, stored.shape, updates, True, stored)
    blocks.compute(tensor, out, lambda _: None, recorder=recorder, reproducible=reproducible)
    return of_bytes(out.getvalue(), DTYPES[tensor.dtype], W.shape), Held(recorder)


def unmerge_tensor(merged: Tensor, record: Held, updates: tuple[Weighted, ...], dtype: str) -> Tensor:
    ref, out = TensorRef.of(merged, "l.weight"), io.BytesIO()
    undoing.restore(NewTensor("l.weight", ref, dtype, ref.shape, updates), record, out, lambda _: None)
    return of_bytes(out.getvalue(), DTYPES[dtype], merged.shape)


def of_bytes(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


Patch = tuple[Any, str, Any]


@contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in patches:
            patch.setattr(owner, name, value)
        yield


def there_and_back(W: Tensor, updates: tuple[Weighted, ...], dtype: str = "", wrong: Sequence[Patch] = ()) -> Held:
    """Merge, unmerge (as another machine would, with `wrong`), and demand every bit."""
    merged, record = merge_tensor(W, updates, dtype)
    with patched(wrong):
        back = unmerge_tensor(merged, record, updates, TensorRef.of(W).dtype)
    assert (back.dtype, back.shape) == (W.dtype, W.shape)
    assert raw(back) == raw(W)
    return record


def moving(move: Moved) -> list[Patch]:
    """A machine whose arithmetic gives other last bits: `move` changes what float32 and float64 compute.

    A number that nothing was taken out of is only converted, which no machine does differently: in float32 such ones
    are left alone.
    """
    round_exactly, round_once = blocks.round_exactly, blocks.round_once

    def exactly(W: Tensor, band: Tensor, out: Tensor, low: Tensor, exact: Any, at_once: int) -> tuple[Tensor, Tensor]:
        W.copy_(move(W))
        found: tuple[Tensor, Tensor] = round_exactly(W, band, out, low, lambda at: move(exact(at)), at_once)
        return found

    def once(values: Tensor, out: Tensor) -> Tensor:
        rounded: Tensor = round_once(move(values) if values.dtype == torch.float64 else values, out)
        return rounded

    patches = (("round_exactly", exactly), ("round_once", once))
    return [(module, name, function) for module in (blocks, undoing) for name, function in patches]


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


def backwards() -> list[Patch]:
    """A machine that adds the terms of a product from the last to the first, one by one."""

    def apply(block: Any, W: Tensor, start: int, weight: float) -> None:
        B = block.B.rows(start, start + len(W))
        for r in reversed(range(B.shape[1])):
            W.add_(B[:, r : r + 1] * block.A[r], alpha=weight * block.scale)

    def apply_at(block: Any, values: Tensor, rows: Tensor, columns: Tensor, weight: float) -> None:
        B, A = block.B.at(rows).double(), block.A[:, columns].double()
        for r in reversed(range(len(A))):
            values.add_(B[:, r] * A[r], alpha=weight * block.scale)

    return [(LoraBlock, "apply", apply), (LoraBlock, "apply_at", apply_at)]


def float64() -> list[Patch]:
    return [(blocks, "compute_dtype", lambda tensor: "F64")]


def same() -> list[Patch]:
    return []


MACHINES: dict[str, Callable[[], list[Patch]]] = {
    "same": same,
    "one unit": lambda: moving(one_unit(7)),
    "all up": lambda: moving(up),
    "all down": lambda: moving(down),
    "float64": float64,
    "float64, all up": lambda: [*float64(), *moving(up)],
    "backwards": backwards,
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
@pytest.mark.parametrize("weight", [1.0, 0.5, -0.5, 2.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_with_a_weight(dtype: str, weight: float, machine: str) -> None:
    """Also where a factor takes all of a row or column away, nearly all of it, or turns it round."""
    for axis, length in enumerate((48, 32)):
        factor = values(length, dtype="F32") + 1
        whole = 1 - 1 / weight  # (1 - w) + w f = 0
        factor[:5] = torch.tensor([whole, 0.0, -1.0, whole + 2.0**-20, 2.0**-60])
        updates = weighted(Target("l.weight", (48, 32)), (Scale(TensorRef.of(factor), axis), weight))
        there_and_back(values(48, 32, dtype=dtype), updates, wrong=MACHINES[machine]())


def test_what_a_factor_of_zero_takes_away_is_all_that_is_stored_in_full() -> None:
    for axis, length in enumerate((48, 32)):
        factor = values(length, dtype="F32").abs() + 0.5
        factor[3] = 0
        seen = Seen(values(48, 32), weighted(Target("l.weight", (48, 32)), (Scale(TensorRef.of(factor), axis), 1.0)))
        marks = torch.zeros(48, 32, dtype=torch.bool)
        marks.view(-1)[seen.literal] = True
        assert marks.transpose(0, axis)[3].all()
        assert marks.sum() == 48 * 32 // length


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
        merged, record = merge_tensor(W, updates)
        try:
            torch.set_flush_denormal(True)  # where the processor can; the arithmetic of this thread, for real
            back = unmerge_tensor(merged, record, updates, "BF16")
        finally:
            torch.set_flush_denormal(False)
        assert raw(back) == raw(W)


def extreme(B: float, A: float) -> Update:
    """Factors whose squares leave float32, while their product is an ordinary number."""
    rows, columns = values(64, 2, dtype="F32"), values(2, 64, dtype="F32", seed=4)
    return Lora(TensorRef.of(columns * A), TensorRef.of(rows * B), Scaling(rank=2))


@machines
@pytest.mark.parametrize(("B", "A"), [(1e-25, 1e25), (1e25, 1e-25), (1e-19, 1e19)])
def test_factors_whose_squares_leave_float32(B: float, A: float, machine: str) -> None:
    updates = weighted(Target("l.weight", (64, 64)), (extreme(B, A), 1.0))
    there_and_back(values(64, 64), updates, wrong=MACHINES[machine]())


def test_a_band_that_is_not_finite_makes_literals() -> None:
    """And a prediction that is not: nothing is known of it."""
    update = Lora(TensorRef.of(torch.full((2, 8), 1e38)), TensorRef.of(torch.full((4, 2), 1e3)), Scaling(scale=1e-30))
    there_and_back(values(4, 8), weighted(Target("l.weight", (4, 8)), (update, 1e-8)), wrong=MACHINES["all up"]())
    numbers = torch.tensor([1.0, 2.0, torch.inf, torch.nan], dtype=torch.float64)
    for doubt, literal in ((0.0, [False, False, True, True]), (torch.nan, [True] * 4), (torch.inf, [True] * 4)):
        found = rounding.undecided(numbers, torch.full((4,), doubt, dtype=torch.float64), torch.bfloat16)
        assert found.tolist() == literal


@given(data=st.data())
def test_a_block_is_what_it_was(data: st.DataObject) -> None:
    """Any bits, any prediction, any dtype, any literals; and those may be predicted otherwise by the decoder."""
    dtype = data.draw(st.sampled_from(WIDTHS))
    width = torch.finfo(dtype).bits
    ints = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    count = data.draw(st.integers(0, 40))
    some = st.one_of(st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1), st.sampled_from((0, -1)))
    true = torch.tensor(data.draw(st.lists(some, min_size=count, max_size=count)), dtype=ints)
    shift = torch.tensor(data.draw(st.lists(st.integers(-128, 127), min_size=count, max_size=count)), dtype=ints)
    literal = torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1)))) if count else [], dtype=torch.int64)
    guess = (true + shift).view(dtype)
    block = undo.encode_block(true.view(dtype), guess, literal)
    assert guess.view(ints).equal(true + shift), "the prediction is only read"
    other = guess.view(ints).clone()
    other[literal] = ~other[literal]
    assert raw(undo.decode_block(block, other.view(dtype))) == raw(true)


WIDTHS = (*DTYPES.values(), torch.float8_e4m3fn)


def moved_by(guess: Tensor, steps: Sequence[int]) -> Tensor:
    """Each number so many neighbours further, by counting: no code of an integer is involved."""
    found = []
    for number, step in zip(guess, steps, strict=True):
        for _ in range(abs(step)):
            number = torch.nextafter(number, torch.tensor(torch.inf if step > 0 else -torch.inf, dtype=number.dtype))
        found.append(number)
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_differences_at_the_edge_of_a_byte(dtype: torch.dtype) -> None:
    steps = [-129, -128, -127, -126, -1, 0, 1, 126, 127, 128, 129]
    small = 60 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for start, far in ((1.0, 4), (-1.0, 4), (small, 5), (-small, 5)):  # -0 and +0 are one step each
        guess = torch.full((len(steps),), start, dtype=dtype)
        true = moved_by(guess, steps)
        block = undo.encode_block(true, guess, torch.empty(0, dtype=torch.int64))
        assert struct.unpack_from("<II", block) == (len(steps) - 1, far)
        assert raw(undo.decode_block(block, guess.clone())) == raw(true)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_differences_at_the_end_of_a_dtype(dtype: torch.dtype) -> None:
    """The ends are NaNs, which a prediction is where the merged number is one; no number lies behind them."""
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.empty(0, dtype=dtype).element_size()]
    top, low = torch.iinfo(ints).max, -1  # the patterns of the codes at both ends
    pairs = [(top, top - 5), (top - 5, top), (low, low - 5), (low - 5, low), (top, low), (low, top), (0, top), (top, 0)]
    true, guess = (torch.tensor(column, dtype=ints).view(dtype) for column in zip(*pairs, strict=True))
    block = undo.encode_block(true, guess, torch.empty(0, dtype=torch.int64))
    assert raw(undo.decode_block(block, guess.clone())) == raw(true)
    ends = [(top, 1, False), (top, -1, True), (top - 126, 127, False), (top - 127, 127, True)]
    ends += [(low, -1, False), (low, 1, True), (low - 126, -127, False), (low - 127, -127, True)]
    for end, step, sound in ends:
        content, guess = block_of(b"\0", bytes([step & 0xFF]), b"", 1, 0), torch.tensor([end], dtype=ints).view(dtype)
        if sound:
            undo.decode_block(content, guess)
        else:
            with pytest.raises(ValueError, match="leads out of the dtype"):
                undo.decode_block(content, guess)


def block_of(gaps: bytes, differences: bytes, literals: bytes, m: int, l: int) -> bytes:  # noqa: E741 - as in the spec
    frames = [zstandard.ZstdCompressor().compress(part) for part in (gaps, differences, literals)]
    return struct.pack("<IIII", m, l, len(frames[0]), len(frames[1])) + b"".join(frames)


# --- the prediction and its band --------------------------------------------------------------------------------------


class Seen:
    """What a merge and the record's prediction computed, of one tensor in one block."""

    def __init__(self, W: Tensor, updates: tuple[Weighted, ...], dtype: str = "") -> None:
        self.single: list[tuple[Tensor, Tensor]] = []  # of the merge, then of the prediction: float32 and its band
        self.double: tuple[Tensor, Tensor, Tensor] | None = None  # flat indices, float64 and how far it can be off
        self.guess, self.literal = torch.empty(0), torch.empty(0)
        where = torch.empty(0)
        round_exactly, undecided, encode_block = undoing.round_exactly, undoing.undecided, undoing.encode_block

        def exactly(W: Tensor, band: Tensor, *rest: Any) -> Any:
            nonlocal where
            self.single.append((W.double(), band.double()))
            where, found = round_exactly(W, band, *rest)
            return where, found

        def open_ones(values: Tensor, doubt: Tensor, dtype: torch.dtype) -> Any:
            at = where if len(self.single) else torch.arange(values.numel())
            self.double = (at, values.double().flatten(), doubt.double().expand(values.shape).flatten())
            return undecided(values, doubt, dtype)

        def encode(true: Tensor, guess: Tensor, literal: Tensor) -> Any:
            self.guess, self.literal = guess.clone(), literal
            return encode_block(true, guess, literal)

        seen = [(blocks, "round_exactly", exactly), (undoing, "round_exactly", exactly)]
        seen += [(undoing, "undecided", open_ones), (undoing, "encode_block", encode)]
        with patched(seen):
            self.merged, self.record = merge_tensor(W, updates, dtype, reproducible=True)


def guesses(W: Tensor, updates: tuple[Weighted, ...], wrong: Sequence[Patch]) -> Tensor:
    """The decoder's prediction of a tensor in one block."""
    merged, record = merge_tensor(W, updates, reproducible=True)
    found = []
    decode = undoing.decode_block

    def decoding(content: bytes, guess: Tensor) -> Any:
        found.append(guess.clone())
        return decode(content, guess)

    with patched([*wrong, (undoing, "decode_block", decoding)]):
        unmerge_tensor(merged, record, updates, TensorRef.of(W).dtype)
    return torch.cat(found)


@machines
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("form", ["lora", "add", "replace", "lokr", "dora0-lora", "dora1-loha", "scale0"])
def test_every_machine_predicts_the_same(form: str, dtype: str, machine: str) -> None:
    """Bit for bit, wherever the record does not hold the number itself; and that is next to never."""
    updates = weighted(Target("l.weight", (96, 64)), (make_update(form, (96, 64), Maker(2), rank=8), 0.5))
    W = values(96, 64, dtype=dtype)
    seen = Seen(W, updates)
    other = guesses(W, updates, MACHINES[machine]())
    differ = rounding.differing(seen.guess, other)
    assert torch.isin(differ, seen.literal).all()
    assert len(seen.literal) <= 2


def exact_at(W: Tensor, at: int, updates: tuple[Weighted, ...], back: bool = False) -> Fraction:
    """One element of the sum in rational arithmetic: there, or back from the merged W."""
    row, column = divmod(at, W.shape[1])
    total = Fraction(float(W[row, column]))
    for item, weight in updates:
        update: Any = item.update
        if isinstance(update, Replace):
            total = total if back else Fraction(float(update.value.read()[row, column]))
            continue
        if isinstance(update, Add):
            delta = Fraction(float(update.value.read()[row, column]))
        else:
            B, A = update.B.read()[row].tolist(), update.A.read()[:, column].tolist()
            delta = sum((Fraction(b) * Fraction(a) for b, a in zip(B, A, strict=True)), Fraction(0))
        total += delta * Fraction(update.scaling.factor) * Fraction(weight) * (-1 if back else 1)
    return total


def lora_of(B: Tensor, A: Tensor, scale: float = 1.0) -> Lora:
    return Lora(TensorRef.of(A), TensorRef.of(B), Scaling(rank=len(A), scale=scale))


def adversarial() -> dict[str, list[tuple[Update, float]]]:
    """Updates of a [24, 16] matrix whose rounding errors are as large as one can make them."""

    def factors(rank: int, seed: int = 5, std: float = 0.1) -> tuple[Tensor, Tensor]:
        return values(24, rank, dtype="F32", std=std, seed=seed), values(rank, 16, dtype="F32", std=std, seed=seed + 1)

    found: dict[str, list[tuple[Update, float]]] = {}
    for rank in (1, 3, 32, 33, 300):
        found[f"rank {rank}"] = [(lora_of(*factors(rank)), 1.0)]
        B, A = factors(rank)
        twice = torch.cat([B, -B], 1), torch.cat([A, A * (1 + 2.0**-20)])
        found[f"cancelling, rank {2 * rank}"] = [(lora_of(*twice, 1e6), 1.0)]
        found[f"one sign, rank {rank}"] = [(lora_of(B.abs() + 0.1, A.abs() + 0.1), 1 / 3)]
    for scale in (1e-6, 1 / 3, 1e6):
        for weight in (1e-6, 0.7, 1e6):
            found[f"scale {scale:.0e}, weight {weight:.0e}"] = [(lora_of(*factors(8), scale), weight)]
    add = Add(TensorRef.of(values(24, 16, dtype="F32", std=30.0)), Scaling(scale=1 / 3))
    found["add"] = [(add, 0.1)]
    found["there and back"] = [(add, 1e4), (lora_of(*factors(40)), 1e3), (add, -1e4), (lora_of(*factors(40)), -999.0)]
    found["replaced"] = [(Replace(TensorRef.of(values(24, 16, dtype="F32"))), 1.0), (lora_of(*factors(8)), 0.3)]
    return found


@pytest.mark.parametrize("case", adversarial())
def test_the_bands_are_honest(case: str) -> None:
    """What is computed in float32 is within its band of the exact result; so is float64, in both directions."""
    updates = weighted(Target("l.weight", (24, 16)), *adversarial()[case])
    W = values(24, 16, std=0.02)
    seen = Seen(W, updates)
    assert len(seen.single) == 2
    for (computed, band), start, back in zip(seen.single, (W, seen.merged), (False, True), strict=True):
        for at in range(0, W.numel(), 7):
            exact = exact_at(start, at, updates, back)
            assert abs(Fraction(float(computed.flatten()[at])) - exact) <= Fraction(float(band[at // 16, 0]))
    assert seen.double is not None
    for at, computed, doubt in zip(*seen.double, strict=True):
        exact = exact_at(seen.merged, int(at), updates, True)
        assert abs(Fraction(float(computed)) - exact) <= Fraction(float(doubt))
    wide = Seen(W.float(), updates)  # a float32 base is computed in float64 throughout
    assert wide.double is not None
    for at, computed, doubt in [*zip(*wide.double, strict=True)][::7]:
        exact = exact_at(wide.merged, int(at), updates, True)
        assert abs(Fraction(float(computed)) - exact) <= Fraction(float(doubt))


def test_the_bands_are_not_idle() -> None:
    """Somewhere among them float32 and float64 use up a good part of their bands: too narrow ones would be found."""
    single, double = 0.0, 0.0
    for updates in adversarial().values():
        made = weighted(Target("l.weight", (24, 16)), *updates)
        seen = Seen(values(24, 16, std=0.02), made)
        for (computed, band), start, back in zip(
            seen.single, (values(24, 16, std=0.02), seen.merged), (False, True), strict=True
        ):
            for at in range(0, computed.numel(), 7):
                off = abs(Fraction(float(computed.flatten()[at])) - exact_at(start, at, made, back))
                single = max(single, float(off / Fraction(float(band[at // 16, 0]))))
        wide = Seen(values(24, 16, dtype="F32", std=0.02), made)
        assert wide.double is not None
        for at, computed, doubt in [*zip(*wide.double, strict=True)][::7]:
            off = abs(Fraction(float(computed)) - exact_at(wide.merged, int(at), made, True))
            double = max(double, float(off / Fraction(float(doubt))))
    assert 0.1 < single <= 1, single
    assert 0.02 < double <= 1, double


def bands(*updates: tuple[Update, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bands of a prediction in float32 and float64, with the numbers they are for."""
    made = weighted(Target("l.weight", (32, 32)), *updates)
    (computed, single), seen = Seen(values(32, 32), made).single[1], Seen(values(32, 32, dtype="F32"), made)
    assert seen.double is not None
    return computed, single, seen.double[1], seen.double[2]


def test_the_bands_grow_with_the_number_of_updates() -> None:
    """Each subtraction rounds a number as large as the prediction."""
    count = 60
    updates = [(Add(TensorRef.of(values(32, 32, dtype="F32", std=1e-9, seed=n)), Scaling()), 1.0) for n in range(count)]
    computed, single, wide, double = bands(*updates)
    assert bool((single >= count * 2.0**-24 * computed.abs()).all())
    assert bool((double >= count * 2.0**-53 * wide.abs()).all())


def test_the_bands_grow_with_the_rank() -> None:
    """Of one magnitude, a longer sum is rounded more often: in float64 all at once, in float32 slice by slice."""

    def padded(rank: int) -> tuple[Update, float]:
        B, A = torch.zeros(32, rank), torch.zeros(rank, 32)
        B[:, 0], A[0] = 1e6, 1.0
        return lora_of(B, A), 1.0

    nothing = lora_of(torch.zeros(32, 320), torch.zeros(320, 32))
    computed, single, wide, double = bands((nothing, 1.0), (nothing, 1.0))
    assert bool((double >= 2 * 320 * 2.0**-53 * wide.abs()).all()), (
        "one term after the other can be added to the number"
    )
    assert bool((single >= 2 * 10 * 2.0**-24 * computed.abs()).all())
    (_, single2, _, double2), (_, single320, _, double320) = bands(padded(2)), bands(padded(320))
    assert bool((double320 > double2 * (320 + 8) / (2 + 2 + 8) * 0.99).all())
    assert bool((single320 > single2 * (32 + 2 + 10) / (2 + 2 + 1) * 0.9).all())


SIZES = [(std, share, rank) for std, share in ((2e-3, 0.05), (1e-4, 0.012)) for rank in (16, 64, 256)]


@pytest.mark.parametrize(("std", "share", "rank"), SIZES)
def test_a_record_is_small(std: float, share: float, rank: int) -> None:
    """The README promises it: of what a merge rounds away there is not much."""
    W = values(1024, 1024, std=0.02)
    B, A = values(1024, rank, dtype="F32", std=1.0), values(rank, 1024, dtype="F32", std=std / rank**0.5, seed=4)
    updates = weighted(Target("l.weight", (1024, 1024)), (lora_of(B, A), 1.0))
    record = there_and_back(W, updates)
    assert sum(map(len, record.blocks)) <= share * W.nbytes


# --- files ----------------------------------------------------------------------------------------------------------


def round_trip(base: Path, parts: Parts, folder: Path, merging: Any = None, unmerging: Any = None) -> Path:
    """Merge with a record, unmerge without the base; the report and the bits say that it is exact."""
    out, record, back = folder / "out", folder / "r.undo.safetensors", folder / "back"
    if base.is_file():
        out, back = folder / "out.safetensors", folder / "back.safetensors"
    loratool.merge(base, parts, out, undo=record, allow_unchanged=True, **(merging or {}))
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


JUNK: list[Any] = [None, True, -1, 1.5, 2**53, 2**70, 10**400, "1", "", [], {}, [None], [[]], ["x"], [1, -1], {"a": 1}]


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


def parts_of(block: bytes) -> tuple[list[int], list[bytes]]:
    """The four counts and the three frames of a block."""
    m, l, first, second = struct.unpack_from("<IIII", block)  # noqa: E741 - as in the spec
    return [m, l], [block[16 : 16 + first], block[16 + first : 16 + first + second], block[16 + first + second :]]


def joined(counts: Sequence[int], frames: Sequence[bytes]) -> bytes:
    return struct.pack("<IIII", *counts, len(frames[0]), len(frames[1])) + b"".join(frames)


def test_lying_blocks(made: Made) -> None:
    """Blocks that are sound zstd, and nothing else: counts and streams that contradict each other."""
    first, *rest = made.blocks_of("l.weight")
    counts, frames = parts_of(first)
    assert joined(counts, frames) == first
    contents = [zstandard.ZstdDecompressor().decompress(frame) for frame in frames]
    for n, plain in enumerate(contents):
        lies = {plain[:-1], plain + b"\0", plain + b"\xff", b"\xff" * len(plain), bytes(len(plain)), b"\x80" * 24, b""}
        for lie in lies - {plain}:
            for level in (1, 19):
                changed = [*frames]
                changed[n] = zstandard.ZstdCompressor(level=level).compress(lie)
                block = joined(counts, changed)
                assert made.outcome(made.with_blocks("l.weight", [block, *rest])) in ("E-UNDO", "E-NOT-EXACT"), (n, lie)
        for frame in (b"", b"\0", frames[n][:-1], frames[n][1:], b"\x28\xb5\x2f\xfd", frames[n] * 2, frames[n] + b"x"):
            changed = [*frames]
            changed[n] = frame
            assert made.outcome(made.with_blocks("l.weight", [joined(counts, changed), *rest])) == "E-UNDO", (n, frame)
    for m, l in ((0, 0), (counts[0] + 1, counts[1]), (counts[0], counts[1] + 1), (2**31, 0), (2**32 - 1, 2**32 - 1)):  # noqa: E741 - as in the spec
        assert made.outcome(made.with_blocks("l.weight", [joined((m, l), frames), *rest])) == "E-UNDO", (m, l)
    for block in (b"", b"\0", first[:16], first[:15], first[:-1], first[1:], first + b"x", first * 2, bytes(16)):
        assert made.outcome(made.with_blocks("l.weight", [block, *rest])) == "E-UNDO", block
    for content in ([first], [first, *rest, first], [first, *rest, b""]):
        assert made.outcome(made.with_blocks("l.weight", content)) == "E-UNDO"


def test_no_flipped_bit_gives_a_wrong_base(made: Made) -> None:
    """`outcome` fails for a wrong one; in the header and in the blocks."""
    generator = torch.Generator().manual_seed(1)
    head = len(made.bytes) - len(made.data)
    places = torch.randint(8 * head, (120,), generator=generator).tolist()
    places += (8 * head + torch.randperm(8 * len(made.data), generator=generator)[:280]).tolist()
    norms = made.header["m.weight.norm.0"]["data_offsets"]
    found, idle = set(), 0
    for place in places:
        flipped = bytearray(made.bytes)
        flipped[place // 8] ^= 1 << place % 8
        code = made.outcome(bytes(flipped))
        found.add(code)
        idle += code == "exact" and not norms[0] <= place // 8 - head < norms[1]
    assert {"E-HEADER", "E-UNDO", "E-NOT-EXACT"} <= found
    assert idle <= 0.02 * len(places), "the last bits of a norm matter to no rounding, and zstd has an unused bit"


def test_wrong_types_in_the_manifest(made: Made) -> None:
    for junk in JUNK:
        if not isinstance(junk, dict):
            assert made.outcome(made.with_manifest(json.dumps(junk))) in ("E-UNDO", "E-HEADER"), junk
        for key, value in made.manifest.items():
            if value != junk:
                code = made.outcome(made.with_manifest({**made.manifest, key: junk}))
                assert code == ("E-VERSION" if key == "version" and junk == "" else code if junk == "1" else "E-UNDO")
                assert code != "exact", (key, junk)
        for key in made.manifest["tensors"]["l.weight"]:
            manifest = made.manifest
            manifest["tensors"]["l.weight"][key] = junk
            code = made.outcome(made.with_manifest(manifest))
            assert code == "E-UNDO", (key, junk, code)
        manifest = made.manifest
        manifest["tensors"]["l.weight"] = junk
        assert made.outcome(made.with_manifest(manifest)) == "E-UNDO", junk
    for key in made.manifest:
        manifest = made.manifest
        del manifest[key]
        assert made.outcome(made.with_manifest(manifest)) == "E-UNDO", key
    for key in made.manifest["tensors"]["l.weight"]:
        manifest = made.manifest
        del manifest["tensors"]["l.weight"][key]
        assert made.outcome(made.with_manifest(manifest)) == "E-UNDO", key


def test_odd_names(tmp_path: Path) -> None:
    """A record's own tensors are named after those of the base, and nothing of it collides."""
    names = ["a", "a.blocks", "a.norm.0", "a.norm.0.blocks", "x y", 'q"uote', "\u00e9\u2603", "up/../b", "C:\\x", "."]
    state = {name: values(6, 4, seed=n) for n, name in enumerate(names)}
    items = [
        Targeted(Target(name, (6, 4)), make_update("dora0-lora" if n % 2 == 0 else "lora", (6, 4), Maker(n)))
        for n, name in enumerate(names)
    ]
    back = round_trip(save_sharded(state, tmp_path / "base"), [(Adapter(tuple(items)), 1.0)], tmp_path)
    assert same_bits(tensors_of(back), state)


SPEC = Path(__file__).parent.parent / "spec"
VECTORS = json.loads((SPEC / "vectors" / "undo-1.0" / "blocks.json").read_text())


def guess_of(case: Any) -> Tensor:
    """A vector's prediction."""
    return of_bytes(bytes_of(case, "guess"), DTYPES[case["dtype"]], (len(case["guess"].split()),))


def bytes_of(case: Any, key: str) -> bytes:
    return b"".join(bytes.fromhex(text)[::-1] for text in case[key].split())


@pytest.mark.parametrize("case", VECTORS["valid"], ids=lambda case: case["name"])
def test_valid_blocks_of_the_spec(case: Any) -> None:
    restored = undo.decode_block(bytes.fromhex(case["block"]), guess_of(case))
    assert raw(restored) == bytes_of(case, "restored")


@pytest.mark.parametrize("case", VECTORS["invalid"], ids=lambda case: case["name"])
def test_invalid_blocks_of_the_spec(case: Any) -> None:
    with pytest.raises(ValueError, match=r"."):  # what `restore` turns into E-UNDO
        undo.decode_block(bytes.fromhex(case["block"]), guess_of(case))


@pytest.mark.parametrize("case", [*VECTORS["valid"], *VECTORS["invalid"]], ids=lambda case: case["name"])
def test_the_reference_decoder_agrees_about_blocks(case: Any) -> None:
    guess = bits(guess_of(case)).numpy()
    if "rule" in case:
        with pytest.raises((ValueError, zstandard.ZstdError)):
            reference_undo.block(bytes.fromhex(case["block"]), guess)
    else:
        found = reference_undo.block(bytes.fromhex(case["block"]), guess)
        assert found.tobytes() == bytes_of(case, "restored")


PLAIN = ("lora", "add", "dora0-lora", "dora1-lora", "scale0", "scale1")


@settings(max_examples=80)
@given(first=cases(PLAIN), second=cases(PLAIN), seed=seeds, data=st.data())
def test_the_reference_decoder_restores_the_base(
    first: Case, second: Case, seed: int, data: st.DataObject, fresh: Fresh
) -> None:
    """It is written from UNDO.md alone."""
    folder = fresh()
    base = save_sharded(first.base, folder / "base")
    weights = st.sampled_from((1.0, 0.5, -1.0, 0.0, 0.3, 2.0))
    parts = [(first.adapter, data.draw(weights))]
    fits = {(i.target.name, i.target.shape) for i in first.adapter.updates}
    if all((i.target.name, i.target.shape) in fits and i.update.role == "add" for i in second.adapter.updates):
        parts.append((second.adapter, data.draw(weights)))
    dtype = data.draw(st.sampled_from(("keep", "keep", "bf16", "fp16", "fp32")))
    try:
        with small_blocks(data.draw(st.sampled_from((8, 32, 1 << 20)))):
            loratool.merge(base, parts, folder / "out", undo=folder / "undo", dtype=dtype)
    except loratool.Mismatch:  # the two adapters do not go together
        return
    given_ = []
    for n, (adapter, weight) in enumerate(parts):
        given_.append((folder / f"{n}.lora.safetensors", weight))
        loratool.save(adapter, given_[-1][0])
    found = reference_undo.restore(folder / "out" / "model.safetensors", given_, folder / "undo")
    assert found == {name: raw(first.base[name]) for name in found}
    changed = {i.target.name for adapter, weight in parts for i in adapter.updates if weight}
    assert changed <= found.keys()


@pytest.mark.parametrize("form", ["scale0", "scale1"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_reference_decoder_takes_factors_out(dtype: str, form: str, tmp_path: Path) -> None:
    state = {"l.weight": values(64, 48, dtype=dtype)}
    base, adapter = save_sharded(state, tmp_path / "base"), one(form, (64, 48), name="l.weight", seed=4)
    loratool.merge(base, [(adapter, 0.5)], tmp_path / "out", undo=tmp_path / "undo")
    loratool.save(adapter, tmp_path / "a.lora.safetensors")
    given_ = [(tmp_path / "a.lora.safetensors", 0.5)]
    found = reference_undo.restore(tmp_path / "out" / "model.safetensors", given_, tmp_path / "undo")
    assert found == {"l.weight": raw(state["l.weight"])}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_reference_decoder_restores_many_numbers(dtype: str, tmp_path: Path) -> None:
    state = {"l.weight": values(200, 160, dtype=dtype, std=0.02)}
    base = save_sharded(state, tmp_path / "base")
    parts = [(one("lora", (200, 160), name="l.weight", seed=n, rank=8), w) for n, w in ((1, 0.01), (2, -0.3))]
    loratool.merge(base, parts, tmp_path / "out", undo=tmp_path / "undo")
    given_ = []
    for n, (adapter, weight) in enumerate(parts):
        given_.append((tmp_path / f"{n}.lora.safetensors", weight))
        loratool.save(adapter, given_[-1][0])
    found = reference_undo.restore(tmp_path / "out" / "model.safetensors", given_, tmp_path / "undo")
    assert found == {"l.weight": raw(state["l.weight"])}


def test_the_reference_decoder_is_independent() -> None:
    text = Path(reference_undo.__file__).read_text()
    assert not re.findall(r"import loratool|from loratool|torch", text)
    assert len(text.splitlines()) <= 120


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
    # It claims to be empty, and is 2^17 zeros in every four bytes.
    modest = b"\x28\xb5\x2f\xfd\x80\x88" + bytes(4) + (b"\x02\0\x10\0" * (HUGE >> 17)) + b"\x01\0\0"
    return {"sized": compressor.compress(bytes(HUGE)), "unsized": unsized, "lying": lying, "modest": modest}


def test_a_bomb_takes_no_memory(made: Made, tmp_path: Path) -> None:
    first, *rest = made.blocks_of("l.weight")
    counts, frames = parts_of(first)
    found = []
    for name, bomb in bombs().items():
        for n in range(3):
            found.append(f"{name} {n}")
            block = joined(counts, [*frames[:n], bomb, *frames[n + 1 :]])
            (tmp_path / found[-1]).write_bytes(made.with_blocks("l.weight", [block, *rest]))
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
    for owner, name, value in moving(lambda p: p * 1.1):
        monkeypatch.setattr(owner, name, value)
    with pytest.raises(LoratoolError) as caught:
        loratool.unmerge(work / "out", TINY, work / "back", undo=work / "undo")
    assert caught.value.code in ("E-NOT-EXACT", "E-UNDO")
    assert not (work / "back").exists()


def test_records_are_the_same_every_time(work: Path) -> None:
    for name in ("1", "2"):
        loratool.merge(work / "base", TINY, work / f"out{name}", undo=work / name)
    assert (work / "1").read_bytes() == (work / "2").read_bytes()

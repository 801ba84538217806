"""Rounding as if computed exactly: a merge in float32 gives the bits that rational arithmetic gives."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUT, Maker, make_update, raw, small_blocks
from torch import Tensor

from loratool import Target, Targeted, TensorRef
from loratool.errors import Mismatch
from loratool.layout import NewTensor, Weighted
from loratool.rounding import bits, differing, positions, round_exactly, round_once
from loratool.tensors import torch_dtype
from loratool.updates import Add, Lora, Replace, ReplaceRows, Scaling, Update

blocks: ModuleType = importlib.import_module("loratool.blocks")

NARROW = ("BF16", "F16")
TOP = {"F32": 128, "F16": 16, "BF16": 128, "F8_E5M2": 16}  # F8_E4M3 has no infinity to round to
narrow = pytest.mark.parametrize("dtype", NARROW)


def nearest(x: Fraction, dtype: str) -> Fraction | float:
    """The number of a dtype that is nearest to x, ties to even; by hand."""
    precision, smallest = LAYOUT[dtype]
    size = abs(x)
    exponent = smallest
    if size:
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        exponent = max(exponent - (Fraction(2) ** exponent > size), smallest)
    step = Fraction(2) ** (exponent - precision + 1)
    found = round(x / step) * step  # of a Fraction, to even
    return found if abs(found) < Fraction(2) ** TOP[dtype] else math.copysign(math.inf, x)


def merged(W: Tensor, updates: Sequence[Weighted], dtype: str = "") -> Tensor:
    ref, out = TensorRef.of(W, "l.weight"), io.BytesIO()
    tensor = NewTensor("l.weight", ref, dtype or ref.dtype, ref.shape, tuple(updates))
    blocks.compute(tensor, out, lambda _: None, reproducible=True)
    return torch.frombuffer(bytearray(out.getvalue()), dtype=DTYPES[tensor.dtype]).reshape(W.shape)


def part_of(component: TensorRef, expert: int | None) -> Tensor:
    whole = component.read()
    return (whole if expert is None else whole[expert]).double()


def exact_sums(W: Tensor, updates: Sequence[Weighted]) -> list[Fraction]:
    """Every element of a merge, in rational arithmetic: replacements first, then what is added."""
    total = np.array([Fraction(x) for x in W.double().flatten().tolist()], dtype=object).reshape(W.shape)
    for item, weight in sorted(updates, key=lambda w: w.item.update.role != "replace"):
        target, update = item.target, item.update
        for matrix in range(W.shape[0]) if W.dim() == 3 else [None]:
            if target.expert not in (None, matrix):
                continue
            region = total if matrix is None else total[matrix]
            region = region if target.rows is None else region[slice(*target.rows)]
            expert = matrix if target.experts is not None else None
            if isinstance(update, Replace):
                region[:] = fractions(part_of(update.value, expert))
            elif isinstance(update, ReplaceRows):
                region[update.index.read().numpy()] = fractions(part_of(update.value, None))
            else:
                if isinstance(update, Add):
                    delta = fractions(part_of(update.value, expert))
                else:
                    assert isinstance(update, Lora)
                    delta = fractions(part_of(update.B, expert)) @ fractions(part_of(update.A, expert))
                region += delta * (Fraction(update.scaling.factor) * Fraction(weight))
    return list(total.flatten())


def fractions(values: Tensor) -> Any:
    return np.array([Fraction(x) for x in values.flatten().tolist()], dtype=object).reshape(values.shape)


def check(W: Tensor, updates: Sequence[Weighted], dtype: str = "") -> Tensor:
    """Every element of the merge is the nearest number to the exact sum."""
    found = merged(W, updates, dtype)
    name = TensorRef.of(found).dtype
    wanted = [float(nearest(x, name)) for x in exact_sums(W, updates)]
    wrong = [
        (n, a, b) for n, (a, b) in enumerate(zip(found.double().flatten().tolist(), wanted, strict=True)) if a != b
    ]
    assert not wrong, f"{len(wrong)} of {len(wanted)}: {wrong[:3]}"
    return found


def values(*shape: int, dtype: str = "F32", std: float = 0.02, seed: int = 3) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std
    return made.to(DTYPES[dtype])


def lora(rows: int, columns: int, rank: int = 4, seed: int = 5, std: float = 0.05, scale: float = 1.0) -> Lora:
    B, A = values(rows, rank, std=std, seed=seed), values(rank, columns, std=std, seed=seed + 100)
    return Lora(TensorRef.of(A), TensorRef.of(B), Scaling(rank=rank, scale=scale))


def whole(shape: tuple[int, ...], *updates: tuple[Update, float]) -> list[Weighted]:
    return [Weighted(Targeted(Target("l.weight", shape), update), weight) for update, weight in updates]


# --- merges ----------------------------------------------------------------------------------------------------------

SHAPE = (160, 96)  # enough that float32 alone gets some of them wrong: see the last test of this part


@narrow
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_lora(dtype: str, rank: int) -> None:
    check(values(*SHAPE, dtype=dtype), whole(SHAPE, (lora(*SHAPE, rank), 0.7)))


@narrow
@pytest.mark.parametrize("out", ["BF16", "F16"])
def test_several_loras_and_another_dtype(dtype: str, out: str) -> None:
    updates = whole(SHAPE, (lora(*SHAPE), 1.0), (lora(*SHAPE, seed=6, scale=0.1), -0.3), (lora(*SHAPE, seed=7), 1 / 3))
    check(values(*SHAPE, dtype=dtype), updates, out)


@narrow
def test_a_replacement_and_a_lora(dtype: str) -> None:
    """What is replaced is a float32 number: it, too, is rounded only once, with the rest."""
    updates = whole(SHAPE, (lora(*SHAPE), 1.0), (Replace(TensorRef.of(values(*SHAPE, seed=8))), 1.0))
    check(values(*SHAPE, dtype=dtype), updates)
    index = torch.tensor([0, 3, 4, 158])
    rows = ReplaceRows(TensorRef.of(index), TensorRef.of(values(4, SHAPE[1], seed=8)))
    with small_blocks(2 * SHAPE[1] * 7):
        check(values(*SHAPE, dtype=dtype), whole(SHAPE, (lora(*SHAPE), 1.0), (rows, 1.0)))


@narrow
def test_ranges_of_rows(dtype: str) -> None:
    """In a block some rows are touched and others not, or by another update."""
    updates = [
        Weighted(Targeted(Target("l.weight", SHAPE, rows), lora(rows[1] - rows[0], SHAPE[1], seed=rows[0])), weight)
        for rows, weight in (((0, 50), 1.0), ((50, 51), -0.5), ((90, 160), 3.0))
    ]
    W = values(*SHAPE, dtype=dtype)
    W[60] = torch.tensor([-0.0, 2.0**-24] * (SHAPE[1] // 2))
    for size in (1 << 20, 2 * SHAPE[1] * 7):
        with small_blocks(size):
            found = check(W, updates)
        assert raw(found[51:90]) == raw(W[51:90]), "untouched, zeros of both signs included"


@narrow
def test_experts(dtype: str) -> None:
    shape, make = (3, 40, 32), Maker(4, experts=3)
    every = Targeted(Target("l.weight", shape, experts=3), make_update("lora", shape[1:], make, rank=4))
    single = Targeted(Target("l.weight", shape, (8, 20), 1), lora(12, 32))
    with small_blocks(2 * 32 * 7):
        check(values(*shape, dtype=dtype), [Weighted(every, 0.3), Weighted(single, 1.0)])


@narrow
def test_pruned_weights_and_zero_rows(dtype: str) -> None:
    """Sums that are exactly 0, and tiny ones beside them."""
    W = values(*SHAPE, dtype=dtype)
    W[values(*SHAPE, seed=9) < 0.03] = 0.0
    update = lora(*SHAPE)
    B = update.B.read().clone()
    B[::3] = 0.0
    B[1] *= 1e-18
    updates = whole(SHAPE, (Lora(update.A, TensorRef.of(B), update.factors), 1.0))
    check(W, updates)


@narrow
def test_outliers(dtype: str) -> None:
    """One large number widens the band of its row, not that of its neighbours' results."""
    W = values(*SHAPE, dtype=dtype)
    W[:, 5] = 1e3
    W[7, :5] *= 1e4
    update = lora(*SHAPE)
    A = update.A.read().clone()
    A[:, 11] *= 1e2
    check(W, whole(SHAPE, (Lora(TensorRef.of(A), update.B, update.factors), 1.0)))


@narrow
def test_the_end_of_the_range(dtype: str) -> None:
    """What rounds to the largest number is written, what is half a unit above it is refused, however little."""
    top = torch.finfo(DTYPES[dtype]).max
    half = top * 2.0 ** -LAYOUT[dtype][0] / (2 - 2.0 ** (1 - LAYOUT[dtype][0]))  # half the last number's unit
    W = torch.full((2, 4), top, dtype=torch.float64).to(DTYPES[dtype])
    for sign in (1, -1):
        for off, finite in ((1 - 2.0**-23, True), (1.0, False), (1 + 2.0**-23, False), (0.5, True), (1.5, False)):
            B, A = torch.full((2, 1), sign * 2.0**8), torch.full((1, 4), half * off * 2.0**-8)
            updates = whole((2, 4), (Lora(TensorRef.of(A), TensorRef.of(B), Scaling(rank=1)), 1.0))
            if finite:
                check(W * sign, updates)
            else:
                with pytest.raises(Mismatch, match="E-NONFINITE"):
                    merged(W * sign, updates)


def test_a_sum_that_leaves_float32_on_the_way() -> None:
    half = Lora(TensorRef.of(torch.full((1, 4), 2.0**127)), TensorRef.of(torch.ones(2, 1)), Scaling(rank=1))
    W = (2.0**100 * torch.arange(8)).reshape(2, 4).to(torch.bfloat16)
    found = check(W, whole((2, 4), (half, 1.0), (half, 1.0), (half, -2.0)))
    assert raw(found) == raw(W)


@narrow
def test_ties(dtype: str) -> None:
    """Exactly in the middle between two neighbours, and the least bit beside it."""
    unit = 2.0 ** -(LAYOUT[dtype][0] - 1)
    W = (1 + unit * torch.arange(64, dtype=torch.float64)).repeat(6, 1).to(DTYPES[dtype])
    W[3:] *= -1
    halves = torch.full((6, 64), unit / 2, dtype=torch.float64)
    halves[1] *= 1 + 2.0**-20  # beside the middle, by less than float32 shows at 1
    halves[2] *= 1 - 2.0**-20
    halves[4] *= -(1 + 2.0**-20)
    halves[5] *= -1
    found = check(W, whole((6, 64), (Add(TensorRef.of(halves.float()), Scaling()), 1.0)))
    steps = (bits(found[0]) - bits(W[0])).tolist()
    assert steps == [0, 1] * 32, "to even"
    for rank in (1, 33):  # the same by products
        B, A = torch.zeros(6, rank), torch.zeros(rank, 64)
        B[:, -1], A[-1] = halves[:, 0].float(), 1.0
        check(W, whole((6, 64), (Lora(TensorRef.of(A), TensorRef.of(B), Scaling(rank=rank)), 1.0)))


def test_float32_alone_would_be_wrong() -> None:
    """The tests above have something to find."""
    shape = (512, 512)
    update = lora(*shape, rank=40)
    updates, W = whole(shape, (update, 0.7)), values(*shape, dtype="BF16")
    for dtype in ("BF16", "F16"):
        alone = (W.float() + (update.B.read() @ update.A.read()) * 0.7).to(DTYPES[dtype])
        assert (alone != merged(W, updates, dtype)).any()


@narrow
def test_few_numbers_at_a_time_give_the_same(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = whole(SHAPE, (lora(*SHAPE), 0.7))
    W = values(*SHAPE, dtype=dtype)
    wanted = merged(W, updates)
    asked = []
    exact = blocks.exact_of

    def watched(*arguments: Any, **options: Any) -> Any:
        inner = exact(*arguments, **options)

        def ask(where: Tensor) -> Any:
            asked.append(len(where))
            return inner(where)

        return ask

    monkeypatch.setattr(blocks, "exact_of", watched)
    monkeypatch.setattr(blocks, "at_once", lambda inside: 3)
    assert raw(merged(W, updates)) == raw(wanted)
    assert max(asked) == 3
    assert len(asked) > 1


def test_flushing_subnormals_changes_nothing() -> None:
    """A process may have switched it on; it is as it was afterwards."""
    W = torch.tensor([[0.0, 2.0**-133, -(2.0**-131), 2.0**-126, 2.0**-127, 1.0]] * 8).to(torch.bfloat16)
    updates = whole((8, 6), (lora(8, 6, std=1e-20), 1.0))
    wanted = check(W, updates)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        found = merged(W, updates)
        assert not (torch.full((1,), 2.0**-140) * 1.0).item(), "still on"
    finally:
        torch.set_flush_denormal(False)
    assert raw(found) == raw(wanted)


# --- the parts -------------------------------------------------------------------------------------------------------


def near_a_boundary(dtype: str) -> st.SearchStrategy[float]:
    """float64 numbers at the middles between two of a dtype, a bit beside them, in all its range; and any others."""
    precision, smallest = LAYOUT[dtype]
    exponents = st.integers(smallest - precision - 2, TOP[dtype])
    middles = st.builds(lambda m, e: math.ldexp(m, e - precision), st.integers(0, 2 ** (precision + 2)), exponents)
    beside = st.sampled_from((0.0, 2.0**-52, -(2.0**-52), 2.0**-26, -(2.0**-26), 2.0**-30))
    close = st.builds(lambda x, off, sign: sign * x * (1 + off), middles, beside, st.sampled_from((1.0, -1.0)))
    return st.one_of(close, st.floats(allow_nan=False, width=64))


@pytest.mark.parametrize("dtype", TOP)
@given(data=st.data())
def test_round_once(data: st.DataObject, dtype: str) -> None:
    numbers = data.draw(st.lists(near_a_boundary(dtype), min_size=1, max_size=60))
    given_ = torch.tensor(numbers, dtype=torch.float64)
    before = raw(given_)
    found = round_once(given_, torch.empty(len(numbers), dtype=torch_dtype(dtype))).double().tolist()
    assert raw(given_) == before
    for number, result in zip(numbers, found, strict=True):
        wanted = number if math.isinf(number) else float(nearest(Fraction(number), dtype))
        assert (result, math.copysign(1, result)) == (wanted, math.copysign(1, number))


def test_round_once_keeps_nan_and_a_single_rounding_of_float32() -> None:
    for dtype in DTYPES.values():
        assert round_once(torch.tensor([math.nan], dtype=torch.float64), torch.empty(1, dtype=dtype)).isnan().all()
    middle = torch.tensor([1 + 2.0**-8 + 2.0**-30], dtype=torch.float64)
    assert middle.to(torch.bfloat16).item() == 1.0, "torch rounds twice"
    assert round_once(middle, torch.empty(1, dtype=torch.bfloat16)).item() == 1 + 2.0**-7


EVERY = (*DTYPES.values(), torch.float8_e4m3fn, torch.float8_e5m2)


@given(data=st.data())
def test_differing(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(EVERY))
    width = torch.empty(0, dtype=dtype).element_size()
    columns = data.draw(st.integers(0, 40))
    rows = data.draw(st.integers(1, 3))
    content = data.draw(st.binary(min_size=rows * columns * width, max_size=rows * columns * width))
    one = of_bytes(content, dtype).reshape(rows, columns)
    places = data.draw(st.sets(st.integers(0, max(0, len(content) - 1)), max_size=6)) if content else set()
    changed = bytearray(content)
    for place in places:
        changed[place] ^= data.draw(st.integers(1, 255))
    other = of_bytes(bytes(changed), dtype).reshape(rows, columns)
    assert differing(one, other).tolist() == sorted({place // width for place in places})
    assert differing(one.clone(), one).tolist() == []
    assert differing(one.T, other.T).tolist() == sorted(
        {place // width % columns * rows + place // width // columns for place in places}
    )


def of_bytes(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


@given(
    size=st.integers(0, 3000), share=st.sampled_from((0.0, 0.005, 0.0101, 0.1, 0.5, 0.9, 1.0)), seed=st.integers(0, 99)
)
def test_positions(size: int, share: float, seed: int) -> None:
    flags = np.random.default_rng(seed).random(size) < share
    found = positions(flags)
    assert found.tolist() == [n for n, flag in enumerate(flags.tolist()) if flag]


def test_a_band_that_is_not_finite_decides_nothing() -> None:
    """And a band of one row does not spoil another: all are asked for."""
    for bad in (math.inf, math.nan):
        W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        out, low = torch.empty(2, 2, dtype=torch.bfloat16), torch.empty(2, 2, dtype=torch.bfloat16)
        band = torch.tensor([[bad], [0.0]])
        where, found = round_exactly(W, band, out, low, lambda at: at.double() + 0.5, 3)
        assert where.tolist() == [0, 1, 2, 3]
        assert found.tolist() == [0.5, 1.5, 2.5, 3.5]
        assert out.flatten().tolist() == [0.5, 1.5, 2.5, 3.5]


def test_only_open_numbers_are_asked_for() -> None:
    middle = 1 + 2.0**-8
    W = torch.tensor([[1.0, middle, 1 + 2.0**-7], [0.0, middle + 2.0**-12, 2.0]])
    out, low = torch.empty(2, 3, dtype=torch.bfloat16), torch.empty(2, 3, dtype=torch.bfloat16)
    asked = []

    def exact(at: Tensor) -> Tensor:
        asked.extend(at.tolist())
        return torch.full((len(at),), middle + 1e-14, dtype=torch.float64)

    where, _ = round_exactly(W, torch.full((2, 1), 2.0**-20), out, low, exact, 64)
    assert asked == where.tolist() == [1, 3]
    assert out.flatten().tolist() == [1.0, 1 + 2.0**-7, 1 + 2.0**-7, 1 + 2.0**-7, 1 + 2.0**-7, 2.0]

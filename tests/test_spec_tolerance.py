"""The tolerance of FORMAT.md, section 8: plain arithmetic and loratool lie within it, a sloppy program does not.

The truth and the band are computed here in fractions, from the text of the specification alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.updates import Add, Lora, Replace, Scale, Scaling

SHAPE = (2, 3)
ROWS, COLUMNS = SHAPE
TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DIGITS = {"F64": (53, -1074), "F32": (24, -149), "BF16": (8, -133), "F16": (11, -24)}  # and the smallest step
WIDE = ("F64", "F32")


@dataclass(eq=False)
class Step:
    """One update of a target, with its components as lists of numbers that binary32 holds."""

    kind: str
    weight: float
    scale: float = 1.0
    rank: int = 0
    B: np.ndarray | None = None  # [rows, rank]
    A: np.ndarray | None = None  # [rank, columns]
    value: np.ndarray | None = None  # [rows, columns]; of a scale [rows]


def exactly(array: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda x: Fraction(float(x)), otypes=[object])(array)


def raised(x: np.ndarray | Fraction) -> np.ndarray | Fraction:
    return (
        np.vectorize(lambda v: max(Fraction(1), abs(v)), otypes=[object])(x)
        if isinstance(x, np.ndarray)
        else max(Fraction(1), abs(x))
    )


def truth(W: np.ndarray, steps: list[Step], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The exact result and the band of every element."""
    u, h = (Fraction(1, 2**53), Fraction(1, 2**1074)) if dtype in WIDE else (Fraction(1, 2**24), Fraction(1, 2**149))
    x = exactly(W)
    S, Z, n, touched = abs(x), raised(x), 8, False
    for step in sorted(steps, key=lambda step: step.kind != "replace"):
        w, s = Fraction(step.weight), Fraction(step.scale)
        if not w:
            continue
        n += 4 + step.rank
        if step.kind == "replace":
            value = exactly(step.value)
            touched = touched or w != 1
            S, Z = (
                (abs(value), raised(value))
                if w == 1
                else (S + abs(w) * (abs(value) + S), Z + raised(w) * (raised(value) + Z))
            )
            x = x + w * (value - x)
            continue
        touched = True
        if step.kind == "scale":
            factor = exactly(step.value)[:, None]
            S, Z = S + abs(w) * (S + abs(factor) * S), Z + raised(w) * (Z + raised(factor) * Z)
            x = x + w * (factor * x - x)
            continue
        B, A = (exactly(step.B), exactly(step.A)) if step.kind == "lora" else (None, None)
        delta, sizes, above = (
            (B.dot(A), abs(B).dot(abs(A)), raised(B).dot(raised(A)))
            if step.kind == "lora"
            else (exactly(step.value), abs(exactly(step.value)), raised(exactly(step.value)))
        )
        x, S, Z = x + w * s * delta, S + abs(w * s) * sizes, Z + raised(w) * raised(s) * above
    g = n * u / (1 - n * u)
    return x, int(touched) * (g * S + n * h * Z)


def rounded(x: Fraction, dtype: str) -> Fraction:
    digits, least = DIGITS[dtype]
    if not x:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    step = Fraction(2) ** max(exponent - digits + 1, least)
    return round(x / step) * step


def outside(got: np.ndarray, x: np.ndarray, band: np.ndarray, dtype: str) -> list[tuple[int, ...]]:
    """The elements that are not round(y) of any y within the band."""
    return [
        place
        for place in np.ndindex(*x.shape)
        if not rounded(x[place] - band[place], dtype)
        <= Fraction(float(got[place]))
        <= rounded(x[place] + band[place], dtype)
    ]


def computed(W: np.ndarray, steps: list[Step], number: type, order: list[int]) -> np.ndarray:
    """Plain arithmetic in one type, additive updates in any order."""
    y = W.astype(number)
    replaced = [step for step in steps if step.kind == "replace" and step.weight]
    for step in replaced:
        value = step.value.astype(number)
        y = value.copy() if step.weight == 1 else y + number(step.weight) * (value - y)
    others = [step for step in steps if step.kind != "replace" and step.weight]
    for step in sorted(others, key=lambda step: order[steps.index(step) % len(order)]):
        if step.kind == "scale":
            y = y + number(step.weight) * (step.value.astype(number)[:, None] * y - y)
        else:
            delta = step.B.astype(number) @ step.A.astype(number) if step.kind == "lora" else step.value.astype(number)
            y = y + (number(step.weight) * number(step.scale)) * delta
    return y


# --- cases ----------------------------------------------------------------------------------------------------------

SMALL = st.floats(-4, 4, width=16)
FAR = st.tuples(st.integers(-2047, 2047), st.integers(-60, 40)).map(lambda p: math.ldexp(*p))
TINY = st.tuples(st.integers(-2047, 2047), st.integers(-140, -120)).map(lambda p: math.ldexp(*p))


def arrays(rows: int, columns: int, numbers: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    size = rows * columns
    return st.lists(numbers, min_size=size, max_size=size).map(lambda v: np.array(v).reshape(rows, columns))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, list[Step], str]:
    dtype = draw(st.sampled_from([*TORCH]))
    numbers = draw(st.sampled_from([SMALL, SMALL, FAR, TINY] if dtype != "F16" else [SMALL]))
    W = torch.tensor(draw(arrays(ROWS, COLUMNS, numbers))).to(TORCH[dtype]).double().numpy()
    steps = []
    if draw(st.booleans()):
        steps.append(
            Step("replace", draw(st.sampled_from([1.0, 0.5, -0.3])), value=draw(arrays(ROWS, COLUMNS, numbers)))
        )
    if draw(st.integers(0, 4)) == 0:
        factors = draw(arrays(1, ROWS, st.floats(0.25, 3, width=16)))[0]
        return W, [*steps, Step("scale", draw(st.sampled_from([1.0, 0.5])), value=factors)], dtype
    for _ in range(draw(st.sampled_from([1, 2, 5, 14, 24, 64]))):
        weight, scale = draw(st.sampled_from([1.0, 0.7, -1.0])), draw(st.floats(-3, 3, width=32))
        rank = draw(st.sampled_from([0, 0, 1, 3]))
        if rank:
            B, A = draw(arrays(ROWS, rank, numbers)), draw(arrays(rank, COLUMNS, numbers))
            steps.append(Step("lora", weight, scale, rank, B, A))
        else:
            steps.append(Step("add", weight, scale, value=draw(arrays(ROWS, COLUMNS, numbers))))
    if len(steps) > 1 and draw(st.booleans()):  # what was added is taken away again, but for rounding
        last = steps[-1]
        steps.append(Step(last.kind, -last.weight, last.scale, last.rank, last.B, last.A, last.value))
    return W, [step for step in steps if step.kind != "replace" or step.value is not None], dtype


def finite(x: np.ndarray, band: np.ndarray, dtype: str) -> bool:
    top = Fraction(torch.finfo(TORCH[dtype]).max)
    return all(abs(value) + off < top for value, off in zip(x.flat, band.flat, strict=True))


@settings(deadline=None, max_examples=150)
@given(cases(), st.lists(st.integers(0, 99), min_size=70, max_size=70))
def test_the_compute_dtype_in_any_order_is_enough(case: tuple[np.ndarray, list[Step], str], order: list[int]) -> None:
    W, steps, dtype = case
    x, band = truth(W, steps, dtype)
    if not finite(x, band, dtype):
        return
    for number in (np.float64, *(() if dtype in WIDE else (np.float32,))):
        with np.errstate(all="ignore"):
            y = computed(W, steps, number, order)
        if np.isfinite(y).all():
            off = abs(exactly(y) - x) > band
            assert not off.any(), (dtype, number, y[off], x[off], band[off])


def written(W: np.ndarray, steps: list[Step], dtype: str, folder: Path) -> np.ndarray:
    """What loratool's own merge gives, each update an adapter of its own."""

    def ref(array: np.ndarray) -> TensorRef:
        return TensorRef.of(torch.tensor(array, dtype=torch.float64))

    adapters = []
    for step in steps:
        scaling = Scaling("none", step.rank or None, None, step.scale)
        update = {
            "lora": lambda step=step, scaling=scaling: Lora(ref(step.A), ref(step.B), scaling),
            "add": lambda step=step, scaling=scaling: Add(ref(step.value), Scaling("none", None, None, step.scale)),
            "replace": lambda step=step: Replace(ref(step.value)),
            "scale": lambda step=step: Scale(ref(step.value), 0),
        }[step.kind]()
        adapters.append((Adapter((Targeted(Target("w", SHAPE), update),)), step.weight))
    save_file({"w": torch.tensor(W).to(TORCH[dtype])}, folder / "base.safetensors")
    loratool.merge(folder / "base.safetensors", adapters, folder / "out.safetensors", allow_unchanged=True, force=True)
    return load_file(folder / "out.safetensors")["w"].double().numpy()


@settings(deadline=None, max_examples=60)
@given(cases())
def test_loratool_lies_within_it(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[np.ndarray, list[Step], str]
) -> None:
    W, steps, dtype = case
    x, band = truth(W, steps, dtype)
    if not finite(x, band, dtype):
        return
    assert outside(written(W, steps, dtype, tmp_path_factory.mktemp("merge")), x, band, dtype) == []


# --- what is outside ------------------------------------------------------------------------------------------------


def of_loras(dtype: str, count: int) -> tuple[np.ndarray, list[Step]]:
    generator = np.random.default_rng(5)
    draw = lambda *shape: np.round(generator.normal(size=shape) * 512) / 512  # noqa: E731
    W = torch.tensor(draw(*SHAPE)).to(TORCH[dtype]).double().numpy()
    return W, [Step("lora", 0.3, 1.1, 2, draw(ROWS, 2), draw(2, COLUMNS)) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 5, 24])
def test_sums_in_binary32_are_not_enough_for_f32(count: int) -> None:
    W, steps = of_loras("F32", count)
    x, band = truth(W, steps, "F32")
    y = computed(W, steps, np.float32, [0])
    assert (abs(exactly(y) - x) > band).any()


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("count", [1, 5, 24])
def test_a_millionth_off_is_outside(dtype: str, count: int) -> None:
    W, steps = of_loras(dtype, count)
    x, band = truth(W, steps, dtype)
    y = exactly(computed(W, steps, np.float64, [0]) * (1 + 2.0**-20))
    assert len(outside(y, x, band, dtype)) == ROWS * COLUMNS


def test_the_band_stays_far_below_a_step() -> None:
    """64 loras have a band of some 30 times that of one, not of 64 x 64."""
    widths = []
    for count in (1, 64):
        W, steps = of_loras("F32", count)
        x, band = truth(W, steps, "F32")
        widths.append(max(band.flat) / max(abs(x).flat))
    assert widths[0] < Fraction(1, 2**48)
    assert widths[1] < Fraction(1, 2**36)


# --- why the terms are there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 14, 64])
def test_roundings_add_up_with_the_updates(count: int) -> None:
    """Each of these additions is lost entirely, all in the same direction: more than 8 u S, and within the band."""
    W, value = np.ones(SHAPE), np.full(SHAPE, 0.98 * 2.0**-53)
    steps = [Step("add", 1.0, value=value) for _ in range(count)]
    x, band = truth(W, steps, "F64")
    off = abs(exactly(computed(W, steps, np.float64, [0])) - x)
    assert (off <= band).all()
    assert (off > (count - 1) * Fraction(1, 2**53) * Fraction(97, 100)).all()
    assert (off > 8 * Fraction(1, 2**53)).all() == (count > 8)


def test_what_underflows_is_within_the_band() -> None:
    """In binary32 the product is 0, which no relative term allows."""
    W, small = np.zeros(SHAPE), np.full((ROWS, 1), 2.0**-80)
    steps = [Step("lora", 1.0, 1.0, 1, small, np.full((1, COLUMNS), 2.0**-80))]
    x, band = truth(W, steps, "BF16")
    y = computed(W, steps, np.float32, [0])
    assert not y.any()
    assert (abs(exactly(y) - x) <= band).all()
    assert (band < Fraction(1, 2**140)).all()

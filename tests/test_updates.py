"""Every kind of update against the formulas of the specification, written again here in numpy and float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strategies import (
    ADDITIVE,
    DIRECTIONS,
    DORAS,
    DTYPES,
    FORMS,
    RULES,
    Array,
    Maker,
    State,
    base_for,
    make_update,
    one,
    rounded,
    save_sharded,
    small_blocks,
    tensors_of,
)
from torch import Tensor

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.updates import KINDS, Dora, Lora, ReplaceRows, Scale, Scaling, Update

SHAPES = {"linear": (6, 4), "conv1d": (6, 4, 3), "conv2d": (6, 4, 3, 2)}
UNIT = {"F32": 2.0**-24, "F64": 2.0**-53}  # of the compute dtype


# --- the formulas ---------------------------------------------------------------------------------------------------


def numbers(update: Update, expert: int | None = None) -> dict[str, Array]:
    read = {name: ref.read().double().numpy() for name, ref in update.components().items()}
    return read if expert is None else {name: value[expert] for name, value in read.items()}


def product(B: Array, A: Array, mid: Array | None) -> Array:
    """P(B, A, mid): entry [i, j, k...] by its definition."""
    if mid is None:
        return np.einsum("ir,rj...->ij...", B, A)
    return np.einsum("im,mn...,nj->ij...", B, mid, A)


def delta(kind: str, t: dict[str, Array]) -> Array:
    if kind == "add":
        return t["value"]
    if kind == "lora":
        return product(t["B"], t["A"], t.get("mid"))
    if kind == "loha":
        return product(t["B1"], t["A1"], t.get("mid1")) * product(t["B2"], t["A2"], t.get("mid2"))
    W1 = t["w1"] if "w1" in t else t["B1"] @ t["A1"]
    W2 = t["w2"] if "w2" in t else product(t["B2"], t["A2"], t.get("mid2"))
    (a, c), (b, d, *kernel) = W1.shape, W2.shape
    made = np.empty((a * b, c * d, *kernel))
    for i, p, j, q in np.ndindex(a, b, c, d):
        made[i * b + p, j * d + q] = W1[i, j] * W2[p, q]
    return made


def changed(update: Update, W: Array, weight: float, t: dict[str, Array]) -> Array:
    """What an update makes of its region W."""
    if update.kind == "replace":
        return t["value"] if weight == 1 else W + weight * (t["value"] - W)
    if update.kind == "replace_rows":
        new = W.copy()
        for row, value in zip(t["index"].astype(int), t["value"], strict=True):
            new[row] = value if weight == 1 else new[row] + weight * (value - new[row])
        return new
    if isinstance(update, Scale):
        along = [1] * W.ndim
        along[update.axis] = -1
        return W + weight * (t["factor"].reshape(along) * W - W)
    assert update.scaling is not None
    assert update.scaling.scale is not None
    if not isinstance(update, Dora):
        return W + weight * update.scaling.scale * delta(update.kind, t)
    V = W + update.scaling.scale * delta(update.direction.kind, t)
    others = tuple(n for n in range(V.ndim) if n != update.axis)
    along = [1] * V.ndim
    along[update.axis] = -1
    factor = t["magnitude"].reshape(along) / np.sqrt((V**2).sum(axis=others, keepdims=True))
    return factor * V if weight == 1 else W + weight * (factor * V - W)


def band(update: Update, W: Array, weight: float, t: dict[str, Array], unit: float) -> Array:
    """How far the compute dtype may take a result from the exact one (section Merging of the specification)."""
    sizes = {name: np.abs(value) for name, value in t.items()}
    exact = np.abs(changed(update, W, weight, t))
    rank = (update.scaling.rank if update.scaling else None) or 1
    if update.kind == "lora" and "mid" not in t:
        assert update.scaling is not None
        assert update.scaling.scale is not None
        rows = np.linalg.norm(t["B"], axis=1)
        columns = np.linalg.norm(t["A"], axis=0)
        spread = np.multiply.outer(rows, columns)
        return 2 * unit * exact + (rank + 2) * unit * abs(weight * update.scaling.scale) * spread
    if isinstance(update, Scale):
        return 16 * unit * np.abs(W) * (1 + abs(weight) * (1 + sizes["factor"].max()))
    if update.scaling is None:
        return 16 * unit * (np.abs(W) + changed(update, np.abs(W) * 0, abs(weight), sizes))
    assert update.scaling.scale is not None
    kind = update.direction.kind if isinstance(update, Dora) else update.kind
    terms = abs(update.scaling.scale) * delta(kind, sizes)
    if isinstance(update, Dora):
        V = W + update.scaling.scale * delta(kind, t)
        others = tuple(n for n in range(V.ndim) if n != update.axis)
        along = [1] * V.ndim
        along[update.axis] = -1
        norm = np.sqrt((V**2).sum(axis=others, keepdims=True))
        lost = np.sqrt(((np.abs(W) + terms) ** 2).sum(axis=others, keepdims=True)) / norm  # V may cancel
        terms = sizes["magnitude"].reshape(along) / norm * (np.abs(W) + terms) * lost
    return (rank + 16) * unit * (np.abs(W) + abs(weight) * (np.abs(W) + terms))


def assert_within(got: Tensor, exact: Array, allowed: Array, dtype: str) -> None:
    found = got.double().numpy().reshape(exact.shape)
    low, high = rounded(exact - allowed, dtype), rounded(exact + allowed, dtype)
    wrong = (found < low) | (found > high)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} are off, by {np.abs(found - exact).max():.3g}"


# --- blocks of rows -------------------------------------------------------------------------------------------------


def shapes_of(form: str) -> list[str]:
    return ["linear", "conv1d", "conv2d"] if form != "replace_rows" else ["linear", "conv1d"]


CASES = [(form, shape) for form in FORMS for shape in shapes_of(form)]


@pytest.mark.parametrize(("form", "shape"), CASES, ids=["-".join(case) for case in CASES])
@pytest.mark.parametrize("compute", ["F32", "F64"])
def test_blocks_of_rows_follow_the_formula(form: str, shape: str, compute: str) -> None:
    region = SHAPES[shape]
    for seed, (dtype, rule) in enumerate(zip(DTYPES, RULES, strict=True)):
        update = make_update(form, region, Maker(seed, dtype), rank=1 + seed % 3, rule=rule, alpha=0.7)
        W = Maker(seed + 50).values(*region, dtype=torch.float32)
        t = numbers(update)
        for weight in (1.0, -0.6):
            exact = changed(update, W.double().numpy(), weight, t)
            allowed = band(update, W.double().numpy(), weight, t, UNIT[compute])
            for cuts in ((0, 6), (0, 1, 3, 6), (0, 5, 6), (0, 1, 2, 3, 4, 5, 6)):
                got = W.to(DTYPES[compute]).reshape(region[0], -1).clone()
                pieces = [(start, got[start:stop]) for start, stop in itertools.pairwise(cuts)]
                block = update.open(DTYPES[compute], None)
                if update.first_pass:
                    for start, piece in pieces:
                        block.observe(piece, start)
                for start, piece in pieces:
                    block.apply(piece, start, weight)
                assert_within(got, exact, allowed, compute)


def test_every_kind_is_tested_here() -> None:
    assert {make_update(form, (4, 4), Maker(0)).kind for form in FORMS} == set(KINDS)


@pytest.mark.parametrize("form", DIRECTIONS)
def test_a_delta_is_bilinear_in_its_scale(form: str) -> None:
    """Scale is one factor in front, for every rule that gives the same number."""
    region = (6, 4, 3)
    wanted: Tensor | None = None
    for rule, alpha in (("none", 1.5), ("alpha", 1.5), ("alpha/rank", 6.0), ("alpha/sqrt(rank)", 3.0)):
        if form == "lokr" and rule.startswith("alpha/"):
            continue
        update = make_update(form, region, Maker(3), rank=4, rule=rule, alpha=alpha)
        assert update.scaling is not None
        assert update.scaling.scale == 1.5
        W = torch.zeros(6, 12, dtype=torch.float64)
        update.open(torch.float64, None).apply(W, 0, 1.0)
        wanted = W if wanted is None else wanted
        assert torch.equal(W, wanted)


# --- through a merge ------------------------------------------------------------------------------------------------


def merge(base: State, parts: Any, folder: Path, **options: Any) -> State:
    save_sharded(base, folder / "base")
    loratool.merge(folder / "base", parts, folder / "out", **options)
    return tensors_of(folder / "out")


def unit_of(stored: str, out: str) -> float:
    return UNIT["F32" if {stored, out} <= {"F16", "BF16"} else "F64"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", [1, 70, 1 << 20])
def test_a_merge_is_the_exact_result_rounded_once(form: str, blocks: int, tmp_path: Path) -> None:
    items: list[Targeted] = []
    base: State = {}
    for seed, (stored, shape) in enumerate(itertools.product(DTYPES, shapes_of(form))):
        factors = ("BF16", "F32", "F16")[seed % 3]
        adapter = one(form, SHAPES[shape], seed=seed, dtype=factors, name=f"{stored}.{shape}")
        items += adapter.updates
        base |= base_for(adapter, seed, (stored,))
    with small_blocks(blocks):
        out = merge(base, [(Adapter(tuple(items)), 0.7)], tmp_path)
    for item in items:
        name, update = item.target.name, item.update
        stored, W = name.split(".")[0], base[name].double().numpy()
        exact = changed(update, W, 0.7, numbers(update))
        allowed = band(update, W, 0.7, numbers(update), unit_of(stored, stored))
        assert out[name].dtype == DTYPES[stored]
        assert_within(out[name], exact, allowed, stored)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "replace_rows"])
@pytest.mark.parametrize("blocks", [1, 100])
def test_experts_and_rows_are_regions(form: str, blocks: int, tmp_path: Path) -> None:
    """An update of rows 2:5 of every expert, and another of one expert alone."""
    shape, matrix = (3, 7, 4), (3, 4)
    stacked = make_update(form, matrix, Maker(1, "F32", 3))
    single = make_update(form, (7, 4), Maker(2))
    adapter = Adapter(
        (
            Targeted(Target("all", shape, rows=(2, 5), experts=3), stacked),
            Targeted(Target("one", shape, expert=1), single),
        )
    )
    base = base_for(adapter, 3, ("BF16",))
    with small_blocks(blocks):
        out = merge(base, [adapter], tmp_path)
    unit = unit_of("BF16", "BF16")
    for n in range(3):
        W = base["all"][n, 2:5].double().numpy()
        t = numbers(stacked, n)
        assert_within(out["all"][n, 2:5], changed(stacked, W, 1, t), band(stacked, W, 1, t, unit), "BF16")
        assert torch.equal(out["all"][n, :2], base["all"][n, :2])
        assert torch.equal(out["all"][n, 5:], base["all"][n, 5:])
    W, t = base["one"][1].double().numpy(), numbers(single)
    assert_within(out["one"][1], changed(single, W, 1, t), band(single, W, 1, t, unit), "BF16")
    assert torch.equal(out["one"][::2], base["one"][::2])


@pytest.mark.parametrize("form", DORAS)
def test_a_dora_takes_its_norm_after_the_replacements(form: str, tmp_path: Path) -> None:
    shape = (6, 4, 2)
    value = make_update("replace", shape, Maker(9))
    dora = make_update(form, shape, Maker(8))
    target = Target("w", shape)
    for n, items in enumerate(((value, dora), (dora, value))):
        adapter = Adapter(tuple(Targeted(target, update) for update in items))
        with small_blocks(30):
            out = merge(base_for(adapter, 1, ("F32",)), [adapter], tmp_path / str(n))
        W = numbers(value)["value"]
        exact, allowed = changed(dora, W, 1, numbers(dora)), band(dora, W, 1, numbers(dora), UNIT["F64"])
        assert_within(out["w"], exact, allowed, "F32")


@pytest.mark.parametrize("form", ADDITIVE)
@pytest.mark.parametrize("replacement", ["replace", "replace_rows"])
def test_deltas_come_on_top_of_replacements(form: str, replacement: str, tmp_path: Path) -> None:
    shape = (6, 4)
    extra, value = make_update(form, shape, Maker(4)), make_update(replacement, shape, Maker(5))
    target = Target("w", shape)
    adapter = Adapter((Targeted(target, extra), Targeted(target, value)))
    base = base_for(adapter, 1, ("F32",))
    out = merge(base, [(adapter, 0.5)], tmp_path)
    W = changed(value, base["w"].double().numpy(), 0.5, numbers(value))
    allowed = band(extra, W, 0.5, numbers(extra), UNIT["F64"]) + 2.0**-48
    assert_within(out["w"], changed(extra, W, 0.5, numbers(extra)), allowed, "F32")


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_all_adapters_are_one_sum_that_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    """Ten small steps, none of which would survive a rounding of its own."""
    base: State = {"w": torch.ones(2, 8, dtype=DTYPES[dtype])}
    step = torch.full((2, 8), float(torch.finfo(DTYPES[dtype]).eps) / 8)
    small = Adapter((Targeted(Target("w", (2, 8)), KINDS["add"](TensorRef.of(step), Scaling())),))  # type: ignore[call-arg]
    out = merge(base, [small] * 8, tmp_path)
    assert torch.equal(out["w"], base["w"] + torch.finfo(DTYPES[dtype]).eps)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 1, 3)])
@pytest.mark.parametrize("form", ["replace", "add"])
def test_full_updates_of_any_shape(form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    adapter = one(form, shape, seed=3)
    base = base_for(adapter, 1, ("F32",))
    out = merge(base, [adapter], tmp_path)["layer.weight"]
    update, W = adapter.updates[0].update, base["layer.weight"].double().numpy()
    assert out.shape == shape
    assert_within(out, changed(update, W, 1, numbers(update)), np.full(shape, 2.0**-50), "F32")


def test_replaced_rows_are_exactly_their_values(tmp_path: Path) -> None:
    value = torch.tensor([[1.0, -0.0], [0.1, 3.0]])
    update = ReplaceRows(TensorRef.of(torch.tensor([0, 3])), TensorRef.of(value))
    base: State = {"w": torch.full((4, 2), 1e30)}
    out = merge(base, [Adapter((Targeted(Target("w", (4, 2), layout="embedding"), update),))], tmp_path)["w"]
    assert torch.equal(out[[0, 3]].view(torch.int32), value.view(torch.int32))
    assert torch.equal(out[[1, 2]], base["w"][[1, 2]])


# --- extremes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_norm_of_a_dora_neither_overflows_nor_vanishes(size: float, axis: int, tmp_path: Path) -> None:
    """The squares of these numbers are no float32; the numbers and their norm are."""
    shape = (4, 6)
    W = (Maker(1).values(*shape, dtype=torch.float64) * size).to(torch.bfloat16)
    lora = Lora(TensorRef.of(torch.zeros(2, 6)), TensorRef.of(torch.zeros(4, 2)), Scaling.by("alpha", 1.0, 2))
    dora = Dora(lora, TensorRef.of(torch.ones(shape[axis])), axis)
    out = merge({"w": W}, [Adapter((Targeted(Target("w", shape), dora),))], tmp_path)["w"]
    exact = changed(dora, W.double().numpy(), 1, numbers(dora))
    assert_within(out, exact, 2.0**-20 * np.abs(exact), "BF16")


@pytest.mark.parametrize("axis", [0, 1])
def test_the_norm_of_many_numbers_is_good(axis: int, tmp_path: Path) -> None:
    shape = (2, 60_000) if axis == 0 else (60_000, 2)
    W = Maker(1).values(*shape, dtype=torch.bfloat16).abs()
    lora = make_update("lora", shape, Maker(2), rank=1, alpha=1e-3)
    dora = Dora(lora, TensorRef.of(torch.full((2,), 200.0)), axis)
    out = merge({"w": W}, [Adapter((Targeted(Target("w", shape), dora),))], tmp_path, dtype="bf16")["w"]
    exact = changed(dora, W.double().numpy(), 1, numbers(dora))
    allowed = band(dora, W.double().numpy(), 1, numbers(dora), UNIT["F32"])
    assert_within(out, exact, allowed, "BF16")


@pytest.mark.parametrize("size", [1e-300, 1e-60, 1e60, 1e300])
def test_double_precision_reaches_beyond_float32(size: float, tmp_path: Path) -> None:
    base: State = {"layer.weight": Maker(1).values(3, 2, dtype=torch.float64) * size}
    out = merge(base, [one("lora", (3, 2), alpha=size)], tmp_path)["layer.weight"]
    update, W = one("lora", (3, 2), alpha=size).updates[0].update, base["layer.weight"].numpy()
    assert_within(out, changed(update, W, 1, numbers(update)), band(update, W, 1, numbers(update), UNIT["F64"]), "F64")


def test_a_dora_of_nothing_is_refused(tmp_path: Path) -> None:
    """A row of zeros has no direction."""
    lora = Lora(TensorRef.of(torch.ones(1, 3)), TensorRef.of(torch.zeros(2, 1)), Scaling.by("alpha", 1.0, 1))
    dora = Dora(lora, TensorRef.of(torch.ones(2)), 0)
    adapter = Adapter((Targeted(Target("w", (2, 3)), dora),))
    for n, weight in enumerate((1, 0.5)):
        with pytest.raises(loratool.Mismatch) as caught:
            merge({"w": torch.tensor([[1.0, 2, 3], [0, 0, 0]])}, [(adapter, weight)], tmp_path / str(n))
        assert caught.value.code == "E-NONFINITE"
        assert not (tmp_path / str(n) / "out").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_result_that_the_dtype_can_not_hold_is_refused(form: str, tmp_path: Path) -> None:
    shape = (4, 4)
    item = one(form, shape).updates[0]
    base: State = {"layer.weight": torch.full(shape, 6e4, dtype=torch.float16)}
    huge = replace(item.update, **{
        name: TensorRef.of(ref.read() * 0 + 300) for name, ref in item.update.components().items() if name != "index"
        and hasattr(item.update, name)})  # fmt: skip
    if form in ("replace", "replace_rows"):
        huge = replace(huge, value=TensorRef.of(huge.value.read() * 300))
    if isinstance(huge, Dora):
        huge = replace(huge, magnitude=TensorRef.of(huge.magnitude.read() * 3000))
    if form == "add":
        huge = replace(huge, value=TensorRef.of(huge.value.read() * 300))
    with pytest.raises(loratool.Mismatch) as caught:
        merge(base, [Adapter((replace(item, update=huge),))], tmp_path)
    assert caught.value.code == "E-NONFINITE"
    assert "layer.weight" in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_component_of_another_shape_is_found(form: str) -> None:
    shape = (6, 4, 3) if "mid" in form else (6, 4)
    item = one(form, shape).updates[0]
    for name in item.update.components():
        holder = item.update if hasattr(item.update, name) else item.update.direction  # type: ignore[attr-defined]
        ref: TensorRef = getattr(holder, name)
        for grown in (ref.reshape(1, *ref.shape), TensorRef.of(torch.cat([ref.read()] * 2))):
            wrong: Update = replace(holder, **{name: grown})
            if holder is not item.update:
                wrong = replace(item.update, direction=wrong)
            codes = {problem.code for problem in Adapter((replace(item, update=wrong),)).check()}
            assert codes <= {"E-SHAPE", "E-RANK"}, (name, codes)
            if not (form.startswith(("lokr", "dora")) and math.prod(grown.shape) != ref.numel):  # may fit another way
                assert codes, (name, grown.shape)


@pytest.mark.parametrize("form", FORMS)
def test_a_component_of_another_dtype_is_found(form: str) -> None:
    item = one(form, (6, 4)).updates[0]
    for name in item.update.components():
        holder = item.update if hasattr(item.update, name) else item.update.direction  # type: ignore[attr-defined]
        wrong: Update = replace(holder, **{name: TensorRef.of(getattr(holder, name).read().to(torch.int32))})
        if holder is not item.update:
            wrong = replace(item.update, direction=wrong)
        assert [problem.code for problem in Adapter((replace(item, update=wrong),)).check()] == ["E-DTYPE"], name

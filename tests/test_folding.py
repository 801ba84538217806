"""Arithmetic for writers: every change of form keeps the delta, exactly where it says so."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import (
    DTYPES,
    MATRIX_FORMS,
    SCALES,
    Case,
    Maker,
    adapters,
    alphas,
    cases,
    dtypes,
    make_update,
    matrices,
    pick,
    ranks,
    raw,
    regions,
    rounded,
    seeds,
    small_blocks,
    tensors_of,
    updates,
)
from torch import Tensor

import loratool
from loratool import Adapter, Target, Targeted, TensorRef, folding
from loratool.matrices import ROLE_ORDER
from loratool.tensors import FileSpan
from loratool.updates import Lora, Update

SCALABLE = (*(form for form in MATRIX_FORMS if form not in SCALES), "add")
POWERS = st.sampled_from((-4.0, -1.0, 0.125, 0.5, 2.0, 16.0))
FACTORS = st.sampled_from((3.0, 0.1, -0.7, 1 / 3, 1000.0))


def applied(items: Sequence[Targeted], seed: int = 1) -> Tensor:
    """A base of random numbers with the updates of one tensor in it, in float64."""
    shape = items[0].target.shape
    whole = Maker(seed).values(*shape, dtype=torch.float64)
    matrices = [*whole] if items[0].target.stacked else [whole]
    for number, matrix in enumerate(matrices):
        W = matrix.reshape(len(matrix) if matrix.dim() else 1, -1)
        for item in sorted(items, key=lambda item: ROLE_ORDER.index(item.update.role)):
            if item.target.expert in (None, number):
                start, stop = item.target.rows or (0, len(W))
                block = item.update.open(torch.float64, number if item.target.experts is not None else None)
                if item.update.first_pass:
                    block.observe(W[start:stop], 0)
                part = W[start:stop].clone()
                block.apply(part, 0, 1.0)
                W[start:stop] = part
    return whole


def assert_sound(*items: Targeted) -> None:
    assert Adapter(tuple(items)).check() == []


def assert_near(one: Tensor, two: Tensor, bound: float = 2.0**-20) -> None:
    """Equal but for one rounding to float32 of a factor."""
    assert torch.allclose(one, two, rtol=bound, atol=bound * float(two.abs().max() + 1))


# -- scale ------------------------------------------------------------------------------------------------------------


@given(seeds, dtypes, POWERS)
def test_a_power_of_two_is_exact(seed: int, dtype: str, factor: float) -> None:
    values = Maker(seed, dtype)(5, 3)
    scaled = folding.times(values, factor)
    assert torch.equal(scaled.read(torch.float64), values.read(torch.float64) * factor)
    assert scaled.dtype == ("F32" if dtype == "F16" else dtype)
    assert scaled.read().dtype == DTYPES[scaled.dtype]


@given(seeds, dtypes, FACTORS)
def test_another_factor_is_rounded_once(seed: int, dtype: str, factor: float) -> None:
    values = Maker(seed, dtype)(5, 3)
    scaled = folding.times(values, factor)
    assert scaled.dtype == ("F64" if dtype == "F64" else "F32")
    exact = values.read(torch.float64).numpy() * factor
    assert np.array_equal(scaled.read(torch.float64).numpy(), rounded(exact, scaled.dtype))


def test_float16_does_not_underflow() -> None:
    tiny = TensorRef.of(torch.tensor([2.0**-24], dtype=torch.float16))
    assert folding.times(tiny, 2.0**-10).read().item() == 2.0**-34


@given(st.data(), pick(SCALABLE), matrices, alphas, POWERS | FACTORS)
def test_the_same_delta_under_another_scale(
    data: st.DataObject, form: str, region: tuple[int, int], alpha: float, factor: float
) -> None:
    update: Update = data.draw(updates(form, region))
    assert update.scaling is not None
    wanted = replace(update.scaling, rule="none", alpha=None, scale=update.scaling.factor / factor)
    item = Targeted(Target("a.weight", region), update)
    other = replace(item, update=folding.rescaled(update, wanted))
    assert other.update.scaling == wanted
    assert_sound(other)
    assert_near(applied([other]), applied([item]))


@given(st.floats(1e-3, 1e3), st.integers(1, 300))
def test_alpha_gives_the_scale_back(scale: float, rank: int) -> None:
    scaling = folding.by_rank(scale, rank)
    assert scaling.alpha is not None
    assert scaling.factor == scaling.alpha / rank
    assert abs(scaling.factor - scale) <= 2.0**-52 * scale


# -- rank -------------------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(("lora", "lora-mid")), regions, st.sampled_from((None, 2)), st.integers(0, 4))
def test_zeros_change_nothing(
    data: st.DataObject, form: str, region: tuple[int, ...], experts: int | None, more: int
) -> None:
    update = data.draw(updates(form, region, experts))
    wide = folding.padded(update, folding.rank_of(update) + more)
    assert folding.rank_of(wide) == folding.rank_of(update) + more
    shape = region if experts is None else (experts, *region)
    item, other = (Targeted(Target("a.weight", shape, experts=experts), u) for u in (update, wide))
    assert_sound(other)
    assert {name: ref.dtype for name, ref in wide.components().items()} == {
        name: ref.dtype for name, ref in update.components().items()
    }
    assert_near(applied([other]), applied([item]), 2.0**-48)


@given(adapters(("lora", "lora-mid", "dora0-lora", "dora1-lora-mid", "loha", "replace")))
def test_uniform_has_one_rank_and_one_scale(adapter: Adapter) -> None:
    changed = folding.uniform(adapter.updates)
    assert_sound(*changed)
    loras = [lora for item in changed if (lora := folding.low_rank(item.update))]
    assert len({(folding.rank_of(lora), lora.factors) for lora in loras}) <= 1
    one, two = adapter.targets(), Adapter(changed).targets()
    for name in one:
        assert_near(applied(two[name]), applied(one[name]))
    others = [item for item in adapter.updates if folding.low_rank(item.update) is None]
    assert others == [item for item in changed if folding.low_rank(item.update) is None]


def test_uniform_keeps_what_has_the_frequent_scale_bit_for_bit() -> None:
    make = Maker(3, "BF16")
    items = [
        Targeted(Target(f"l.{n}.weight", (4, 3)), make_update("lora", (4, 3), make, 2, "alpha/rank", alpha))
        for n, alpha in enumerate((2.0, 6.0, 6.0, 12.0))
    ]
    changed = folding.uniform(items)
    assert [item.update.scaling for item in changed] == [items[1].update.scaling] * 4
    for number in (1, 2):
        assert changed[number].update == items[number].update
    assert [item.update.components()["B"].dtype for item in changed] == ["F32", "BF16", "BF16", "BF16"]
    assert "B of 2 updates was scaled; 1 of them by no power of two" in folding.uniform_note(items, changed)


@given(st.data(), regions.filter(lambda region: len(region) > 2), st.sampled_from((None, 3)))
def test_a_core_goes_into_a(data: st.DataObject, region: tuple[int, ...], experts: int | None) -> None:
    update = data.draw(updates("lora-mid", region, experts))
    flat = folding.without_core(update)
    assert flat.mid is None
    shape = region if experts is None else (experts, *region)
    item, other = (Targeted(Target("a.weight", shape, experts=experts), u) for u in (update, flat))
    assert_sound(other)
    assert_near(applied([other]), applied([item]))


# -- parts and wholes -------------------------------------------------------------------------------------------------


def of_rows(item: Targeted, start: int, stop: int) -> Targeted:
    """The part of a LoRA that changes rows start:stop of its tensor: rows of B."""
    assert isinstance(item.update, Lora)
    B = item.update.B.narrow(len(item.update.B.shape) - 2, start, stop - start)  # [.., rows, rank]
    return Targeted(replace(item.target, rows=(start, stop)), replace(item.update, B=B))


@given(st.data(), regions, st.sampled_from((None, 2)))
def test_rows_apart_are_the_whole(data: st.DataObject, region: tuple[int, ...], experts: int | None) -> None:
    shape = region if experts is None else (experts, *region)
    item = Targeted(Target("a.weight", shape, experts=experts), data.draw(updates("lora", region, experts)))
    cut = data.draw(st.integers(0, region[0]))
    parts = [of_rows(item, start, stop) for start, stop in ((0, cut), (cut, region[0])) if start < stop]
    assert_sound(*parts)
    assert torch.equal(applied(parts), applied([item]))
    padded = [folding.of_all_rows(part) for part in parts]
    assert_sound(*padded)
    assert torch.equal(applied(padded), applied([item]))


@given(st.data(), regions, pick(("lora", "lora-mid", "loha", "loha-mid", "add")))
def test_rows_of_rows_are_the_part_of_the_whole(data: st.DataObject, region: tuple[int, ...], form: str) -> None:
    """Of an update of a range of rows, what changes another range; and all of it among rows of zeros."""
    rows = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True).map(sorted))
    target = Target("a.weight", (10, *region[1:]), (rows[0], rows[1]))
    item = Targeted(target, data.draw(updates(form, target.region)))
    whole = folding.of_all_rows(item)
    assert_sound(whole)
    assert torch.equal(applied([whole]), applied([item]))
    start, stop = data.draw(st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True).map(sorted))
    part = folding.of_rows(item, start, stop)
    base = Maker(1).values(*target.shape, dtype=torch.float64)
    if part is None:
        assert torch.equal(applied([item])[start:stop], base[start:stop])
    else:
        assert_sound(part)
        assert part.target.covers_all
        moved = applied([part]) - Maker(1).values(*part.target.shape, dtype=torch.float64)
        torch.testing.assert_close(moved, (applied([item]) - base)[start:stop], rtol=1e-12, atol=1e-12)


@given(st.data(), regions, pick(("replace", "dora0-lora", "dora0-loha", "lokr", "dora1-lora")))
def test_rows_of_all_are_cut_where_that_can_be(data: st.DataObject, region: tuple[int, ...], form: str) -> None:
    shape = (2 * region[0], *region[1:])
    exact = form in ("lokr", "dora1-lora")
    rows = (0, region[0]) if exact else None
    item = Targeted(Target("a.weight", shape, rows), data.draw(updates(form, region if exact else shape)))
    part = folding.of_rows(item, 0, region[0])
    assert part is not None
    assert part.target == Target("a.weight", region)
    assert_sound(part)
    assert (folding.of_rows(item, region[0], shape[0]) is None) == exact
    if exact:
        assert part.update is item.update
    else:
        state = Maker(1).values(*shape, dtype=torch.float64)
        got = state[: region[0]].reshape(region[0], -1).clone()
        part.update.open(torch.float64, None).apply(got, 0, 1.0)
        torch.testing.assert_close(got, applied([item])[: region[0]].reshape(region[0], -1), rtol=1e-12, atol=1e-12)


@given(st.data(), regions, st.integers(1, 3), pick((*MATRIX_FORMS, "add", "replace")))
def test_experts_apart_are_the_whole(data: st.DataObject, region: tuple[int, ...], experts: int, form: str) -> None:
    target = Target("a.weight", (experts, *region), experts=experts)
    item = Targeted(target, data.draw(updates(form, region, experts)))
    parts = [folding.of_expert(item, expert) for expert in range(experts)]
    assert_sound(*parts)
    assert torch.equal(applied(parts), applied([item]))


@given(st.data(), regions, st.sets(st.integers(0, 3), min_size=1))
def test_single_experts_become_all(data: st.DataObject, region: tuple[int, ...], chosen: set[int]) -> None:
    items = [
        Targeted(Target("a.weight", (4, *region), expert=expert), data.draw(updates("lora", region)))
        for expert in sorted(chosen)
    ]
    whole = folding.of_all_experts(items)
    assert_sound(whole)
    assert whole.target.experts == 4
    assert_near(applied([whole]), applied(items))


@given(adapters(("lora", "lora-mid"), most=2), seeds)
def test_all_loras_of_a_tensor_become_one(adapter: Adapter, seed: int) -> None:
    for items in adapter.targets().values():
        whole = folding.merged_factors(items)
        assert_sound(whole)
        assert whole.target.rows is None
        assert whole.target.expert is None
        assert isinstance(whole.update, Lora)
        assert_near(applied([whole], seed), applied(items, seed))


@given(st.data(), regions, st.integers(1, 4))
def test_a_sum_is_one_update(data: st.DataObject, region: tuple[int, ...], count: int) -> None:
    items = [Targeted(Target("a.weight", region), data.draw(updates("lora", region))) for _ in range(count)]
    whole = folding.summed(items)
    assert_sound(whole)
    assert folding.rank_of(whole.update) == sum(folding.rank_of(item.update) for item in items)
    assert_near(applied([whole]), applied(items))


def test_a_scale_of_zero_changes_nothing() -> None:
    make = Maker(1)
    target = Target("a.weight", (4, 3))
    items = [Targeted(target, make_update("lora", (4, 3), make, 2, "none", alpha)) for alpha in (0.0, 0.0, 3.0)]
    for chosen in (items, items[:2]):
        assert_near(applied([folding.summed(chosen)]), applied(chosen))
        for item, other in zip(chosen, folding.uniform(chosen), strict=True):
            assert_near(applied([other]), applied([item]))


# -- full tensors -----------------------------------------------------------------------------------------------------


@given(cases(), st.sampled_from((16, 1 << 20)))
def test_what_is_baked_has_the_bits_of_a_merge(case: Case, block: int) -> None:
    with tempfile.TemporaryDirectory() as folder, small_blocks(block):
        base, merged = Path(folder, "base.safetensors"), Path(folder, "merged.safetensors")
        save_file(case.base, base)
        loratool.merge(base, case.adapter, merged)
        truth = tensors_of(merged)
        for name, items in case.adapter.targets().items():
            baked = folding.bake(items, TensorRef.of(case.base[name], name))
            assert_sound(baked)
            value = baked.update.components()["value"].read()
            assert (value.dtype, value.shape) == (truth[name].dtype, truth[name].shape)
            assert raw(value) == raw(truth[name])


# -- laziness ---------------------------------------------------------------------------------------------------------


def test_nothing_is_read_before_it_is_needed() -> None:
    def absent(*shape: int) -> TensorRef:
        return TensorRef("x", "F32", shape, FileSpan(Path("/does/not/exist"), 0), shape)

    target = Target("a.weight", (6, 4))
    scaling = make_update("lora", (6, 4), Maker(0)).scaling
    item = Targeted(target, Lora(absent(2, 4), absent(6, 2), scaling))
    other = Targeted(target, Lora(absent(3, 4), absent(6, 3), folding.by_rank(0.3, 3)))
    made = [folding.summed([item, other]), *folding.uniform([item, other]), of_rows(item, 1, 3)]
    made += [folding.of_all_rows(made[-1]), folding.bake([item], absent(6, 4))]
    assert_sound(made[0])
    for result in made:
        with pytest.raises(loratool.InvalidFile):
            [ref.read() for ref in result.update.components().values()]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_that_fits_is_left_alone(rank: int) -> None:
    update = make_update("lora", (3, 3), Maker(0), rank)
    assert folding.padded(update, rank) is update


@given(ranks, alphas)
def test_a_scale_that_fits_is_left_alone(rank: int, alpha: float) -> None:
    update = make_update("lora", (3, 3), Maker(0), rank, "alpha/rank", alpha)
    assert folding.rescaled(update, update.scaling).B is update.B

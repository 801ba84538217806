"""What holds for every adapter: round trips, order, splitting, weight 0, and the way back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    ADDITIVE,
    DTYPES,
    FORMS,
    Case,
    Maker,
    State,
    adapters,
    base_for,
    cases,
    files_of,
    make_update,
    one,
    raw,
    same_bits,
    save_sharded,
    scaling,
    seeds,
    tensors_of,
    weights,
)
from torch import Tensor

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.updates import Add, Dora, Loha, Lora, Replace, Scale, Scaling, Update

Parts = Sequence[Adapter | tuple[Adapter, float]]


Fresh = Callable[[], Path]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Makes a new folder for every example."""
    return lambda: tmp_path_factory.mktemp("example")


def merged(base: State, parts: Parts, folder: Path, *, shards: int = 1, **options) -> State:
    save_sharded(base, folder / "base", shards)
    loratool.merge(folder / "base", parts, folder / "out", allow_unchanged=True, **options)
    return tensors_of(folder / "out")


def assert_close(one: State, two: State, base: State) -> None:
    """Equal but for the rounding of the compute dtype and of the output, one unit each way."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        x, y = value.double(), two[name].double()
        if not x.numel():
            continue
        unit = 2.0**-10 if value.dtype in (torch.bfloat16, torch.float16) else 2.0**-22
        unit = 2.0**-40 if value.dtype == torch.float64 else unit
        unit *= 8 if value.dtype == torch.bfloat16 else 1
        largest = max(float(x.abs().max()), float(base[name].double().abs().max()) if name in base else 0.0)
        assert float((x - y).abs().max()) <= unit * (largest + 2.0**-20), name


def described(adapter: Adapter) -> list[object]:
    """All that a file must keep of an adapter, numbers as bytes."""
    return [
        (
            item.target,
            item.update.kind,
            item.update.scaling,
            getattr(item.update, "axis", None),
            {part: (ref.dtype, ref.shape, raw(ref.read())) for part, ref in item.update.components().items()},
        )
        for item in adapter.updates
    ]


# --- files ----------------------------------------------------------------------------------------------------------


@given(adapter=adapters(), seed=seeds)
def test_a_saved_adapter_is_the_same_when_loaded(adapter: Adapter, seed: int, fresh: Fresh) -> None:
    folder = fresh()
    first, second = folder / "1.lora.safetensors", folder / "2.lora.safetensors"
    known = {
        name: loratool.TensorIdentity(TensorRef.of(value).digest(), TensorRef.of(value).dtype, tuple(value.shape))
        for name, value in base_for(adapter, seed, ("BF16",)).items()
        if name in adapter.targets()
    }
    adapter = replace(adapter, base=loratool.BaseIdentity("some/model", known if seed % 2 else {}))
    loratool.save(adapter, first)
    loaded = loratool.load(first)
    assert described(loaded) == described(adapter)
    assert (loaded.base, loaded.provenance) == (adapter.base, adapter.provenance)
    assert loratool.validate(first) == []
    loratool.save(loaded, second)
    assert first.read_bytes() == second.read_bytes()


@given(adapter=adapters(), data=st.data())
def test_a_file_does_not_depend_on_the_order_of_dicts(adapter: Adapter, data: st.DataObject, fresh: Fresh) -> None:
    folder = fresh()
    pairs = [(f"key {n}", f"{n}") for n in range(4)]
    identities = [(name, loratool.TensorIdentity("blake3:" + "0" * 64, "F32", items[0].target.shape))
                  for name, items in adapter.targets().items()]  # fmt: skip
    for n in range(2):
        shuffled = replace(
            adapter,
            provenance=dict(data.draw(st.permutations(pairs))),
            base=loratool.BaseIdentity("", dict(data.draw(st.permutations(identities)))),
        )
        loratool.save(shuffled, folder / f"{n}.lora.safetensors")
    assert len({path.read_bytes() for path in folder.iterdir()}) == 1


@given(adapter=adapters())
def test_an_adapter_in_memory_and_its_file_merge_alike(adapter: Adapter, fresh: Fresh) -> None:
    folder = fresh()
    base = base_for(adapter, 1, ("BF16", "F32"))
    loratool.save(adapter, folder / "a.lora.safetensors")
    save_sharded(base, folder / "base")
    one = loratool.merge(folder / "base", adapter, folder / "memory").receipt
    two = loratool.merge(folder / "base", folder / "a.lora.safetensors", folder / "file").receipt
    assert same_bits(tensors_of(folder / "memory"), tensors_of(folder / "file"))
    assert one.adapters[0].digest == two.adapters[0].digest


# --- order ----------------------------------------------------------------------------------------------------------


@given(case=cases(), data=st.data())
def test_the_order_of_updates_is_rounding(case: Case, data: st.DataObject, fresh: Fresh) -> None:
    folder = fresh()
    shuffled = replace(case.adapter, updates=tuple(data.draw(st.permutations(case.adapter.updates))))
    assert_close(
        merged(case.base, [case.adapter], folder / "1"), merged(case.base, [shuffled], folder / "2"), case.base
    )


@given(case=cases(), data=st.data())
def test_the_order_of_base_tensors_does_not_matter(case: Case, data: st.DataObject, fresh: Fresh) -> None:
    folder = fresh()
    shuffled = dict(data.draw(st.permutations([*case.base.items()])))
    one, two = merged(case.base, [case.adapter], folder / "1"), merged(shuffled, [case.adapter], folder / "2", shards=2)
    assert same_bits(one, two)


@given(case=cases(ADDITIVE), data=st.data())
def test_the_order_of_adapters_is_rounding(case: Case, data: st.DataObject, fresh: Fresh) -> None:
    folder = fresh()
    singles = [Adapter((item,)) for item in case.adapter.updates]
    parts = [(part, data.draw(weights)) for part in singles]
    shuffled = data.draw(st.permutations(parts))
    assert_close(merged(case.base, parts, folder / "1"), merged(case.base, shuffled, folder / "2"), case.base)


@given(case=cases(), shards=st.integers(2, 4))
def test_one_file_and_shards_give_the_same_tensors(case: Case, shards: int, fresh: Fresh) -> None:
    folder = fresh()
    one = merged(case.base, [case.adapter], folder / "1")
    assert same_bits(one, merged(case.base, [case.adapter], folder / "2", shards=shards))
    assert {n for n in one if raw(one[n]) != raw(case.base[n])} <= case.touched


# --- parts and the whole --------------------------------------------------------------------------------------------


def rows_of(update: Update, start: int, stop: int) -> Update:
    """The part of a row-separable update for some rows of its region."""

    def cut(ref: TensorRef) -> TensorRef:
        return ref.narrow(0, start, stop - start)

    match update:
        case Lora():
            return replace(update, B=cut(update.B))
        case Loha():
            return replace(update, B1=cut(update.B1), B2=cut(update.B2))
        case Replace() | Add():
            return replace(update, value=cut(update.value))
        case Scale():
            return update if update.axis == 1 else replace(update, factor=cut(update.factor))
        case Dora():
            return replace(update, direction=rows_of(update.direction, start, stop), magnitude=cut(update.magnitude))
        case _:
            raise AssertionError(update.kind)


SEPARABLE = [form for form in FORMS if "lokr" not in form and not form.startswith(("dora1", "replace_rows"))]


@pytest.mark.parametrize("form", SEPARABLE)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_ranges_of_rows_make_up_the_whole(form: str, dtype: str, tmp_path: Path) -> None:
    shape = (7, 4, 3) if "mid" in form else (7, 4)
    whole = one(form, shape)
    base = base_for(whole, 2, (dtype,))
    ((target, update),) = [(item.target, item.update) for item in whole.updates]
    cuts = (0, 1, 4, 7)
    parts = [Targeted(replace(target, rows=(a, b)), rows_of(update, a, b)) for a, b in itertools.pairwise(cuts)]
    split = Adapter(tuple(parts[::-1]))
    loratool.save(split, tmp_path / "split.lora.safetensors")
    assert loratool.validate(tmp_path / "split.lora.safetensors") == []
    left = merged(base, [whole], tmp_path / "1")
    assert_close(left, merged(base, [loratool.load(tmp_path / "split.lora.safetensors")], tmp_path / "2"), base)
    assert_close(left, merged(base, [Adapter((part,)) for part in parts], tmp_path / "3"), base)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "replace_rows"])
def test_experts_one_by_one_are_all_experts_at_once(form: str, tmp_path: Path) -> None:
    count, matrix = 3, (6, 4, 2) if "mid" in form else (6, 4)
    shape = (count, *matrix)
    together = make_update(form, matrix, Maker(5, "BF16", count))

    def expert(update: Update, n: int) -> Update:
        cut = {name: ref.select(n) for name, ref in update.components().items() if hasattr(update, name)}
        if isinstance(update, Dora):
            cut["direction"] = expert(update.direction, n)
        return replace(update, **cut)

    whole = Adapter((Targeted(Target("w", shape, experts=count), together),))
    each = Adapter(tuple(Targeted(Target("w", shape, expert=n), expert(together, n)) for n in range(count)))
    base = base_for(whole, 3, ("BF16",))
    left = merged(base, [whole], tmp_path / "1")
    assert same_bits(left, merged(base, [each], tmp_path / "2"))
    alone = merged(base, [Adapter(each.updates[1:2])], tmp_path / "3")
    assert raw(alone["w"][1]) == raw(left["w"][1])
    assert raw(alone["w"][0]) == raw(base["w"][0])
    assert raw(alone["w"][2]) == raw(base["w"][2])


@given(seed=seeds, ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)), ws=st.tuples(weights, weights))
def test_two_loras_are_the_lora_of_both(
    seed: int, ranks: tuple[int, int], ws: tuple[float, float], fresh: Fresh
) -> None:
    folder, shape, make = fresh(), (5, 4), Maker(seed, "F64")
    target = Target("w", shape)
    loras = [make_update("lora", shape, make, rank) for rank in ranks]
    parts = [(Adapter((Targeted(target, lora),)), weight) for lora, weight in zip(loras, ws, strict=True)]
    A = torch.cat([lora.A.read() for lora in loras])
    B = torch.cat([lora.B.read() * (lora.factors.scale * w) for lora, w in zip(loras, ws, strict=True)], 1)
    both = Lora(TensorRef.of(A), TensorRef.of(B), scaling("none", 1.0, sum(ranks)))
    together = Adapter((Targeted(target, both),))
    base = base_for(together, seed, ("F64",))
    assert_close(merged(base, parts, folder / "1"), merged(base, [together], folder / "2"), base)


# --- weights --------------------------------------------------------------------------------------------------------


@given(case=cases(), more=cases(), dtype=st.sampled_from(("keep", "fp32")))
def test_weight_0_is_the_identity(case: Case, more: Case, dtype: str, fresh: Fresh) -> None:
    folder = fresh()
    parts = [(case.adapter, 0.0), (case.adapter, -0.0)]
    out = merged(case.base, parts, folder, dtype=dtype)
    wanted = {
        name: value.float() if dtype == "fp32" and value.is_floating_point() else value
        for name, value in case.base.items()
    }
    assert same_bits(out, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES])
def test_weight_0_keeps_zeros_and_their_signs(form: str, dtype: str, tmp_path: Path) -> None:
    """A base of zeros: even the norm of a DoRA would be 0."""
    shape = (4, 4)
    adapter = one(form, shape)
    base = {"layer.weight": torch.zeros(shape, dtype=DTYPES[dtype])}
    base["layer.weight"][::2] = -0.0
    assert same_bits(merged(base, [(adapter, 0)], tmp_path), base)


@given(case=cases(ADDITIVE), weight=weights)
def test_a_weight_is_a_scale(case: Case, weight: float, fresh: Fresh) -> None:
    folder = fresh()

    def scaled(item: Targeted) -> Targeted:
        known = item.update.scaling
        assert known is not None
        return replace(
            item, update=replace(item.update, factors=Scaling("none", known.rank, None, known.factor * weight))
        )

    strong = Adapter(tuple(map(scaled, case.adapter.updates)))
    assert_close(
        merged(case.base, [(case.adapter, weight)], folder / "1"), merged(case.base, [strong], folder / "2"), case.base
    )


@pytest.mark.parametrize("form", ["replace", "replace_rows", "dora0-lora", "dora1-lora", "dora1-loha-mid"])
@pytest.mark.parametrize("weight", [0.25, 1.5, -1.0])
def test_a_weight_moves_along_the_line_to_the_full_change(form: str, weight: float, tmp_path: Path) -> None:
    adapter = one(form, (5, 4))
    base = base_for(adapter, 4, ("F64",))
    full = merged(base, [adapter], tmp_path / "1")
    part = merged(base, [(adapter, weight)], tmp_path / "2")
    W = base["layer.weight"]
    assert_close(part, {**base, "layer.weight": W + weight * (full["layer.weight"] - W)}, base)


# --- the way back ---------------------------------------------------------------------------------------------------


@given(case=cases(), second=weights, shards=st.integers(1, 3))
def test_unmerging_with_the_base_gives_its_files_back(case: Case, second: float, shards: int, fresh: Fresh) -> None:
    folder = fresh()
    save_sharded(case.base, folder / "base", shards)
    (folder / "base" / "config.json").write_text('{"model_type": "x"}\n')
    additive = Adapter(tuple(i for i in case.adapter.updates if i.update.role == "add"))
    overlapping = {i.target.name for i in case.adapter.updates if i.update.role == "renormalise"}
    more = Adapter(tuple(i for i in additive.updates if i.target.name not in overlapping))
    parts: list[tuple[Adapter, float]] = [(case.adapter, 1.0)]
    if more.updates and more.updates != case.adapter.updates:
        parts.append((more, second))
    loratool.merge(folder / "base", parts, folder / "merged", allow_unchanged=True)
    report = loratool.unmerge(folder / "merged", [p for p, _ in parts], folder / "back", base=folder / "base")
    assert report.exact
    assert report.bound == 0
    assert files_of(folder / "back") == files_of(folder / "base")


def worst(base: State, back: State) -> float:
    return max((float((base[n].double() - back[n].double()).abs().max()) for n in base if base[n].numel()), default=0.0)


@given(case=cases(ADDITIVE), more=st.lists(weights, max_size=2), dtype=st.sampled_from(("keep", "bf16", "fp32")))
def test_unmerging_without_the_base_keeps_within_the_bound(case: Case, more: list[float], dtype: str, fresh) -> None:
    folder = fresh()
    save_sharded(case.base, folder / "base")
    extra = [Adapter((item,)) for item in case.adapter.updates]
    parts = [(case.adapter, 1.0), *zip(extra, more, strict=False)]
    loratool.merge(folder / "base", parts, folder / "merged", dtype=dtype, allow_unchanged=True)
    report = loratool.unmerge(folder / "merged", [part for part, _ in parts], folder / "back")
    back = tensors_of(folder / "back")
    assert {n: (v.dtype, v.shape) for n, v in back.items()} == {n: (v.dtype, v.shape) for n, v in case.base.items()}
    assert worst(case.base, back) <= report.bound
    assert report.restored <= report.total == len(report.plan.changes)
    if report.exact:
        assert same_bits(back, case.base)


def within(base: Tensor, parts: list[Adapter], folder: Path) -> None:
    """Merging and unmerging a tensor without its base keeps within the bound that the report gives."""
    state = {"layer.weight": base}
    save_sharded(state, folder / "base")
    loratool.merge(folder / "base", parts, folder / "merged", allow_unchanged=True)
    report = loratool.unmerge(folder / "merged", parts, folder / "back")
    found = worst(state, tensors_of(folder / "back"))
    assert found <= report.bound, f"off by {found:.3g}, the report says at most {report.bound:.3g}"


def difference(value: Tensor, scale: float = 1.0) -> Adapter:
    return Adapter(
        (Targeted(Target("layer.weight", tuple(value.shape)), Add(TensorRef.of(value), Scaling(scale=scale))),)
    )


def test_the_bound_holds_where_large_differences_cancel(tmp_path: Path) -> None:
    """Up by 4096 and down again: float32 loses bits of W on the way that bfloat16 would have kept."""
    up = torch.full((2, 8), 4096.0)
    base = (torch.arange(16).reshape(2, 8) * 0.00071 + 0.0101).bfloat16()
    within(base, [difference(up), difference(-up)], tmp_path)


def test_the_bound_holds_inside_one_lora_that_cancels(tmp_path: Path) -> None:
    A = torch.tensor([[8192.0] * 4, [8192.0] * 4])
    B = torch.tensor([[1.0, -1.0], [1.0, -0.99999]])
    lora = Lora(TensorRef.of(A), TensorRef.of(B), scaling("none", 1.0, 2))
    base = torch.tensor([[0.0101, 0.0207, 0.0313, 0.00419]] * 2).bfloat16()
    within(base, [Adapter((Targeted(Target("layer.weight", (2, 4)), lora),))], tmp_path)


def test_the_bound_holds_for_subnormal_half_precision(tmp_path: Path) -> None:
    """Below 2^-14 the steps of float16 stop getting smaller."""
    base = torch.full((2, 4), 3 * 2.0**-24).half()
    within(base, [difference(torch.full((2, 4), 0.5 * 2.0**-24))], tmp_path)  # a tie: 3.5 steps become 4, twice


def test_the_bound_counts_what_vanished_in_a_narrow_dtype(tmp_path: Path) -> None:
    """Zeros are not exact where float16 had no room for what was there."""
    state = {"layer.weight": torch.full((2, 4), 1e-10)}
    save_sharded(state, tmp_path / "base")
    adapter = difference(torch.zeros(2, 4))
    loratool.merge(tmp_path / "base", adapter, tmp_path / "merged", dtype="fp16", allow_unchanged=True)
    report = loratool.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert not report.exact
    assert worst(state, tensors_of(tmp_path / "back")) <= report.bound


@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_the_bound_is_known_for_numbers_beyond_float32(size: float, tmp_path: Path) -> None:
    base = torch.full((2, 4), size, dtype=torch.float64)
    within(base, [difference(torch.full((2, 4), size / 3, dtype=torch.float64))], tmp_path)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_adapter_of_weight_0_is_unmerged_as_nothing(axis: int, tmp_path: Path) -> None:
    """Undoing it would divide by a norm of 0."""
    shape = (4, 4)
    lora = Lora(TensorRef.of(torch.ones(2, 4)), TensorRef.of(torch.zeros(4, 2)), scaling("none", 1.0, 2))
    dora = Dora(lora, TensorRef.of(torch.ones(4)), axis)
    idle, other = Adapter((Targeted(Target("layer.weight", shape), dora),)), one("add", shape, dtype="BF16")
    save_sharded({"layer.weight": torch.zeros(shape, dtype=torch.float64)}, tmp_path / "base")
    loratool.merge(tmp_path / "base", [(other, 1)], tmp_path / "one")
    with pytest.raises(loratool.Mismatch):  # a DoRA beside another update is refused
        loratool.merge(tmp_path / "base", [(idle, 1), (other, 1)], tmp_path / "refused")
    loratool.merge(tmp_path / "base", [(idle, 0), (other, 1)], tmp_path / "merged")
    assert same_bits(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "one"))
    report = loratool.unmerge(tmp_path / "merged", [idle, other], tmp_path / "back")
    assert report.exact

"""Arithmetic for writers: the same delta under another scale, rank, shape or kind, for targets that can not hold it.

Everything here is lazy: results are references whose numbers are made when they are read. The factors keep their
dtype where that loses nothing; where a product has to be rounded, it is rounded once, to float32 (float64 stays).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

from loratool.adapter import Target, Targeted
from loratool.blocks import whole
from loratool.layout import NewTensor, Weighted
from loratool.tensors import Computed, Shape, TensorRef, torch_dtype
from loratool.updates import Add, Dora, Loha, Lokr, Lora, Replace, Scale, Scaling, Update
from loratool.updates.lora import with_core

if TYPE_CHECKING:
    import torch

U = TypeVar("U", bound=Update)


# -- scale ------------------------------------------------------------------------------------------------------------


def times(ref: TensorRef, factor: float) -> TensorRef:
    """A tensor times a number.

    By a power of two it keeps its dtype and is exact (but for results below the smallest normal number); float16,
    whose exponent is too short for that, becomes float32. Any other factor makes it float32, rounded once.
    """
    if factor == 1:
        return ref
    keeps = ref.dtype == "F64" or (ref.dtype != "F16" and is_exact(factor))
    dtype = ref.dtype if keeps else "F32"

    def make() -> torch.Tensor:
        import torch

        return (ref.read(torch.float64) * factor).to(torch_dtype(dtype))

    return _computed(ref.name, dtype, ref.shape, make)


def single(ref: TensorRef) -> TensorRef:
    """A float64 tensor as float32, rounded once, for containers that have no other; other dtypes as they are."""
    if ref.dtype != "F64":
        return ref
    return _computed(ref.name, "F32", ref.shape, lambda: ref.read(torch_dtype("F32")))


def is_exact(factor: float) -> bool:
    """Whether a product with this number loses nothing: it is a power of two, or its negative, or zero."""
    return abs(math.frexp(factor)[0]) in (0.0, 0.5)


def by_rank(scale: float, rank: int) -> Scaling:
    """The rule alpha/rank with the alpha that gives this scale: to the last bit where there is one."""
    near = scale * rank
    candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    alpha = next((alpha for alpha in candidates if alpha / rank == scale), near)
    return Scaling.by("alpha/rank", alpha, rank)


def rescaled(update: U, scaling: Scaling) -> U:
    """The same delta under another scale: the left factor times s/s'. Kinds without a scale stay as they are.

    A LoRA's B [out, rank], a LoHa's B1, a LoKr's w1 or B1, the value of a stored difference.
    """
    if update.scaling is None:
        return update
    factor = update.scaling.factor / scaling.factor
    if isinstance(update, Dora):
        return cast(U, replace(update, direction=rescaled(update.direction, scaling)))
    if isinstance(update, Lora):
        return cast(U, replace(update, B=times(update.B, factor), factors=scaling))
    if isinstance(update, Loha):
        return cast(U, replace(update, B1=times(update.B1, factor), factors=scaling))
    if isinstance(update, Add):
        return cast(U, replace(update, value=times(update.value, factor), factors=scaling))
    assert isinstance(update, Lokr), update.kind
    if update.w1 is not None:
        return cast(U, replace(update, w1=times(update.w1, factor), factors=scaling))
    assert update.B1 is not None
    return cast(U, replace(update, B1=times(update.B1, factor), factors=scaling))


# -- rank -------------------------------------------------------------------------------------------------------------


def rank_of(update: Lora) -> int:
    return update.B.shape[-1]


def padded(update: Lora, rank: int) -> Lora:
    """The same delta and scale at a larger rank: rows of zeros for A [rank, in...], columns of zeros for B [out, rank].

    A Tucker core [rank, rank, kernel...] grows along both. Exact, in the factors' own dtypes.
    """
    if rank == rank_of(update):
        return update
    lead = len(update.B.shape) - 2  # 1 where the components have a dimension of experts

    def grown(ref: TensorRef, *axes: int) -> TensorRef:
        shape = tuple(rank if axis - lead in axes else size for axis, size in enumerate(ref.shape))
        return assembled(shape, [(ref, (0,) * len(shape))])

    return Lora(
        grown(update.A, 0),
        grown(update.B, 1),
        by_rank(update.factors.factor, rank),
        None if update.mid is None else grown(update.mid, 0, 1),
    )


def uniform(items: Iterable[Targeted]) -> tuple[Targeted, ...]:
    """All LoRA updates, and the directions of DoRA, at one rank (the largest) and one scale (the most frequent).

    For consumers that read a single rank and a single alpha. Other kinds stay.
    """
    items = tuple(items)
    loras = [lora for item in items if (lora := low_rank(item.update)) is not None]
    if not loras:
        return items
    rank = max(map(rank_of, loras))
    scaling = by_rank(most_frequent(lora.factors.factor for lora in loras) or 1.0, rank)

    def changed(update: Update) -> Update:
        if isinstance(update, Dora):
            return replace(update, direction=changed(update.direction))
        # the rank first: both steps change alpha/rank, and the scale that is asked for comes last
        return rescaled(padded(update, rank), scaling) if isinstance(update, Lora) else update

    return tuple(replace(item, update=changed(item.update)) for item in items)


def uniform_note(before: Iterable[Targeted], after: Iterable[Targeted]) -> str:
    """What `uniform` has done to some updates, for people."""
    pairs = [(low_rank(one.update), low_rank(two.update)) for one, two in zip(before, after, strict=True)]
    scales = [(one.factors.factor, two.factors.factor) for one, two in pairs if one and two]
    ranks = [rank_of(two) for _, two in pairs if two]
    if not scales:
        return "no LoRA update is in it to bring to one rank and scale"
    moved = [one / two for one, two in scales if one != two]
    rounded = sum(not is_exact(factor) for factor in moved)
    how = f"; {rounded} of them by no power of two, rounded to float32" if rounded else ", exactly"
    what = f"B of {len(moved)} updates was scaled{how}" if moved else "nothing had to be scaled"
    return f"one rank, {ranks[0]}, and one scale, {scales[0][1]:g}: {what}"


def low_rank(update: Update) -> Lora | None:
    """The LoRA that an update is, or that gives its direction."""
    if isinstance(update, Dora):
        return low_rank(update.direction)
    return update if isinstance(update, Lora) else None


def most_frequent(values: Iterable[float]) -> float:
    """The value that most have, the first of several; zeros count only if there is nothing else."""
    counted = Counter(values)
    return max(counted, key=lambda value: (value != 0, counted[value]))


def without_core(update: Lora) -> Lora:
    """A LoRA with its Tucker core contracted into A, which becomes [rank, in, kernel...], in float32 or float64."""
    if update.mid is None:
        return update
    A, mid = update.A, update.mid
    lead = len(update.B.shape) - 2
    dtype = "F64" if "F64" in (A.dtype, mid.dtype) else "F32"
    shape = (*A.shape[:lead], rank_of(update), A.shape[-1], *mid.shape[lead + 2 :])

    def make() -> torch.Tensor:
        import torch

        a, core = A.read(torch_dtype(dtype)), mid.read(torch_dtype(dtype))
        if not lead:
            return with_core(a, core)
        return torch.stack([with_core(*pair) for pair in zip(a, core, strict=True)])

    return Lora(_computed(A.name, dtype, shape, make), update.B, update.factors)


def multiplied(update: Lora) -> TensorRef:
    """B @ A as one tensor [out, in, kernel...], without the scale: rounded once, to float32 (or float64)."""
    components = update.components()
    dtype = "F64" if any(ref.dtype == "F64" for ref in components.values()) else "F32"
    kernel = update.A.shape[2:] if update.mid is None else update.mid.shape[2:]
    shape = (update.B.shape[0], update.A.shape[1], *kernel)

    def make() -> torch.Tensor:
        import torch

        return update.open(torch.float64, None).delta(0, shape[0]).to(torch_dtype(dtype)).reshape(shape)

    return _computed(update.B.name, dtype, shape, make)


# -- parts and wholes -------------------------------------------------------------------------------------------------


def of_expert(item: Targeted, expert: int) -> Targeted:
    """The part of an update of all experts that changes one of them. Exact, without a copy."""
    assert item.target.experts is not None, "an update of all experts"
    target = replace(item.target, experts=None, expert=expert)
    return Targeted(target, _mapped(item.update, lambda ref: ref.select(expert)))


def of_all_rows(item: Targeted) -> Targeted:
    """A LoRA, a LoHa or a difference of a range of rows as one of the whole tensor. Exact.

    B [rows, rank], B1 and B2, or the value [rows, in...] lie between rows of zeros.
    """
    update, rows = item.update, item.target.rows
    if rows is None:
        return item

    def grown(ref: TensorRef, axis: int) -> TensorRef:
        start = tuple(rows[0] if dim == axis else 0 for dim in range(len(ref.shape)))
        return assembled((*ref.shape[:axis], item.target.matrix[0], *ref.shape[axis + 1 :]), [(ref, start)])

    whole: Update
    if isinstance(update, Lora):
        whole = replace(update, B=grown(update.B, len(update.B.shape) - 2))
    elif isinstance(update, Loha):
        axis = len(update.B1.shape) - 2
        whole = replace(update, B1=grown(update.B1, axis), B2=grown(update.B2, axis))
    else:
        assert isinstance(update, Add), "only LoRA, LoHa and differences"
        whole = replace(update, value=grown(update.value, int(item.target.stacked and item.target.expert is None)))
    return Targeted(replace(item.target, rows=None), whole)


def of_rows(item: Targeted, start: int, stop: int) -> Targeted | None:
    """The part of an update that changes rows start:stop, as one of a tensor of these rows alone; None if none does.

    Any update of exactly these rows; LoRA, LoHa and differences of any; replacements, factors, and DoRA with a norm per
    row, of more than these. No experts. Exact.
    """
    first, last = item.target.rows or (0, item.target.shape[0])
    low, high = max(start, first), min(stop, last)
    if low >= high:
        return None
    part = replace(item.target, shape=(stop - start, *item.target.shape[1:]), rows=None)
    if (first, last) == (start, stop):
        return Targeted(part, item.update)

    def cut(update: U) -> U:
        if isinstance(update, Dora):
            assert update.axis == 0, "a norm over the rows needs all of them"
            magnitude = update.magnitude.narrow(0, low - first, high - low)
            return cast(U, replace(update, direction=cut(update.direction), magnitude=magnitude))
        if isinstance(update, Scale) and update.axis == 1:
            return update  # the same for every row
        left = {"B", "B1", "B2", "factor", "value"} & update.components().keys()
        return replace(update, **{part: getattr(update, part).narrow(0, low - first, high - low) for part in left})

    rows = None if (low, high) == (start, stop) else (low - start, high - start)
    return of_all_rows(Targeted(replace(part, rows=rows), cut(item.update)))


def of_all_experts(items: Sequence[Targeted]) -> Targeted:
    """LoRAs of single experts of one tensor as one of all: A [experts, rank, in...], B [experts, out, rank].

    Each expert has at most one. All get the largest rank and the most frequent scale; an expert without an update
    gets zeros.
    """
    target, updates = items[0].target, [(item.target.expert, item.update) for item in uniform(items)]
    first = updates[0][1]
    assert isinstance(first, Lora), "only LoRA"
    experts = target.shape[0]

    def piled(part: str) -> TensorRef:
        parts = [(expert or 0, getattr(update, part)) for expert, update in updates]
        shape = parts[0][1].shape
        return assembled((experts, *shape), [(ref.reshape(1, *shape), (e, *(0 for _ in shape))) for e, ref in parts])

    return Targeted(replace(target, expert=None, experts=experts), Lora(piled("A"), piled("B"), first.factors))


def summed(items: Sequence[Targeted]) -> Targeted:
    """Several LoRAs of one region as one: their factors side by side, B under the first one's scale.

    A [sum of ranks, in...], B [out, sum of ranks]. Exact but for B's products with the ratios of scales.
    """
    if len(items) == 1:
        return items[0]
    loras = [item.update for item in items if isinstance(item.update, Lora) and item.update.mid is None]
    assert len(loras) == len(items), "only LoRA"
    rank = sum(map(rank_of, loras))
    scaling = by_rank(most_frequent(lora.factors.factor for lora in loras) or 1.0, rank)
    loras = [rescaled(lora, scaling) for lora in loras]
    lead = len(loras[0].B.shape) - 2  # 1 where the components have a dimension of experts
    starts = [sum(map(rank_of, loras[:n])) for n in range(len(loras))]
    A = _joined([lora.A for lora in loras], starts, axis=lead)
    B = _joined([lora.B for lora in loras], starts, axis=lead + 1)
    return Targeted(items[0].target, Lora(A, B, scaling))


def merged_factors(items: Sequence[Targeted]) -> Targeted:
    """All LoRAs of one tensor, of ranges of rows and single experts as well, as one of the whole tensor."""
    whole = [of_all_rows(replace(item, update=without_core(cast(Lora, item.update)))) for item in items]
    single = {expert: [item for item in whole if item.target.expert == expert] for expert in _experts(whole)}
    others = [item for item in whole if item.target.expert is None]
    if single:
        others.append(of_all_experts([summed(group) for group in single.values()]))
    return summed(others)


def _experts(items: Iterable[Targeted]) -> list[int]:
    return sorted({item.target.expert for item in items if item.target.expert is not None})


# -- tensors ----------------------------------------------------------------------------------------------------------


def zeros(*shape: int) -> TensorRef:
    """Float32 zeros that take no memory before they are read."""
    return assembled(shape, [], "F32")


def assembled(shape: Shape, parts: Sequence[tuple[TensorRef, Shape]], dtype: str = "") -> TensorRef:
    """Zeros with tensors placed in them, each at the index of its first element.

    Keeps the dtype that all have; of different ones it is float32, which holds 16-bit numbers exactly (or float64).
    """
    dtypes = {ref.dtype for ref, _ in parts} | ({dtype} if dtype else set())
    widest = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"

    def make() -> torch.Tensor:
        import torch

        whole = torch.zeros(shape, dtype=torch_dtype(widest), device="cpu")
        for ref, start in parts:
            whole[tuple(slice(at, at + size) for at, size in zip(start, ref.shape, strict=True))] = ref.read()
        return whole

    return _computed(parts[0][0].name if parts else "", widest, shape, make)


def _joined(refs: Sequence[TensorRef], starts: Sequence[int], axis: int) -> TensorRef:
    """Tensors side by side along an axis, each from its start on."""
    length = starts[-1] + refs[-1].shape[axis]
    shape = (*refs[0].shape[:axis], length, *refs[0].shape[axis + 1 :])
    places = [tuple(start if dim == axis else 0 for dim in range(len(shape))) for start in starts]
    return assembled(shape, list(zip(refs, places, strict=True)))


def _computed(name: str, dtype: str, shape: Shape, make: Callable[[], torch.Tensor]) -> TensorRef:
    return TensorRef(name, dtype, shape, Computed(make), shape)


def _mapped(update: U, change: Callable[[TensorRef], TensorRef]) -> U:
    """The same update with every component changed."""
    if isinstance(update, Dora):
        return cast(U, replace(update, direction=_mapped(update.direction, change), magnitude=change(update.magnitude)))
    return replace(update, **{name: change(ref) for name, ref in update.components().items()})


# -- full tensors -----------------------------------------------------------------------------------------------------


def bake(items: Sequence[Targeted], stored: TensorRef) -> Targeted:
    """All updates of one tensor as its replacement: the base's tensor `stored`, merged.

    Computed by the loop of `merge` when it is read, so it has the bits that a merge would write, in the base's dtype.
    """
    target = items[0].target
    source = stored if stored.shape == target.shape else None  # a replacement may bring another shape
    tensor = NewTensor(target.name, source, stored.dtype, target.shape, tuple(Weighted(item, 1.0) for item in items))

    layout = target.layout if len(target.shape) == 2 else ""
    value = _computed(target.name, stored.dtype, target.shape, lambda: whole(tensor))
    return Targeted(Target(target.name, target.shape, layout=layout), Replace(value))

"""Real changes that do not belong here: transposed, of other rows, of another tensor, of an adapter not asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from loratool.diagnosis import Reason, rest
from loratool.evidence import Asked, Evidence, Ranges, computed_at, rounded, stored_at
from loratool.layout import NewTensor, Weighted
from loratool.matrices import matrices_of
from loratool.updates import Lora

if TYPE_CHECKING:
    import torch

SAME = 0.97  # share of elements that another place's change must give, or be one rounding off
FIRST = 4  # rows that are compared roughly, before all are
ALIKE = 0.95  # cosine of two rows that are the same one
WIDE = 512  # columns that are compared with each other
LOW = 3  # a rank is low where it is less than the numbers of rows and columns divided by this
EXPLAINED = 0.9  # share of a difference that its largest singular values must hold
NOISE = 4  # singular values of rounding errors are smaller than so many times what they should be


class Neighbour(NamedTuple):
    """Another tensor of the same shape: the same rows of the base's, and of the exact result."""

    name: str
    base: torch.Tensor
    right: torch.Tensor
    mixed: tuple[tuple[str, torch.Tensor], ...] = ()  # the result with one factor of each of the two


def neighbour(tensor: NewTensor, other: NewTensor, ranges: Ranges) -> Neighbour:
    """What `other`, a tensor of the same shape, is and would be."""
    columns = matrices_of(tensor)[2]
    mixed = [(text, computed_at(tensor, [update], ranges, columns)) for text, update in _mixed(tensor, other)]
    right = computed_at(other, other.updates, ranges, columns)
    return Neighbour(other.name, stored_at(other, ranges, columns), right, tuple(mixed))


def _mixed(tensor: NewTensor, other: NewTensor) -> Iterator[tuple[str, Weighted]]:
    """Updates with one factor of each of two tensors."""
    if len(tensor.updates) != 1 or len(other.updates) != 1:
        return
    (mine, weight), (theirs, _) = tensor.updates[0], other.updates[0]
    one, two = mine.update, theirs.update
    if not isinstance(one, Lora) or not isinstance(two, Lora) or mine.target.rows != theirs.target.rows:
        return
    if one.A.shape == two.A.shape and one.B.shape == two.B.shape:
        for text, update in (
            (f"the B of {tensor.name} and the A of {other.name}", replace(one, A=two.A)),
            (f"the A of {tensor.name} and the B of {other.name}", replace(one, B=two.B)),
        ):
            yield text, Weighted(replace(mine, update=update), weight)


def moved(found: Evidence) -> Reason | None:
    """What is at another place of the same tensor; `found` are rows that lie together."""
    return _transposed(found) or _permuted(found)


def unknown(found: Evidence, asked: Sequence[Asked]) -> Reason:
    """What there is beside or instead of the change that was asked for."""
    names = ", ".join(each.name for each in asked)
    ranks = {what: _low_rank(found, left) for what, left in rest(found)}
    known = {what: rank for what, rank in ranks.items() if rank}
    if known:
        what = min(known, key=lambda what: (known[what], what))
        if what == "added":
            return Reason("other-adapter", f"it has another change of rank {known[what]} as well: one more adapter")
        return Reason(
            "other-adapter", f"its change has rank {known[what]}, and is not that of {names}: another adapter"
        )
    size = float(found.change.square().sum())
    if size > 0.5 * float(found.base.square().sum() + found.merged.square().sum()):
        return Reason("other-base", "it has nothing in common with the base's tensor")
    left = float((found.merged - found.right).square().sum())
    share = max(0.0, 1 - left / size) if size else 0.0
    if share < 0.01:
        return Reason("other-base", "it differs from the base's tensor, and not by these adapters")
    return Reason("other-change", f"{share:.0%} of its change is that of the adapters, the rest is not")


def _same(found: Evidence, numbers: torch.Tensor) -> bool:
    few = float(((numbers[:FIRST] - found.merged[:FIRST]).abs() <= 4 * found.unit[:FIRST]).double().mean())
    return few >= SAME and found.share(numbers) >= SAME


def _transposed(found: Evidence) -> Reason | None:
    rows, columns = found.base.shape
    if found.matrix != columns or int(found.rows[-1]) >= columns or rows < 2:
        return None  # not square, or one of several
    square = found.rows
    there, base = found.merged[:, square], found.base[:, square]
    unit = found.unit[:, square]

    def alike(numbers: torch.Tensor) -> bool:
        away = (rounded(numbers, found.dtype) - there).abs() / unit
        return float((away <= 1).double().mean()) >= SAME

    delta = (found.right - found.base)[:, square]
    if alike(base + delta.T):
        return Reason("transposed", "the change was added transposed")
    if alike((base + delta).T):
        return Reason("transposed", "the whole tensor is transposed")
    return None


def _permuted(found: Evidence) -> Reason | None:
    """Rows, or columns, in another order: of the change, or of the tensor."""
    delta = found.right - found.base
    for what, there, wanted in (("the change", found.change, delta), ("the tensor", found.merged, found.right)):
        where = _moved(there, wanted)
        if where is not None:
            if len(steps := (found.rows[where] - found.rows)) and _between(steps, found.matrix, found.rows):
                return Reason("experts-swapped", f"the experts of {what} are in another order")
            return Reason("permuted", f"the rows of {what} are in another order")
        if _moved(there[:, :WIDE].T, wanted[:, :WIDE].T) is not None:
            return Reason("permuted", f"the columns of {what} are in another order")
    return None


def _between(steps: torch.Tensor, matrix: int, rows: torch.Tensor) -> bool:
    """Whether rows only moved to the same place of another matrix."""
    return int(rows[-1]) >= matrix and bool((steps % matrix == 0).all())


def _moved(there: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """[rows]: which of the wanted rows each row is; None if they are where they belong, or no such rows at all."""
    import torch

    if len(there) < 4 or there.shape[1] < 4:
        return None
    one, other = (torch.nn.functional.normalize(values, dim=1) for values in (there, wanted))
    alike, which = torch.inner(one, other).max(dim=1)  # [rows]
    moved = which != torch.arange(len(there), device="cpu")
    real = there.any(dim=1)
    found = alike[real] > ALIKE
    if not real.any() or float(found.double().mean()) < SAME or int(moved[real].sum()) < 2:
        return None
    return torch.where(real, which, torch.arange(len(there), device="cpu"))


def swapped(found: Evidence, neighbours: Iterable[Neighbour]) -> Reason | None:
    """Whether a tensor has what is another one's."""
    for other in neighbours:
        if _same(found, found.base + (other.right - other.base)):
            return Reason("swapped", f"it has the change of {other.name}")
        if _same(found, other.right):
            return Reason("swapped", f"it is what {other.name} was to be")
        if _same(found, other.base):
            return Reason("swapped", f"it is the base's {other.name}")
        for text, right in other.mixed:
            if _same(found, right):
                return Reason("mixed-factors", f"its change is made of {text}")
    return None


def _low_rank(found: Evidence, left: torch.Tensor) -> int:
    """The rank of a difference, apart from rounding errors; 0 if it is none, or not low."""
    import torch

    part = left[found.rows < int(found.rows[0]) + found.matrix][:, : 2 * WIDE]  # of one matrix
    rows, columns = part.shape
    if min(rows, columns) < 4 * LOW:
        return 0
    noise = float(found.unit.square().mean().sqrt()) * 0.3 * (rows**0.5 + columns**0.5)
    values = torch.linalg.svdvals(part)
    rank = int((values > NOISE * noise).sum())
    explained = float(values[:rank].square().sum()) > EXPLAINED * float(values.square().sum())
    return rank if explained and rank * LOW <= min(rows, columns) else 0

"""Some rows of one tensor as numbers: the base's, the merged one's, and what each adapter changes in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from loratool.blocks import each_block
from loratool.layout import NewTensor, Weighted
from loratool.matrices import Merged, matrices_of, row_count
from loratool.rounding import bits, round_once
from loratool.tensors import DTYPE_BITS, FLOATS, TensorRef, torch_dtype
from loratool.updates import Scaling

if TYPE_CHECKING:
    import torch

Changes: TypeAlias = "tuple[torch.Tensor, ...]"  # [rows, columns] each, of every adapter
Ranges = Sequence[tuple[int, int]]  # start:stop of rows, ascending, apart from each other

PLACES = 4  # of a tensor that are looked at beside its first and its last wrong row
SLOPPY = 4  # float32 arithmetic is off by so many units of its own last place


class Asked(NamedTuple):
    """One adapter's updates of a tensor, as they should have been merged."""

    name: str
    updates: tuple[Weighted, ...]
    number: int = 0  # of the adapter

    @property
    def weight(self) -> float:
        return self.updates[0].weight

    @property
    def scaling(self) -> Scaling | None:
        """The scale, where all updates have the same one."""
        scalings = {item.update.scaling for item, _ in self.updates}
        return scalings.pop() if len(scalings) == 1 else None

    @property
    def factor(self) -> float | None:
        """What stands in front of the product B @ A."""
        scaling = self.scaling
        return None if scaling is None or not scaling.scale else scaling.scale * self.weight


@dataclass(frozen=True)
class Evidence:
    """Rows of one tensor in float64, [rows, columns] each. `right` is the exact result, before it is rounded."""

    rows: torch.Tensor  # [rows]: their numbers, counted through all matrices
    base: torch.Tensor
    merged: torch.Tensor
    changes: Changes
    right: torch.Tensor
    dtype: str  # of the merged tensor
    matrix: int  # rows of one matrix: fewer than the tensor's where its first dimension counts experts
    narrowed: Callable[[str], Changes | None] = lambda dtype: None  # the changes by factors in another dtype

    @cached_property
    def unit(self) -> torch.Tensor:
        """[rows, columns]: what one rounding to the dtype can be off by, of anything that was added on the way."""
        import torch

        largest = torch.maximum(self.base.abs(), self.merged.abs())
        for change in self.changes:
            size = change.abs()  # whose own errors are those of its row, where they are as large as a unit
            largest = torch.maximum(largest, size.amax(dim=1, keepdim=True) if is_wide(self.dtype) else size)
        return largest * resolution(self.dtype) + torch.finfo(torch_dtype(self.dtype)).tiny

    @cached_property
    def change(self) -> torch.Tensor:
        """What was really changed."""
        return self.merged - self.base

    def sum(self, factors: Sequence[float]) -> torch.Tensor:
        """The adapters' changes, each times its factor."""
        total = self.base * 0
        for factor, change in zip(factors, self.changes, strict=True):
            total.add_(change, alpha=factor)
        return total

    def away(self, numbers: torch.Tensor) -> torch.Tensor:
        """[rows, columns]: how many units the merged tensor is away from these numbers."""
        return (numbers - self.merged).abs() / self.unit

    def share(self, numbers: torch.Tensor) -> float:
        """How many elements are these numbers, or off by one rounding."""
        return float((self.away(rounded(numbers, self.dtype)) <= 1).double().mean())


def resolution(dtype: str) -> float:
    """The relative distance of two neighbours; where arithmetic is no better than the numbers, with its errors."""
    import torch

    known = torch_dtype(dtype)
    return float(torch.finfo(known).eps) * (SLOPPY if is_wide(dtype) else 1)


def is_wide(dtype: str) -> bool:
    """Whether a dtype is no narrower than the arithmetic of most tools."""
    return DTYPE_BITS[dtype] >= 32


def gather(tensor: NewTensor, there: TensorRef, ranges: Ranges, asked: Sequence[Asked]) -> Evidence:
    """What can be known of some ranges of rows, where `there` [rows, columns] is the merged checkpoint's tensor."""
    import torch

    columns = there.shape[1]
    base = stored_at(tensor, ranges, columns)

    def changes_of(parts: Iterable[Sequence[Weighted]]) -> Changes:
        return tuple(computed_at(tensor, updates, ranges, columns) - base for updates in parts)

    def narrowed(dtype: str) -> Changes | None:
        parts = [[_narrowed(weighted, dtype) for weighted in each.updates] for each in asked]
        wider = any(is_wider(ref.dtype, dtype) for each in asked for ref in _components(each.updates))
        return changes_of(parts) if wider else None

    changes = changes_of(each.updates for each in asked)
    right = base + changes[0] if len(changes) == 1 else computed_at(tensor, tensor.updates, ranges, columns)
    merged = torch.cat([there.narrow(0, start, stop - start).read().double() for start, stop in ranges])
    rows = torch.cat([torch.arange(start, stop, device="cpu") for start, stop in ranges])
    matrices, height, _ = matrices_of(tensor)
    matrix = height if matrices > 1 else there.shape[0]
    return Evidence(rows, base, merged.view(-1, columns), changes, right, tensor.dtype, matrix, narrowed)


def _components(updates: Sequence[Weighted]) -> list[TensorRef]:
    return [ref for item, _ in updates for ref in item.update.components().values() if ref.dtype in FLOATS]


def _narrowed(weighted: Weighted, dtype: str) -> Weighted:
    """An update whose factors were rounded before they were multiplied, as by a model that was loaded in a dtype."""
    item, weight = weighted
    changed: dict[str, Any] = {
        name: TensorRef.of(ref.read().to(torch_dtype(dtype)), ref.name)
        for name, ref in item.update.components().items()
        if is_wider(ref.dtype, dtype)
    }
    own = {field.name for field in fields(item.update)} & changed.keys()
    return Weighted(replace(item, update=replace(item.update, **{name: changed[name] for name in own})), weight)


def is_wider(dtype: str, other: str) -> bool:
    return dtype in FLOATS and DTYPE_BITS[dtype] > DTYPE_BITS[other]


def stored_at(tensor: NewTensor, ranges: Ranges, columns: int) -> torch.Tensor:
    """The base's rows [rows, columns]; zeros where it has none."""
    import torch

    if tensor.source is None:
        return torch.zeros(sum(stop - start for start, stop in ranges), columns, dtype=torch.float64, device="cpu")
    whole = tensor.source.reshape(tensor.source.numel // columns, columns)
    return torch.cat([whole.narrow(0, start, stop - start).read().double() for start, stop in ranges])


def computed_at(tensor: NewTensor, updates: Sequence[Weighted], ranges: Ranges, columns: int) -> torch.Tensor:
    """The tensor's rows [rows, columns] with these updates alone, exact.

    Its own rows are longer than `columns` where none of the updates sees experts.
    """
    import torch

    changed = replace(tensor, dtype="F64", updates=tuple(updates))
    width = math.prod(tensor.shape) // max(1, row_count(changed))
    found = []
    for start, stop in ranges:
        low, high = start * columns // width, -(-stop * columns // width)
        part = torch.zeros(high - low, width, dtype=torch.float64, device="cpu")

        def receive(block: Merged, low: int = low, high: int = high, part: torch.Tensor = part) -> None:
            first, last = max(block.start, low), min(block.stop, high)
            part[first - low : last - low] = block.values[first - block.start : last - block.start]

        each_block(changed, receive, rows=(low, high))
        found.append(part.flatten()[start * columns - low * width : stop * columns - low * width])
    return torch.cat(found).view(-1, columns)


def ranges_of(rows: int, columns: int, numbers: int, wanted: Sequence[int]) -> Ranges:
    """Where to look: about so many numbers around the wanted rows, and at places all over the tensor."""
    height = max(1, numbers // max(1, columns * (PLACES + len(wanted))))
    spread = [place * (rows - height) // (PLACES - 1) for place in range(PLACES)]
    return _joined((max(0, min(start, rows - height)), height, rows) for start in [*wanted, *spread])


def side_by_side(tensor: NewTensor, numbers: int, first: int = 0) -> Ranges:
    """Rows that lie together, to compare them with each other: the same few of each matrix where there are several."""
    matrices, height, columns = matrices_of(tensor)
    count = max(1, numbers // max(1, columns))
    if matrices == 1:
        return _joined([(max(0, min(first, height - count)), count, height)])
    few = min(height, max(1, count // matrices))
    offset = min(first % height, height - few)
    return _joined((n * height + offset, few, matrices * height) for n in range(min(count, matrices)))


def _joined(places: Iterable[tuple[int, int, int]]) -> Ranges:
    """(start, height, rows in all) as ranges that do not overlap."""
    found: list[tuple[int, int]] = []
    for start, height, rows in sorted(places):
        stop = min(start + height, rows)
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def matrix_of(ref: TensorRef, columns: int) -> TensorRef:
    """A tensor as [rows, columns], of which some rows can be read: from its file, or from memory."""
    if not ref.in_order:
        ref = TensorRef.of(ref.read(), ref.name)
    return ref.reshape(ref.numel // max(1, columns), columns)


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The same numbers as `dtype` has them, in float64."""
    import torch

    return round_once(values, torch.empty(values.shape, dtype=torch_dtype(dtype), device="cpu")).double()


def ulps_between(one: torch.Tensor, other: torch.Tensor, dtype: str) -> torch.Tensor:
    """How many numbers of `dtype` two of its numbers are apart, as floats; infinity where one of them is NaN."""
    import torch

    codes = [_codes(values.to(torch_dtype(dtype))) for values in (one, other)]
    distance = codes[0].sub_(codes[1]).abs_()
    strange = one.isnan() ^ other.isnan()
    return distance.masked_fill_(strange, torch.inf) if strange.any() else distance


def _codes(values: torch.Tensor) -> torch.Tensor:
    """Numbers in the order of their size, one apart from each other, both zeros alike.

    In float32 for 16 bits, which holds them all; else in float64.
    """
    import torch

    size = values.element_size() * 8
    code = bits(values).to(torch.int32 if size <= 16 else torch.int64)
    negative = code < 0
    magnitude = code.bitwise_and_((1 << (size - 1)) - 1).to(torch.float32 if size <= 16 else torch.float64)
    return torch.where(negative, -magnitude, magnitude)

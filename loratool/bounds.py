"""How far computed numbers can be from the exact ones, and the exact ones where that matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.layout import NewTensor
from loratool.matrices import Merged, Opened, Part, compute_dtype, inside_of
from loratool.rounding import Exact
from loratool.tensors import torch_dtype
from loratool.updates.dora import DoraBlock
from loratool.updates.scale import ScaleBlock

if TYPE_CHECKING:
    import torch

FACTORS_AT_ONCE = 1 << 16  # numbers of a factor that are gathered at a time, to compute single elements


def peaks(W: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, [rows, 1]; NaN if there is one."""
    import torch

    return torch.maximum(W.amax(dim=1, keepdim=True), W.amin(dim=1, keepdim=True).neg_())


def size_of(inside: Sequence[Part], W: torch.Tensor, start: int) -> torch.Tensor:
    """[rows, 1]: the magnitudes of everything that is added to a row of a block, summed."""
    size = W.new_zeros(len(W), 1)
    for update, part, offset in inside:
        if update.block.steps:
            place = offset + update.start - start
            magnitude = update.block.magnitude(offset, offset + len(part))
            size[place : place + len(part)].add_(magnitude, alpha=abs(update.weight))
    return size


def single_band(inside: Sequence[Part], size: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """[rows, 1]: how far a row's elements, computed in float32, can be from the exact ones.

    In each step a sum of `length` products is scaled and added: at most length + 2 roundings of its magnitude, and one
    of the result; no result in between is larger than the last one and all that was added. The last 4 are for adding
    the band itself, twice, and for its own rounding. What is flushed to zero on the way may be scaled afterwards.
    """
    steps = sum(update.block.steps for update, _, _ in inside)
    length = max((update.block.length for update, _, _ in inside), default=0)
    unit, tiny = 2.0**-24, 2.0**-126
    factor = max((abs(u.block.scale * u.weight) for u, _, _ in inside if u.block.steps), default=0.0)
    flushed = (length + 2) * steps * tiny * max(1.0, factor)
    band = size.mul((length + 2 + steps) * unit).add_(size.sign(), alpha=flushed)
    return band.add_(peaks, alpha=(steps + 4) * unit)


def double_band(opened: Sequence[Opened], size: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How far `values`, computed in float64, can be from the exact ones: section 5 of UNDO.md."""
    import torch

    unit, tiny = 2.0**-53, torch.finfo(torch.float64).tiny
    return (values.abs() + (size + tiny / unit)).mul_((sum(update.terms for update in opened) + 8) * unit)


def exact_of(opened: Sequence[Opened], stored: torch.Tensor, start: int, back: bool = False) -> Exact:
    """Computes single elements of a block, whose first row is `start`, in float64: there or back."""

    def exact(where: torch.Tensor) -> torch.Tensor:
        import torch

        row = where // stored.shape[1]
        column, row = where - row * stored.shape[1], row + start
        # A new tensor starts from zeros.
        values = stored.view(-1)[where].double() if len(stored) else torch.zeros_like(where, dtype=torch.float64)
        for update in opened[::-1] if back else opened:
            if back and update.replaces:
                continue
            weight = -update.weight if back else update.weight
            if update.start <= start and start + len(stored) <= update.stop:
                update.block.apply_at(values, row - update.start, column, weight)
                continue
            inside = ((row >= update.start) & (row < update.stop)).nonzero().view(-1)
            part = values[inside]
            update.block.apply_at(part, row[inside] - update.start, column[inside], weight)
            values[inside] = part
        return values

    return exact


def at_once(inside: Sequence[Part]) -> int:
    """How many single elements to compute at a time: their factors are gathered for it."""
    gathered = sum(update.block.length * update.block.steps for update, _, _ in inside)
    return max(64, FACTORS_AT_ONCE // max(1, gathered))


def reach_of(opened: Sequence[Opened], start: int, stop: int) -> float:
    """No element of the deltas' sum, in rows start:stop, is larger."""
    return sum(
        abs(update.weight) * float(update.block.magnitude(low - update.start, high - update.start).max())
        for update in opened
        if (low := max(start, update.start)) < (high := min(stop, update.stop))
    )


def float32_error(block: Merged) -> torch.Tensor:
    """[rows, 1] in float64: how far a merge that computes in float32, in any order, may be from the exact result."""
    start, stop = block.start - block.first, block.stop - block.first
    error = block.values.new_zeros(len(block.values), 1, dtype=torch_dtype("F64"))
    if block.exact is None:
        return error
    own = 4
    for update, part, offset in inside_of(block.opened, block.exact, start, stop):
        place = offset + update.start - start
        magnitude = update.block.magnitude(offset, offset + len(part)).double()
        error[place : place + len(part)].add_(magnitude, alpha=abs(update.weight) * (update.terms + 8))
        own += update.terms + 8 if isinstance(update.block, DoraBlock | ScaleBlock) else 0
    return error.add_(peaks(block.exact), alpha=own).mul_(2.0**-24)


def rounding_bound(tensor: NewTensor, largest: float, reach: float) -> float:
    """How far an element can be off after a merge and an unmerge: the rounding of the merged tensor, that of the
    restored one, and the compute dtype's error in both sums (the tolerance of the spec)."""
    import torch

    stored_dtype = tensor.source.dtype if tensor.source else tensor.dtype
    ranks = sum((item.update.scaling.rank or 1) + 8 for item, _ in tensor.updates if item.update.scaling)
    unit = torch.finfo(torch_dtype(compute_dtype(tensor))).eps / 2
    return _half_ulp(largest, stored_dtype) + _half_ulp(largest, tensor.dtype) + 4 * ranks * unit * (largest + reach)


def _half_ulp(largest: float, dtype: str) -> float:
    """Half a unit in the last place of numbers as large as `largest`."""
    import torch

    info = torch.finfo(torch_dtype(dtype))
    return math.ldexp(info.eps, math.frexp(max(largest, info.tiny))[1] - 2)

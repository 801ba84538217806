"""Which part of a tensor an index asks for, so that no more than that part is read and computed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from loratool.tensors import Shape

Bounds = tuple[tuple[int, int], ...]  # start and stop in each dimension


class Box(NamedTuple):
    """The smallest box that holds what an index asks for, and the index of that within the box."""

    bounds: Bounds
    index: Any

    @property
    def shape(self) -> Shape:
        return tuple(stop - start for start, stop in self.bounds)


def box(index: Any, shape: Shape) -> Box:
    """The box for any index that torch takes, which must be valid for the shape.

    It is narrow for numbers, slices, `...` and None. Lists and tensors are applied to all of the tensor.
    """
    whole = Box(tuple((0, size) for size in shape), index)
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is Ellipsis or isinstance(item, slice) or _is_number(item) for item in items):
        return whole
    if sum(item is Ellipsis for item in items) > 1:
        return whole
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    given = sum(item is not None and item is not Ellipsis for item in items)
    place = next(n for n, item in enumerate(items) if item is Ellipsis)
    items[place : place + 1] = [slice(None)] * (len(shape) - given)
    bounds: list[tuple[int, int]] = []
    within: list[Any] = []
    for item in items:
        if item is None:
            within.append(None)
            continue
        size = shape[len(bounds)]
        if isinstance(item, slice):
            chosen = range(*item.indices(size))
            bounds.append((chosen[0], chosen[-1] + 1) if chosen else (0, 0))
            within.append(slice(None, None, chosen.step))
        else:
            start = operator.index(item) % size
            bounds.append((start, start + 1))
            within.append(0)
    return Box(tuple(bounds), tuple(within))


def _is_number(item: Any) -> bool:
    """Whether an index takes one place of one dimension. True and False are masks."""
    if isinstance(item, bool) or getattr(item, "shape", ()) != () or "bool" in str(getattr(item, "dtype", "")):
        return False
    try:
        operator.index(item)
    except TypeError:
        return False
    return True


def runs(shape: Sequence[int], bounds: Bounds) -> list[tuple[int, int]]:
    """The consecutive places start:stop of a box, in the order of its elements, of a tensor that is laid out by rows.

    >>> runs((3, 4), ((1, 3), (0, 4)))
    [(4, 12)]
    >>> runs((3, 4), ((0, 2), (1, 3)))
    [(1, 3), (5, 7)]
    """
    if any(start >= stop for start, stop in bounds):
        return []
    # All dimensions after `last` are whole, so that what is chosen in it lies in one piece.
    partial = [dim for dim, size in enumerate(shape) if bounds[dim] != (0, size)]
    last = partial[-1] if partial else 0
    starts = [0]
    for dim in range(last):
        each = math.prod(shape[dim + 1 :])
        starts = [start + place * each for start in starts for place in range(*bounds[dim])]
    if not shape:
        return [(0, 1)]
    each = math.prod(shape[last + 1 :])
    low, high = bounds[last]
    return [(start + low * each, start + high * each) for start in starts]

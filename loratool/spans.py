"""A part of a stored tensor, straight out of its file: as few bytes as that takes, on several workers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from loratool.slicing import Bounds, runs
from loratool.tensors import CHUNK, DTYPE_BITS, FileSpan, TensorRef, as_bytes, empty, open_to_read, read_exactly

if TYPE_CHECKING:
    import torch

LONG = 1 << 16  # bytes of a run from which on it is worth a read of its own
WASTE = 8  # times the bytes of shorter runs that may be read instead, to have them all at once
SHARE = 4 << 20  # bytes that a worker reads at a time

T = TypeVar("T")


def reads(ref: TensorRef, bounds: Bounds, out: torch.Tensor, workers: int) -> list[Callable[[], None]]:
    """What fills `out`, of the shape of the bounds and not empty, each to be called once, in any order.

    The tensor must lie in a file, in one piece.
    """
    assert isinstance(ref.data, FileSpan) and not ref.views
    span, width = ref.data, DTYPE_BITS[ref.dtype] // 8
    found = runs(ref.shape, bounds)
    run = (found[0][1] - found[0][0]) * width
    cut = max((dim for dim, size in enumerate(ref.shape) if bounds[dim] != (0, size)), default=0)
    row = math.prod(ref.shape[cut:]) * width  # bytes of which a run is a part
    if len(found) == 1 or run >= LONG or run * WASTE < row:
        data, position = as_bytes(out), 0
        parts: list[tuple[int, memoryview]] = []
        for start, stop in found:
            for low in range(start * width, stop * width, SHARE):
                size = min(SHARE, stop * width - low)
                parts.append((span.offset + low, data[position : position + size]))
                position += size
        return [functools.partial(_whole, span, share) for share in shares(parts, workers)]
    inner = math.prod(ref.shape[cut + 1 :])
    columns = slice(bounds[cut][0] * inner, bounds[cut][1] * inner)
    target = out.view(-1, columns.stop - columns.start)
    windows = [*_windows(runs(ref.shape[:cut], bounds[:cut]), max(1, CHUNK // row))]
    return [functools.partial(_cut, span, row, share, columns, target) for share in shares(windows, workers)]


def shares(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """At most `count` parts of a list, of about the same length."""
    size = max(1, -(-len(items) // count))
    return [items[start : start + size] for start in range(0, len(items), size)]


def _windows(wanted: Sequence[tuple[int, int]], height: int) -> Iterator[tuple[int, int, int]]:
    """Rows start:stop, at most `height` of them, and how many rows are wanted before them."""
    place = 0
    for start, stop in wanted:
        for low in range(start, stop, height):
            high = min(stop, low + height)
            yield low, high, place
            place += high - low


def _whole(span: FileSpan, parts: Sequence[tuple[int, memoryview]]) -> None:
    with open_to_read(span.path) as file:
        for offset, memory in parts:
            file.seek(offset)
            read_exactly(file, memory, span.path)


def _cut(
    span: FileSpan, row: int, windows: Sequence[tuple[int, int, int]], columns: slice, target: torch.Tensor
) -> None:
    """Read whole rows of so many bytes, and keep some columns of them."""
    buffer = empty((max(stop - start for start, stop, _ in windows), row // target.element_size()), target.dtype)
    with open_to_read(span.path) as file:
        for start, stop, place in windows:
            rows = buffer[: stop - start]
            file.seek(span.offset + start * row)
            read_exactly(file, as_bytes(rows), span.path)
            target[place : place + len(rows)] = rows[:, columns]

"""A tensor that lies in pieces, in several files: boxes that tile it, of which no more is read than is asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loratool.slicing import Bounds
from loratool.tensors import (
    CHUNK,
    DTYPE_BITS,
    FileSpan,
    FileState,
    Shape,
    TensorRef,
    as_bytes,
    empty,
    files_of,
    open_to_read,
    read_exactly,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

IRREGULAR = 4000  # boxes that are compared with each other where they are no grid


class Piece(NamedTuple):
    """A part of a tensor, and where in it its first element lies."""

    offsets: Shape
    ref: TensorRef

    @property
    def bounds(self) -> Bounds:
        return tuple((start, start + size) for start, size in zip(self.offsets, self.ref.shape, strict=True))


@dataclass(frozen=True)
class Pieces:
    """The data of a tensor of `shape` that is tiled by `pieces`, from its element `start` on."""

    shape: Shape
    pieces: tuple[Piece, ...]
    start: int = 0

    @property
    def path(self) -> Path | None:
        return self.pieces[0].ref.data.path

    @property
    def states(self) -> tuple[FileState, ...]:
        return tuple(sorted(files_of(piece.ref for piece in self.pieces)))

    def after(self, elements: int, dtype: str) -> Pieces:
        return replace(self, start=self.start + elements)

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        found = empty(shape, torch_dtype(dtype))
        self._fill(found.view(-1), self.start)
        return found

    def rows(self, start: int, stop: int, columns: int) -> torch.Tensor:
        """Rows start:stop of the tensor seen as [..., columns]."""
        found = empty((stop - start, columns), torch_dtype(self.pieces[0].ref.dtype))
        self._fill(found.view(-1), self.start + start * columns)
        return found

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        count = math.prod(shape)
        at_once = CHUNK * 8 // DTYPE_BITS[dtype]
        buffer = empty((min(count, at_once),), torch_dtype(dtype))
        for start in range(0, count, at_once):
            part = buffer[: min(at_once, count - start)]
            self._fill(part, self.start + start)
            yield as_bytes(part)

    def _fill(self, out: torch.Tensor, first: int) -> None:
        """Read the elements from `first` on, as many as `out` [n] has room for."""
        done = 0
        for box in boxes(self.shape, first, first + out.numel()):
            size = tuple(stop - start for start, stop in box)
            target = out[done : done + math.prod(size)].view(size)
            done += math.prod(size)
            for piece in self.pieces:
                common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.bounds, strict=True)]
                if all(start < stop for start, stop in common):
                    within = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box, strict=True))
                    own = [(a - c, b - c) for (a, b), c in zip(common, piece.offsets, strict=True)]
                    _read(piece.ref, own, target[within])


def _read(ref: TensorRef, bounds: Sequence[tuple[int, int]], out: torch.Tensor) -> None:
    """A part of a piece that lies in it without a gap, or of one that is stored in another order."""
    if not isinstance(ref.data, FileSpan) or ref.views:
        out.copy_(ref.read()[tuple(slice(*bound) for bound in bounds)])
        return
    values = out if out.is_contiguous() else empty(out.shape, out.dtype)
    first = 0
    for size, (start, _) in zip(ref.shape, bounds, strict=True):
        first = first * size + start
    with open_to_read(ref.data.path) as file:
        file.seek(ref.data.offset + first * values.element_size())
        read_exactly(file, as_bytes(values), ref.data.path)
    if values is not out:
        out.copy_(values)


def boxes(shape: Shape, first: int, last: int) -> list[Bounds]:
    """The elements first:last, in row-major order, as boxes: each is one place of some first dimensions, a range of
    the next, and all of the others.

    >>> boxes((3, 4), 2, 9)
    [((0, 1), (2, 4)), ((1, 2), (0, 4)), ((2, 3), (0, 1))]
    """
    if first >= last:
        return []
    if not shape:
        return [()]
    each, inner = math.prod(shape[1:]), shape[1:]
    low, high = -(-first // each), last // each  # whole ones
    if low > high:
        return [((high, low), *box) for box in boxes(inner, first - high * each, last - high * each)]
    before = boxes(inner, first - (low - 1) * each, each) if first < low * each else []
    behind = boxes(inner, 0, last - high * each)
    found: list[Bounds] = [((low - 1, low), *box) for box in before]
    found += [((low, high), *((0, size) for size in inner))] if low < high else []
    return found + [((high, high + 1), *box) for box in behind]


def untiled(shape: Shape, found: Sequence[Bounds]) -> str:
    """Why boxes that are not empty do not tile a tensor, in a few words; "" if they do."""
    for bounds in found:
        if any(stop > size for (_, stop), size in zip(bounds, shape, strict=True)):
            return f"the piece at {_place(bounds)} reaches beyond its {list(shape)}"
    if (twice := _overlap(found)) is not None:
        return f"pieces overlap at {_place(twice)}"
    volume = sum(math.prod(stop - start for start, stop in bounds) for bounds in found)
    if volume < math.prod(shape):
        return f"its pieces hold {volume:,} of its {math.prod(shape):,} elements: a piece is missing"
    return ""


def _overlap(found: Sequence[Bounds]) -> Bounds | None:
    """A box that another one reaches into. Raises ValueError for more irregular ones than can be compared."""
    dims = range(len(found[0]) if found else 0)
    cuts = [sorted({edge for bounds in found for edge in bounds[dim]}) for dim in dims]
    following = [dict(itertools.pairwise(edges)) for edges in cuts]
    if all(following[dim][bounds[dim][0]] == bounds[dim][1] for bounds in found for dim in dims):  # cells of one grid
        seen: set[Bounds] = set()
        return next((bounds for bounds in found if bounds in seen or seen.add(bounds)), None)  # type: ignore[func-returns-value]
    if len(found) > IRREGULAR:
        raise ValueError(f"{len(found):,} pieces that are no grid, more than {IRREGULAR:,}")
    widest = max(dims, key=lambda dim: len(cuts[dim]))
    active: list[Bounds] = []
    for bounds in sorted(found, key=lambda bounds: bounds[widest]):
        active = [other for other in active if other[widest][1] > bounds[widest][0]]
        if any(all(a < d and c < b for (a, b), (c, d) in zip(bounds, other, strict=True)) for other in active):
            return bounds
        active.append(bounds)
    return None


def _place(bounds: Bounds) -> str:
    return str([start for start, _ in bounds])

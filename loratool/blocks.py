"""One tensor of an output, a block of rows at a time: the loop of a merge, and its one dtype policy.

Stored bytes -> compute dtype -> every update of every adapter -> finite? -> rounded once -> written. Buffers are used
again for every block, and nothing as large as a tensor is held, except the factors of its updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from blake3 import blake3

from loratool.errors import InvalidFile, Mismatch, Problem
from loratool.layout import NewTensor, Weighted
from loratool.tensors import (
    CHUNK,
    DTYPE_BITS,
    FLOATS,
    FileSpan,
    TensorRef,
    all_finite,
    as_bytes,
    extremes,
    open_to_read,
    read_exactly,
    torch_dtype,
)
from loratool.undo import TensorRecorder, UndoTensor, decode_block, encode_block
from loratool.updates import Block
from loratool.updates.dora import DoraBlock

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = CHUNK  # stored bytes of a row block: small enough for it and its wider copy to stay in the cache
ROLE_ORDER = ("replace", "add", "renormalise")  # section "Merging" of the spec
NARROW = [dtype for dtype in FLOATS if DTYPE_BITS[dtype] <= 16]


class Written(NamedTuple):
    """What is known of a computed tensor once it is written."""

    before: str | None  # digest of the source tensor; None for a new one
    after: str
    bound: float  # how far rounding can have moved an element


def compute_dtype(tensor: NewTensor) -> str:
    """float32 where both ends have 16 bits or less, float64 otherwise: the result then rounds once."""
    stored = tensor.source.dtype if tensor.source else tensor.dtype
    return "F32" if stored in NARROW and tensor.dtype in NARROW else "F64"


class _Opened(NamedTuple):
    """An update that is open for one matrix, and the rows of the matrix it covers."""

    block: Block
    start: int
    stop: int
    weight: float
    first_pass: bool


def compute(
    tensor: NewTensor,
    out: BinaryIO,
    step: Callable[[int], None],
    measure: bool = False,
    recorder: TensorRecorder | None = None,
    digests: bool = True,
) -> Written:
    """Compute one tensor and write it at the current position of `out`.

    `step` is told the bytes of every block. With `measure`, the error that rounding may leave is bounded on the way;
    with a `recorder`, what undoes every block is recorded.
    """
    tensor = replace(tensor, updates=tuple(map(_held, tensor.updates)))
    before, after = blake3(), blake3()
    largest = 0.0
    reach = 0.0  # of the deltas: sums in between can be larger than both ends
    matrices, rows, columns = _matrices(tensor)
    with _Rows(tensor, rows, columns) as source:
        for matrix in range(matrices):
            opened = [_open(weighted, tensor, matrix, rows) for weighted in _ordered(tensor, matrix)]
            if measure:
                reach = max(reach, sum(abs(u.weight) * u.block.reach() for u in opened))
            first = matrix * rows
            if any(update.first_pass for update in opened):
                for start, stop in _blocks(rows, columns, tensor):
                    W = source.widened(source.read(first + start, first + stop), stop - start)
                    for update, part, offset in _inside(opened, W, start, stop):
                        if update.first_pass:
                            update.block.observe(part, offset)
                        else:  # replacements come first: the norm is of what they leave
                            update.block.apply(part, offset, update.weight)
            for start, stop in _blocks(rows, columns, tensor):
                stored = source.read(first + start, first + stop)
                result = stored
                if opened or tensor.source is None or tensor.source.dtype != tensor.dtype:
                    W = source.widened(stored, stop - start)
                    if measure:
                        largest = max(largest, *map(abs, extremes(W)))
                    for update, part, offset in _inside(opened, W, start, stop):
                        update.block.apply(part, offset, update.weight)
                    largest = max(largest, _largest_finite(W, tensor))
                    result = round_once(W, source.out[: stop - start])
                if recorder is not None and tensor.source is not None:
                    merged = source.widened(result, stop - start)
                    predicted, band = _predict(tensor, opened, merged, source.terms[: stop - start], start, stop)
                    recorder.blocks.append(encode_block(stored, predicted, band))
                data = as_bytes(result)
                if digests:
                    before.update(as_bytes(stored))
                    after.update(data)
                write_all(out, data)
                step(len(data))
            if recorder is not None:
                recorder.height = _height(rows, columns, tensor)
                recorder.norms += [update.block.norm for update in opened if isinstance(update.block, DoraBlock)]
    if recorder is not None and tensor.source is None and tensor.original is not None:
        _record_whole(tensor.original, recorder)
    if not digests:
        return Written(None if tensor.original is None else "", "", 0.0)
    digest = f"blake3:{before.hexdigest()}" if tensor.source else tensor.original.digest() if tensor.original else None
    bound = _rounding_bound(tensor, largest, reach) if measure else 0.0
    return Written(digest, f"blake3:{after.hexdigest()}", bound)


def _record_whole(original: TensorRef, recorder: TensorRecorder) -> None:
    """Record a tensor that nothing predicts, because the merge gave it another shape: against zeros."""
    tensor = NewTensor(original.name, original, original.dtype, original.shape)
    _, rows, columns = _matrices(tensor)
    recorder.height = _height(rows, columns, tensor)
    with _Rows(tensor, rows, columns) as source:
        for start, stop in _blocks(rows, columns, tensor):
            zeros = source.W[: stop - start].zero_()
            recorder.blocks.append(encode_block(source.read(start, stop), zeros, zeros.clone()))


def restore(tensor: NewTensor, record: UndoTensor, out: BinaryIO, step: Callable[[int], None]) -> Written:
    """Write the base's tensor: predicted from the merged one in `tensor.source`, corrected by its undo record.

    `tensor.updates` carry the weights of the merge. Raises InvalidFile for a record that does not fit.
    """
    tensor = replace(tensor, updates=tuple(map(_held, tensor.updates)))
    after = blake3()
    matrices, rows, columns = _matrices(tensor)
    blocks, norms = record.read_blocks(), iter(record.norms)
    try:
        with _Rows(tensor, rows, columns, record.height) as source:
            for matrix in range(matrices):
                opened = [_open(weighted, tensor, matrix, rows) for weighted in _ordered(tensor, matrix)]
                for update in opened:
                    if isinstance(update.block, DoraBlock):
                        update.block.norm = next(norms).read().reshape(update.block.norm.shape)
                first = matrix * rows
                for start, stop in _blocks(rows, columns, tensor, record.height):
                    stored = source.read(first + start, first + stop)
                    W = source.widened(stored, stop - start)
                    predicted, _ = _predict(tensor, opened, W, source.terms[: stop - start], start, stop)
                    data = as_bytes(decode_block(next(blocks), predicted, torch_dtype(tensor.dtype)))
                    after.update(data)
                    write_all(out, data)
                    step(len(data))
        if next(blocks, None) is not None or next(norms, None) is not None:
            raise ValueError("it has more blocks than the tensor")
    except (StopIteration, ValueError, RuntimeError) as error:
        what = f"{tensor.name}: the undo record does not fit: {error or 'it has too few blocks'}"
        raise InvalidFile(Problem("E-UNDO", what, tensor.name, "use --base instead")) from None
    return Written(None, f"blake3:{after.hexdigest()}", 0.0)


def _predict(
    tensor: NewTensor, opened: list[_Opened], W: torch.Tensor, terms: torch.Tensor, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged rows W, in place, with the updates taken out again; and how far from the exact result they can be.

    Every operation's error is at most u times what it computes with; in all (k + 8) u (|p| + terms), where terms are
    the magnitudes that were subtracted and k the length of the longest sums. Doubled, so that two machines, each
    within the band of the exact result, are within it of each other.
    """
    import torch

    terms.zero_()
    for update, part, offset in reversed([*_inside(opened, W, start, stop)]):
        low = offset + update.start - start
        update.block.revert(part, terms[low : low + len(part)], offset, update.weight)
    ranks = [
        (item.update.scaling.rank or 1) * sum(name.startswith(("B", "mid")) for name in item.update.components())
        for item, _ in tensor.updates
        if item.update.scaling
    ]
    unit = torch.finfo(W.dtype).eps / 2
    longest = max(ranks, default=0) + 2 * len(opened)
    # terms * (k + 8) u + 8 u |p|
    band = terms.add_(torch.finfo(W.dtype).tiny / unit).mul_(2 * (longest + 8) * unit)
    band.add_(W.abs(), alpha=2 * (len(opened) + 8) * unit)
    return W, band


def _matrices(tensor: NewTensor) -> tuple[int, int, int]:
    """A tensor as (matrices, rows, columns): one matrix per expert where updates see experts, else one."""
    stacked = any(item.target.stacked for item, _ in tensor.updates)
    shape = tensor.shape[1:] if stacked else tensor.shape
    rows = shape[0] if shape else 1
    columns = 1
    for dim in shape[1:]:
        columns *= dim
    return tensor.shape[0] if stacked else 1, rows, columns


def _ordered(tensor: NewTensor, matrix: int) -> list[Weighted]:
    """The updates that touch a matrix: replacements, then deltas, then DoRA; in the adapters' order within each."""
    touching = [w for w in tensor.updates if w.item.target.expert in (None, matrix)]
    return sorted(touching, key=lambda w: ROLE_ORDER.index(w.item.update.role))


def _held(weighted: Weighted) -> Weighted:
    """An update of all experts is opened once per expert, so what can not be sliced in its file is read once before."""
    item = weighted.item
    return (
        weighted if item.target.experts is None else Weighted(replace(item, update=item.update.held()), weighted.weight)
    )


def _open(weighted: Weighted, tensor: NewTensor, matrix: int, rows: int) -> _Opened:
    target, update = weighted.item.target, weighted.item.update
    expert = matrix if target.experts is not None else None
    start, stop = target.rows or (0, rows)
    block = update.open(torch_dtype(compute_dtype(tensor)), expert)
    return _Opened(block, start, stop, weighted.weight, update.first_pass)


def _inside(
    opened: list[_Opened], W: torch.Tensor, start: int, stop: int
) -> Iterator[tuple[_Opened, torch.Tensor, int]]:
    """Each update with its rows of a block, and the number of the first of them within the update's region."""
    for update in opened:
        low, high = max(start, update.start), min(stop, update.stop)
        if low < high:
            yield update, W[low - start : high - start], low - update.start


def _height(rows: int, columns: int, tensor: NewTensor) -> int:
    """How many rows make a block."""
    return max(1, min(rows, BLOCK_BYTES * 8 // max(1, columns * DTYPE_BITS[tensor.dtype])))


def _blocks(rows: int, columns: int, tensor: NewTensor, height: int = 0) -> Iterator[tuple[int, int]]:
    height = height or _height(rows, columns, tensor)
    for start in range(0, rows if columns else 0, height):
        yield start, min(rows, start + height)


class _Rows:
    """Blocks of rows of a tensor, in buffers that are used again for every block: stored, computed, to be written."""

    def __init__(self, tensor: NewTensor, rows: int, columns: int, height: int = 0) -> None:
        import torch

        height = min(rows, height) or _height(rows, columns, tensor)
        self.source = tensor.source
        self.columns = columns
        self.stored = torch.empty(height, columns, dtype=torch_dtype(tensor.source.dtype if tensor.source else "U8"))
        self.W = torch.empty(height, columns, dtype=torch_dtype(compute_dtype(tensor)))
        self.out = torch.empty(height, columns, dtype=torch_dtype(tensor.dtype))
        self.terms = torch.empty(height, columns, dtype=self.W.dtype)

    def __enter__(self) -> _Rows:
        self.file: BinaryIO | None = None
        self.held: torch.Tensor | None = None
        source = self.source
        if source is not None and isinstance(source.data, FileSpan) and not source.views:
            self.span = source.data
            self.file = open_to_read(source.data.path)
        elif source is not None and source.numel:
            self.held = source.read().reshape(-1, self.columns)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop as stored, [rows, columns]; none for a new tensor."""
        if self.file is not None:
            stored = self.stored[: stop - start]
            self.file.seek(self.span.offset + start * self.columns * stored.element_size())
            read_exactly(self.file, as_bytes(stored), self.span.path)
            return stored
        return self.stored[:0] if self.held is None else self.held[start:stop].contiguous()

    def widened(self, stored: torch.Tensor, rows: int) -> torch.Tensor:
        """A block in the compute dtype, [rows, columns]; zeros for a new tensor."""
        W = self.W[:rows]
        return W.copy_(stored) if self.source is not None else W.zero_()


def round_once(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Round into `out`, of the same shape and the output's dtype: once, to nearest, ties to even.

    torch goes from float64 to 16 bits through float32, which rounds twice; here the float32 in between is rounded to
    odd, after which the second rounding is the only one that shows (Boldo and Melquiond, 2008).
    """
    import torch

    if values.dtype == torch.float64 and out.element_size() == 2:
        near = values.to(torch.float32)
        even = (near.view(torch.int32) & 1) == 0
        error = values - near.to(torch.float64)
        toward = torch.where(error > 0, torch.inf, -torch.inf).to(torch.float32)
        inexact = (error != 0) & near.isfinite()
        values = torch.where(inexact & even, torch.nextafter(near, toward), near)
    return out.copy_(values)


def _largest_finite(W: torch.Tensor, tensor: NewTensor) -> float:
    """The largest magnitude of a computed block, which must be finite in the output's dtype as well.

    Rounding is monotonic: if the extremes stay finite, so does everything between them.
    """
    import torch

    ends = torch.tensor(extremes(W), dtype=W.dtype)
    if not all_finite(round_once(ends, torch.empty(2, dtype=torch_dtype(tensor.dtype)))):
        what = f"{tensor.name} would have NaN or infinity in {tensor.dtype}"
        raise Mismatch(
            Problem("E-NONFINITE", what, tensor.name, "is the scale right? a wider --dtype may hold it", "R-061")
        )
    return float(ends.abs().max())


def _rounding_bound(tensor: NewTensor, largest: float, reach: float) -> float:
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


def write_all(out: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]

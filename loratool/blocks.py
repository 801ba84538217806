"""One tensor of an output, a block of rows at a time: the loop of a merge, and its one dtype policy.

Stored bytes -> compute dtype -> every update of every adapter -> finite? -> rounded once -> written. Buffers are used
again for every block, and nothing as large as a tensor is held, except right factors of its updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, BinaryIO

from blake3 import blake3

from loratool.bounds import at_once, exact_of, peaks, reach_of, rounding_bound, single_band, size_of
from loratool.errors import Mismatch, Problem
from loratool.layout import NewTensor
from loratool.matrices import (
    Merged,
    Opened,
    blocks_of,
    compute_dtype,
    height_of,
    held,
    inside_of,
    matrices_of,
    opened_for,
    ordered,
    rows_of,
    sample_of,
)
from loratool.quantised import Dequantised
from loratool.rounding import bits, gradual_underflow, round_exactly, round_once
from loratool.rows import Rows
from loratool.survival import Survival, survival_of
from loratool.tensors import all_finite, as_bytes, empty, extremes, torch_dtype
from loratool.undo import TensorRecorder
from loratool.undoing import Written, norms_of, record_whole, undo_of, write_all

if TYPE_CHECKING:
    import torch

E4M3_LIMIT = 464  # what still rounds to the largest number, 448; there is no infinity beyond


Place = Callable[[int, int], "torch.Tensor | None"]  # [rows, columns] in one piece; None: the block's own memory


@gradual_underflow()
def each_block(
    tensor: NewTensor,
    receive: Callable[[Merged], None],
    *,
    rows: tuple[int, int] | None = None,
    reproducible: bool = False,
    device: str = "cpu",
    place: Place | None = None,
) -> None:
    """Merge a tensor block by block, or only the blocks that hold some of the rows start:stop.

    Blocks are the same ones whatever rows are wanted, and so are their bits. `reproducible` rounds as if computed
    exactly, to the same bits on every machine; without it, about 20 in a million elements of 16 bits are the other
    neighbour. `place` says where the values of the rows start:stop of a block are to be rounded to, if not to memory
    that the next block uses again; blocks in which nothing is computed do not go there.
    """
    tensor = held(tensor)
    matrices, height, columns = matrices_of(tensor)
    low, high = rows or (0, matrices * height)
    with rows_of(tensor, height, columns, device) as source:
        for matrix in range(matrices):
            first = matrix * height
            wanted = [(a, b) for a, b in blocks_of(height, columns, tensor) if first + a < high and low < first + b]
            if not wanted:
                continue
            opened = [opened_for(weighted, tensor, matrix, height, device) for weighted in ordered(tensor, matrix)]
            if any(update.first_pass for update in opened):
                for start, stop in blocks_of(height, columns, tensor):
                    W = source.widened(source.read(first + start, first + stop), stop - start)
                    for update, part, offset in inside_of(opened, W, start, stop):
                        if update.first_pass:
                            update.block.observe(part, offset)
                        else:  # replacements come first: the norm is of what they leave
                            update.block.apply(part, offset, update.weight)
            for start, stop in wanted:
                stored = source.read(first + start, first + stop)
                values, exact, largest = stored, None, 0.0
                if opened or tensor.source is None or tensor.source.dtype != tensor.dtype:
                    out = place(first + start, first + stop) if place is not None else None
                    if out is None:
                        out = source.buffer("out", torch_dtype(tensor.dtype), stop - start)
                    values, exact, largest = _merged(tensor, source, opened, stored, out, start, stop, reproducible)
                receive(Merged(first + start, first + stop, stored, values, exact, largest, source, opened, first))


def whole(tensor: NewTensor, reproducible: bool = False) -> torch.Tensor:
    """A merged tensor in memory, in its shape and dtype."""
    merged = empty(tensor.shape, torch_dtype(tensor.dtype))

    def receive(block: Merged) -> None:
        merged.view(-1, block.values.shape[1])[block.start : block.stop] = block.values

    each_block(tensor, receive, reproducible=reproducible)
    return merged


def compute(
    tensor: NewTensor,
    out: BinaryIO,
    step: Callable[[int], None],
    measure: bool = False,
    recorder: TensorRecorder | None = None,
    digests: bool = True,
    reproducible: bool = False,
    device: str = "cpu",
) -> Written:
    """Compute one tensor and write it at the current position of `out`.

    `step` is told the bytes of every block. With `measure`, the error that rounding may leave is bounded on the way;
    with a `recorder`, what undoes every block is recorded. `reproducible` is as in `each_block`.
    """
    import torch

    before, after = blake3(), blake3()
    largest = 0.0
    reach = 0.0  # of the deltas: sums in between can be larger than both ends
    survival = Survival()
    changed = tensor.source is None or tensor.source.dtype != tensor.dtype
    _, rows, columns = matrices_of(tensor)

    def receive(block: Merged) -> None:
        nonlocal largest, reach, survival, changed
        source, start, stop = block.source, block.start - block.first, block.stop - block.first
        if measure and block.exact is not None:
            largest = max(largest, block.largest, *map(abs, extremes(block.stored)))
            reach = max(reach, reach_of(block.opened, start, stop))
        sample = sample_of(block) if tensor.source is not None else None
        if sample is not None and block.exact is not None:
            survival = survival.plus(survival_of(block.stored[sample], block.exact[sample], block.values[sample]))
        if not changed:  # true after the first block of most tensors
            changed = not torch.equal(bits(block.stored), bits(block.values))
        if digests:
            before.update(as_bytes(source.last))
        data = source.host(block.values)
        if digests:
            after.update(data)
        write_all(out, data)
        step(len(data))
        if recorder is None:
            return
        if tensor.source is not None:
            recorder.blocks.append(undo_of(tensor, block))
        if stop == rows:
            recorder.norms += [norm.cpu() for norm in norms_of(block)]

    each_block(tensor, receive, reproducible=reproducible, device=device)
    if recorder is not None:
        recorder.height = height_of(rows, columns, tensor)
    if recorder is not None and tensor.source is None and tensor.original is not None:
        record_whole(tensor.original, recorder)
    if not digests:
        return Written(None if tensor.original is None else "", "", 0.0, survival, changed)
    as_stored = tensor.source is not None and not isinstance(tensor.source.data, Dequantised)
    digest = f"blake3:{before.hexdigest()}" if as_stored else tensor.original.digest() if tensor.original else None
    bound = rounding_bound(tensor, largest, reach) if measure else 0.0
    return Written(digest, f"blake3:{after.hexdigest()}", bound, survival, changed)


def _merged(
    tensor: NewTensor,
    source: Rows,
    opened: Sequence[Opened],
    stored: torch.Tensor,
    out: torch.Tensor,
    start: int,
    stop: int,
    reproducible: bool,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rows start:stop of the result, in `out`; before they were rounded; and their largest magnitude, which is
    finite."""
    W = source.widened(stored, stop - start)
    inside = [*inside_of(opened, W, start, stop)]
    for update, part, offset in inside:
        update.block.apply(part, offset, update.weight)
    largest = max(map(abs, extremes(W)))
    if not reproducible or not inside or compute_dtype(tensor) == "F64":
        return _finite(round_once(W, out), largest, tensor), W, largest
    size = size_of(inside, W, start)
    low = source.buffer("low", out.dtype, stop - start)
    exact = exact_of(opened, stored, start)
    round_exactly(W, single_band(inside, size, peaks(W)), out, low, exact, at_once(inside))
    return _finite(out, largest, tensor), W, largest


def _finite(out: torch.Tensor, largest: float, tensor: NewTensor) -> torch.Tensor:
    """A rounded block, which must be finite; so it is where its largest magnitude was, before, in its dtype's range.

    What is computed in float32 is not asked: at the very end of the range it can be on the other side.
    """
    import torch

    if tensor.dtype == "F8_E4M3":  # it has no infinity that would show in `out`
        fits = largest <= E4M3_LIMIT
    else:
        fits = largest < torch.finfo(out.dtype).max or all_finite(out)
    if not fits:
        what = f"{tensor.name} would have NaN or infinity in {tensor.dtype}"
        raise Mismatch(
            Problem("E-NONFINITE", what, tensor.name, "is the scale right? a wider dtype may hold it", "R-061")
        )
    return out

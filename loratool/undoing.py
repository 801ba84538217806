"""A block on its way back: the base's numbers as they follow from the merged ones, corrected by an undo record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from blake3 import blake3

from loratool.bounds import at_once, double_band, exact_of, peaks, single_band, size_of
from loratool.errors import InvalidFile, Problem
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
)
from loratool.rounding import gradual_underflow, round_exactly, round_once, undecided
from loratool.rows import Rows
from loratool.survival import Survival
from loratool.tensors import TensorRef, as_bytes, torch_dtype
from loratool.undo import TensorRecorder, UndoTensor, decode_block, encode_block
from loratool.updates.dora import DoraBlock

if TYPE_CHECKING:
    import torch


class Written(NamedTuple):
    """What is known of a computed tensor once it is written."""

    before: str | None  # digest of the source tensor; None for a new one
    after: str
    bound: float  # how far rounding can have moved an element
    survival: Survival = Survival()  # of a sample of its rows, or of all of a weight that was quantised again
    changed: bool = True  # whether any of its bits is another one than before


def write_all(out: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]


def undo_of(tensor: NewTensor, block: Merged) -> bytes:
    """What `Predictor` needs beside a merged block to give the stored one back. Not for a new tensor."""
    start, stop = block.start - block.first, block.stop - block.first
    guess, doubtful = _predicted(tensor, block.source, block.opened, block.values, block.stored.dtype, start, stop)
    return encode_block(block.stored, guess, doubtful())


def norms_of(block: Merged) -> list[torch.Tensor]:
    """What `Predictor` needs of a matrix's DoRA updates, in order; whole once its last block was handed out."""
    return [update.block.norm for update in block.opened if isinstance(update.block, DoraBlock)]


class Predictor:
    """Gives blocks of rows back as they were before a merge: `tensor.source` is of the merged one's shape and dtype.

    `norms` are those of a matrix's DoRA updates, asked for when it is its turn; `height` is that of the blocks, where
    another merge chose it.
    """

    def __init__(
        self,
        tensor: NewTensor,
        norms: Callable[[int], Iterator[torch.Tensor]],
        device: str = "cpu",
        height: int = 0,
    ) -> None:
        self.tensor = held(tensor)
        self.norms, self.device = norms, device
        _, self.rows, columns = matrices_of(tensor)
        self.buffers = rows_of(tensor, self.rows, columns, device, height)
        self.matrix, self.opened = -1, list[Opened]()

    def before(self, start: int, stop: int, merged: torch.Tensor, undo: bytes) -> torch.Tensor:
        """The block of rows start:stop, on the CPU. Raises ValueError for a record that does not fit."""
        matrix, first = divmod(start, self.rows)
        self.at(matrix)
        guess, _ = _predicted(
            self.tensor, self.buffers, self.opened, merged, torch_dtype(self.tensor.dtype), first, first + stop - start
        )
        return decode_block(undo, guess)

    def at(self, matrix: int) -> None:
        """Open the updates of a matrix, if they are not."""
        if matrix == self.matrix:
            return
        self.matrix = matrix
        self.opened = [opened_for(w, self.tensor, matrix, self.rows, self.device) for w in ordered(self.tensor, matrix)]
        norms = self.norms(matrix)
        for update in self.opened:
            if isinstance(update.block, DoraBlock):
                update.block.norm = next(norms).reshape(update.block.norm.shape).to(self.device)


@gradual_underflow()
def restore(
    tensor: NewTensor, record: UndoTensor, out: BinaryIO, step: Callable[[int], None], device: str = "cpu"
) -> Written:
    """Write the base's tensor: predicted from the merged one in `tensor.source`, corrected by its undo record.

    `tensor.updates` carry the weights of the merge. Raises InvalidFile for a record that does not fit.
    """
    after = blake3()
    matrices, rows, columns = matrices_of(tensor)
    blocks = record.read_blocks()
    norms = (ref.read() for ref in record.norms)
    predictor = Predictor(tensor, lambda matrix: norms, device, record.height)
    try:
        with rows_of(tensor, rows, columns, device, record.height) as source:
            for matrix in range(matrices):
                predictor.at(matrix)
                first = matrix * rows
                for start, stop in blocks_of(rows, columns, tensor, record.height):
                    merged = source.read(first + start, first + stop)
                    data = as_bytes(predictor.before(first + start, first + stop, merged, next(blocks)))
                    after.update(data)
                    write_all(out, data)
                    step(len(data))
        if next(blocks, None) is not None or next(norms, None) is not None:
            raise ValueError("it has more blocks than the tensor")
    except (StopIteration, ValueError, RuntimeError) as error:
        what = f"{tensor.name}: the undo record does not fit: {error or 'it has too few blocks'}"
        raise InvalidFile(Problem("E-UNDO", what, tensor.name, "use --base instead")) from None
    return Written(None, f"blake3:{after.hexdigest()}", 0.0)


def record_whole(original: TensorRef, recorder: TensorRecorder) -> None:
    """Record a tensor that nothing predicts, because the merge gave it another shape: against zeros."""
    import torch

    tensor = NewTensor(original.name, original, original.dtype, original.shape)
    _, rows, columns = matrices_of(tensor)
    recorder.height = height_of(rows, columns, tensor)
    with rows_of(tensor, rows, columns) as source:
        for start, stop in blocks_of(rows, columns, tensor):
            stored = source.read(start, stop)
            recorder.blocks.append(encode_block(stored, torch.zeros_like(stored), _none()))


def _predicted(
    tensor: NewTensor,
    source: Rows,
    opened: Sequence[Opened],
    merged: torch.Tensor,
    dtype: torch.dtype,
    start: int,
    stop: int,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """The base's rows start:stop as they follow from the merged ones, in the base's dtype; and what tells the flat
    indices, ascending, of the elements for which another machine may find a neighbour."""
    guess = source.buffer("guess", dtype, stop - start)
    if merged.dtype == dtype and not [*inside_of(opened, merged, start, stop)]:
        return guess.copy_(merged), _none
    W = source.widened(merged, stop - start)
    inside = [*inside_of(opened, W, start, stop)][::-1]
    if not inside or compute_dtype(tensor) == "F64":
        terms = W.new_zeros(stop - start, 1)
        for update, part, offset in inside:
            place = offset + update.start - start
            update.block.revert(part, terms[place : place + len(part)], offset, update.weight)
        round_once(W, guess)
        doubt = double_band(opened, terms, W)
        return guess, lambda: undecided(W, doubt, dtype).view(-1).nonzero().view(-1)
    for update, part, offset in inside:
        if not update.replaces:  # what was replaced can not be predicted
            update.block.apply(part, offset, -update.weight)
    size = size_of(inside, W, start)
    low = source.buffer("low guess", dtype, stop - start)
    exact = exact_of(opened, merged, start, back=True)
    where, values = round_exactly(W, single_band(inside, size, peaks(W)), guess, low, exact, at_once(inside))

    def doubtful() -> torch.Tensor:
        sizes = size.view(-1)[where // W.shape[1]].double()
        return where[undecided(values, double_band(opened, sizes, values), dtype)]

    return guess, doubtful


def _none() -> torch.Tensor:
    import torch

    return torch.empty(0, dtype=torch.int64, device="cpu")

"""One parameter of a running model: rewritten in place, block by block, with what gives its original bits back.

Every block has its own record, which is right at any moment: while a block is being written, the record is a copy of
its original numbers. So whatever interrupts a change, the next one starts from the original bits of every block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool.blocks import each_block
from loratool.errors import Mismatch, Problem, Unsupported
from loratool.layout import NewTensor, Weighted
from loratool.live.shards import Piece
from loratool.matrices import Merged, block_rows, sample_of
from loratool.rounding import bits, gradual_underflow
from loratool.survival import Survival, survival_of
from loratool.tensors import Computed, FileState, Shape, TensorRef, as_bytes
from loratool.undoing import Predictor, norms_of, undo_of

if TYPE_CHECKING:
    import torch

Undo = str | TensorRef  # "copy", "compressed", or the tensor of a file that has the original
Updates = tuple[Weighted, ...]


@dataclass(frozen=True, eq=False)
class Spot:
    """A parameter as it is now: `values` is what of it lies in this process, `shape` that of the whole."""

    name: str
    values: torch.Tensor
    dtype: str
    shape: Shape
    piece: Piece

    @property
    def sharded(self) -> bool:
        return self.piece.shape != self.shape

    @property
    def device(self) -> str:
        """Where blocks are computed: with the parameter on a GPU; for other devices, some without float64, here."""
        return str(self.values.device) if self.values.device.type == "cuda" else "cpu"


@dataclass(frozen=True, eq=False)
class Generation:
    """What a parameter was once changed by, and the norms of its DoRA updates by matrix."""

    tensor: NewTensor
    norms: dict[int, list[torch.Tensor]]


class Packed(NamedTuple):
    """A block's original numbers, as what corrects their prediction from the present ones."""

    content: bytes
    generation: Generation


class Kept(NamedTuple):
    """A block's original numbers, [rows, columns], on the CPU."""

    values: torch.Tensor


class InFile(NamedTuple):
    """The whole tensor's original numbers are in a file."""

    stored: TensorRef


@dataclass(frozen=True)
class How:
    """What a parameter is to hold, how it is rounded, and what is kept to have the original back."""

    updates: Updates = ()
    undo: Undo = "compressed"
    reproducible: bool = False


@dataclass(eq=False)
class Parameter:
    """A parameter, and for each block that was changed what gives it back.

    `updates` are those that its present bits hold; None while, or since, a change was interrupted. `how` it was
    changed last is then no more true.
    """

    spot: Spot
    records: dict[int, Packed | Kept | InFile] = field(default_factory=dict)  # by a block's first row
    updates: Updates | None = ()
    how: How = How()
    address: int = 0
    stacked: bool = False  # whether blocks are counted through one matrix per expert
    version: int | None = None  # torch's count of writes after ours
    lock: threading.Lock = field(default_factory=threading.Lock)  # a job that was interrupted may still be at work

    @property
    def undo_bytes(self) -> int:
        """What is held in memory for the original bits."""
        sizes = (len(r.content) if isinstance(r, Packed) else r.values.nbytes if isinstance(r, Kept) else 0
                 for r in self.records.values())  # fmt: skip
        generations = {id(r.generation): r.generation for r in self.records.values() if isinstance(r, Packed)}
        norms = (norm.nbytes for each in generations.values() for some in each.norms.values() for norm in some)
        return sum(sizes) + sum(norms)

    def moved_to(self, spot: Spot) -> Problem | None:
        """Take the parameter as it is now, perhaps on another device; or say that something else has changed it."""
        old = self.spot
        same = (spot.dtype, spot.shape, spot.piece) == (old.dtype, old.shape, old.piece)
        if self.records and (not same or (self.version is not None and self.version != write_count(spot.values))):
            what = f"{spot.name} was changed by something else since an adapter was applied"
            return Problem("E-CHANGED", what, spot.name, "`forget()` the original, or load the model again")
        self.spot = spot
        return None

    def at_rest(self) -> Parameter:
        """Let go of the memory, which the model may move elsewhere; `moved_to` finds it again."""
        values = self.spot.values
        if values.numel():
            self.address = values.data_ptr()
            self.spot = replace(self.spot, values=values.new_empty(0))
        return self

    def tensor(self, updates: Updates = ()) -> NewTensor:
        """What becomes of the part that lies here."""
        spot = self.spot
        ref = TensorRef(spot.name, spot.dtype, spot.piece.shape, Original(self, spot.device), spot.piece.shape)
        return NewTensor(spot.name, ref, spot.dtype, spot.piece.shape, updates, original=ref)

    def window(self, start: int, stop: int) -> torch.Tensor:
        """The rows of a block, as a view of the parameter, with all its dimensions."""
        values = self.spot.values
        if self.stacked:
            height = values.shape[1]
            return values[start // height, start % height : start % height + stop - start]
        return values[start:stop] if values.dim() else values

    # --- rewriting ---------------------------------------------------------------------------------------------------

    def rewrite(self, how: How, check: Callable[[], None] = lambda: None) -> Survival:
        """Make the bits those of a merge of the updates into the original; of none, the original ones.

        `check` is called before each block is written, and may raise.
        """
        import torch

        stacked = any(item.target.stacked for item, _ in how.updates)
        with self.lock, torch.no_grad():
            self.updates = self.version = None
            found = Survival()
            if self.records and (not how.updates or stacked != self.stacked):
                self._give_back(check)  # blocks of another layout would not be the same rows
            if how.updates:
                found = self._merge(how, stacked, check)
            self.updates, self.how, self.version = how.updates, how, write_count(self.spot.values)
        return found

    def _merge(self, how: How, stacked: bool, check: Callable[[], None]) -> Survival:
        self.stacked = stacked
        tensor, found = self.tensor(how.updates), Survival()
        assert tensor.source is not None
        # What is kept must not lead back to the parameter, or only a garbage collection would free a model.
        bare = replace(tensor.source, data=Computed(_nothing))
        generation = Generation(replace(tensor, source=bare, original=bare), {})

        def receive(block: Merged) -> None:
            nonlocal found
            check()
            old = self.records.get(block.start)
            if block.exact is None:  # nothing changes this matrix
                if old is not None:
                    self._write(block.start, block.stop, block.stored, block.values, None)
                return
            if (sample := sample_of(block)) is not None:
                found = found.plus(survival_of(block.stored[sample], block.exact[sample], block.values[sample]))
            new: Packed | Kept | InFile
            if how.undo == "compressed":
                matrix = block.first // max(1, tensor.shape[1]) if stacked else 0
                generation.norms[matrix] = norms_of(block)
                new = Packed(undo_of(tensor, block), generation)
            elif isinstance(how.undo, TensorRef):
                new = InFile(how.undo)
            else:
                new = old if isinstance(old, Kept) else kept(block.stored)
            self._write(block.start, block.stop, block.stored, block.values, new)

        each_block(tensor, receive, reproducible=how.reproducible, device=self.spot.device)
        return found

    @gradual_underflow()
    def _give_back(self, check: Callable[[], None]) -> None:
        data = Original(self, self.spot.device)
        for start, stop in self._blocks():
            if start in self.records:
                check()
                stored = data.rows(start, stop)
                self._write(start, stop, stored, stored, None)

    def _write(
        self, start: int, stop: int, stored: torch.Tensor, values: torch.Tensor, record: Packed | Kept | InFile | None
    ) -> None:
        """Write a block; its record does not depend on the present bits meanwhile."""
        import torch

        window = self.window(start, stop)
        if record is None or isinstance(record, Packed):
            self.records[start] = kept(stored)
        else:
            self.records[start] = record
        with torch.inference_mode(window.is_inference()):  # what was made in that mode is only written in it
            window.copy_(values.reshape(window.shape))
        if record is None:
            del self.records[start]
        else:
            self.records[start] = record

    def _blocks(self) -> list[tuple[int, int]]:
        tensor = self.tensor()
        if not self.stacked:
            return block_rows(tensor)
        experts, *matrix = self.spot.piece.shape
        one = NewTensor(tensor.name, tensor.source, tensor.dtype, tuple(matrix))
        return [(n * matrix[0] + a, n * matrix[0] + b) for n in range(experts) for a, b in block_rows(one)]

    def differs_from(self, stored: TensorRef) -> bool:
        """Whether a file's tensor, of the same shape and dtype, has other bits than the original of what lies here."""
        import torch

        mine = Original(self, self.spot.device)
        theirs = Original(Parameter(self.spot, stacked=self.stacked), "cpu", InFile(stored))
        return not all(torch.equal(bits(mine.rows(*b).cpu()), bits(theirs.rows(*b))) for b in self._blocks())


@dataclass(frozen=True, eq=False)
class Original:
    """The bits that a parameter had before any adapter, made out of its present ones. Blocks go in order, on `device`.

    Of a parameter that is spread over processes, rows are those of the piece that lies here.
    """

    parameter: Parameter
    device: str
    elsewhere: InFile | None = None  # instead of the parameter's records
    predictors: dict[int, Predictor] = field(default_factory=dict)
    path: Path | None = None
    states: tuple[FileState, ...] = ()

    def rows(self, start: int, stop: int, columns: int = 0) -> torch.Tensor:
        """The numbers of one block, [rows, columns]; a view of the parameter's, where it was not changed."""
        record = self.elsewhere or self.parameter.records.get(start)
        present = self.parameter.window(start, stop)
        if isinstance(record, InFile):
            return self._from_file(record.stored, start, stop).to(self.device)
        if isinstance(record, Kept):
            return record.values.to(self.device)
        here = present.reshape(stop - start, -1).contiguous().to(self.device)
        return here if record is None else self._unpacked(record, here, start, stop).to(self.device)

    def _unpacked(self, record: Packed, here: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        generation = record.generation
        if id(generation) not in self.predictors:
            norms = generation.norms
            self.predictors[id(generation)] = Predictor(generation.tensor, lambda n: iter(norms[n]), self.device)
        try:
            return self.predictors[id(generation)].before(start, stop, here, record.content)
        except ValueError as error:  # written to in a way that torch does not count
            name = self.parameter.spot.name
            what = f"{name} was changed by something else since an adapter was applied ({error})"
            raise Mismatch(Problem("E-CHANGED", what, name, "load the model again")) from None

    def _from_file(self, stored: TensorRef, start: int, stop: int) -> torch.Tensor:
        """The rows of a block, of this process's piece, out of a file that has the whole tensor."""
        for state in stored.data.states:
            state.check()
        first, *more = piece_starts = self.parameter.spot.piece.start or (0,)
        shape = self.parameter.spot.piece.shape
        if self.parameter.stacked:
            matrix, row = divmod(start, shape[1])
            stored, start, stop = stored.select(first + matrix), row, row + stop - start
            first, *more = piece_starts[1:]
            shape = shape[1:]
        part = stored.narrow(0, first + start, stop - start).read() if shape else stored.read()
        for dim, (begin, size) in enumerate(zip(more, shape[1:], strict=True), 1):
            part = part.narrow(dim, begin, size)
        return part.reshape(stop - start, -1).contiguous()

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        self._whole()
        for start, stop in self.parameter._blocks():
            yield as_bytes(self.rows(start, stop).cpu())

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        import torch

        self._whole()
        return torch.cat([self.rows(start, stop).cpu() for start, stop in self.parameter._blocks()]).reshape(shape)

    def _whole(self) -> None:
        spot = self.parameter.spot
        if spot.sharded:
            what = f"{spot.name} lies in pieces on several processes: its bytes are not read as a whole"
            raise Unsupported(Problem("E-UNSUPPORTED", what, spot.name))


def _nothing() -> torch.Tensor:
    raise AssertionError("only its dtype and shape are asked for")


def kept(stored: torch.Tensor) -> Kept:
    copy = stored.detach().cpu()
    return Kept(copy.clone() if copy.data_ptr() == stored.data_ptr() else copy)


def write_count(values: Any) -> int | None:
    """How often a tensor was written to, as torch counts; it does not for one that was made in inference mode."""
    return None if values.is_inference() else int(values._version)

"""Parts of merged tensors, computed or read on all workers when they are asked for, and nothing beside them kept."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.blocks import Place, each_block
from loratool.changes import inputs
from loratool.errors import Closed, Mismatch, Problem, Unsupported
from loratool.layout import NewTensor
from loratool.matrices import block_rows, held, stacked
from loratool.recycling import Recycled
from loratool.requantise import each_codes, in_float32, new_scales
from loratool.slicing import Bounds, runs
from loratool.spans import reads, shares
from loratool.tensors import CHUNK, FileSpan, FileState, Shape, TensorRef, torch_dtype
from loratool.workers import workers

if TYPE_CHECKING:
    import torch

SCALES_HELD = 8  # weights whose new scales are kept: codes and scales are asked for apart

Receive = Callable[["torch.Tensor", int], None]  # rows of a tensor, and the number of the first
Piece = tuple[int, int, int]  # rows start:stop of a tensor, and the place of the first among those that are asked for


@dataclass(frozen=True)
class Entry:
    """A tensor of a merged file: what a header says of it, and what it is made of."""

    name: str
    dtype: str
    shape: Shape
    made_of: TensorRef | NewTensor

    @cached_property
    def inputs(self) -> frozenset[FileState]:
        return frozenset(inputs(self.made_of))


class Engine:
    """Reads and computes parts of tensors, each on all workers. They start with the first tensor."""

    def __init__(self, threads: int, reproducible: bool, path: str) -> None:
        self.threads, self.reproducible, self.path = threads, reproducible, path
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.memory = Recycled()
        self.scales: dict[str, torch.Tensor] = {}  # of weights that are quantised again, by name
        self.open = True

    def refuse_closed(self) -> None:
        if not self.open:
            raise Closed(Problem("E-CLOSED", "the merged checkpoint was closed", self.path, "open it again"))

    def close(self) -> None:
        """Waits for what other threads still compute."""
        with self.lock:
            self.open = False
            pool, self.pool = self.pool, None
        if pool is not None:
            pool.shutdown()
        self.memory.close()
        self.scales = {}

    def dtype(self, entry: Entry) -> torch.dtype:
        try:
            return torch_dtype(entry.dtype)
        except (KeyError, AttributeError):
            what = f"torch has no dtype {entry.dtype}, in which {entry.name} is stored"
            raise Unsupported(Problem("E-TENSOR", what, self.path)) from None

    def read(self, entry: Entry, bounds: Bounds, out: torch.Tensor | None = None) -> torch.Tensor:
        """A part of a tensor. Raises InvalidFile if a file that it comes from is another one now, or was meanwhile."""
        import torch

        self.refuse_closed()
        dtype, shape = self.dtype(entry), tuple(stop - start for start, stop in bounds)
        if out is None:
            with torch.inference_mode(False):  # what a caller makes in that mode, no other thread could write to
                out = self.memory.empty(shape, entry.dtype)
        elif (out.dtype, tuple(out.shape), out.device.type, out.is_contiguous()) != (dtype, shape, "cpu", True):
            what = f"{entry.name} is {entry.dtype} {list(shape)}, `out` must be that too, on the CPU and contiguous"
            raise Mismatch(Problem("E-SHAPE", what, self.path, f"it is {out.dtype} {list(out.shape)} on {out.device}"))
        out = out.detach()  # a parameter, too
        try:
            if out.numel():
                with torch.inference_mode(False):
                    self._fill(entry, bounds, out)
        except Exception:
            _check(entry)  # explains whatever went wrong
            raise
        _check(entry)
        return out

    def _fill(self, entry: Entry, bounds: Bounds, out: torch.Tensor) -> None:
        made_of = entry.made_of
        if isinstance(made_of, NewTensor):
            if made_of.part == "scales":
                scales = self._scales(made_of).to(out.dtype).reshape(entry.shape)
                out.copy_(scales[tuple(slice(*bound) for bound in bounds)])
            elif made_of.part:
                self._codes(held(made_of), bounds, out)
            else:
                self._merged(held(made_of), bounds, out)
        elif isinstance(made_of.data, FileSpan) and not made_of.views:
            jobs = reads(made_of, bounds, out, self.threads)
            if out.nbytes > CHUNK:
                self._run(jobs)
            else:  # not worth a worker
                for job in jobs:
                    job()
        elif made_of.in_order and bounds:  # in pieces
            (start, stop), *others = bounds
            rows = made_of.narrow(0, start, stop - start).read()
            out.copy_(rows[(slice(None), *(slice(*bound) for bound in others))])
        else:  # a pickle's, which can only be read whole
            out.copy_(made_of.read()[tuple(slice(*bound) for bound in bounds)])

    # --- computed ---

    def _merged(self, tensor: NewTensor, bounds: Bounds, out: torch.Tensor) -> None:
        def each(rows: tuple[int, int], receive: Receive, place: Place) -> None:
            each_block(
                tensor,
                lambda block: receive(block.values, block.start),
                rows=rows,
                reproducible=self.reproducible,
                place=place,
            )

        self._computed(tensor, bounds, out, each)

    def _codes(self, tensor: NewTensor, bounds: Bounds, out: torch.Tensor) -> None:
        scales = self._scales(tensor)

        def each(rows: tuple[int, int], receive: Receive, _: Place) -> None:
            each_codes(tensor, scales, receive, rows)

        self._computed(in_float32(tensor), bounds, out, each)

    def _scales(self, tensor: NewTensor) -> torch.Tensor:
        """The scales of all tiles of a weight, which take a pass over all of it."""
        assert tensor.source is not None
        name = tensor.source.name
        if (found := self.scales.get(name)) is not None:
            return found
        made: list[torch.Tensor] = []
        self._run([lambda: made.append(new_scales(tensor))])
        kept = [*self.scales.items()][-(SCALES_HELD - 1) :]
        self.scales = {**dict(kept), name: made[0]}
        return made[0]

    def _computed(
        self,
        tensor: NewTensor,
        bounds: Bounds,
        out: torch.Tensor,
        each: Callable[[tuple[int, int], Receive, Place], None],
    ) -> None:
        """Rows on the workers, whole blocks to each of them. `each` hands out the blocks that hold some rows."""
        depth = min(2 if stacked(tensor) else 1, len(tensor.shape))  # the dimensions that rows are counted through
        columns = (slice(None), *(slice(*bound) for bound in bounds[depth:]))
        target = out.view(-1, *out.shape[depth:])  # [rows that are asked for, columns...]

        def work(pieces: Sequence[Piece]) -> None:
            for start, stop, place in pieces:
                at = (start, stop, place)
                each((start, stop), functools.partial(keep, *at), functools.partial(straight, *at))

        def straight(start: int, stop: int, place: int, low: int, high: int) -> torch.Tensor | None:
            """Where a block's rows low:high go without a copy: if all of them are asked for, with all columns."""
            if low < start or stop < high or target.shape[1:] != tensor.shape[depth:]:
                return None
            return target[place + low - start : place + high - start].view(high - low, -1)

        def keep(start: int, stop: int, place: int, values: torch.Tensor, first: int) -> None:
            low, high = max(start, first), min(stop, first + len(values))
            kept = target[place + low - start : place + high - start]
            if values.data_ptr() != kept.data_ptr():
                kept.copy_(values[low - first : high - first].view(high - low, *tensor.shape[depth:])[columns])

        pieces = _pieces(runs(tensor.shape[:depth], bounds[:depth]), block_rows(tensor))
        self._run([functools.partial(work, _joined(share)) for share in shares(pieces, self.threads)])

    # --- workers ---

    def _run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run jobs on the workers and wait for all of them. Raises what the first of them raised."""
        with self.lock:
            self.refuse_closed()
            if self.pool is None:
                self.pool = workers(self.threads)
            started = [self.pool.submit(job) for job in jobs]
        wait(started)
        for done in started:
            done.result()


def _check(entry: Entry) -> None:
    for state in entry.inputs:
        state.check()


def _pieces(wanted: Sequence[tuple[int, int]], blocks: Sequence[tuple[int, int]]) -> list[Piece]:
    """The wanted rows, cut where blocks end. Both are in ascending order."""
    pieces: list[Piece] = []
    place = number = 0
    for start, stop in wanted:
        while number < len(blocks) and blocks[number][0] < stop:
            low, high = max(start, blocks[number][0]), min(stop, blocks[number][1])
            if low < high:
                pieces.append((low, high, place))
                place += high - low
            if blocks[number][1] > stop:
                break  # the next run may begin in the same block
            number += 1
    return pieces


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours as one piece, for which factors are opened once."""
    joined: list[Piece] = []
    for start, stop, place in pieces:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop, joined[-1][2])
        else:
            joined.append((start, stop, place))
    return joined

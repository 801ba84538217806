"""Merged on read: base + adapters with the interface of `safetensors.safe_open`, and nothing written.

A tensor, or the part of it that is asked for, is computed when it is asked for: out of the same blocks as a merge, by
workers with one torch thread each, and so to the same bits as a merged folder has. What an adapter does not touch is
read from its place in the base. Beside what is asked for, a worker holds a block, the factors, and no more.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter
from loratool.blocks import Place, block_rows, each_block, held, stacked
from loratool.changes import fitted, inputs
from loratool.conventions.choices import Choices
from loratool.errors import Closed, Mismatch, NoSuchTensor, Problem, Unsupported
from loratool.layout import NewTensor, OutputFile, names_clash, output_files
from loratool.recycling import Recycled
from loratool.requantise import each_codes, in_float32, new_scales
from loratool.slicing import Bounds, box, runs
from loratool.spans import reads, shares
from loratool.tensors import CHUNK, FileSpan, FileState, Shape, TensorRef, torch_dtype
from loratool.workers import worker_count, workers

if TYPE_CHECKING:
    import torch

SCALES_HELD = 8  # weights whose new scales are kept: codes and scales are asked for apart

Receive = Callable[["torch.Tensor", int], None]  # rows of a tensor, and the number of the first
Piece = tuple[int, int, int]  # rows start:stop of a tensor, and the place of the first among those that are asked for


@dataclass(frozen=True)
class _Entry:
    """A tensor of a merged file: what a header says of it, and what it is made of."""

    name: str
    dtype: str
    shape: Shape
    made_of: TensorRef | NewTensor

    @cached_property
    def inputs(self) -> frozenset[FileState]:
        return frozenset(inputs(self.made_of))


class MergedSlice:
    """One tensor of a merged checkpoint; an index computes what it asks for. As `safe_open(...).get_slice(name)`."""

    def __init__(self, entry: _Entry, engine: _Engine) -> None:
        self._entry, self._engine = entry, engine

    def get_shape(self) -> list[int]:
        return [*self._entry.shape]

    def get_dtype(self) -> str:
        """The name that a safetensors header has for it, such as "BF16"."""
        return self._entry.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """What the same index gives on the whole tensor, on the CPU.

        Numbers, slices, `...` and None, alone or in a tuple, compute only the rows and keep only the columns that they
        ask for; what else torch takes is applied to the whole tensor. Raises what torch raises for a wrong index.
        """
        import torch

        entry = self._entry
        self._engine.refuse_closed()
        torch.empty(entry.shape, dtype=self._engine.dtype(entry), device="meta")[index]  # wrong ones end here
        part = box(index, entry.shape)
        result: torch.Tensor = self._engine.read(entry, part.bounds)[part.index]
        return result


class MergedFile:
    """One file of a merged checkpoint that is not written: `keys`, `get_tensor`, `get_slice`, `metadata`, `with`.

    As `safetensors.safe_open(path, "pt")` of the merged file. All tensors are on the CPU, in memory of their own.
    Safe to use from several threads.

    Raises NoSuchTensor (also a KeyError) for a wrong name, Closed (also a ValueError) after it was closed, InvalidFile
    with E-CHANGED if the base or an adapter is another file by now, and Mismatch where a merge would not be finite.
    """

    def __init__(self, entries: Mapping[str, _Entry], metadata: Mapping[str, str], engine: _Engine, path: str) -> None:
        self._entries, self._metadata, self._engine, self._path = entries, metadata, engine, path
        self._open = True

    def keys(self) -> list[str]:
        """The names of its tensors, sorted."""
        return sorted(self.offset_keys())

    def offset_keys(self) -> list[str]:
        """The names of its tensors, in the order of their bytes."""
        self._refuse_closed()
        return [*self._entries]

    def metadata(self) -> dict[str, str] | None:
        self._refuse_closed()
        return dict(self._metadata) or None

    def get_tensor(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor, computed now: into `out`, if that is given, which saves a copy and the memory for it.

        `out` is contiguous, on the CPU, and of the tensor's shape and dtype. What it holds after an error is undefined.
        """
        entry = self._entry(name)
        return self._engine.read(entry, tuple((0, size) for size in entry.shape), out)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, in memory at once."""
        return {name: self.get_tensor(name) for name in self.offset_keys()}

    def get_slice(self, name: str) -> MergedSlice:
        """A tensor of which nothing is computed yet: index it."""
        return MergedSlice(self._entry(name), self._engine)

    def close(self) -> None:
        """Nothing more can be asked of it. What was computed stays with those who have it."""
        self._open = False

    def __enter__(self) -> MergedFile:
        self._refuse_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_closed(self) -> None:
        if not self._open:
            raise Closed(Problem("E-CLOSED", "it was closed", self._path, "open it again"))
        self._engine.refuse_closed()

    def _entry(self, name: str) -> _Entry:
        self._refuse_closed()
        try:
            return self._entries[name]
        except KeyError:
            what = f"there is no tensor {name!r:.200}"
            raise NoSuchTensor(Problem("E-NAMES", what, self._path, "`keys()` lists all names")) from None


class MergedFolder(MergedFile):
    """A merged checkpoint that is not written: all its tensors together, and each of its files.

    Names are those of the merged files; of a pipeline, COMPONENT.TENSOR. `metadata` is that of all files together.
    """

    def __init__(self, files: Sequence[OutputFile], notes: Sequence[str], engine: _Engine, path: Path) -> None:
        self.notes = tuple(notes)
        self._files = {file.name: _entries(file) for file in files if file.made_of}
        self._metadatas = {file.name: file.metadata for file in files}
        entries: dict[str, _Entry] = {}
        for name, contents in self._files.items():
            component = f"{name.rpartition('/')[0]}." if "/" in name else ""
            entries |= {f"{component}{tensor}": entry for tensor, entry in contents.items()}
        metadata = {key: value for found in self._metadatas.values() for key, value in found.items()}
        super().__init__(entries, metadata, engine, str(path))

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the merged files, relative to their folder."""
        return tuple(self._files)

    def open_shard(self, name: str) -> MergedFile:
        """One of `files`. It can be closed alone, and is closed with the folder."""
        self._refuse_closed()
        if name not in self._files:
            what = f"there is no file {name!r:.200}: there are {', '.join(self._files)}"
            raise NoSuchTensor(Problem("E-MISSING", what, self._path))
        return MergedFile(self._files[name], self._metadatas[name], self._engine, f"{self._path} ({name})")

    def close(self) -> None:
        """As of a file; also ends its workers."""
        super().close()
        self._engine.close()

    def __enter__(self) -> MergedFolder:
        self._refuse_closed()
        return self


def _entries(file: OutputFile) -> dict[str, _Entry]:
    both = zip(file.tensors, file.made_of, strict=True)
    return {name: _Entry(name, dtype, shape, made_of) for (name, dtype, shape), made_of in both}


def open_virtual(
    base: Path,
    adapters: Sequence[tuple[Path | Adapter, float]],
    *,
    dtype: str,
    allow_new: bool,
    choices: Choices,
    reproducible: bool,
    threads: int | None,
) -> MergedFolder:
    """Bind adapters to a base, and lay out what a merge would write. Raises what a merge would raise."""
    count = worker_count(threads)
    fit = fitted(base, adapters, dtype, choices, allow_new)
    if problems := [*names_clash(fit.base), *fit.problems]:
        raise Mismatch(problems)
    dropped = frozenset(ref.name for ref in fit.dropped)
    files = output_files(fit.base, fit.changes, fit.additions, dropped)
    return MergedFolder(files, fit.notes, _Engine(count, reproducible, str(base)), base)


def each_tensor(merged: MergedFolder) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors by name, in the order of the files and of their bytes. Closes the folder at the end."""
    with merged:
        for name in merged.offset_keys():
            yield name, merged.get_tensor(name)


class _Engine:
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

    def dtype(self, entry: _Entry) -> torch.dtype:
        try:
            return torch_dtype(entry.dtype)
        except (KeyError, AttributeError):
            what = f"torch has no dtype {entry.dtype}, in which {entry.name} is stored"
            raise Unsupported(Problem("E-TENSOR", what, self.path)) from None

    def read(self, entry: _Entry, bounds: Bounds, out: torch.Tensor | None = None) -> torch.Tensor:
        """A part of a tensor. Raises InvalidFile if a file that it comes from is another one now, or was meanwhile."""
        self.refuse_closed()
        dtype, shape = self.dtype(entry), tuple(stop - start for start, stop in bounds)
        if out is None:
            out = self.memory.empty(shape, entry.dtype)
        elif (out.dtype, tuple(out.shape), out.device.type, out.is_contiguous()) != (dtype, shape, "cpu", True):
            what = f"{entry.name} is {entry.dtype} {list(shape)}, `out` must be that too, on the CPU and contiguous"
            raise Mismatch(Problem("E-SHAPE", what, self.path, f"it is {out.dtype} {list(out.shape)} on {out.device}"))
        out = out.detach()  # a parameter, too
        try:
            if out.numel():
                self._fill(entry, bounds, out)
        except Exception:
            _check(entry)  # explains whatever went wrong
            raise
        _check(entry)
        return out

    def _fill(self, entry: _Entry, bounds: Bounds, out: torch.Tensor) -> None:
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


def _check(entry: _Entry) -> None:
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

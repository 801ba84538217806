"""Running a plan: the loop over row blocks, and the one dtype policy.

Per block: stored bytes -> compute dtype -> every update of every adapter -> finite? -> rounded once -> written. What
is between the targets is copied without being decoded. Nothing as large as a tensor is held, except its factors.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from blake3 import blake3

from loratool import receipt
from loratool.errors import InvalidFile, Mismatch, Problem
from loratool.layout import Change, Copy, NewTensor, OutputFile, Weighted
from loratool.plan import BLOCK_BYTES, Plan, compute_dtype
from loratool.receipt import ChangedTensor, Receipt
from loratool.staging import staged
from loratool.tensors import (
    DTYPE_BITS,
    FileSpan,
    TensorRef,
    all_finite,
    as_bytes,
    extremes,
    open_to_read,
    read_exactly,
    torch_dtype,
)
from loratool.updates import Block
from loratool.version import TOOL

if TYPE_CHECKING:
    import torch

WORKERS = min(8, os.cpu_count() or 1)
ROLE_ORDER = ("replace", "add", "renormalise")  # section "Merging" of the spec


class Progress(NamedTuple):
    """One step of a running merge, for a progress callback."""

    done: int  # bytes
    total: int  # bytes
    what: str  # the file being written


ProgressCallback = Callable[[Progress], None]


class Written(NamedTuple):
    """What is known of a computed tensor once it is written."""

    before: str | None  # digest of the source tensor; None for a new one
    after: str
    bound: float  # how far rounding can have moved an element


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `receipt` is also in the output."""

    plan: Plan
    receipt: Receipt
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**self.plan.to_json(), "seconds": round(self.seconds, 3), "receipt": self.receipt.to_json()}


@dataclass(frozen=True)
class UnmergeReport:
    """What an unmerge did: how many tensors are proven to be the base's again, and how far the others can be off."""

    plan: Plan
    restored: int  # tensors whose digest is the base's
    total: int  # tensors that the merge had changed
    bound: float  # largest possible error of an element; 0 if all are restored
    seconds: float

    @property
    def exact(self) -> bool:
        return self.restored == self.total

    def to_json(self) -> dict[str, Any]:
        return {
            **self.plan.to_json(),
            "exact": self.exact,
            "tensors_restored": self.restored,
            "tensors_unmerged": self.total,
            "error_bound": self.bound,
            "seconds": round(self.seconds, 3),
        }


def run_merge(plan: Plan, progress: ProgressCallback | None = None) -> MergeReport:
    """Write the output of a merge plan, with its receipt; whole or not at all."""
    import torch  # noqa: F401  # before the clock starts: seconds are those of the work

    started = time.monotonic()
    if plan.single:  # the receipt is in the header, which comes before the digests are known: keep its place
        blank = _receipt(plan, {tensor.name: _BLANK for tensor in plan.changes})
        plan = replace(plan, files=(_with_receipt(plan.files[0], blank),))
    with _output(plan) as folder:
        done = _receipt(plan, _write(plan, folder, progress))
        if plan.single:
            header = _with_receipt(plan.files[0], done).header
            assert len(header) == len(plan.files[0].header), "digests have one length"
            with (folder / plan.files[0].name).open("r+b") as file:
                file.write(header)
        else:
            (folder / receipt.FILE_NAME).write_text(done.dumps(), encoding="utf-8")
    return MergeReport(plan, done, time.monotonic() - started)


def run_unmerge(plan: Plan, progress: ProgressCallback | None = None) -> UnmergeReport:
    """Write the output of an unmerge plan, and compare it with the base's digests in the receipt."""
    import torch  # noqa: F401  # before the clock starts

    assert plan.receipt is not None
    started = time.monotonic()
    known = plan.receipt.tensors
    with _output(plan) as folder:
        written = _write(plan, folder, progress)
        wrong = {name: found.bound for name, found in written.items() if found.after != known[name].base}
        if plan.exact and wrong:
            raise Mismatch(
                Problem(
                    "E-NOT-EXACT",
                    f"{next(iter(wrong))} came out with other bytes than the base's: the"
                    " base changed while it was read",
                    str(plan.out),
                )
            )
    seconds = time.monotonic() - started
    return UnmergeReport(plan, len(written) - len(wrong), len(written), max(wrong.values(), default=0.0), seconds)


_BLANK = Written("blake3:" + "0" * 64, "blake3:" + "0" * 64, 0.0)


def _with_receipt(file: OutputFile, found: Receipt) -> OutputFile:
    return file.with_metadata({**file.metadata, receipt.METADATA_KEY: found.dumps()})


def _receipt(plan: Plan, written: Mapping[str, Written]) -> Receipt:
    tensors = {}
    for tensor in plan.changes:
        original, found = tensor.original, written[tensor.name]
        tensors[tensor.name] = ChangedTensor(
            merged=found.after,
            dtype=tensor.dtype,
            shape=tensor.shape,
            base=found.before if original else None,
            base_dtype=original.dtype if original else tensor.dtype,
            base_shape=original.shape if original else tensor.shape,
            reversible=tensor.reversible,
        )
    return Receipt(TOOL, plan.dtype, plan.adapters, tensors)


def run_copy(plan: Plan, progress: ProgressCallback | None = None) -> None:
    """Write the output of a plan that changes no tensor: a clean base out of a wrapped checkpoint."""
    with _output(plan) as folder:
        _write(plan, folder, progress)


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _output(plan: Plan) -> Iterator[Path]:
    """The folder to write weights files into; what is in it is at `plan.out` when the block ends well."""
    with staged(plan.out) as place:
        if plan.single:
            yield place.parent  # the one file is written under the output's own name
        else:
            place.mkdir()
            for path in plan.companions:
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(plan.source / path, place / path)
            if plan.index is not None:
                (place / plan.index[0]).write_bytes(plan.index[1])
            yield place


def _write(plan: Plan, folder: Path, progress: ProgressCallback | None) -> dict[str, Written]:
    """Write the weights files of a plan; return what is known of each computed tensor, by name."""
    meter = _Meter(plan.nbytes, progress)
    tasks: list[tuple[Path, Copy | Change]] = []
    for file in plan.files:
        path = folder / file.name
        with path.open("wb", buffering=0) as out:
            out.truncate(file.size)
            _write_all(out, memoryview(file.header))
        meter.step(len(file.header), file.name)
        tasks += [(path, task) for task in file.tasks]
    found: dict[str, Written] = {}
    # torch on one thread per worker: blocks are too small to be worth its own threads, which wait for each other.
    with ThreadPoolExecutor(WORKERS, initializer=_single_threaded) as pool:
        running = [pool.submit(_run, path, task, meter, not plan.exact) for path, task in tasks]
        try:
            for done in as_completed(running):
                if (written := done.result()) is not None:
                    found[written[0]] = written[1]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {tensor.name: found[tensor.name] for tensor in plan.changes}


def _single_threaded() -> None:
    import torch

    torch.set_num_threads(1)  # of this thread: OpenMP keeps the number per thread


class _Meter:
    """Counts the bytes that the workers have written, and tells the progress callback."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.lock = threading.Lock()

    def step(self, nbytes: int, what: str) -> None:
        with self.lock:
            self.done += nbytes
            if self.progress is not None:
                self.progress(Progress(self.done, self.total, what))


def _run(path: Path, task: Copy | Change, meter: _Meter, measure: bool) -> tuple[str, Written] | None:
    """One task of a plan, in a worker: it knows its place in the output."""
    with path.open("r+b", buffering=0) as out:
        out.seek(task.offset)

        def step(nbytes: int) -> None:
            meter.step(nbytes, path.name)

        if isinstance(task, Copy):
            _copy(task.source, out, step)
            return None
        return task.tensor.name, _change(task, out, step, measure)


def _copy(source: TensorRef, out: BinaryIO, step: Callable[[int], None]) -> None:
    """Copy bytes: in the kernel where source and system allow it."""
    if isinstance(source.data, FileSpan) and hasattr(os, "copy_file_range"):
        position, left = source.data.offset, source.nbytes
        with open_to_read(source.data.path) as file:
            while left:
                try:
                    count = os.copy_file_range(file.fileno(), out.fileno(), min(left, 64 << 20), offset_src=position)
                except OSError:
                    break  # not between these file systems: what is left goes through memory
                if count == 0:
                    raise InvalidFile(Problem("E-CHANGED", "the file became shorter while it was read", str(file.name)))
                position, left = position + count, left - count
                step(count)
        source = replace(source, shape=(left,), stored_shape=(left,), data=FileSpan(source.data.path, position))
    for chunk in source.chunks() if source.nbytes else ():
        _write_all(out, chunk)
        step(len(chunk))


def _write_all(out: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]


# --- arithmetic ------------------------------------------------------------------------------------------------------


class _Opened(NamedTuple):
    """An update that is open for one matrix, and the rows of the matrix it covers."""

    block: Block
    start: int
    stop: int
    weight: float
    first_pass: bool


def _change(task: Change, out: BinaryIO, step: Callable[[int], None], measure: bool) -> Written:
    """Compute one tensor, a block of rows at a time, and write it at the current position of `out`.

    With `measure`, the error that rounding may have left is bounded on the way.
    """
    tensor = replace(task.tensor, updates=tuple(map(_held, task.tensor.updates)))
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
                before.update(as_bytes(stored))
                if opened or tensor.source is None or tensor.source.dtype != tensor.dtype:
                    W = source.widened(stored, stop - start)
                    if measure:
                        largest = max(largest, *map(abs, extremes(W)))
                    for update, part, offset in _inside(opened, W, start, stop):
                        update.block.apply(part, offset, update.weight)
                    largest = max(largest, _largest_finite(W, tensor))
                    stored = round_once(W, source.out[: stop - start])
                data = as_bytes(stored)
                after.update(data)
                _write_all(out, data)
                step(len(data))
    digest = f"blake3:{before.hexdigest()}" if tensor.source else tensor.original.digest() if tensor.original else None
    bound = _rounding_bound(tensor, largest, reach) if measure else 0.0
    return Written(digest, f"blake3:{after.hexdigest()}", bound)


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


def _blocks(rows: int, columns: int, tensor: NewTensor) -> Iterator[tuple[int, int]]:
    height = _height(rows, columns, tensor)
    for start in range(0, rows if columns else 0, height):
        yield start, min(rows, start + height)


class _Rows:
    """Blocks of rows of a tensor, in buffers that are used again for every block: stored, computed, to be written."""

    def __init__(self, tensor: NewTensor, rows: int, columns: int) -> None:
        import torch

        height = _height(rows, columns, tensor)
        self.source = tensor.source
        self.columns = columns
        self.stored = torch.empty(height, columns, dtype=torch_dtype(tensor.source.dtype if tensor.source else "U8"))
        self.W = torch.empty(height, columns, dtype=torch_dtype(compute_dtype(tensor)))
        self.out = torch.empty(height, columns, dtype=torch_dtype(tensor.dtype))

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

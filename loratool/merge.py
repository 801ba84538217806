"""Running a plan: its tasks on a few workers, into an output that appears whole, with a receipt.

What is between the targets is copied without being decoded; `blocks.py` computes the targets.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratool import dispatch, receipt, resume, undo
from loratool.errors import Mismatch, Problem
from loratool.layout import Change, Copy, OutputFile
from loratool.plan import Plan
from loratool.receipt import ChangedTensor, Receipt
from loratool.remote import Site
from loratool.requantise import Requantiser
from loratool.resume import Journal, Kept, kept_files
from loratool.staging import flush, given_back, staged
from loratool.survival import Survival, loss, survival_json
from loratool.tasks import Settings, run_task
from loratool.tensors import CHUNK, open_to_read, reading
from loratool.undo import UndoWriter
from loratool.undoing import Written, write_all
from loratool.unmerging import changed_since
from loratool.version import TOOL
from loratool.workers import Meter, ProgressCallback, each_done, workers

FLUSH_BYTES = 64 << 20  # written to a file before it is flushed on the way


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. `receipt` is also in the output."""

    plan: Plan
    receipt: Receipt
    seconds: float
    survival: Mapping[str, Survival] = field(default_factory=dict)  # of tensors with a delta, from a sample of rows
    unchanged: tuple[str, ...] = ()  # tensors that were computed, and whose bits are what they were

    @property
    def changed(self) -> int:
        """How many tensors of the output are not the base's, bit for bit."""
        return len(self.plan.changes) - len(self.unchanged)

    @property
    def notes(self) -> list[str]:
        """What only a merge that is done can tell, beside the notes of its plan."""
        parts = {tensor.name: tensor.part for tensor in self.plan.changes}
        again = {name: found for name, found in self.survival.items() if parts[name]}
        rounded = {name: found for name, found in self.survival.items() if not parts[name]}
        count = len(self.unchanged)
        unchanged = f"{count} tensors keep every bit: nothing of the change is left after rounding, " if count else ""
        unchanged += f"such as {self.unchanged[0]}" if count else ""
        return [
            *filter(None, [unchanged]),
            *loss(again, "after quantising again", "--dtype bf16 keeps all of it"),
            *loss(rounded, "after rounding", "--dtype fp32 keeps all of it"),
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.plan.to_json(),
            "notes": [*self.plan.notes, *self.notes],
            "tensors_changed": self.changed,
            "unchanged": list(self.unchanged),
            "survival": survival_json(self.survival),
            "seconds": round(self.seconds, 3),
            "receipt": self.receipt.to_json(),
        }


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


def run_merge(plan: Plan, progress: ProgressCallback | None = None, executor: Executor | None = None) -> MergeReport:
    """Write the output of a merge plan with its receipt, and its undo record if it asks for one; all or nothing.

    Its tasks run on threads of this process, or as calls of an `executor`, whose workers may be other machines.
    """
    import torch  # noqa: F401  # before the clock starts: seconds are those of the work

    started = time.monotonic()
    if plan.single and plan.repacked is None:  # its receipt is in the header, before the digests are known
        blank = Written(_BLANK, _BLANK, 0.0) if plan.digests else Written("", "", 0.0)
        placeholder = _receipt(plan, {tensor.name: blank for tensor in plan.changes})
        plan = replace(plan, files=(_with_receipt(plan.files[0], placeholder),))
    recorded = False
    had_record = plan.undo is not None and plan.undo.exists()
    try:
        with ExitStack() as stack:
            if plan.undo is not None:
                stack.enter_context(given_back(plan.undo))
            kept = stack.enter_context(kept_files(plan)) if plan.resume else {}
            folder = stack.enter_context(_output(plan))
            if plan.undo is None:
                done, written = _fill(plan, folder, progress, kept, None, executor)
            else:
                # The record appears first: there is never a merge that promised one and has none.
                with undo.writing(plan.undo, plan.force) as (writer, record):
                    done, written = _fill(plan, folder, progress, kept, writer, executor)
                    writer.finish(record, done)
                recorded = True
    except BaseException:
        if recorded and plan.undo is not None and not had_record:
            plan.undo.unlink(missing_ok=True)
        raise
    survival = {name: found.survival for name, found in written.items() if found.survival.asked}
    unchanged = tuple(name for name, found in written.items() if not found.changed)
    return MergeReport(plan, done, time.monotonic() - started, survival, unchanged)


def _fill(
    plan: Plan,
    folder: Path,
    progress: ProgressCallback | None,
    kept: Mapping[str, Kept],
    writer: UndoWriter | None,
    executor: Executor | None,
) -> tuple[Receipt, dict[str, Written]]:
    """Write the weights files of a merge and its receipt; also what is known of each computed tensor."""
    written = _write(plan, folder, progress, writer, kept, executor)
    if not plan.allow_unchanged and not any(found.changed for found in written.values()):
        what = "nothing would change: every element rounds back to what it was"
        hint = "a wider --dtype keeps more of the change; --allow-unchanged writes it all the same"
        raise Mismatch(Problem("E-NO-CHANGE", what, str(plan.source), hint))
    done = _receipt(plan, written)
    if plan.repacked is not None:
        _finish_archive(plan, folder, done if plan.single else None)
    if plan.single and plan.repacked is None:
        header = _with_receipt(plan.files[0], done).header
        assert len(header) == len(plan.files[0].header), "digests have one length"
        with (folder / plan.files[0].name).open("r+b") as file:
            file.write(header)
    elif not plan.single:
        (folder / receipt.FILE_NAME).write_text(done.dumps(), encoding="utf-8")
    return done, written


def run_unmerge(plan: Plan, progress: ProgressCallback | None = None) -> UnmergeReport:
    """Write the output of an unmerge plan, and compare it with the base's digests in the receipt."""
    import torch  # noqa: F401  # before the clock starts

    assert plan.receipt is not None
    started = time.monotonic()
    known = plan.receipt.tensors
    with _output(plan) as folder:
        written = _write(plan, folder, progress)
        wrong = {name: found.bound for name, found in written.items() if found.after != known[name].base}
        if plan.exact and any(known[name].base for name in wrong):
            raise Mismatch([*_blamed(plan, wrong)])
        if plan.repacked is not None:
            _finish_archive(plan, folder, plan.previous if plan.single else None)
        if plan.previous is not None and not plan.single:
            (folder / receipt.FILE_NAME).write_text(plan.previous.dumps(), encoding="utf-8")
    seconds = time.monotonic() - started
    return UnmergeReport(plan, len(written) - len(wrong), len(written), max(wrong.values(), default=0.0), seconds)


def _finish_archive(plan: Plan, folder: Path, known: Receipt | None) -> None:
    """Close a pickle that was written again, with a receipt in it."""
    assert plan.repacked is not None
    text = None if known is None else known.dumps().encode("utf-8")
    plan.repacked.archive.finish(folder / plan.repacked.file.name, plan.repacked.storages, text)


def _blamed(plan: Plan, wrong: Iterable[str]) -> Iterator[Problem]:
    """Why some tensors of an exact unmerge did not come out as the base's."""
    assert plan.receipt is not None
    sources = {tensor.name: tensor.source for tensor in plan.changes}
    for name in wrong:
        source = sources[name]
        if plan.record and source is not None and source.digest() != plan.receipt.tensors[name].merged:
            yield changed_since(name, plan.source)
        else:
            what = f"{name} came out with other bytes than the base's"
            hint = "the undo record is damaged: use --base" if plan.record else "the base changed while it was read"
            yield Problem("E-NOT-EXACT", what, str(plan.out), hint)


_BLANK = "blake3:" + "0" * 64


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
            targets=tuple(dict.fromkeys(item.target.name for item, _ in tensor.updates)),
        )
    dropped = {ref.name: ref.digest() if plan.digests else "" for ref in plan.dropped}
    return Receipt(TOOL, plan.dtype, plan.adapters, tensors, dropped, plan.companions.replaced, plan.previous)


def run_copy(plan: Plan, progress: ProgressCallback | None = None) -> None:
    """Write the output of a plan that changes no tensor: a clean base out of a wrapped checkpoint."""
    with _output(plan) as folder:
        _write(plan, folder, progress)


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _output(plan: Plan) -> Iterator[Path]:
    """The folder to write weights files into; what is in it is at `plan.out` when the block ends well."""
    with staged(plan.out, plan.force) as place:
        if plan.single:
            yield place.parent  # the one file is written under the output's own name
        else:
            place.mkdir()
            for name in plan.companions.names:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                origin = plan.companions.origin(name, plan.source)
                if origin is None:
                    (place / name).write_bytes(plan.companions.written[name])
                else:
                    _copy_companion(origin, place / name)
            if plan.index is not None:
                (place / plan.index[0]).write_bytes(plan.index[1])
            yield place


def _copy_companion(path: Path, place: Path) -> None:
    with open_to_read(path) as source, place.open("wb") as copy:
        while True:
            with reading(path):
                piece = source.read(CHUNK)
            if not piece:
                return
            copy.write(piece)


def _write(
    plan: Plan,
    folder: Path,
    progress: ProgressCallback | None,
    writer: UndoWriter | None = None,
    kept: Mapping[str, Kept] | None = None,
    executor: Executor | None = None,
) -> dict[str, Written]:
    """Write the weights files of a plan; return what is known of each computed tensor, by name."""
    journal = Journal((folder if plan.single else folder.parent) / resume.FILE_NAME, plan)
    meter = Meter(plan.nbytes, progress)
    tasks: list[tuple[str, Copy | Change]] = []
    for file in plan.files:
        path = folder / file.name
        path.parent.mkdir(exist_ok=True)  # a component's folder
        if kept and file.name in kept:
            kept[file.name].path.rename(path)
            journal.file_done(file.name, kept[file.name].written)
            meter.step(file.size, file.name)
            continue
        if plan.link and file.same_as is not None and _linked(file.same_as, path):
            meter.step(file.size, file.name)
            continue
        with path.open("wb", buffering=0) as out:
            out.truncate(file.size)
            write_all(out, memoryview(file.header))
        meter.step(len(file.header), file.name)
        tasks += [(file.name, task) for task in file.tasks]
    settings = Settings(plan.digests, not plan.exact, plan.reproducible, plan.device, writer is not None, plan.record)
    if executor is None:
        _on_threads(plan.threads, folder, tasks, settings, meter, writer, journal)
    else:
        site = Site.of(folder, journal, plan.device, plan.inputs)
        dispatch.run(executor, site, tasks, settings, meter, writer, journal)
    for known in plan.inputs:
        known.check()
    found = {name: written for file in journal.found.values() for name, written in file.items()}
    return {tensor.name: found[tensor.name] for tensor in plan.changes}


def _on_threads(
    count: int,
    folder: Path,
    tasks: Sequence[tuple[str, Copy | Change]],
    settings: Settings,
    meter: Meter,
    writer: UndoWriter | None,
    journal: Journal,
) -> None:
    """Run tasks, each with the name of its file, on threads of this process."""
    queue, requantiser = _Queue(tasks), Requantiser()
    with _Flusher() as flusher, workers(count) as pool:

        def work() -> None:
            while (taken := queue.take()) is not None:
                name, task = taken
                try:
                    _run(folder / name, name, task, settings, meter, writer, journal, requantiser)
                    flusher.wrote(folder / name, task.nbytes)
                finally:
                    queue.done(name)

        try:
            for _ in each_done(pool, [work] * count):
                pass
        finally:
            queue.drain()  # a pool does not know, and wait for, a worker that a signal interrupted it in starting


def _linked(source: Path, path: Path) -> bool:
    """Make a hard link to a whole untouched file, and to the file itself where a hub cache has a symlink."""
    try:
        os.link(source.resolve(), path)
    except OSError:
        return False  # another file system, or one without hard links: it is copied
    return True


class _Queue:
    """Hands out tasks to workers: of the file that the fewest of them write to, since a file has one lock for all."""

    def __init__(self, tasks: Sequence[tuple[str, Copy | Change]]) -> None:
        self.changed = threading.Condition()
        self.left: dict[str, deque[Copy | Change]] = {}
        for name, task in tasks:
            self.left.setdefault(name, deque()).append(task)
        self.writers = dict.fromkeys(self.left, 0)

    def take(self) -> tuple[str, Copy | Change] | None:
        """The next task and its file, which `done` is told afterwards; None if nothing is left."""
        with self.changed:
            if not self.left:
                return None
            name = min(self.left, key=self.writers.__getitem__)  # the first of equals, to finish it for --resume
            task = self.left[name].popleft()
            if not self.left[name]:
                del self.left[name]
            self.writers[name] += 1
            return name, task

    def done(self, name: str) -> None:
        with self.changed:
            self.writers[name] -= 1
            self.changed.notify_all()

    def drain(self) -> None:
        """Hand out nothing more, and wait until nobody writes any more."""
        with self.changed:
            self.left.clear()
            self.changed.wait_for(lambda: not any(self.writers.values()))


class _Flusher:
    """Sends what is written to the disk while the rest is computed, so that little is left to wait for at the end."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.lock = threading.Lock()
        self.dirty: dict[Path, int] = {}
        self.flushes: list[Future[None]] = []

    def wrote(self, path: Path, nbytes: int) -> None:
        with self.lock:
            self.dirty[path] = self.dirty.get(path, 0) + nbytes
            if self.dirty[path] >= FLUSH_BYTES:
                self.dirty[path] = 0
                self.flushes.append(self.pool.submit(flush, path))

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, *failure: object) -> None:
        self.pool.shutdown(cancel_futures=any(failure))
        for done in self.flushes if not any(failure) else ():
            done.result()  # an error of the disk is told once, here


def _run(
    path: Path,
    name: str,
    task: Copy | Change,
    settings: Settings,
    meter: Meter,
    writer: UndoWriter | None,
    journal: Journal,
    requantiser: Requantiser,
) -> None:
    """One task of a plan, in a worker of our own."""
    with path.open("r+b", buffering=0) as out:
        written, recorder = run_task(task, out, lambda nbytes: meter.step(nbytes, name), settings, requantiser)
    if isinstance(task, Copy) or written is None:
        journal.task_done(name, {})
        return
    if writer is not None and recorder is not None:
        writer.add(task.tensor.name, recorder)
    journal.task_done(name, {task.tensor.name: written})

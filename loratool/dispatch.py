"""Handing the tasks of a plan to an executor: any of `concurrent.futures`, with workers here or on other machines.

Small tasks of one file go together, long copies in pieces; only so many are on their way at a time. It is the
executor's business to redo what is lost with a worker: every call may be run again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from loratool.errors import OutputRefused, Problem
from loratool.layout import Change, Copy
from loratool.remote import INSTALL, Report, Seen, Site, factors, lies_in_files, look, perform, sources
from loratool.resume import Journal
from loratool.tasks import Settings
from loratool.tensors import FileSpan
from loratool.undo import UndoWriter
from loratool.undoing import Written
from loratool.workers import Meter

BUNDLE = 64 << 20  # bytes that a call writes, if its tasks allow it: it takes longer than sending it
FILES_AT_ONCE = 8  # a file has one lock for all its writers; finished files are what --resume can keep
IN_FLIGHT = 512  # calls that are sent and not done
CARRIED = 256 << 20  # bytes of them
GRACE = 30  # seconds to wait for what runs, after an error


class Bundle(NamedTuple):
    """Tasks of one file that are one call. `stays` is whether they can only be run here: a base in memory."""

    name: str
    tasks: tuple[Copy | Change, ...]
    stays: bool = False

    @property
    def nbytes(self) -> int:
        return sum(task.nbytes for task in self.tasks)


def run(
    executor: Executor,
    site: Site,
    tasks: Sequence[tuple[str, Copy | Change]],
    settings: Settings,
    meter: Meter,
    writer: UndoWriter | None,
    journal: Journal,
) -> None:
    """Run tasks, each with the name of its file, as calls of an executor.

    Raises what a task raises, and OutputRefused (E-WORKER) for workers that do not see the same files, have another
    release, or are lost. After an error nothing is left running that could change the output.
    """
    _check_workers(executor, site)
    waiting: dict[Future[Report], tuple[Bundle, int]] = {}
    bundles = [*_spread(tasks)]
    left, known = Counter(bundle.name for bundle in bundles), defaultdict[str, dict[str, Written]](dict)

    def collect() -> None:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            report = _result(future)
            bundle, _ = waiting.pop(future)
            if report.error is not None:
                raise report.error
            for name, recorded in report.undo.items():
                if writer is not None:
                    writer.add(name, recorded.recorder())
            known[bundle.name].update(report.written)
            left[bundle.name] -= 1
            if not left[bundle.name]:
                journal.file_done(bundle.name, known[bundle.name])
            meter.step(bundle.nbytes, bundle.name)

    with ThreadPoolExecutor(1) as here:
        try:
            for bundle in bundles:
                if bundle.stays:
                    waiting[here.submit(_stay, site, bundle, settings)] = bundle, 0
                    continue
                tool, raw = site.call(bundle.name, bundle.tasks, settings)
                while waiting and (len(waiting) >= IN_FLIGHT or sum(n for _, n in waiting.values()) > CARRIED):
                    collect()
                waiting[_submit(executor, perform, tool, raw)] = bundle, len(raw)
            while waiting:
                collect()
        except BaseException:
            running = [future for future in waiting if not future.cancel()]
            wait(running, timeout=GRACE)
            raise


def _stay(site: Site, bundle: Bundle, settings: Settings) -> Report:
    return perform(*site.call(bundle.name, bundle.tasks, settings))


# --- the executor ----------------------------------------------------------------------------------------------------


def _submit(executor: Executor, function: Any, *arguments: object) -> Future[Any]:
    try:
        return executor.submit(function, *arguments)
    except Exception as error:  # broken, shut down, not connected: each has its own
        raise _lost(error) from error


def _result(future: Future[Any]) -> Any:
    """What a call has returned. It does not raise, so what is raised comes from the executor."""
    try:
        return future.result()
    except Exception as error:
        raise _lost(error) from error


def _lost(error: Exception) -> OutputRefused:
    said = " ".join(str(error).split()) or "a call was cancelled"
    what = f"the executor gave up: {type(error).__name__}: {said:.400}"
    hint = "see the workers' logs: have they the memory (--dry-run)? have they, and the scheduler, the same releases?"
    return OutputRefused(Problem("E-WORKER", what, hint=hint))


def _check_workers(executor: Executor, site: Site) -> None:
    """Ask every worker, or where the executor can not tell them apart one, whether it could do the work."""
    client = getattr(executor, "_client", None)  # Dask's executor has no public way to it
    if client is None:
        answers = {"": _result(_submit(executor, look, *site.packed()))}
    else:
        try:
            answers = client.run(look, *site.packed(), on_error="return")
        except Exception as error:
            raise _lost(error) from error
        if not answers:
            raise OutputRefused(Problem("E-WORKER", "the cluster has no workers", hint="start some, `dask worker`"))
    problems: dict[tuple[str, str], list[str]] = defaultdict(list)
    for address, answer in answers.items():
        seen = answer if isinstance(answer, Seen) else Seen("", ((f"fails: {answer}", INSTALL),))
        for wrong in seen.wrong:
            problems[wrong].append(" on ".join(filter(None, (address, seen.host))))
    if problems:
        raise OutputRefused(
            Problem("E-WORKER", f"a worker {what}", ", ".join(places[:4]) + (", ..." if places[4:] else ""), hint)
            for (what, hint), places in problems.items()
        )


# --- tasks as calls --------------------------------------------------------------------------------------------------


def _spread(tasks: Sequence[tuple[str, Copy | Change]]) -> Iterator[Bundle]:
    """All tasks in bundles, those of a few files in turns."""
    files: dict[str, list[Copy | Change]] = defaultdict(list)
    for name, task in tasks:
        files[name].append(task)
    names = [*files]
    for first in range(0, len(names), FILES_AT_ONCE):
        turns = zip_longest(*(bundles(name, files[name]) for name in names[first : first + FILES_AT_ONCE]))
        yield from (bundle for bundle in chain.from_iterable(turns) if bundle is not None)


def bundles(name: str, tasks: Sequence[Copy | Change]) -> Iterator[Bundle]:
    """The tasks of one file in bundles of about `BUNDLE` bytes; a tensor is never cut, and so may be a larger one."""
    held: list[Copy | Change] = []
    size = 0
    for unit in _units(tasks):
        if not all(lies_in_files(ref) for task in unit for ref in sources(task)):
            yield Bundle(name, unit, stays=True)
            continue
        held += unit
        # What is sent costs more than what is written by a worker.
        sent = sum(ref.nbytes for task in unit for ref in factors(task) if not lies_in_files(ref))
        size += sum(task.nbytes for task in unit) + 8 * sent
        if size >= BUNDLE:
            yield Bundle(name, tuple(held))
            held, size = [], 0
    if held:
        yield Bundle(name, tuple(held))


def _units(tasks: Sequence[Copy | Change]) -> Iterator[tuple[Copy | Change, ...]]:
    """What must not be in two calls: the scales and the codes of a weight, which are computed together."""
    parts: dict[str, list[Copy | Change]] = defaultdict(list)
    for task in tasks:
        if isinstance(task, Change) and task.tensor.part and task.tensor.source is not None:
            parts[task.tensor.source.name].append(task)
    for task in tasks:
        if isinstance(task, Copy):
            yield from ((piece,) for piece in _pieces(task))
        elif not task.tensor.part or task.tensor.source is None:
            yield (task,)
        elif pair := parts.pop(task.tensor.source.name, ()):
            yield tuple(pair)


def _pieces(task: Copy) -> Iterator[Copy]:
    """A copy of much in several."""
    source, data = task.source, task.source.data
    if not isinstance(data, FileSpan) or source.dtype != "U8" or source.views:
        yield task
        return
    for start in range(0, source.nbytes, BUNDLE):
        piece = source.narrow(0, start, min(BUNDLE, source.nbytes - start))
        yield Copy(piece, task.offset + start)

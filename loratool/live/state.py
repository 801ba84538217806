"""What is known of a live model: the adapters in it, in their order, and the parameters that they changed.

Every change, there, back or across, is one thing: from the adapters that shall be in the model follows what each
parameter is to hold, and parameters that hold something else are rewritten, several at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.checkpoint import open_checkpoint
from loratool.errors import Mismatch, Problem
from loratool.live.bound import Entry, Request, bound, in_file
from loratool.live.model import Model, addresses, distributed, read
from loratool.live.parameter import How, Parameter, Updates
from loratool.live.shards import all_agree
from loratool.survival import Survival, loss
from loratool.workers import WORKERS, workers

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LiveReport:
    """What a change of a live model came to.

    `changed` counts the parameters that were rewritten. `survival` says, of each of them that holds adapters now, how
    much of their change is left after rounding. `undo_bytes` and `factor_bytes` are what is held in memory, for all
    adapters of the model together: for the original bits, and of the adapters.
    """

    changed: int
    survival: Mapping[str, Survival]
    undo_bytes: int
    factor_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Job:
    """A parameter to rewrite, and what it takes to have it back."""

    parameter: Parameter
    how: How
    before: How


@dataclass(eq=False)
class State:
    """The adapters of one model. It does not hold the model itself, which is free to go."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    entries: tuple[Entry, ...] = ()
    parameters: dict[str, Parameter] = field(default_factory=dict)  # that hold adapters, by clean names
    undo: str | Path = "compressed"
    reproducible: bool = False

    def change(
        self,
        model: nn.Module,
        entries: Sequence[Entry | Request],
        undo: str | Path | None = None,
        reproducible: bool | None = None,
        others: Sequence[tuple[nn.Module, State]] = (),
    ) -> LiveReport:
        """Make the model hold these adapters, one of which may be new; or leave it, and raise why not.

        `undo` and `reproducible` are as before where they are None. What another of the models changed is refused.
        """
        started = time.monotonic()
        spread = distributed(model)
        # Pieces are computed in other blocks than the whole: only correct rounding gives them the same bits.
        exactly = (self.reproducible if reproducible is None else reproducible) or bool(spread)
        kind = self.undo if undo is None else undo
        before = (self.entries, self.undo, self.reproducible)
        jobs: list[Job] = []
        asked = False  # whether the other processes know how it went here
        try:
            seen = self._seen(model)
            active, notes = bound(seen, entries, kind)
            jobs += self._jobs(seen, active, undo, exactly, others)
            found = _run(jobs)
            asked = True
            if not all_agree(spread, True):
                what = "another process that has a part of the model could not change it"
                raise Mismatch(Problem("E-INTERRUPTED", what, type(model).__name__, "see what that process reports"))
            for job in jobs:
                self.parameters[job.parameter.spot.name] = job.parameter
            self.entries, self.undo, self.reproducible = active, kind, exactly
        except BaseException:
            try:
                self.entries, self.undo, self.reproducible = before
                self._take_back(jobs)
            finally:
                if not asked:
                    all_agree(spread, False)
            raise
        finally:
            self.parameters = {name: each.at_rest() for name, each in self.parameters.items() if each.updates != ()}
        survival = {job.parameter.spot.name: each for job, each in zip(jobs, found, strict=True)
                    if job.how.updates}  # fmt: skip
        notes = (*notes, *loss(survival, "after rounding", "a model in float32 keeps all of it"))
        return LiveReport(len(jobs), survival, self.undo_bytes, self.factor_bytes, time.monotonic() - started, notes)

    @property
    def undo_bytes(self) -> int:
        return sum(parameter.undo_bytes for parameter in self.parameters.values())

    @property
    def factor_bytes(self) -> int:
        refs = [ref for entry in self.entries for item in entry.part.adapter.updates
                for ref in item.update.components().values()]  # fmt: skip
        return sum(ref.nbytes for ref in refs)

    def _seen(self, model: nn.Module) -> Model:
        """The model as it is now. Raises Mismatch where something else has changed what adapters changed."""
        seen = read(model, self.parameters)
        problems = []
        for name, parameter in self.parameters.items():
            if name not in seen.spots:
                what = f"{name} is not in the model any more, and an adapter was applied to it"
                problems.append(Problem("E-CHANGED", what, name, "`forget()` the original"))
            elif why := parameter.moved_to(seen.spots[name]):
                problems.append(why)
        if problems:
            raise Mismatch(problems)
        return seen

    # --- what each parameter is to hold ------------------------------------------------------------------------------

    def _jobs(
        self,
        seen: Model,
        active: Sequence[Entry],
        undo: str | Path | None,
        exactly: bool,
        others: Sequence[tuple[nn.Module, State]],
    ) -> list[Job]:
        """The parameters that do not hold what they are to hold."""
        names = dict.fromkeys([*self.parameters, *(name for entry in active for name in entry.updates)])
        kind = self.undo if undo is None else undo
        base = open_checkpoint(kind) if isinstance(kind, Path) else None
        jobs, problems = [], []
        for name in names:
            parameter = self.parameters.get(name) or Parameter(seen.spots[name])
            how = replace(parameter.how, updates=_of(active, name), reproducible=exactly)
            if parameter.updates is not None and _same(parameter.how, how):
                continue
            if how.updates and (undo is not None or not parameter.records):
                stored = kind if base is None else in_file(name, parameter, base)
                if isinstance(stored, Problem):
                    problems.append(stored)
                    continue
                assert not isinstance(stored, Path), "a path was opened"
                how = replace(how, undo=stored)
            if any(other.has(parameter, owner) for owner, other in others):
                what = f"{name} was changed through another module that has it too"
                problems.append(Problem("E-OVERLAP", what, name, "apply all adapters to one module, or remove first"))
            jobs.append(Job(parameter, how, replace(parameter.how, updates=_of(self.entries, name))))
        if problems:
            raise Mismatch(problems)
        return jobs

    def has(self, parameter: Parameter, model: nn.Module) -> bool:
        """Whether a parameter of another model is one that adapters changed here, in `model`, and that it still has.

        Memory that a model was moved out of is soon another's.
        """
        address = parameter.spot.values.data_ptr()
        known = parameter.spot.values.numel() > 0 and address in [each.address for each in [*self.parameters.values()]]
        return known and address in addresses(model)

    def _take_back(self, jobs: Sequence[Job]) -> None:
        """Give every parameter the bits it had before the call. What stops this does not stop the next change."""
        for job in jobs:
            if job.parameter.records:  # an original, however far the job came
                self.parameters[job.parameter.spot.name] = job.parameter
        _run([replace(job, how=job.before) for job in jobs
              if job.parameter.updates is None or not _same(job.parameter.how, job.before)])  # fmt: skip


def _of(entries: Sequence[Entry], name: str) -> Updates:
    return tuple(weighted for entry in entries for weighted in entry.updates.get(name, ()))


def _same(one: How, other: How) -> bool:
    """Whether a parameter comes to the same bits."""
    if len(one.updates) != len(other.updates) or (one.updates and one.reproducible != other.reproducible):
        return False
    return all(a is b for a, b in zip(one.updates, other.updates, strict=True))


# --- work ------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Another parameter's job has failed."""


def _run(jobs: Sequence[Job]) -> list[Survival]:
    """Rewrite parameters, several at a time, each on one thread as a merge does. Raises the first error, if any."""
    if not jobs:
        return []
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    _settle(jobs)
    pool = workers(min(WORKERS, len(jobs)))
    work: list[Callable[[], Survival]] = [partial(job.parameter.rewrite, job.how, check) for job in jobs]
    futures = [pool.submit(each) for each in work]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        if not all(future.done() and future.exception() is None for future in futures):
            stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        _settle(jobs)
    failed = [future.exception() for future in futures if not future.cancelled()]
    for error in failed:
        if error is not None and not isinstance(error, Stopped):
            raise error
    return [future.result() for future in futures]


def _settle(jobs: Sequence[Job]) -> None:
    """Wait for GPUs: each worker has a stream of its own, and so has who uses the model."""
    import torch

    for device in {job.parameter.spot.values.device for job in jobs}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

"""Is this the base with these adapters merged in? Every tensor is compared with the correctly rounded result.

Base, adapters and merged checkpoint are streamed; none is held. A merge by another tool is as good as one by loratool:
an element may be the neighbour of the right one (torch's float32 arithmetic leaves some there), or as far from the
exact result as float32 can be.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from loratool import diagnosis, maps
from loratool.adapter import Adapter
from loratool.blocks import Merged, each_block, float32_error, row_count
from loratool.changes import Fitted, fitted
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.conventions.choices import Choices
from loratool.diagnosis import Reason
from loratool.errors import ChoiceNeeded, Mismatch, Problem
from loratool.layout import NewTensor, Weighted
from loratool.quantised import logical
from loratool.requantise import Requantiser
from loratool.survival import Survival, loss, survival_json, survival_of
from loratool.tensors import DTYPE_BITS, MERGEABLE, FileSpan, FileState, TensorRef, torch_dtype
from loratool.workers import WORKERS, Meter, ProgressCallback, workers

if TYPE_CHECKING:
    import torch

ULPS = 1  # the largest accepted distance, in units of the last place
OFTEN = 0.01  # of 16-bit elements next to the right one: more than float32 arithmetic leaves
ROUNDED_DELTA = 2.0**-8  # how far a delta is off, relatively, that was rounded to bfloat16, and again when scaled
SHOWN = 3  # names in a sentence


@dataclass(frozen=True)
class TensorCheck:
    """One tensor that the adapters change. `ulps` is the largest distance from the correctly rounded result, in units
    of the last place; `differing` counts elements that are not it, `wrong` those too far from it to be a rounding."""

    name: str
    dtype: str
    elements: int
    ulps: float
    differing: int
    wrong: int
    survival: Survival
    reason: Reason | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor": self.name,
            "dtype": self.dtype,
            "elements": self.elements,
            "ulps": None if self.ulps == float("inf") else self.ulps,
            "differing": self.differing,
            "wrong": self.wrong,
            "reason": None if self.reason is None else self.reason.word,
            "factors": [] if self.reason is None else [round(factor, 6) for factor in self.reason.factors],
        }


@dataclass(frozen=True)
class Finding:
    """One reason for a no, and the tensors it is about."""

    word: str
    text: str
    tensors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.word, "text": self.text, "tensors": list(self.tensors)}


@dataclass(frozen=True)
class VerifyReport:
    """The answer, and what it rests on. With a `sample`, only that share of each tensor was looked at."""

    merged: Path
    base: Path
    adapters: tuple[str, ...]
    tensors: tuple[TensorCheck, ...]
    untouched: int  # tensors that no adapter changes, byte-equal to the base's
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    sample: float | None
    seconds: float

    @property
    def answer(self) -> bool:
        return not self.findings

    @property
    def ulps(self) -> float:
        return max((check.ulps for check in self.tensors), default=0)

    @property
    def counts(self) -> tuple[int, int]:
        """Elements that are not the correctly rounded ones, of those that the adapters change."""
        return sum(check.differing for check in self.tensors), sum(check.elements for check in self.tensors)

    @property
    def survival(self) -> Mapping[str, Survival]:
        return {check.name: check.survival for check in self.tensors if check.survival.asked}

    def to_json(self) -> dict[str, Any]:
        return {
            "merged": str(self.merged),
            "base": str(self.base),
            "adapters": list(self.adapters),
            "answer": self.answer,
            "sample": self.sample,
            "ulps": None if self.ulps == float("inf") else self.ulps,
            "differing": self.counts[0],
            "elements": self.counts[1],
            "untouched": self.untouched,
            "findings": [finding.to_json() for finding in self.findings],
            "tensors": [check.to_json() for check in self.tensors],
            "survival": survival_json(self.survival),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def run_verify(
    merged_path: Path,
    base_path: Path,
    adapters: Sequence[tuple[Path | Adapter, float]],
    choices: Choices,
    *,
    ulps: int = ULPS,
    sample: float | None = None,
    rounded_delta: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Compare `merged` with base + adapters; see `loratool.verify`."""
    import torch  # noqa: F401  # before the clock starts

    if sample is not None and not 0 < sample <= 1:
        raise ChoiceNeeded(Problem("E-OPTION", f"a sample of {sample:g} is no share of the whole"))
    started = time.monotonic()
    fit = fitted(base_path, adapters, "keep", choices, allow_new=True)
    if fit.problems:
        raise Mismatch(fit.problems)
    merged = _Merged(logical(open_checkpoint(merged_path)), choices)
    work = _Work(fit, merged, ulps, sample or 1.0, rounded_delta)
    jobs = [*work.jobs()]
    meter = Meter(sum(job.nbytes for job in jobs), progress)
    checks: list[TensorCheck] = []
    same, other = 0, []
    with workers(threads or WORKERS) as pool:
        running = {pool.submit(work.look, job): job for job in jobs}
        for done in as_completed(running):
            job, found = running[done], done.result()
            meter.step(job.nbytes, job.name)
            if isinstance(found, TensorCheck):
                checks.append(found)
            elif found:
                same += 1
            else:
                other.append(job.name)
    for known in work.inputs():
        known.check()
    order = {job.name: n for n, job in enumerate(jobs)}
    checks.sort(key=lambda check: order[check.name])
    findings = (*work.findings, *_findings(checks, sorted(other, key=order.__getitem__), len(jobs)))
    notes = [*fit.notes, *merged.notes, *_rounding_notes(checks)]
    if not findings:
        survival = {check.name: check.survival for check in checks if check.survival.asked}
        notes += loss(survival, "in this dtype", "a wider one keeps all of it")
    names = tuple(f"{adapter.name}@{adapter.weight:g}" for adapter in fit.merged)
    seconds = time.monotonic() - started
    return VerifyReport(merged_path, base_path, names, tuple(checks), same, findings, tuple(notes), sample, seconds)


def _rounding_notes(checks: Sequence[TensorCheck]) -> Iterator[str]:
    """What is accepted, and not the best there is."""
    accepted = [check for check in checks if check.reason is not None and not check.wrong]
    for text in dict.fromkeys(check.reason.text for check in accepted if check.reason):
        names = [check.name for check in accepted if check.reason and check.reason.text == text]
        yield f"{_named(names)}: {text}"


def _findings(checks: Sequence[TensorCheck], other: Sequence[str], count: int) -> Iterator[Finding]:
    """The reasons of all tensors, those of one kind together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        if check.wrong and check.reason is not None:
            groups.setdefault((check.reason.word, check.reason.text), []).append(check.name)
    unexplained = [name for (word, _), names in groups.items() if word.startswith("other-") for name in names]
    if other and len(other) * 2 > count - len(checks):
        yield Finding("other-base", "no adapter changes them, and most are not the base's: another base", tuple(other))
        groups = {key: names for key, names in groups.items() if not key[0].startswith("other-")}
    elif other:
        yield Finding("untouched", "no adapter changes them, and they are not the base's", tuple(other))
    elif unexplained and len(unexplained) == len(checks):
        what = "no tensor is what this base and these adapters give: another base, or other adapters as well"
        yield Finding("other-base", what, tuple(unexplained))
        groups = {}
    for (word, text), names in groups.items():
        yield Finding(word, text, tuple(names))


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


# -- the merged checkpoint, by the base's names ------------------------------------------------------------------------


class _Merged:
    """Finds the base's tensors in a merged checkpoint, where its names, its packing or its ties may be others."""

    def __init__(self, checkpoint: Checkpoint, choices: Choices) -> None:
        self.checkpoint = checkpoint
        self.stored = dict(_stored(checkpoint))
        self.view = maps.View(checkpoint.tensors, choices.maps or maps.shipped())
        self.used: set[str] = set()
        self.led = 0

    def find(self, name: str) -> TensorRef | None:
        tensors, ties = self.checkpoint.tensors, self.checkpoint.ties
        for known in (name, ties.get(name, "")):
            found = self.stored.get(known) or tensors.get(known)
            if found is not None:
                self.used.add(known)
                return found
        if name in self.view.places:
            self.led += 1
            return self.view.tensors.get(name)
        return None

    def extra(self) -> list[str]:
        """Tensors that nobody has asked for."""
        return [] if self.led else sorted(self.stored.keys() - self.used - self.checkpoint.ties.keys())

    @property
    def notes(self) -> list[str]:
        return [f"{self.led} tensors of the base are named or packed differently in it"] if self.led else []


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    """Every tensor of the files, by the name that it has in a receipt."""
    if not checkpoint.components:
        yield from ((name, ref) for shard in checkpoint.shards for name, ref in shard.tensors.items())
    for component, part in checkpoint.components.items():
        yield from ((f"{component}.{name}", ref) for name, ref in _stored(part))


# -- one tensor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One tensor to look at: what it is to be, and what is there."""

    wanted: NewTensor
    found: TensorRef

    @property
    def name(self) -> str:
        return self.wanted.name

    @property
    def nbytes(self) -> int:
        return self.found.nbytes


@dataclass
class _Work:
    fit: Fitted
    merged: _Merged
    ulps: int
    share: float
    rounded_delta: bool
    findings: list[Finding] = field(default_factory=list)
    requantiser: Requantiser = field(default_factory=Requantiser)

    def jobs(self) -> Iterator[_Job]:
        """Every tensor of the result; those that are not there, or that should not be, become findings."""
        absent, others = [], []
        for wanted in self._wanted():
            found = self.merged.find(wanted.name) or self._tied(wanted.name)
            if found is None:
                absent.append(wanted.name)
            elif found.shape != wanted.shape or not _comparable(found.dtype, wanted):
                others.append(f"{wanted.name} ({found.dtype} {list(found.shape)})")
            else:
                yield _Job(replace(wanted, dtype=found.dtype), found)
        if absent:
            self.findings.append(Finding("absent", "the merged checkpoint does not have them", tuple(absent)))
        if others:
            self.findings.append(Finding("shape", "they have another shape or kind of numbers", tuple(others)))
        if extra := self.merged.extra():
            self.findings.append(Finding("extra", "neither the base nor an adapter has them", tuple(extra)))

    def _wanted(self) -> Iterator[NewTensor]:
        """What the merge makes of every tensor of the base, and those it adds."""
        for name, stored in _stored(self.fit.base):
            yield self.fit.changes.get(name) or NewTensor(name, stored, stored.dtype, stored.shape)
        yield from self.fit.additions

    def _tied(self, name: str) -> TensorRef | None:
        """The tensor that has the same bytes in the base, and was kept where a tool kept one of them."""
        ties = self.fit.base.ties
        others = [ties.get(name), *(other for other, kept in ties.items() if kept == name)]
        return next((found for other in others if other and (found := self.merged.find(other))), None)

    def inputs(self) -> set[FileState]:
        refs = [*self.merged.stored.values(), *(ref for _, ref in _stored(self.fit.base))]
        return {ref.data.state for ref in refs if ref.data.state is not None}

    def look(self, job: _Job) -> TensorCheck | bool:
        """What became of a tensor; of one that nothing changes, whether it is the base's."""
        wanted, source = job.wanted, job.wanted.source
        if wanted.part:
            return self._requantised(job)
        if not wanted.updates and source is not None and source.dtype == job.found.dtype:
            return self._equal(source, job.found)
        found = self._compared(job)
        return found if wanted.updates else not found.differing

    def _equal(self, one: TensorRef, other: TensorRef) -> bool:
        if self.share < 1 and one.shape:
            start, stop = _sampled(one.name, one.shape[0], self.share)
            one, other = (ref.narrow(0, start, stop - start) for ref in (one, other))
        return one.digest() == other.digest()

    def _requantised(self, job: _Job) -> TensorCheck:
        """Compare codes or scales with those that a merge by loratool would write."""
        rows = _matrix(job.found, job.found.shape[-1] if job.found.shape else 1)
        sink = _Comparing(rows, self.ulps)
        self.requantiser.write(job.wanted, cast(BinaryIO, sink), lambda nbytes: None, digests=False)
        reason = Reason("requantised", "its codes or scales are not those of this merge") if sink.wrong else None
        return TensorCheck(
            job.name, job.found.dtype, job.found.numel, sink.furthest, sink.differing, sink.wrong, Survival(), reason
        )

    def _compared(self, job: _Job) -> TensorCheck:
        """Compare a tensor with the correctly rounded result, block by block; find out why it is another one."""
        wanted, survival = job.wanted, Survival()
        sink: _Comparing | None = None
        bad: list[tuple[int, int]] = []

        def receive(block: Merged) -> None:
            nonlocal sink, survival
            sink = sink or _Comparing(_matrix(job.found, block.values.shape[1]), self.ulps)
            there = sink.rows.narrow(0, block.start, block.stop - block.start).read()
            error = float32_error(block)
            if self.rounded_delta and block.exact is not None and wanted.source is not None:
                error = error + (block.exact - block.stored.to(block.exact.dtype)).abs().double() * ROUNDED_DELTA
            if sink.compare(block.values, there, error):
                bad.append((block.start, block.stop))
            if block.exact is not None and wanted.source is not None:
                survival = survival.plus(survival_of(block.stored, block.exact, there))

        rows = _sampled(job.name, row_count(wanted), self.share) if self.share < 1 else None
        each_block(wanted, receive, rows=rows, reproducible=True)
        if sink is None:
            return TensorCheck(job.name, wanted.dtype, 0, 0, 0, 0, Survival())
        check = TensorCheck(job.name, wanted.dtype, sink.elements, sink.furthest, sink.differing, sink.wrong, survival)
        often = DTYPE_BITS[wanted.dtype] <= 16 and sink.differing > sink.elements * OFTEN
        if not wanted.updates or not (sink.wrong or often):
            return check
        reason = self._why(job, sink.rows, bad or [rows or (0, 1)])
        return replace(check, reason=reason) if sink.wrong or reason.word == "rounded-delta" else check

    def _why(self, job: _Job, rows: TensorRef, bad: Sequence[tuple[int, int]]) -> Reason:
        import torch

        ranges = list(dict.fromkeys((bad[0], bad[-1])))
        there = torch.cat([rows.narrow(0, start, stop - start).read().double() for start, stop in ranges])
        by_adapter: dict[str, list[Weighted]] = {}
        for weighted in job.wanted.updates:
            by_adapter.setdefault(self._adapter(weighted), []).append(weighted)
        groups = [*by_adapter.values()]
        return diagnosis.explain(diagnosis.evidence(job.wanted, there, ranges, groups), groups, [*by_adapter])

    def _adapter(self, weighted: Weighted) -> str:
        owners = (part for part in self.fit.parts if any(item is weighted.item for item in part.adapter.updates))
        return next((part.name for part in owners), "the adapters")


class _Comparing:
    """Counts how far the elements of a tensor are from those that were wanted. Rows as they are there: [rows, columns].

    It can be written to, as to a file, with the rows that are wanted.
    """

    def __init__(self, rows: TensorRef, ulps: int) -> None:
        self.rows, self.ulps = rows, ulps
        self.elements = self.differing = self.wrong = self.row = 0
        self.furthest = 0.0

    def compare(self, wanted: torch.Tensor, there: torch.Tensor, error: torch.Tensor | float = 0.0) -> int:
        """Note a block; return how many elements are neither close enough nor within `error` of what is wanted."""
        distance = diagnosis.ulps_between(wanted, there, self.rows.dtype)  # [rows, columns]
        if not distance.numel():
            return 0
        self.elements += distance.numel()
        self.differing += int((distance > 0).sum())
        self.furthest = max(self.furthest, float(distance.max()))
        far = distance > self.ulps
        if far.any():
            far &= ~((wanted.double() - there.double()).abs() <= error)
        wrong = int(far.sum())
        self.wrong += wrong
        return wrong

    def write(self, data: memoryview) -> int:
        import torch

        wanted = torch.frombuffer(data, dtype=torch_dtype(self.rows.dtype)).view(-1, self.rows.shape[1])
        self.compare(wanted, self.rows.narrow(0, self.row, len(wanted)).read())
        self.row += len(wanted)
        return len(data)


def _comparable(dtype: str, wanted: NewTensor) -> bool:
    """Whether a tensor of this dtype can be what is wanted: rounded to another one, unless it is made of codes."""
    return dtype == wanted.dtype or (not wanted.part and {dtype, wanted.dtype} <= {*MERGEABLE})


def _matrix(ref: TensorRef, columns: int) -> TensorRef:
    """A tensor as [rows, columns], of which some rows can be read: from its file, or from memory."""
    if not isinstance(ref.data, FileSpan) or ref.views:
        ref = TensorRef.of(ref.read(), ref.name)
    return ref.reshape(ref.numel // max(1, columns), columns)


def _sampled(name: str, count: int, share: float) -> tuple[int, int]:
    """A share of a tensor's rows, at a place that only its name decides."""
    height = max(1, math.ceil(count * share))
    place = zlib.crc32(name.encode()) / 2**32
    start = int(place * (count - height + 1))
    return start, start + height

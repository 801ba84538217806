"""A merged checkpoint against what base and adapters give: one tensor at a time, block by block."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from loratool import diagnosis, maps
from loratool.blocks import each_block
from loratool.bounds import float32_error
from loratool.changes import Fitted
from loratool.checkpoint import Checkpoint
from loratool.conventions.choices import Choices
from loratool.diagnosis import Reason
from loratool.layout import NewTensor, Weighted
from loratool.matrices import Merged, row_count, sample_of
from loratool.requantise import Requantiser
from loratool.rounding import differing
from loratool.survival import Survival, survival_of
from loratool.tensors import DTYPE_BITS, MERGEABLE, FileSpan, FileState, TensorRef, torch_dtype

if TYPE_CHECKING:
    import torch

EVIDENCE = 1 << 17  # numbers that are enough to find a reason
OFTEN = 0.01  # of 16-bit elements next to the right one: more than float32 arithmetic leaves
ROUNDED_DELTA = 2.0**-8  # how far a delta is off, relatively, that was rounded to bfloat16, and again when scaled


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


# -- the merged checkpoint, by the base's names ------------------------------------------------------------------------


class MergedTensors:
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
class Job:
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
class Comparison:
    fit: Fitted
    merged: MergedTensors
    ulps: int
    share: float
    rounded_delta: bool
    findings: list[Finding] = field(default_factory=list)
    requantiser: Requantiser = field(default_factory=Requantiser)

    def jobs(self) -> Iterator[Job]:
        """Every tensor of the result; those that are not there, or that should not be, become findings."""
        absent, others = [], []
        for wanted in self._wanted():
            found = self.merged.find(wanted.name) or self._tied(wanted.name)
            if found is None:
                absent.append(wanted.name)
            elif found.shape != wanted.shape or not _comparable(found.dtype, wanted):
                others.append(f"{wanted.name} ({found.dtype} {list(found.shape)})")
            else:
                yield Job(replace(wanted, dtype=found.dtype), found)
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

    def look_at(self, job: Job) -> tuple[Job, TensorCheck | bool]:
        return job, self.look(job)

    def look(self, job: Job) -> TensorCheck | bool:
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

    def _requantised(self, job: Job) -> TensorCheck:
        """Compare codes or scales with those that a merge by loratool would write."""
        rows = _matrix(job.found, job.found.shape[-1] if job.found.shape else 1)
        sink = _Comparing(rows, self.ulps)
        self.requantiser.write(job.wanted, cast(BinaryIO, sink), lambda nbytes: None, digests=False)
        reason = Reason("requantised", "its codes or scales are not those of this merge") if sink.wrong else None
        return TensorCheck(
            job.name, job.found.dtype, job.found.numel, sink.furthest, sink.differing, sink.wrong, Survival(), reason
        )

    def _compared(self, job: Job) -> TensorCheck:
        """Compare a tensor with the correctly rounded result, block by block; find out why it is another one."""
        wanted, survival = job.wanted, Survival()
        sink: _Comparing | None = None
        bad: list[int] = []  # rows

        def receive(block: Merged) -> None:
            nonlocal sink, survival
            sink = sink or _Comparing(_matrix(job.found, block.values.shape[1]), self.ulps)
            there = sink.rows.narrow(0, block.start, block.stop - block.start).read()
            error = float32_error(block)
            if self.rounded_delta and block.exact is not None and wanted.source is not None:
                error = error + (block.exact - block.stored.to(block.exact.dtype)).abs().double() * ROUNDED_DELTA
            if len(wrong := sink.compare(block.values, there, error)):
                bad.extend((block.start + int(wrong[0]), block.start + int(wrong[-1])))
            sample = sample_of(block) if wanted.source is not None else None
            if sample is not None and block.exact is not None:
                survival = survival.plus(survival_of(block.stored[sample], block.exact[sample], there[sample]))

        rows = _sampled(job.name, row_count(wanted), self.share) if self.share < 1 else None
        each_block(wanted, receive, rows=rows, reproducible=True)
        if sink is None:
            return TensorCheck(job.name, wanted.dtype, 0, 0, 0, 0, Survival())
        check = TensorCheck(job.name, wanted.dtype, sink.elements, sink.furthest, sink.differing, sink.wrong, survival)
        often = DTYPE_BITS[wanted.dtype] <= 16 and sink.differing > sink.elements * OFTEN
        if not wanted.updates or not (sink.wrong or often):
            return check
        reason = self._why(job, sink.rows, bad or [rows[0] if rows else 0])
        return replace(check, reason=reason) if sink.wrong or reason.word == "rounded-delta" else check

    def _why(self, job: Job, rows: TensorRef, bad: Sequence[int]) -> Reason:
        """The reason, from some rows at the first and the last of those that are wrong."""
        import torch

        height = max(1, EVIDENCE // max(1, rows.shape[1]))
        starts = [max(0, min(row, rows.shape[0] - height)) for row in (bad[0], bad[-1])]
        ranges = [(start, min(start + height, rows.shape[0])) for start in dict.fromkeys(starts)]
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

    def compare(self, wanted: torch.Tensor, there: torch.Tensor, error: torch.Tensor | None = None) -> torch.Tensor:
        """Note a block; return the rows in it with elements that are neither close enough nor within `error`."""
        import torch

        self.elements += there.numel()
        where = differing(wanted, there)  # flat indices, few of them in a right merge
        if not len(where):
            return where
        one, other, rows = wanted.view(-1)[where], there.view(-1)[where], where // there.shape[1]
        distance = diagnosis.ulps_between(one, other, self.rows.dtype)
        self.differing += int((distance > 0).sum())
        self.furthest = max(self.furthest, float(distance.max()))
        allowed = error.expand(there.shape)[rows, where - rows * there.shape[1]] if error is not None else 0.0
        far = (distance > self.ulps) & ~((one.double() - other.double()).abs() <= allowed)
        self.wrong += int(far.sum())
        found: torch.Tensor = torch.unique_consecutive(rows[far])
        return found

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

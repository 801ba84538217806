"""A merged checkpoint against what base and adapters give: one tensor at a time, block by block."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, BinaryIO, cast

from loratool import diagnosis, grids, misplaced
from loratool.blocks import each_block
from loratool.bounds import float32_error, size_of
from loratool.changes import Fitted
from loratool.checks import Finding, Moves, TensorCheck
from loratool.diagnosis import Reason
from loratool.evidence import (
    Asked,
    Evidence,
    gather,
    matrix_of,
    ranges_of,
    resolution,
    side_by_side,
    ulps_between,
)
from loratool.layout import NewTensor, Weighted
from loratool.matrices import Merged, inside_of, matrices_of, row_count, sample_of
from loratool.pairing import MergedTensors, stored_of
from loratool.requantise import Requantiser
from loratool.rounding import differing
from loratool.survival import Survival, survival_of
from loratool.tensors import DTYPE_BITS, MERGEABLE, FileState, TensorRef, files_of, torch_dtype

if TYPE_CHECKING:
    import torch

EVIDENCE = 1 << 15  # numbers that are enough to find the weights that were applied
CLOSELY = 1 << 17  # numbers that are enough to tell what else a change is
ROUNDED_DELTA = 2.0**-8  # how far a delta is off, relatively, that was rounded to bfloat16, and again when scaled
NEAREST = 32  # tensors of the same shape that a change may be of


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
        for name, stored in stored_of(self.fit.base):
            yield self.fit.changes.get(name) or NewTensor(name, stored, stored.dtype, stored.shape)
        yield from self.fit.additions

    def _tied(self, name: str) -> TensorRef | None:
        """The tensor that has the same bytes in the base, and was kept where a tool kept one of them."""
        ties = self.fit.base.ties
        others = [ties.get(name), *(other for other, kept in ties.items() if kept == name)]
        return next((found for other in others if other and (found := self.merged.find(other))), None)

    def inputs(self) -> set[FileState]:
        refs = [*self.merged.stored.values(), *(ref for _, ref in stored_of(self.fit.base))]
        return files_of(refs)

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
        rows = matrix_of(job.found, job.found.shape[-1] if job.found.shape else 1)
        sink = _Comparing(rows, self.ulps)
        self.requantiser.write(job.wanted, cast(BinaryIO, sink), lambda nbytes: None, digests=False)
        reason = Reason("requantised", "its codes or scales are not those of this merge") if sink.wrong else None
        return TensorCheck(
            job.name,
            job.found.dtype,
            job.found.numel,
            sink.furthest,
            sink.differing,
            sink.wrong,
            Survival(),
            sink.error,
            reason=reason,
        )

    def _compared(self, job: Job) -> TensorCheck:
        """Compare a tensor with the correctly rounded result, block by block; find out why it is another one."""
        check, bad = self._passed(job)
        if not job.wanted.updates or not (check.wrong or check.suspect):
            return check
        if check.weak and (not check.wrong or check.kept == check.differing):
            return self._weakly(job, check)
        reason = self._why(job, bad, check.wrong)
        if self.rounded_delta and reason.word == "rounded-delta":
            reason = reason._replace(fine=True)
        if check.wrong and reason.fine:
            # Right in the rows that were looked at: then no element may be further off than such a merge leaves it.
            slack = max(ROUNDED_DELTA * self.rounded_delta, 2 * resolution(check.dtype))
            again, _ = self._passed(job, slack, of_terms=reason.word in ("rounded-factors", "rounding"))
            check = replace(again, ulps=0.0) if not again.wrong else again
            reason = diagnosis.damaged(again.wrong) if again.wrong else reason
        return replace(check, reason=reason)

    def _weakly(self, job: Job, check: TensorCheck) -> TensorCheck:
        """A tensor in which so little shows that elements next to the right ones may mean anything."""
        asked = self.asked(job.wanted)
        if len(asked) > 1 and not check.wrong:
            return replace(check, told=False)  # one after the other, several such adapters may well move nothing
        names = ", ".join(each.name for each in asked)
        if check.kept == check.differing:
            text = "; ".join(map(diagnosis.missing, asked))
            return replace(check, reason=Reason("missing", text, (0.0,) * len(asked)))
        return replace(
            check, reason=Reason("indistinct", f"the little that {names} changes in this dtype is not there")
        )

    def _passed(self, job: Job, slack: float = 0.0, of_terms: bool = False) -> tuple[TensorCheck, list[int]]:
        """One pass over a tensor, and the first and last rows of each block that are wrong.

        `slack` is how far elements may be off, beside float32's own errors, relative to what was added to them: to the
        result of a product, or where only its terms are known to be off so far, to those.
        """
        wanted, survival = job.wanted, Survival()
        sink: _Comparing | None = None
        bad: list[int] = []
        moves = Moves(job.found.numel, DTYPE_BITS[job.found.dtype] <= 16)

        def receive(block: Merged) -> None:
            nonlocal sink, survival
            sink = sink or _Comparing(matrix_of(job.found, block.values.shape[1]), self.ulps)
            there = sink.rows.narrow(0, block.start, block.stop - block.start).read()
            error = float32_error(block)
            if slack:
                error = error + _slack(block, slack, of_terms)
            if len(wrong := sink.compare(block.values, there, error)):
                bad.extend((block.start + int(wrong[0]), block.start + int(wrong[-1])))
            if moves.open and len(block.stored):
                moves.count(block.values, block.stored.to(block.values.dtype), there if sink.differing else None)
            sample = sample_of(block) if wanted.source is not None else None
            if sample is not None and block.exact is not None:
                survival = survival.plus(survival_of(block.stored[sample], block.exact[sample], there[sample]))

        rows = _sampled(job.name, row_count(wanted), self.share) if self.share < 1 else None
        each_block(wanted, receive, rows=rows, reproducible=True)
        if sink is None:
            return TensorCheck(job.name, wanted.dtype, 0, 0, 0, 0, Survival()), []
        check = TensorCheck(
            job.name,
            wanted.dtype,
            sink.elements,
            sink.furthest,
            sink.differing,
            sink.wrong,
            survival,
            sink.error,
            told=bool(moves.moved) or wanted.source is None,
            moved=moves.moved if moves.open and wanted.source is not None else sink.elements,
            kept=moves.kept,
        )
        return check, bad or [rows[0] if rows else 0]

    def _why(self, job: Job, bad: Sequence[int], wrong: int) -> Reason:
        """The reason, from some rows: the first and the last of those that are wrong, and others."""
        asked = self.asked(job.wanted)
        some = self.evidence(job, EVIDENCE, (bad[0], bad[-1]))
        likely = diagnosis.most_likely(some, asked)
        explained = diagnosis.explain(some, asked, likely, wrong)
        if explained is not None:
            return explained
        found = self.closely(job, bad[0])
        coarse = grids.coarse(found.merged, found.right, found.dtype)
        known = coarse or misplaced.moved(found) or diagnosis.scaled(some, asked, likely)
        return known or misplaced.unknown(found, asked)

    def evidence(self, job: Job, numbers: int, rows: Sequence[int] = (0,)) -> Evidence:
        """So many numbers of a tensor, around these rows and all over it."""
        matrices, height, columns = matrices_of(job.wanted)
        ranges = ranges_of(matrices * height, columns, numbers, [*dict.fromkeys(rows)])
        return gather(job.wanted, matrix_of(job.found, columns), ranges, self.asked(job.wanted))

    def closely(self, job: Job, row: int = 0) -> Evidence:
        """Rows of a tensor that lie together."""
        columns = matrices_of(job.wanted)[2]
        ranges = side_by_side(job.wanted, CLOSELY, row)
        return gather(job.wanted, matrix_of(job.found, columns), ranges, self.asked(job.wanted))

    def asked(self, tensor: NewTensor) -> list[Asked]:
        """The tensor's updates, by adapter."""
        found: dict[int, list[Weighted]] = {}
        for weighted in tensor.updates:
            found.setdefault(self._owner(weighted), []).append(weighted)
        return [Asked(self.fit.parts[n].name, tuple(updates), n) for n, updates in found.items()]

    def _owner(self, weighted: Weighted) -> int:
        """The number of the adapter that an update is of."""
        for n, part in enumerate(self.fit.parts):
            if any(item.update is weighted.item.update for item in part.adapter.updates):
                return n
        return 0

    def swapped(self, job: Job, jobs: Sequence[Job]) -> Reason | None:
        """Whether a tensor has the change of another of the same shape, of those near it in `jobs`."""
        place = jobs.index(job)
        alike = [n for n, other in enumerate(jobs) if other.wanted.shape == job.wanted.shape and n != place]
        nearest = sorted(alike, key=lambda n: abs(n - place))[:NEAREST]
        ranges = side_by_side(job.wanted, CLOSELY)
        others = (misplaced.neighbour(job.wanted, jobs[n].wanted, ranges) for n in nearest)
        return misplaced.swapped(self.closely(job), others)


def _slack(block: Merged, slack: float, of_terms: bool) -> torch.Tensor | float:
    """How far a merge may be off that rounds what it adds, and each sum: [rows, columns] in float64."""
    if block.exact is None or not len(block.stored):
        return 0.0
    stored, exact = block.stored.double(), block.exact.double()
    allowed = (exact - stored).abs() * slack
    if of_terms or len(block.opened) > 1:  # products, and sums in between, can be larger than both ends
        start, stop = block.start - block.first, block.stop - block.first
        size = size_of([*inside_of(block.opened, block.exact, start, stop)], block.exact, start).double()
        allowed += (size + stored.abs()) * (slack * len(block.opened) / 2)
    return allowed


class _Comparing:
    """Counts how far the elements of a tensor are from those that were wanted. Rows as they are there: [rows, columns].

    It can be written to, as to a file, with the rows that are wanted.
    """

    def __init__(self, rows: TensorRef, ulps: int) -> None:
        self.rows, self.ulps = rows, ulps
        self.elements = self.differing = self.wrong = self.row = 0
        self.furthest = self.error = 0.0

    def compare(self, wanted: torch.Tensor, there: torch.Tensor, error: torch.Tensor | None = None) -> torch.Tensor:
        """Note a block; return the rows in it with elements that are neither close enough nor within `error`."""
        import torch

        self.elements += there.numel()
        where = differing(wanted, there)  # flat indices, few of them in a right merge
        if not len(where):
            return where
        dense = len(where) > there.numel() // 4
        rows = where // there.shape[1]
        if dense:
            one, other = wanted, there
        else:
            one, other = wanted.view(-1)[where], there.view(-1)[where]
        distance = ulps_between(one, other, self.rows.dtype)
        off = (other.double() - one.double()).abs_()
        self.differing += int((distance > 0).sum())
        allowed: torch.Tensor | float = 0.0
        if error is not None:
            allowed = error if dense else error.expand(there.shape)[rows, where - rows * there.shape[1]]
        unexplained = ~(off <= allowed)
        self.furthest = max(self.furthest, float((distance * unexplained).max()))
        far = (distance > self.ulps) & unexplained
        self.wrong += int(far.sum())
        self._note_error(wanted, off, None if dense else rows)
        return far.any(dim=1).nonzero().view(-1) if dense else torch.unique_consecutive(rows[far])

    def _note_error(self, wanted: torch.Tensor, off: torch.Tensor, rows: torch.Tensor | None) -> None:
        """The largest error, relative to the largest number of its row; `rows` are those that single errors are in."""
        import torch

        which, of = (None, None) if rows is None else torch.unique_consecutive(rows, return_inverse=True)
        largest = (wanted if which is None else wanted[which]).abs().amax(dim=1).double()
        largest.clamp_(min=torch.finfo(torch.float64).tiny)
        relative = off.amax(dim=1) / largest if of is None else off / largest[of]
        self.error = max(self.error, float("inf") if relative.isnan().any() else float(relative.max()))

    def write(self, data: memoryview) -> int:
        import torch

        wanted = torch.frombuffer(data, dtype=torch_dtype(self.rows.dtype)).view(-1, self.rows.shape[1])
        self.compare(wanted, self.rows.narrow(0, self.row, len(wanted)).read())
        self.row += len(wanted)
        return len(data)


def _comparable(dtype: str, wanted: NewTensor) -> bool:
    """Whether a tensor of this dtype can be what is wanted: rounded to another one, unless it is made of codes."""
    return dtype == wanted.dtype or (not wanted.part and {dtype, wanted.dtype} <= {*MERGEABLE})


def _sampled(name: str, count: int, share: float) -> tuple[int, int]:
    """A share of a tensor's rows, at a place that only its name decides."""
    height = max(1, math.ceil(count * share))
    place = zlib.crc32(name.encode()) / 2**32
    start = int(place * (count - height + 1))
    return start, start + height

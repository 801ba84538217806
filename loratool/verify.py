"""Is this the base with these adapters merged in? Every tensor is compared with the correctly rounded result.

Base, adapters and merged checkpoint are streamed; none is held. A merge by another tool is as good as one by loratool:
an element may be the neighbour of the right one (torch's float32 arithmetic leaves some there), as far from the exact
result as float32 can be, or as far as it gets by rounding in the output's dtype more than once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loratool import conventions
from loratool.adapter import Adapter
from loratool.applied import Applied, measured
from loratool.changes import fitted
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.checks import Finding, TensorCheck, number
from loratool.claims import Claim, claim_of
from loratool.comparing import Comparison, Job
from loratool.conventions.choices import Choices
from loratool.errors import ChoiceNeeded, Mismatch, Problem
from loratool.pairing import MergedTensors
from loratool.quantised import logical
from loratool.receipt import MergedAdapter
from loratool.survival import Survival, loss, survival_json
from loratool.verdict import findings_of, remarks_of
from loratool.workers import Meter, ProgressCallback, each_done, worker_count, workers

ULPS = 1  # the largest accepted distance, in units of the last place
MISSES = 8  # tensors in a row that were found to have no other one's change, before no more are compared with others


@dataclass(frozen=True)
class VerifyReport:
    """The answer, and what it rests on. With a `sample`, only that share of each tensor was looked at.

    `remarks` are what could be better about a right merge. `applied` are the weights that were really merged, in the
    order of `adapters`; `claim` is what the merged checkpoint's receipt says, which proves nothing.
    """

    merged: Path
    base: Path
    adapters: tuple[MergedAdapter, ...]
    applied: tuple[Applied, ...]
    claim: Claim | None
    tensors: tuple[TensorCheck, ...]
    untouched: int  # tensors that no adapter changes, byte-equal to the base's
    findings: tuple[Finding, ...]
    remarks: tuple[Finding, ...]
    notes: tuple[str, ...]
    sample: float | None
    seconds: float

    @property
    def verdict(self) -> str:
        """ "yes", "no", or "can-not-tell": an adapter is so weak that the base is its right merge, bit for bit."""
        if self.findings:
            return "no"
        return "yes" if all(adapter.told for adapter in self.applied) else "can-not-tell"

    @property
    def answer(self) -> bool:
        return self.verdict == "yes"

    @property
    def error(self) -> float:
        """The largest distance from the right result, relative to the largest number of its row."""
        return max((check.error for check in self.tensors), default=0)

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
            "verdict": self.verdict,
            "merged": str(self.merged),
            "base": str(self.base),
            "adapters": [vars(adapter) for adapter in self.adapters],
            "applied": [found.to_json() for found in self.applied],
            "claim": None if self.claim is None else self.claim.to_json(),
            "sample": self.sample,
            "error": number(self.error),
            "ulps": number(self.ulps),
            "differing": self.counts[0],
            "elements": self.counts[1],
            "untouched": self.untouched,
            "findings": [finding.to_json() for finding in self.findings],
            "remarks": [remark.to_json() for remark in self.remarks],
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
    fit = fitted(base_path, adapters, "keep", choices, allow_new=True, onto_merged=True)
    if fit.problems:
        raise Mismatch(fit.problems)
    opened = open_checkpoint(merged_path)
    claim = claim_of(opened, fit.merged)
    report = VerifyReport(merged_path, base_path, fit.merged, (), claim, (), 0, (), (), fit.notes, sample, 0.0)
    if wrapped := _not_merged(opened, fit.base):
        return replace(report, findings=(wrapped,), seconds=time.monotonic() - started)
    merged = MergedTensors(logical(opened), choices)
    work = Comparison(fit, merged, ulps, sample or 1.0, rounded_delta)
    jobs = [*work.jobs()]
    meter = Meter(sum(job.nbytes for job in jobs), progress)
    checks: dict[str, TensorCheck] = {}
    same, other = 0, []
    with workers(worker_count(threads)) as pool:
        for job, found in each_done(pool, [partial(work.look_at, job) for job in jobs]):
            meter.step(job.nbytes, job.name)
            if isinstance(found, TensorCheck):
                checks[job.name] = found
            elif found:
                same += 1
            else:
                other.append(job.name)
    for known in work.inputs():
        known.check()
    looked = [job for job in jobs if job.name in checks]  # in their order
    _compare_with_others(work, looked, checks)
    applied = measured(work, looked, checks)
    listed = [checks[job.name] for job in looked]
    others = [job for job in jobs if job.name in {*other}]
    findings = findings_of(work, looked, checks, others, len(jobs))
    notes = [*fit.notes, *merged.notes]
    if not findings:
        survival = {check.name: check.survival for check in listed if check.survival.asked}
        notes += loss(survival, "in this dtype", "a wider one keeps all of it")
        notes += _untold(listed)
    return replace(
        report,
        applied=applied,
        tensors=tuple(listed),
        untouched=same,
        findings=findings,
        remarks=tuple(remarks_of(work, jobs, listed)),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def _not_merged(merged: Checkpoint, base: Checkpoint) -> Finding | None:
    """Whether it is no merged checkpoint at all: one with the adapter still beside its weights, or an adapter."""
    for convention in conventions.matching(merged):
        shapes = {ref.shape for ref in base.tensors.values() if len(ref.shape) > 1}
        if any(ref.shape in shapes for ref in merged.tensors.values()):
            text = f"it is a {convention.TITLE}: the adapter is beside the weights in it, and not merged"
            return Finding("wrapped", text, ())
        return Finding("adapter", f"it is an adapter ({convention.TITLE}), and no checkpoint", ())
    return None


def _compare_with_others(work: Comparison, jobs: Sequence[Job], checks: dict[str, TensorCheck]) -> None:
    """Look for the changes of other tensors where nothing else explains what is there."""
    misses = 0
    for job in jobs:
        check = checks[job.name]
        if check.weak or check.reason is None or not check.reason.word.startswith("other-") or misses >= MISSES:
            continue
        reason = work.swapped(job, jobs)
        misses = 0 if reason else misses + 1
        checks[job.name] = replace(check, reason=reason or check.reason)


def _untold(checks: Sequence[TensorCheck]) -> list[str]:
    untold = [check.name for check in checks if not check.told and check.survival.asked]
    if not untold:
        return []
    what = f"{len(untold)} of {len(checks)} changed tensors are the base's to the bit, as they should be"
    return [f"{what}: the change is less than {checks[0].dtype} can hold, so nothing there tells right from wrong"]

"""Is this the base with these adapters merged in? Every tensor is compared with the correctly rounded result.

Base, adapters and merged checkpoint are streamed; none is held. A merge by another tool is as good as one by loratool:
an element may be the neighbour of the right one (torch's float32 arithmetic leaves some there), or as far from the
exact result as float32 can be.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter
from loratool.changes import fitted
from loratool.checkpoint import open_checkpoint
from loratool.comparing import Comparison, Finding, MergedTensors, TensorCheck
from loratool.conventions.choices import Choices
from loratool.errors import ChoiceNeeded, Mismatch, Problem
from loratool.names import listed
from loratool.quantised import logical
from loratool.receipt import MergedAdapter
from loratool.survival import Survival, loss, survival_json
from loratool.workers import Meter, ProgressCallback, each_done, worker_count, workers

ULPS = 1  # the largest accepted distance, in units of the last place


@dataclass(frozen=True)
class VerifyReport:
    """The answer, and what it rests on. With a `sample`, only that share of each tensor was looked at."""

    merged: Path
    base: Path
    adapters: tuple[MergedAdapter, ...]
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
            "adapters": [vars(adapter) for adapter in self.adapters],
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
    merged = MergedTensors(logical(open_checkpoint(merged_path)), choices)
    work = Comparison(fit, merged, ulps, sample or 1.0, rounded_delta)
    jobs = [*work.jobs()]
    meter = Meter(sum(job.nbytes for job in jobs), progress)
    checks: list[TensorCheck] = []
    same, other = 0, []
    with workers(worker_count(threads)) as pool:
        for job, found in each_done(pool, [partial(work.look_at, job) for job in jobs]):
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
    seconds = time.monotonic() - started
    return VerifyReport(
        merged_path, base_path, fit.merged, tuple(checks), same, findings, tuple(notes), sample, seconds
    )


def _rounding_notes(checks: Sequence[TensorCheck]) -> Iterator[str]:
    """What is accepted, and not the best there is."""
    accepted = [check for check in checks if check.reason is not None and not check.wrong]
    for text in dict.fromkeys(check.reason.text for check in accepted if check.reason):
        names = [check.name for check in accepted if check.reason and check.reason.text == text]
        yield f"{listed(names)}: {text}"


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

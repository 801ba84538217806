"""The weights that a merge really has: of each adapter, over all tensors that it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

from loratool.checks import TensorCheck
from loratool.comparing import Comparison, Job
from loratool.diagnosis import fit
from loratool.evidence import Evidence, rounded
from loratool.replays import FEWER

SOME = 1 << 14  # numbers of a right tensor that its weight is measured on
MEASURED = 2  # right tensors of each adapter that are


@dataclass(frozen=True)
class Applied:
    """The weight that one adapter was `asked` with, and merged with: in most tensors, the lowest and the highest.

    These are None where nothing shows them. `told` is false where the adapter does not show at all: without it, every
    tensor would have the same bits.
    """

    name: str
    asked: float
    weight: float | None
    lowest: float | None
    highest: float | None
    tensors: int  # that it changes
    told: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "asked": self.asked,
            "applied": self.weight,
            "lowest": self.lowest,
            "highest": self.highest,
            "tensors": self.tensors,
            "told": self.told,
        }


def measured(work: Comparison, jobs: Sequence[Job], checks: Mapping[str, TensorCheck]) -> tuple[Applied, ...]:
    """What each adapter was merged with, in the order in which they were asked for."""
    return tuple(_of_one(work, number, jobs, checks) for number in range(len(work.fit.parts)))


def _of_one(work: Comparison, number: int, jobs: Sequence[Job], checks: Mapping[str, TensorCheck]) -> Applied:
    own = [job for job in jobs if any(each.number == number for each in work.asked(job.wanted))]
    part = work.fit.parts[number]
    nothing = Applied(part.name, part.weight, None, None, None, len(own))
    if not own:
        return nothing
    factors, right, unknown = [], [], False
    for job in own:
        check = checks[job.name]
        if not check.bad:
            right.append(job)
        if check.reason is not None and check.reason.factors:
            factors.append(check.reason.factors[_place(work, job, number)])
        elif check.bad:
            unknown = True
    looked = [*_looked_at(work, number, right, checks)]
    told = bool(factors) or unknown or any(tells for tells, _ in looked)
    found = [factor for tells, factor in looked if tells]
    rest = len([job for job in right if not _has_factors(checks[job.name])])
    factors += [mean(found)] * rest if found else []
    if not told or not factors:
        return replace(nothing, told=told)
    values = sorted(factor * part.weight for factor in factors)
    return replace(nothing, weight=_plain(median(values)), lowest=_plain(values[0]), highest=_plain(values[-1]))


def _has_factors(check: TensorCheck) -> bool:
    return check.reason is not None and bool(check.reason.factors)


def _plain(value: float) -> float:
    """As many digits as are worth telling."""
    return float(f"{value:.6g}")


def _place(work: Comparison, job: Job, number: int) -> int:
    """Where a tensor's factors have this adapter's."""
    return [each.number for each in work.asked(job.wanted)].index(number)


def _looked_at(
    work: Comparison, number: int, jobs: Sequence[Job], checks: Mapping[str, TensorCheck]
) -> Iterator[tuple[bool, float]]:
    """Whether an adapter shows in right tensors, and its factor there; until enough of them have told."""
    told = 0
    for job in jobs:
        if job.wanted.part:  # codes and scales, compared with those that are due
            yield True, 1.0
            continue
        if not checks[job.name].told and checks[job.name].survival.asked:
            continue
        found = work.evidence(job, SOME)
        place = _place(work, job, number)
        tells = _tells(found, place)
        yield tells, _factor(found, place)
        told += tells
        if told >= MEASURED:
            return


def _tells(found: Evidence, place: int) -> bool:
    """Whether the right result would be another one without an adapter, which changes something."""
    change = found.changes[place]
    without = rounded(found.right - change, found.dtype)
    return not change.any() or bool((without != rounded(found.right, found.dtype)).any())


def _factor(found: Evidence, place: int) -> float:
    factors = fit(found)
    given = rounded(found.base + found.sum(factors), found.dtype)
    right = rounded(found.right, found.dtype)
    return factors[place] if found.away(given).mean() < FEWER * found.away(right).mean() else 1.0

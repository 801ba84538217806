"""What the tensors say together: the reasons for a no, those of one kind in one finding, and remarks on a yes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from loratool import grids
from loratool.checks import Finding, TensorCheck
from loratool.comparing import Comparison, Job
from loratool.diagnosis import Reason

LOOKED_AT = 8  # tensors that no adapter changes and that are others all the same, to find out why

Groups = dict[tuple[str, str], list[str]]


def findings_of(
    work: Comparison, jobs: Sequence[Job], checks: Mapping[str, TensorCheck], others: Sequence[Job], count: int
) -> tuple[Finding, ...]:
    """Why the answer is no; `others` are tensors that no adapter changes and that are not the base's, of `count`."""
    groups = _groups(work, jobs, checks)
    findings = [*work.findings]
    names = tuple(job.name for job in others)
    coarse = _coarse(work, others)
    unexplained = [
        name for (word, _), found in groups.items() if word in ("other-base", "other-change") for name in found
    ]
    if coarse is not None:
        groups.setdefault((coarse.word, coarse.text), []).extend(names)
    elif names and len(names) * 2 > count - len(checks):
        what = "no adapter changes them, and most are not the base's: another base"
        findings.append(Finding("other-base", what, names))
        groups = _without(groups, {*unexplained})
    elif names:
        findings.append(Finding("untouched", "no adapter changes them, and they are not the base's", names))
    if unexplained and len(unexplained) * 2 > len(checks) and not any(f.word == "other-base" for f in findings):
        what = "they are not what this base and these adapters give: another base, or other adapters as well"
        findings.append(Finding("other-base", what, tuple(unexplained)))
        groups = _without(groups, {*unexplained})
    for (word, text), found in groups.items():
        findings.append(Finding("other-change" if word == "other-base" else word, text, tuple(found)))
    return tuple(findings)


def _groups(work: Comparison, jobs: Sequence[Job], checks: Mapping[str, TensorCheck]) -> Groups:
    """The tensors with the same reason, and what it says of all of them."""
    groups: Groups = {}
    for job in jobs:
        reason = checks[job.name].reason
        if checks[job.name].bad and reason is not None:
            groups.setdefault((reason.word, reason.text), []).append(job.name)
    whole: Groups = {}
    for (word, text), names in groups.items():
        whole[word, _of_all(work, jobs, text, names) if word == "missing" else text] = names
    return whole


def _of_all(work: Comparison, jobs: Sequence[Job], text: str, names: Sequence[str]) -> str:
    """The same text, where it is about every tensor of an adapter, and not only here."""
    for part in work.fit.parts:
        own = [job.name for job in jobs if any(each.name == part.name for each in work.asked(job.wanted))]
        if {*own} <= {*names}:
            text = text.replace(f"{part.name}: it was not merged here", f"{part.name}: it was not merged at all")
    return text


def _without(groups: Groups, names: set[str]) -> Groups:
    kept = {key: [name for name in found if name not in names] for key, found in groups.items()}
    return {key: found for key, found in kept.items() if found}


def _coarse(work: Comparison, others: Sequence[Job]) -> Reason | None:
    """What was done to tensors that no adapter changes, where it is the same for all that were looked at."""
    found = [_coarse_one(work, job) for job in others[:LOOKED_AT]]
    same = len({reason and reason.word for reason in found}) == 1
    return Counter(found).most_common(1)[0][0] if same else None


def _coarse_one(work: Comparison, job: Job) -> Reason | None:
    if job.wanted.source is None or job.wanted.part or not job.wanted.shape:
        return None
    found = work.closely(job)
    return grids.coarse(found.merged, found.base, found.dtype)


def remarks_of(work: Comparison, jobs: Sequence[Job], checks: Sequence[TensorCheck]) -> Iterator[Finding]:
    """What is accepted, and not the best there is; and what is no question of right and wrong."""
    groups: Groups = {}
    for check in checks:
        if check.reason is not None and not check.bad:
            groups.setdefault((check.reason.word, check.reason.text), []).append(check.name)
    for job in jobs:
        source = job.wanted.source
        if source is not None and source.dtype != job.found.dtype and not job.wanted.part:
            text = f"it is {job.found.dtype}, the base's is {source.dtype}"
            groups.setdefault(("dtype", text), []).append(job.name)
    for (word, text), names in groups.items():
        yield Finding(word, text, tuple(names))

"""Which name of an adapter means which tensor of a base. Exact names first; a prefix only if one rule fits them all."""

from __future__ import annotations

import difflib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from loratool.errors import ChoiceNeeded, Problem

# Whole-prefix renames: transformers moved the language model of its VLMs, and adapters are trained on that alone.
RENAMED_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
# The first layers of denoisers: control adapters give them more inputs than the base has.
_INPUTS = re.compile(
    r"(?:^|.*[._])(?:img_in|x_embedder|conv_in|patch_embedding|(?:patch|pos)_embed[._]proj|input_blocks[._]0[._]0)"
)


def takes_more_inputs(module: str, stored: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether an adapter's shape is that of a denoiser's first layer, given by its name, with more inputs."""
    alike = len(stored) == len(wanted) >= 2 and (stored[0], *stored[2:]) == (wanted[0], *wanted[2:])
    return alike and wanted[1] > stored[1] and _INPUTS.fullmatch(module) is not None


COMPARED = 200  # names, letter by letter, in a search for near ones


def parent(name: str) -> str:
    """``a.b.weight`` -> ``a.b``."""
    return name.rpartition(".")[0]


def modules(names: Iterable[str]) -> set[str]:
    """All modules that own one of the tensors, directly or not."""
    found: set[str] = set()
    for name in names:
        while (name := parent(name)) and name not in found:
            found.add(name)
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def listed(names: Iterable[str], shown: int = 3) -> str:
    """``a, b, c and 7 more``: as many names as a message can bear."""
    known = [*names]
    return ", ".join(known[:shown]) + (f" and {len(known) - shown} more" if len(known) > shown else "")


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The most similar known names, for an error message; those with the same last segments first."""
    tail = ".".join(name.split(".")[-2:])
    candidates = [other for other in known if other.endswith(tail)] or [*known]
    if len(candidates) > COMPARED:  # comparing letters takes a millisecond a dozen
        segments = set(name.split("."))
        candidates = heapq.nlargest(
            COMPARED, candidates, key=lambda other: len(segments.intersection(other.split(".")))
        )
    return difflib.get_close_matches(name, candidates, count, cutoff=0.4)


def absent(name: str) -> str:
    return f"the base has no '{name}'"


def missing(name: str, known: Iterable[str], where: str) -> Problem:
    """The refusal of a target that the base does not have."""
    near = nearest(name, known)
    return Problem(
        "E-TARGET",
        absent(name),
        where,
        f"near names in the base: {', '.join(near)}" if near else "is this the adapter's base?",
    )


def prefix_rule(wanted: Collection[str], known: Collection[str], where: str) -> tuple[Callable[[str], str], list[str]]:
    """How to turn an adapter's names into the base's: a function, and a note if it changes anything.

    Names that the base has stay. The others are matched by one prefix taken off or put on (a bare encoder's
    ``encoder.`` against ``bert.encoder.``), and only if one such prefix finds most of them and no other finds as many.
    Raises ChoiceNeeded if two prefixes do equally well. Names that stay unmatched are the plan's to report.
    """
    known = set(known)
    lost = [name for name in wanted if name not in known]
    endings = _endings(known) if lost else {}
    scores = Counter(rule for name in lost for rule in _rules(name, known, endings))
    best = max(scores.values(), default=0)
    fitting = sorted(rule for rule, score in scores.items() if score == best)
    if 2 * best <= len(lost):
        return (lambda name: name), []
    if len(fitting) > 1:
        probe = next(name for name in lost if name.startswith(fitting[0][0]))
        candidates = ", ".join(repr(on + probe.removeprefix(off)) for off, on in fitting)
        raise ChoiceNeeded(
            Problem(
                "E-AMBIGUOUS",
                f"{probe!r} could be any of {candidates} of the base",
                where,
                "give the component that was trained as the base",
            )
        )
    off, on = fitting[0]

    def rename(name: str) -> str:
        renamed = on + name.removeprefix(off)
        return renamed if name not in known and name.startswith(off) and renamed in known else name

    return rename, [f"adapter names matched to the base with the prefix {off!r} replaced by {on!r}"]


def _rules(name: str, known: Collection[str], endings: Mapping[str, list[str]]) -> set[tuple[str, str]]:
    """Prefix rules (off, on) that turn `name` into a known name."""
    renamed = [(off, on) for pair in RENAMED_PREFIXES for off, on in (pair, pair[::-1]) if name.startswith(off)]
    found = {(off, on) for off, on in renamed if on + name.removeprefix(off) in known}
    found |= {(prefix, "") for prefix, ending in _splits(name) if ending in known}
    return found | {("", prefix) for prefix in endings.get(name, ())}


def _endings(names: Iterable[str]) -> dict[str, list[str]]:
    """What names end in, after any of their dots, with the prefixes that come before it."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for prefix, ending in _splits(name):
            found[ending].append(prefix)
    return dict(found)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """``a.b.c`` -> (``a.``, ``b.c``), (``a.b.``, ``c``)."""
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]

"""What other tools make of the same numbers: one sum rounded once, deltas rounded before, one adapter after another.

All of them are the right change; how often it was rounded on the way is what tells them apart, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

from loratool.evidence import Evidence, rounded

if TYPE_CHECKING:
    import torch

NARROW = ("BF16", "F16")  # what deltas are rounded to
MANY = 4  # additions: with more of them only the order that was asked for is tried, there and back
PASSES = 3  # merges of the same adapter, at most
FEWER = 0.7  # of what one explanation leaves open, to believe a less simple one
FAR, ODD = 2, 2.0**-5  # units off on average, and relative to the change: more than any rounding
PERFECT = 0.001  # units off on average: no other way explains it better


class Replay(NamedTuple):
    """One way to compute a merge, and how far what is there is away from its result."""

    how: str  # "once", "sequential", "passes", "rounded-delta", "rounded-factors"
    dtype: str  # what deltas were rounded to; "" for none
    share: float  # of elements that it gives, or off by one rounding
    away: float  # units, on average


def closest(found: Evidence, factors: Sequence[float], scales: Sequence[float | None]) -> Replay:
    """The way that explains best what is there, if each change was multiplied by its factor.

    `scales` are what stands in front of each adapter's product, which some round on its own.
    """
    best: Replay | None = None
    for how, dtype, values in _all_ways(found, factors, scales):
        away = found.away(values).clamp_(max=16)
        replay = Replay(how, dtype, float((away <= 1).double().mean()), float(away.mean()))
        # Passes of the same merge are twice as much, too, and are not told from that by anything less than this.
        if best is None or replay.away < best.away * (FEWER if how == "passes" else 1.0):
            best = replay
        if best.away < PERFECT or (how == "once" and _hopeless(found, values, factors)):
            break
    assert best is not None, "there is always the sum that is rounded once"
    return best


def _hopeless(found: Evidence, values: torch.Tensor, factors: Sequence[float]) -> bool:
    """Whether what is there is so far off that no rounding brings it closer."""
    off = found.merged - values
    units = float(found.away(values).clamp_(max=16).mean())
    return units > FAR and float(off.square().mean()) > ODD**2 * float(found.sum(factors).square().mean())


def _all_ways(
    found: Evidence, factors: Sequence[float], scales: Sequence[float | None]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Those with the factors as they are, then those that round them before they multiply."""
    yield from _ways(found, factors, scales)
    for narrow in dict.fromkeys((found.dtype, *NARROW)):
        changes = found.narrowed(narrow) if narrow in NARROW else None
        if changes is not None:
            other = replace(found, changes=changes, right=found.base + sum(changes, found.base * 0))
            for _, _, values in _ways(other, factors, scales):
                yield "rounded-factors", narrow, values


def _ways(
    found: Evidence, factors: Sequence[float], scales: Sequence[float | None]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    base, dtype = found.base, found.dtype
    all_ones = all(factor == 1 for factor in factors)
    yield "once", "", rounded(found.right if all_ones else base + found.sum(factors), dtype)
    used = [n for n, factor in enumerate(factors) if factor]
    yield from _one_after_the_other(
        found, "", [factors[n] * found.changes[n] for n in used], [factors[n] for n in used]
    )
    for narrow in dict.fromkeys((dtype, *NARROW)):
        if narrow not in NARROW:
            continue
        yield "rounded-delta", narrow, rounded(base + rounded(found.sum(factors), narrow), dtype)
        for deltas in _rounded_deltas(found, factors, scales, used, narrow):
            if len(deltas) > 1:
                yield "rounded-delta", narrow, rounded(sum(deltas, base), dtype)
            yield from _one_after_the_other(found, narrow, deltas, [factors[n] for n in used])


def _rounded_deltas(
    found: Evidence, factors: Sequence[float], scales: Sequence[float | None], used: Sequence[int], dtype: str
) -> Iterator[list[torch.Tensor]]:
    """Each delta rounded, and each delta rounded before and after it was scaled."""
    yield [rounded(factors[n] * found.changes[n], dtype) for n in used]
    known = [(n, scale) for n in used if (scale := scales[n]) is not None and scale != 1]
    if known and len(known) == len(used):
        yield [rounded(rounded(found.changes[n] / scale, dtype) * (scale * factors[n]), dtype) for n, scale in known]


def _one_after_the_other(
    found: Evidence, narrow: str, deltas: Sequence[torch.Tensor], factors: Sequence[float]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Added with a rounding after each, in every order; and a whole factor as so many passes with the same delta."""
    yield from _in_all_orders(found, "sequential", narrow, deltas, [*range(len(deltas))])
    counts = [int(factor) if factor == int(factor) and 1 <= factor <= PASSES else 1 for factor in factors]
    if sum(counts) == len(deltas):
        return
    steps = [delta / count for delta, count in zip(deltas, counts, strict=True)]
    if len(set(counts)) == 1 and len(steps) > 1:
        yield "passes", narrow, _added(found, [sum(steps, found.base * 0)] * counts[0])
    copies = [n for n, count in enumerate(counts) for _ in range(count)]
    yield from _in_all_orders(found, "passes", narrow, steps, copies)


def _in_all_orders(
    found: Evidence, how: str, narrow: str, steps: Sequence[torch.Tensor], which: Sequence[int]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    if len(which) < 2:
        return
    orders = {*permutations(which)} if len(which) <= MANY else {tuple(which), tuple(reversed(which))}
    for order in sorted(orders):
        yield how, narrow, _added(found, [steps[n] for n in order])


def _added(found: Evidence, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    values = found.base
    for delta in deltas:
        values = rounded(values + delta, found.dtype)
    return values

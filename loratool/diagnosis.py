"""Why a merged tensor is not what base and adapters give: the weights that were really applied, and what explains them.

The real change C of some rows is fitted by the adapters' own changes D_k: C ~ sum c_k D_k, least squares in float64,
repeated against what the sum gives once it is rounded. A right merge has c = 1. What c is after a mistake is known (2
for a double merge, the rank where alpha was taken for alpha/rank); a known one is believed before a fitted one, and 1
before both, unless the other explains clearly more of what is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from loratool.evidence import Asked, Evidence, resolution, rounded
from loratool.replays import FEWER, PERFECT, Replay, closest

if TYPE_CHECKING:
    import torch

NEAR = 0.03  # relative distance at which a fitted coefficient may be a known one
EXPLAINED = 0.99  # share of elements that an explanation must give, or be one rounding off
ENOUGH = 4  # elements that a less simple explanation must give, beside its share
THRICE = (3.0, "it was merged three times")  # where nothing else explains it
NOTHING = 1e-3  # share of a change, squared, that is left open by a sum in a narrow dtype
DIGITS = (2, 3)  # of weights that people use
ROUNDS = 4  # of fitting
OTHER = 0.8  # cosine of a change and the one that was asked for, below which it is another one
EXACT = 1e-3  # relative distance of a fitted weight from one that was asked for
MOST = 0.5
OVERLAP = 0.99  # share of the rows that have the whole change or nothing of it


class Reason(NamedTuple):
    """One explanation: a stable word, what completes "TENSORS: ...", and the coefficients that were fitted.

    `fine`: it is right all the same, only rounded more often than needed, and no coarser than its dtype.
    """

    word: str
    text: str
    factors: tuple[float, ...] = ()
    fine: bool = False


class Likely(NamedTuple):
    """The coefficients that explain best what is there, and how it was computed with them."""

    factors: tuple[float, ...]
    replay: Replay


def explain(found: Evidence, asked: Sequence[Asked], likely: Likely, wrong: int) -> Reason | None:
    """The coefficients that explain what is there, or the rows; None if none do.

    `wrong` are the elements of the whole tensor that are too far from the right ones for any rounding.
    """
    if not found.merged.isfinite().all():
        return Reason("nonfinite", "NaN or infinity is in it")
    if likely.replay.share < EXPLAINED:
        return _part(found)
    if any(factor != 1 for factor in likely.factors):
        return _told(likely, asked, found.dtype)
    return _part(found) or _precision(likely.replay, found.dtype, wrong)


def scaled(found: Evidence, asked: Sequence[Asked], likely: Likely) -> Reason | None:
    """The coefficients, where arithmetic that is not known leaves next to nothing of the change open; None for 1."""
    left = float((found.change - found.sum(likely.factors)).square().sum())
    away = any(abs(factor - 1) > NEAR for factor in likely.factors)
    if not away or left > NOTHING * float(found.change.square().sum()):
        return None
    return _told(likely, asked, found.dtype)


def most_likely(found: Evidence, asked: Sequence[Asked]) -> Likely:
    """The coefficients of what is there: the simplest that leave the least of it open."""
    scales = [each.factor for each in asked]
    ones = (1.0,) * len(asked)
    best = Likely(ones, closest(found, ones, scales))
    if best.replay.away < PERFECT or not found.merged.isfinite().all():
        return best
    fitted = fit(found)
    known = tuple(_nearest(factor, _known(each)) for factor, each in zip(fitted, asked, strict=True))
    plain = (tuple(map(_plain, fitted, asked, [digits] * len(asked))) for digits in DIGITS)
    for factors in dict.fromkeys((known, *plain, fitted)):
        other = Likely(factors, closest(found, factors, scales))
        if factors != best.factors and _clearly(found, other.replay, best.replay):
            best = other
    return best


def _plain(factor: float, asked: Asked, digits: int) -> float:
    """The factor that gives a weight of few digits."""
    return float(f"{factor * asked.weight:.{digits}g}") / asked.weight if asked.weight else factor


def fit(found: Evidence) -> tuple[float, ...]:
    """The coefficients c of C ~ sum c_k D_k; 1 for an adapter that changes nothing here."""
    import torch

    used = [n for n, change in enumerate(found.changes) if change.any()]
    factors = [1.0] * len(found.changes)
    if not used:
        return tuple(factors)
    weight = 1 / found.unit.flatten()
    matrix = torch.stack([found.changes[n].flatten() * weight for n in used], dim=1)  # [elements, adapters]

    def solved(change: torch.Tensor) -> list[float]:
        values = (change.flatten() * weight).unsqueeze(1)
        return [float(value) for value in torch.linalg.lstsq(matrix, values, driver="gelsd").solution.flatten()]

    for n, value in zip(used, solved(found.change), strict=True):
        factors[n] = value
    tried = []
    for _ in range(ROUNDS):
        given = rounded(found.base + found.sum(factors), found.dtype)
        tried.append((float(found.away(given).clamp(max=16).mean()), tuple(factors)))
        for n, value in zip(used, solved(found.merged - given), strict=True):
            factors[n] += value
    return min(tried)[1]


def _clearly(found: Evidence, other: Replay, best: Replay) -> bool:
    gained = (best.away - other.away) * found.base.numel()
    return other.away < FEWER * best.away and gained > ENOUGH


def _known(asked: Asked) -> list[tuple[float, str]]:
    """Coefficients with a meaning, for an adapter's updates of one tensor."""
    known = [
        (1.0, ""),
        (0.0, "it was not merged here"),
        (2.0, "it was merged twice"),
        (-1.0, "it was subtracted, or base and merged are swapped"),
    ]
    if asked.weight not in (0, 1):
        known.append((1 / asked.weight, "its weight was left out"))
    scaling = asked.scaling
    if scaling is None or not scaling.scale:
        return [*known, THRICE]
    for dtype in ("BF16", "F16"):
        known.append((_as(scaling.scale, dtype) / scaling.scale, f"its scale was rounded to {dtype}"))
    if scaling.scale != 1:
        known.append((1 / scaling.scale, "the scale was left out"))
        known.append((scaling.scale, "the scale was applied twice"))
    if not scaling.rank:
        return [*known, THRICE]
    root = math.sqrt(scaling.rank)
    rules: list[tuple[float, str]] = {
        "alpha": [(1 / scaling.rank, "alpha/rank"), (1 / root, "alpha/sqrt(rank)")],
        "alpha/sqrt(rank)": [(root, "alpha"), (1 / root, "alpha/rank")],
    }.get(
        scaling.rule,
        [(scaling.rank, "alpha"), (root, "alpha/sqrt(rank)"), (1 / scaling.rank, "one divided by the rank again")],
    )
    known += [(factor, f"the scale was taken as {rule}") for factor, rule in rules if factor != 1]
    return [*known, THRICE]


def _as(number: float, dtype: str) -> float:
    import torch

    return float(rounded(torch.tensor([number], dtype=torch.float64, device="cpu"), dtype))


def _nearest(factor: float, known: Sequence[tuple[float, str]]) -> float:
    """The known coefficient that a fitted one is close to; itself if none is."""
    value = min((value for value, _ in known), key=lambda value: abs(factor - value) / (abs(value) or 1.0))
    return value if abs(factor - value) <= NEAR * (abs(value) or 1.0) else factor


def _told(likely: Likely, asked: Sequence[Asked], dtype: str) -> Reason:
    """What other factors than 1 mean."""
    factors, best = likely
    if swapped := _swapped(factors, asked):
        return Reason("weights-swapped", swapped, tuple(factors))
    away = [n for n, factor in enumerate(factors) if factor != 1]
    texts = [_one_told(factors[n], asked[n], best) for n in away]
    missing, rounding = [not factors[n] for n in away], [_is_rounding(factors[n], asked[n], dtype) for n in away]
    if all(rounding):
        return Reason("rounded-scale", "; ".join(texts), tuple(factors), fine=True)
    twice = all(factors[n] == 2 and (asked[n].weight != 0.5 or best.how == "passes") for n in away)
    word = "missing" if all(missing) else "twice" if twice else "scale"
    return Reason(word, "; ".join(texts), tuple(factors))


def _swapped(factors: Sequence[float], asked: Sequence[Asked]) -> str:
    """Whether the weights are those that were asked for, of other adapters."""
    weights = [each.weight for each in asked]
    applied = [factor * weight for factor, weight in zip(factors, weights, strict=True)]
    if len({*weights}) < 2 or not all(map(_alike, sorted(applied), sorted(weights))):
        return ""
    pairs = ", ".join(f"{each.name} has {weight:.4g}" for each, weight in zip(asked, applied, strict=True))
    return f"the adapters' weights were swapped: {pairs}"


def _alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=EXACT)


def missing(asked: Asked) -> str:
    return f"{asked.name}: it was not merged here"


def _one_told(factor: float, asked: Asked, best: Replay) -> str:
    if not factor:
        return missing(asked)
    words = [text for value, text in _known(asked) if value == factor]
    if factor == 2 and best.how == "passes":
        words = [f"{words[0]}, in two passes"]
    scale = asked.factor
    times = f": {apart(scale * factor, scale)} times its product instead of {scale:.4g}" if scale else ""
    if words and words[0].startswith("it was merged") and asked.weight == 1:
        first, *others = words
        meant = f" (or {', or '.join(others)})" if others else ""
        return f"{asked.name}: {first}{meant}{times}"
    meant = f" (as if {', or '.join(words)})" if words else ""
    return (
        f"{asked.name}: merged with weight {apart(asked.weight * factor, asked.weight)} instead of"
        f" {asked.weight:.4g}{meant}{times}"
    )


def _is_rounding(factor: float, asked: Asked, dtype: str) -> bool:
    """Whether it is the right scale, as the output's dtype has it."""
    scaling = asked.scaling
    return (
        bool(scaling and scaling.scale) and factor == _as(scaling.factor, dtype) / scaling.factor if scaling else False
    )


def apart(number: float, other: float) -> str:
    """A number with four digits, or as many as make it another one than `other`."""
    digits = next((n for n in range(4, 17) if float(f"{number:.{n}g}") != float(f"{other:.{n}g}")), 4)
    return f"{number:.{digits}g}"


def _precision(best: Replay, dtype: str, wrong: int) -> Reason:
    """The right change: how it was rounded, or that single elements are others."""
    if best.how == "once" and wrong and best.share < 1:
        return damaged(wrong)
    if best.how == "rounded-factors":
        text = f"the adapters' factors were rounded to {best.dtype} before they were multiplied"
        return Reason(best.how, text, fine=resolution(best.dtype) <= resolution(dtype))
    if best.how == "rounded-delta" or best.dtype:
        fine = resolution(best.dtype) <= resolution(dtype)
        text = f"the delta was rounded to {best.dtype} before it was added"
        return Reason("rounded-delta", text, fine=fine)
    if best.how == "sequential":
        return Reason(
            "sequential", "the adapters were added one after the other, with a rounding after each", fine=True
        )
    return Reason("rounding", "it is the right change, rounded more than once or with less precision", fine=True)


def damaged(wrong: int) -> Reason:
    what = "one element is another number" if wrong == 1 else f"{wrong:,} elements are other numbers"
    return Reason("damaged", f"it is the right change, but {what}: flipped bits, or edited since")


def _part(found: Evidence) -> Reason | None:
    """Whether some rows are right, and the others have nothing of the change, or are other numbers."""
    right = (found.away(rounded(found.right, found.dtype)) <= 1).all(dim=1)
    asked = (rounded(found.right, found.dtype) != found.base).any(dim=1)
    none = (found.merged == rounded(found.base, found.dtype)).all(dim=1) & asked
    count = len(found.rows)
    if not (right & ~none).any():
        return None
    if int(none.sum()) >= 2 and int((right | none).sum()) >= OVERLAP * count:
        row = int(found.rows[none][0])
        return Reason("part", f"some of its rows have the change, others (like {row}) have nothing of it")
    if MOST * count <= int(right.sum()) < count and _whole_rows(found, right):
        row = int(found.rows[~right][0])
        return Reason("part", f"some of its rows are right, others (like {row}) are other numbers")
    return None


def _whole_rows(found: Evidence, right: torch.Tensor) -> bool:
    """Whether the rows that are not right are others altogether, and not in single elements."""
    off = (found.away(rounded(found.right, found.dtype)) > 1)[~right].double().mean(dim=1)
    return bool((off > MOST).all())


def rest(found: Evidence) -> Iterator[tuple[str, torch.Tensor]]:
    """What is left of the change without what was asked for; and all of it, where it is another one."""
    yield "added", found.merged - found.right
    delta = found.right - found.base
    size = float(found.change.norm() * delta.norm())
    if size and abs(float((found.change * delta).sum())) < OTHER * size:
        yield "instead", found.change

"""Why a merged tensor is not what base and adapters give: the scale that was really applied, and what explains it.

The real change C of some rows is fitted by the adapters' own changes D_k (least squares, in float64): C ~ sum c_k D_k.
A right merge has c = 1. What c is after a mistake is known (2 for a double merge, the rank where alpha was taken for
alpha/rank), so c is moved to the nearest of these, and believed only if W + sum c_k D_k, rounded, is what is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from loratool.blocks import each_block
from loratool.layout import NewTensor, Weighted
from loratool.matrices import Merged, row_count
from loratool.rounding import bits, round_once
from loratool.tensors import torch_dtype

if TYPE_CHECKING:
    import torch

NEAR = 0.03  # relative distance at which a fitted coefficient is taken for a known one
EXPLAINED = 0.99  # share of elements that an explanation must give, to a unit in the last place
ROUNDED = 0.95  # share that a rounded delta must give exactly: sums in float32 are rounded at other places now and then
DTYPES = ("BF16", "F16")  # what a delta is rounded to before it is added, apart from the output's own dtype


class Reason(NamedTuple):
    """One explanation: a stable word, what completes "TENSORS: ...", and the coefficients that were fitted."""

    word: str
    text: str
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Some rows of one tensor in float64, [rows, columns] each: the base's, the merged one's, each adapter's change."""

    base: torch.Tensor
    merged: torch.Tensor
    changes: tuple[torch.Tensor, ...]
    dtype: str  # of the merged tensor


def evidence(
    tensor: NewTensor, there: torch.Tensor, rows: Sequence[tuple[int, int]], groups: Sequence[Sequence[Weighted]]
) -> Evidence:
    """What can be known of some ranges of rows, where `there` [rows, columns] are the merged checkpoint's.

    `groups` are the tensor's updates, by adapter.
    """
    import torch

    columns = there.shape[1]

    def computed(updates: Sequence[Weighted]) -> torch.Tensor:
        """The tensor with these updates alone. Its rows are longer where none of them sees experts."""
        changed = replace(tensor, dtype="F64", updates=tuple(updates))
        width = math.prod(tensor.shape) // row_count(changed)
        found = []
        for start, stop in rows:
            low, high = start * columns // width, -(-stop * columns // width)
            part = torch.zeros(high - low, width, dtype=torch.float64, device="cpu")

            def receive(block: Merged, low: int = low, high: int = high, part: torch.Tensor = part) -> None:
                first, last = max(block.start, low), min(block.stop, high)
                part[first - low : last - low] = block.values[first - block.start : last - block.start]

            each_block(changed, receive, rows=(low, high))
            found.append(part.flatten()[start * columns - low * width : stop * columns - low * width])
        return torch.cat(found).view(-1, columns)

    base = torch.zeros(there.shape, dtype=torch.float64, device="cpu")
    if tensor.source is not None:
        whole = tensor.source.reshape(tensor.source.numel // columns, columns)
        base = torch.cat([whole.narrow(0, start, stop - start).read().double() for start, stop in rows])
    return Evidence(base, there.double(), tuple(computed(group) - base for group in groups), tensor.dtype)


def explain(found: Evidence, groups: Sequence[Sequence[Weighted]], names: Sequence[str]) -> Reason:
    """The explanation that fits; `names` are what the adapters are called."""
    if not found.merged.isfinite().all():
        return Reason("nonfinite", "NaN or infinity is in it")
    plain = sum(found.changes, found.base * 0)
    for dtype in DTYPES:
        for rounded in (_rounded(plain, dtype), sum((_rounded(change, dtype) for change in found.changes), plain * 0)):
            if _share(found, rounded, ulps=0) >= max(ROUNDED, _share(found, plain, ulps=0)):
                return Reason("rounded-delta", f"the delta was rounded to {dtype} before it was added")
    fitted = _least_squares(found)
    candidates = [_known(group) for group in groups]
    snapped = [_nearest(factor, known) for factor, known in zip(fitted, candidates, strict=True)]
    for factors in (tuple(value for value, _ in snapped), fitted):
        total = sum((c * change for c, change in zip(factors, found.changes, strict=True)), found.base * 0)
        if _share(found, total, ulps=1) >= EXPLAINED:
            return _told(
                factors,
                [words if factors[n] == value else "" for n, (value, words) in enumerate(snapped)],
                groups,
                names,
            )
    return _unexplained(found, fitted)


def _least_squares(found: Evidence) -> tuple[float, ...]:
    """The coefficients c of C ~ sum c_k D_k; 0 for an adapter without a change here."""
    import torch

    change = (found.merged - found.base).flatten()
    matrix = torch.stack([delta.flatten() for delta in found.changes], dim=1)  # [elements, adapters]
    return tuple(map(float, torch.linalg.lstsq(matrix, change.unsqueeze(1), driver="gelsd").solution.flatten()))


def _known(group: Sequence[Weighted]) -> list[tuple[float, str]]:
    """Coefficients with a meaning, for an adapter's updates of one tensor."""
    known = [
        (1.0, ""),
        (0.0, "it was not merged here"),
        (2.0, "it was merged twice"),
        (3.0, "it was merged three times"),
        (-1.0, "it was subtracted"),
    ]
    weights = {weight for _, weight in group}
    if len(weights) == 1 and (weight := weights.pop()) not in (0, 1):
        known.append((1 / weight, "its weight was left out"))
    scalings = {item.update.scaling for item, _ in group}
    scaling = scalings.pop() if len(scalings) == 1 else None
    if scaling is None or not scaling.scale or not scaling.rank:
        return known
    rank, scale = scaling.rank, scaling.scale
    root = math.sqrt(rank)
    rules: list[tuple[float, str]] = {
        "alpha": [(1 / rank, "alpha/rank"), (1 / root, "alpha/sqrt(rank)")],
        "alpha/sqrt(rank)": [(root, "alpha"), (1 / root, "alpha/rank")],
    }.get(scaling.rule, [(rank, "alpha"), (root, "alpha/sqrt(rank)"), (1 / rank, "one divided by the rank again")])
    known += [(factor, f"the scale was taken as {rule}") for factor, rule in rules if factor != 1]
    if scale != 1:
        known.append((1 / scale, "the scale was left out"))
        known.append((scale, "the scale was applied twice"))
    return known


def _nearest(factor: float, known: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The known coefficient that a fitted one is close to, with all that it can mean; itself if none is."""
    value = min((value for value, _ in known), key=lambda value: abs(factor - value) / (abs(value) or 1.0))
    if abs(factor - value) > NEAR * (abs(value) or 1.0):
        return factor, ""
    return value, ", or ".join(words for other, words in known if other == value)


def _told(
    factors: Sequence[float], words: Sequence[str], groups: Sequence[Sequence[Weighted]], names: Sequence[str]
) -> Reason:
    parts = []
    for factor, text, group, name in zip(factors, words, groups, names, strict=True):
        if factor == 1:
            continue
        scaling, weight = group[0].item.update.scaling, group[0].weight
        right = scaling.factor * weight if scaling else 0.0
        scale = f": {right * factor:.3g} times its product instead of {right:.3g}" if right else ""
        what = text or "it was scaled otherwise"
        parts.append(f"{name}: {what}{scale if factor else ''}")
    if not parts:
        return Reason(
            "rounding", "it is the right change, rounded more than once or with less precision", tuple(factors)
        )
    away = [factor for factor in factors if factor != 1]
    word = "missing" if not any(away) else "twice" if away == [2.0] else "scale"
    return Reason(word, "; ".join(parts), tuple(factors))


def _unexplained(found: Evidence, fitted: Sequence[float]) -> Reason:
    """What the real change has in common with the wanted one, where no coefficient explains it."""
    change = found.merged - found.base
    total = sum((c * delta for c, delta in zip(fitted, found.changes, strict=True)), found.base * 0)
    size = float(change.square().sum())
    share = 1 - float((change - total).square().sum()) / size if size else 0.0
    if size > 0.5 * float(found.base.square().sum() + found.merged.square().sum()):
        return Reason("other-base", "it has nothing in common with the base's tensor", tuple(fitted))
    if share < 0.01:
        return Reason("other-base", "it differs from the base's tensor, and not by these adapters", tuple(fitted))
    return Reason("other-change", f"{share:.0%} of its change is that of the adapters, the rest is not", tuple(fitted))


def _share(found: Evidence, total: torch.Tensor, ulps: int) -> float:
    """How many elements of the base plus this change, rounded, are what is there, or so many units next to it."""
    distance = ulps_between(_rounded(found.base + total, found.dtype), found.merged, found.dtype)
    return float((distance <= ulps).double().mean())


def _rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The same numbers as `dtype` has them, in float64."""
    import torch

    return round_once(values, torch.empty(values.shape, dtype=torch_dtype(dtype), device="cpu")).double()


def ulps_between(one: torch.Tensor, other: torch.Tensor, dtype: str) -> torch.Tensor:
    """How many numbers of `dtype` two of its numbers are apart, in float64; infinity where one of them is NaN."""
    import torch

    codes = [_codes(values.to(torch_dtype(dtype))) for values in (one, other)]
    distance = (codes[0] - codes[1]).abs()
    return torch.where(one.isnan() ^ other.isnan(), torch.inf, distance)


def _codes(values: torch.Tensor) -> torch.Tensor:
    """Numbers in the order of their size, one apart from each other, both zeros alike; in float64."""
    code = bits(values).long()
    size = values.element_size() * 8
    magnitude = code & ((1 << (size - 1)) - 1)
    return magnitude.double().mul_(1.0 - 2.0 * (code < 0))

"""How much of a change is left once it is rounded to the dtype of an output.

A fine-tune can be smaller than the steps between the numbers that its base is stored in: bfloat16 has 8 bits, and what
is less than half a step of a weight moves it nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

ENOUGH = 0.9  # less of a change left is worth a warning


class Survival(NamedTuple):
    """What was asked of some elements, and what became of it. Sums add up over blocks, tensors and models."""

    asked: float = 0.0  # sum of delta^2
    kept: float = 0.0  # sum of delta * what changed
    elements: int = 0  # with a delta other than 0
    moved: int = 0  # of these, with another value than before

    @property
    def share(self) -> float | None:
        """The projection of the real change on the delta: 1 where all is left, 0 where nothing is.

        None without a delta, and for one whose square is too large for a number.
        """
        return self.kept / self.asked if self.asked and math.isfinite(self.asked + self.kept) else None

    @property
    def moved_share(self) -> float | None:
        return self.moved / self.elements if self.elements else None

    def plus(self, other: Survival) -> Survival:
        return Survival(
            self.asked + other.asked, self.kept + other.kept, self.elements + other.elements, self.moved + other.moved
        )


def survival_of(before: torch.Tensor, exact: torch.Tensor, after: torch.Tensor) -> Survival:
    """Of a block of rows, [rows, columns] each: as it was, as it is wanted (in the compute dtype), and as it became."""
    import torch

    before = before.to(exact.dtype)
    wanted, change = exact - before, after.to(exact.dtype) - before
    asked = wanted != 0
    return Survival(
        float(wanted.square().sum(dtype=torch.float64)),
        float((wanted * change).sum(dtype=torch.float64)),
        int(asked.sum()),
        int((asked & (change != 0)).sum()),
    )


def total(found: Mapping[str, Survival]) -> Survival:
    return reduce(Survival.plus, found.values(), Survival())


def loss(found: Mapping[str, Survival], how: str, remedy: str) -> list[str]:
    """A warning, where a change is about to be rounded away: of all tensors together, or of some."""
    weak = sorted((each.share, name) for name, each in found.items() if each.share is not None and each.share < ENOUGH)
    if not weak:
        return []
    (worst, name), share = weak[0], total(found).share or 0.0
    what = f"{len(weak)} of {len(found)} tensors keep less than {ENOUGH:.0%} of their change {how}"
    return [f"{what}, {name} {worst:.0%}, all together {share:.0%}: {remedy}"]


def survival_json(found: Mapping[str, Survival]) -> dict[str, Any]:
    """The shares of all tensors together, and of each."""

    def shares(each: Survival) -> dict[str, float | None]:
        share, moved = each.share, each.moved_share
        return {
            "share": None if share is None else round(share, 4),
            "moved": None if moved is None else round(moved, 4),
        }

    return {**shares(total(found)), "tensors": {name: shares(each) for name, each in found.items()}}

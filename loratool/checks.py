"""What was found out about single tensors, and the reasons that several of them share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratool.diagnosis import Reason
from loratool.survival import Survival
from loratool.tensors import DTYPE_BITS

if TYPE_CHECKING:
    import torch

LITTLE = 0.05  # of the elements move: the change is much less than the steps of the dtype
HALF, MOST = 0.5, 0.9  # of the elements that move; of all elements
OFTEN = 0.001  # of 16-bit elements next to the right one: more than float32 arithmetic leaves


@dataclass(frozen=True)
class TensorCheck:
    """One tensor that the adapters change.

    `error` is the largest distance from the correctly rounded result, relative to the largest number of its row.
    `differing` counts elements that are not that result, `wrong` those too far from it to be a rounding, and `ulps` is
    how far those are, in units of their last place. `told` is false where the change is less than the dtype can hold:
    the right result is the base's tensor, bit for bit.
    """

    name: str
    dtype: str
    elements: int
    ulps: float
    differing: int
    wrong: int
    survival: Survival
    error: float = 0.0
    told: bool = True
    reason: Reason | None = None
    moved: int = 0  # elements that are to be others than the base's
    kept: int = 0  # of these, still the base's

    @property
    def weak(self) -> bool:
        """Whether next to nothing of the change shows in this dtype: then the base is next to right everywhere."""
        return self.moved <= self.elements * LITTLE

    @property
    def suspect(self) -> bool:
        """Whether elements next to the right ones are more than arithmetic leaves there."""
        if self.weak or DTYPE_BITS[self.dtype] > 16:
            return self.differing > self.moved * HALF and self.moved < self.elements * MOST
        return self.differing > self.elements * OFTEN

    @property
    def bad(self) -> bool:
        return bool(self.wrong) or (self.reason is not None and not self.reason.fine)

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor": self.name,
            "dtype": self.dtype,
            "elements": self.elements,
            "error": number(self.error),
            "ulps": number(self.ulps),
            "differing": self.differing,
            "wrong": self.wrong,
            "told": self.told,
            "reason": None if self.reason is None else self.reason.word,
            "factors": [] if self.reason is None else [round(factor, 6) for factor in self.reason.factors],
        }


def number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Finding:
    """One reason for a no, or for a yes that could be better, and the tensors it is about."""

    word: str
    text: str
    tensors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.word, "text": self.text, "tensors": list(self.tensors)}


@dataclass
class Moves:
    """Counts the elements that are to be others than the base's, as long as they may be few: `open`."""

    elements: int  # of the tensor
    narrow: bool
    open: bool = True
    seen: int = 0
    moved: int = 0
    kept: int = 0  # moved ones that are still the base's

    def count(self, wanted: torch.Tensor, stored: torch.Tensor, there: torch.Tensor | None) -> None:
        """Note a block; `there` is None where it is right."""
        moves = wanted != stored
        self.seen += wanted.numel()
        self.moved += int(moves.count_nonzero())
        if there is not None:
            self.kept += int((moves & (there == stored)).count_nonzero())
        self.open = self.moved <= (LITTLE * self.elements if self.narrow else MOST * self.seen)

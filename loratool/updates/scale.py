"""Rows or columns of the base times one learned factor each, as (IA)^3 has them (arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.errors import Problem
from loratool.tensors import Shape, TensorRef
from loratool.updates.base import Fixed, Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scale(Update):
    """W' = factor * W.

    `factor` is 1-D along `axis` of the region (0: one per row, 1: one per column); W is that of no other update. A
    weight w other than 1 moves W by w * (W' - W), so that 0 is the identity.
    """

    kind: ClassVar[str] = "scale"
    role: ClassVar[str] = "renormalise"
    dims: ClassVar[int] = 1
    factor: TensorRef
    axis: int

    def expected(self, region: Shape) -> Mapping[str, Shape]:
        return {"factor": (region[self.axis],)}

    def check(self, region: Shape, experts: int | None) -> Iterator[Problem]:
        if len(region) <= self.axis:
            what = f"a scale along axis {self.axis} needs {self.axis + 1} dimensions, its region is {list(region)}"
            yield Problem("E-SHAPE", what, rule="R-022")
        else:
            yield from super().check(region, experts)

    def open(self, dtype: torch.dtype, expert: int | None, device: str = "cpu") -> ScaleBlock:
        return ScaleBlock(self.read("factor", dtype, expert, device), self.axis)


@dataclass
class ScaleBlock(Fixed):
    vector: torch.Tensor  # [rows] for axis 0, [columns of dim 1] for axis 1
    axis: int

    def apply(self, W: torch.Tensor, start: int, weight: float) -> None:
        factor = self._factor(start, W)
        if weight == 1:
            W.mul_(factor)
        else:
            W.add_((W * factor).sub_(W), alpha=weight)

    def revert(self, W: torch.Tensor, terms: torch.Tensor, start: int, weight: float) -> None:
        # W' = (1 - w) W + w f W. What a divisor of 0 took away is not finite here, and stored in full.
        factor = self._factor(start, W)
        divisor = (1 - weight) + weight * factor  # [rows, 1] or [columns]
        worse = (abs(1 - weight) + (weight * factor).abs()) / divisor.abs()  # how much the divisor's sum cancels
        W.div_(divisor)
        lost = (W.abs() * worse).nan_to_num_(0.0, 0.0)
        terms.add_(lost.amax(dim=1, keepdim=True))  # alone on its region: nothing was taken out before

    def _factor(self, start: int, W: torch.Tensor) -> torch.Tensor:
        """The factors of rows start.. of W: [rows, 1] for axis 0, [columns] for axis 1."""
        if self.axis == 0:
            return self.vector[start : start + len(W)].unsqueeze(1)
        return self.vector.repeat_interleave(W.shape[1] // len(self.vector))  # kernel positions share a column's

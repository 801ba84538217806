"""DoRA: a magnitude per row (or column) on the direction of W + scale * delta (arXiv:2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.tensors import Shape, TensorRef
from loratool.updates.base import Additive, Fixed, Scaling, Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dora(Update):
    """V = W + scale * delta; W' = magnitude * V / ||V||.

    `direction` is the additive update that gives the delta. `magnitude` is 1-D along `axis` of the region (0: one
    per row, 1: one per column); the norm is taken over all other axes, of the W that no other update has touched.
    A weight w other than 1 moves W by w * (W' - W), so that 0 is the identity.
    """

    kind: ClassVar[str] = "dora"
    role: ClassVar[str] = "renormalise"
    direction: Update
    magnitude: TensorRef
    axis: int

    @property
    def scaling(self) -> Scaling | None:
        return self.direction.scaling

    @property
    def first_pass(self) -> bool:
        return self.axis == 1  # a column's norm needs all rows

    def components(self) -> dict[str, TensorRef]:
        return {**self.direction.components(), "magnitude": self.magnitude}

    def expected(self, region: Shape) -> Mapping[str, Shape]:
        return {**self.direction.expected(region), "magnitude": (region[self.axis],)}

    def ranks(self) -> list[int]:
        return self.direction.ranks()

    def open(self, dtype: torch.dtype, expert: int | None, device: str = "cpu") -> DoraBlock:
        direction = self.direction.open(dtype, expert, device)
        assert isinstance(direction, Additive)
        vector = self.read("magnitude", dtype, expert, device)
        return DoraBlock(direction, vector, self.axis, vector.new_zeros(len(vector)).double())


@dataclass
class DoraBlock(Fixed):
    """`norm` is that of the pristine direction, in float64: per row for axis 0, per column of dim 1 for axis 1.

    It is known after the first pass (axis 1), row by row after `apply` (axis 0), or from an undo record.
    """

    direction: Additive
    vector: torch.Tensor  # the magnitude: [rows] for axis 0, [columns of dim 1] for axis 1
    axis: int
    norm: torch.Tensor  # of the vector's shape

    def observe(self, W: torch.Tensor, start: int) -> None:
        squares = self._direction(W, start).double().square_().sum(dim=0)  # [columns]
        squares = squares.reshape(len(self.vector), -1).sum(dim=1)  # kernel positions share a column's norm
        self.norm = (self.norm.square_() + squares).sqrt_()

    def apply(self, W: torch.Tensor, start: int, weight: float) -> None:
        import torch

        V = self._direction(W, start)  # [rows, columns]
        if self.axis == 0:
            self.norm[start : start + len(V)] = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64)
        V.mul_(self._factor(start, V))
        if weight == 1:
            W.copy_(V)
        else:
            W.add_(V.sub_(W), alpha=weight)

    def revert(self, W: torch.Tensor, terms: torch.Tensor, start: int, weight: float) -> None:
        # W' = (1 - w) W + w f (W + s D) with f = magnitude / norm, so W = (W' - w f s D) / ((1 - w) + w f).
        factor = self._factor(start, W)
        divisor = (1 - weight) + weight * factor
        share = weight * factor / divisor  # [rows, 1] or [columns]
        delta = self.direction.delta(start, start + len(W)).mul_(self.direction.scale)
        worse = (abs(1 - weight) + (weight * factor).abs()) / divisor.abs()  # how much the divisor's sum cancels
        W.div_(divisor)
        lost = self.direction.magnitude(start, start + len(W)) * (share.abs() * worse)  # [rows, 1] or [rows, columns]
        lost = lost.amax(dim=1, keepdim=True) + (W.abs() * worse).amax(dim=1, keepdim=True)
        terms.div_(divisor.abs().amin(dim=-1, keepdim=True)).add_(lost)
        W.sub_(delta.mul_(share))

    def _factor(self, start: int, W: torch.Tensor) -> torch.Tensor:
        """magnitude / norm for rows start.. of W: [rows, 1] for axis 0, [columns] for axis 1."""
        factor = self.vector / self.norm.to(W.dtype)
        if self.axis == 0:
            return factor[start : start + len(W)].unsqueeze(1)
        return factor.repeat_interleave(W.shape[1] // len(factor))

    def _direction(self, W: torch.Tensor, start: int) -> torch.Tensor:
        V = W.clone()
        self.direction.apply(V, start, 1.0)
        return V

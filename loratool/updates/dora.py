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

    def open(self, dtype: torch.dtype, expert: int | None) -> DoraBlock:
        direction = self.direction.open(dtype, expert)
        assert isinstance(direction, Additive)
        return DoraBlock(direction, self.read("magnitude", dtype, expert), self.axis)


@dataclass
class DoraBlock(Fixed):
    direction: Additive
    magnitude: torch.Tensor  # [rows] for axis 0, [columns of dim 1] for axis 1
    axis: int
    squares: torch.Tensor | None = None  # per column, float64: many rows are summed

    def observe(self, W: torch.Tensor, start: int) -> None:
        squares = self._direction(W, start).double().square_().sum(dim=0)  # [columns]
        squares = squares.reshape(len(self.magnitude), -1).sum(dim=1)  # kernel positions share a column's norm
        self.squares = squares if self.squares is None else self.squares + squares

    def apply(self, W: torch.Tensor, start: int, weight: float) -> None:
        import torch

        V = self._direction(W, start)  # [rows, columns]
        if self.axis == 0:
            norm = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64).to(V.dtype)  # [rows]
            factor = (self.magnitude[start : start + len(V)] / norm).unsqueeze(1)  # [rows, 1]
        else:
            assert self.squares is not None, "the first pass comes before apply"
            norm = self.squares.sqrt().to(V.dtype)
            factor = (self.magnitude / norm).repeat_interleave(V.shape[1] // len(norm))  # [columns]
        V.mul_(factor)
        if weight == 1:
            W.copy_(V)
        else:
            W.add_(V.sub_(W), alpha=weight)

    def _direction(self, W: torch.Tensor, start: int) -> torch.Tensor:
        V = W.clone()
        self.direction.apply(V, start, 1.0)
        return V

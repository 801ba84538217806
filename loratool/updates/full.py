"""Updates that store whole tensors: a replacement, a difference, or some replaced rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.tensors import Shape, TensorRef
from loratool.updates.base import Additive, Fixed, Scaling, Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Replace(Update):
    """W' = value. A weight w other than 1 moves W by w * (value - W).

    Shapes: value is the region's. Trained heads, biases and norms are stored so.
    """

    kind: ClassVar[str] = "replace"
    dims: ClassVar[int] = 0
    role: ClassVar[str] = "replace"
    value: TensorRef

    def expected(self, region: Shape) -> Mapping[str, Shape]:
        return {"value": region}

    def elementwise(self, weight: float) -> bool:
        return weight == 1  # any other rounds in between

    def open(self, dtype: torch.dtype, expert: int | None, device: str = "cpu") -> ReplaceBlock:
        value = self.read("value", dtype, expert, device)
        return ReplaceBlock(value.reshape(len(value) if value.dim() else 1, -1))


@dataclass
class ReplaceBlock(Fixed):
    value: torch.Tensor  # [rows, columns]

    def apply(self, W: torch.Tensor, start: int, weight: float) -> None:
        move(W, self.value[start : start + W.shape[0]], weight)

    def apply_at(self, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, weight: float) -> None:
        values.copy_(self.value[rows, columns])


@dataclass(frozen=True)
class Add(Update):
    """W' = W + scale * value: a stored difference. Shapes: value is the region's."""

    kind: ClassVar[str] = "add"
    dims: ClassVar[int] = 0
    value: TensorRef
    factors: Scaling

    @property
    def scaling(self) -> Scaling:
        return self.factors

    def expected(self, region: Shape) -> Mapping[str, Shape]:
        return {"value": region}

    def elementwise(self, weight: float) -> bool:
        return True

    def open(self, dtype: torch.dtype, expert: int | None, device: str = "cpu") -> AddBlock:
        value = self.read("value", dtype, expert, device)
        return AddBlock(value.reshape(len(value) if value.dim() else 1, -1), self.factors.factor)


@dataclass
class AddBlock(Additive):
    value: torch.Tensor  # [rows, columns]
    scale: float
    steps = 1
    length = 1

    def delta(self, start: int, stop: int) -> torch.Tensor:
        return self.value[start:stop]

    def size(self, start: int, stop: int) -> torch.Tensor:
        return self.value[start:stop].abs().amax(dim=1)

    def apply_at(self, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, weight: float) -> None:
        values.add_(self.value[rows, columns].double(), alpha=weight * self.scale)


@dataclass(frozen=True)
class ReplaceRows(Update):
    """W'[index] = value: trained tokens of an embedding, say.

    Shapes: index [k] int64, strictly increasing row numbers of the whole tensor; value [k, columns...].
    """

    kind: ClassVar[str] = "replace_rows"
    dims: ClassVar[int] = 1
    role: ClassVar[str] = "replace"
    index_components: ClassVar[tuple[str, ...]] = ("index",)
    index: TensorRef
    value: TensorRef

    def expected(self, region: Shape) -> Mapping[str, Shape]:
        count = min(max(1, *self.index.shape, 1), region[0])
        return {"index": (count,), "value": (count, *region[1:])}

    def elementwise(self, weight: float) -> bool:
        return weight == 1

    def open(self, dtype: torch.dtype, expert: int | None, device: str = "cpu") -> ReplaceRowsBlock:
        value = self.read("value", dtype, expert, device)
        return ReplaceRowsBlock(self.read("index", None, expert, device), value.reshape(len(value), -1))


@dataclass
class ReplaceRowsBlock(Fixed):
    index: torch.Tensor  # [k] int64
    value: torch.Tensor  # [k, columns]

    def apply(self, W: torch.Tensor, start: int, weight: float) -> None:
        inside = (self.index >= start) & (self.index < start + W.shape[0])
        rows = self.index[inside] - start
        moved = W[rows]
        move(moved, self.value[inside], weight)
        W[rows] = moved

    def apply_at(self, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, weight: float) -> None:
        import torch

        near = torch.searchsorted(self.index, rows).clamp_(max=len(self.index) - 1)
        hit = self.index[near] == rows
        values[hit] = self.value[near[hit], columns[hit]].to(values.dtype)


def move(W: torch.Tensor, value: torch.Tensor, weight: float) -> None:
    """W + weight * (value - W), in place; exactly `value` for a weight of 1."""
    if weight == 1:
        W.copy_(value)
    else:
        W.add_(value - W, alpha=weight)

"""LoHa: the Hadamard product of two low-rank products (FedPara, arXiv:2108.06098; LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from loratool.tensors import Shape, TensorRef
from loratool.updates.base import Additive, Scaling, Update, inner
from loratool.updates.lora import LeftFactor, core_size, low_rank_shapes, safe_norm, with_core

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loha(Update):
    """delta = (B1 @ A1) * (B2 @ A2), elementwise.

    Shapes: as LoRA's A and B, twice; both products with a Tucker core, or none.
    """

    kind: ClassVar[str] = "loha"
    A1: TensorRef
    B1: TensorRef
    A2: TensorRef
    B2: TensorRef
    factors: Scaling
    mid1: TensorRef | None = None
    mid2: TensorRef | None = None

    @property
    def scaling(self) -> Scaling:
        return self.factors

    def expected(self, region: Shape) -> Mapping[str, Shape]:
        core1, core2 = ("", "") if self.mid1 is None else ("mid1", "mid2")
        return {
            **low_rank_shapes(region, inner(self.B1), core1, "B1", "A1"),
            **low_rank_shapes(region, inner(self.B2), core2, "B2", "A2"),
        }

    def ranks(self) -> list[int]:
        return [inner(self.B1), inner(self.B2)]

    def open(self, dtype: torch.dtype, expert: int | None, device: str = "cpu") -> LohaBlock:
        mid1 = None if self.mid1 is None else self.read("mid1", dtype, expert, device)
        mid2 = None if self.mid2 is None else self.read("mid2", dtype, expert, device)
        A1, A2 = self.read("A1", dtype, expert, device), self.read("A2", dtype, expert, device)
        return LohaBlock(
            with_core(A1, mid1),
            LeftFactor(self.part("B1", expert), dtype, device),
            with_core(A2, mid2),
            LeftFactor(self.part("B2", expert), dtype, device),
            self.factors.factor,
            core_size(A1, mid1),
            core_size(A2, mid2),
        )


@dataclass
class LohaBlock(Additive):
    A1: torch.Tensor  # [rank, columns]
    B1: LeftFactor  # [rows, rank]
    A2: torch.Tensor
    B2: LeftFactor
    scale: float
    size1: torch.Tensor  # [rank, columns], as in LoRA
    size2: torch.Tensor

    def delta(self, start: int, stop: int) -> torch.Tensor:
        B1, B2 = self.B1.rows(start, stop), self.B2.rows(start, stop)
        return (B1 @ self.A1).mul_(B2 @ self.A2)  # [rows, columns]

    def size(self, start: int, stop: int) -> torch.Tensor:
        return self.B1.lengths(start, stop) * self.B2.lengths(start, stop) * self.longest_columns  # [rows]

    @cached_property
    def longest_columns(self) -> torch.Tensor:
        return (safe_norm(self.size1, 0) * safe_norm(self.size2, 0)).amax()

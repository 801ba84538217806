"""LoHa: the Hadamard product of two low-rank products (FedPara, arXiv:2108.06098; LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.tensors import Shape, TensorRef
from loratool.updates.base import Additive, Scaling, Update, inner
from loratool.updates.lora import core_size, low_rank_shapes, product_bound, safe_norm, with_core

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

    def open(self, dtype: torch.dtype, expert: int | None) -> LohaBlock:
        mid1 = None if self.mid1 is None else self.read("mid1", dtype, expert)
        mid2 = None if self.mid2 is None else self.read("mid2", dtype, expert)
        A1, A2 = self.read("A1", dtype, expert), self.read("A2", dtype, expert)
        return LohaBlock(
            with_core(A1, mid1),
            self.read("B1", dtype, expert),
            with_core(A2, mid2),
            self.read("B2", dtype, expert),
            self.factors.factor,
            core_size(A1, mid1),
            core_size(A2, mid2),
        )


@dataclass
class LohaBlock(Additive):
    A1: torch.Tensor  # [rank, columns]
    B1: torch.Tensor  # [rows, rank]
    A2: torch.Tensor
    B2: torch.Tensor
    scale: float
    size1: torch.Tensor  # [rank, columns], as in LoRA
    size2: torch.Tensor

    def delta(self, start: int, stop: int) -> torch.Tensor:
        return (self.B1[start:stop] @ self.A1).mul_(self.B2[start:stop] @ self.A2)  # [rows, columns]

    def add_magnitude(self, terms: torch.Tensor, start: int, factor: float) -> None:
        rows = slice(start, start + len(terms))
        left = safe_norm(self.B1, 1)[rows] * safe_norm(self.B2, 1)[rows]
        terms.addr_(left, safe_norm(self.size1, 0) * safe_norm(self.size2, 0), alpha=factor)

    def bound(self) -> float:
        return product_bound(self.B1, self.A1) * product_bound(self.B2, self.A2)

"""LoKr: the Kronecker product of two small matrices, each whole or of low rank (LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.tensors import Shape, TensorRef
from loratool.updates.base import Additive, Scaling, Update, inner
from loratool.updates.lora import with_core

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Lokr(Update):
    """delta[i*b + p, j*d + q, kernel...] = W1[i, j] * W2[p, q, kernel...].

    Shapes: W1 [a, c] is `w1`, or B1 [a, rank] @ A1 [rank, c]; W2 [b, d, kernel...] is `w2`, or
    B2 [b, rank] @ A2 [rank, d, kernel...], with a core A2 [rank, d]. The region is [a*b, c*d, kernel...].
    """

    kind: ClassVar[str] = "lokr"
    factors: Scaling
    w1: TensorRef | None = None
    A1: TensorRef | None = None
    B1: TensorRef | None = None
    w2: TensorRef | None = None
    A2: TensorRef | None = None
    B2: TensorRef | None = None
    mid2: TensorRef | None = None

    @property
    def scaling(self) -> Scaling:
        return self.factors

    def expected(self, region: Shape) -> Mapping[str, Shape]:
        # Only the products a*b and c*d are given: the first factor's shape decides the second's.
        rows, columns, *kernel = region
        left, right = self.w1 or self.B1, self.w1 or self.A1
        assert left is not None and right is not None, "the components of a kind are complete before it is checked"
        a, c = (*left.shape[-2:-1], 1)[0], (*right.shape[-1:], 1)[0]
        a, c = (a if a and rows % a == 0 else rows), (c if c and columns % c == 0 else columns)
        b, d = rows // a, columns // c
        shapes: dict[str, Shape] = {"w1": (a, c), "w2": (b, d, *kernel)}
        if self.B1 is not None:
            rank = inner(self.B1)
            shapes |= {"B1": (a, rank), "A1": (rank, c)}
        if self.B2 is not None:
            rank = inner(self.B2)
            shapes |= {"B2": (b, rank), "A2": (rank, d, *kernel)}
            if self.mid2 is not None:
                shapes |= {"A2": (rank, d), "mid2": (rank, rank, *kernel)}
        return shapes

    def ranks(self) -> list[int]:
        return [inner(B) for B in (self.B1, self.B2) if B is not None]

    def open(self, dtype: torch.dtype, expert: int | None) -> LokrBlock:
        if self.w1 is not None:
            w1 = self.read("w1", dtype, expert)
        else:
            w1 = self.read("B1", dtype, expert) @ self.read("A1", dtype, expert)  # [a, c]
        if self.w2 is not None:
            w2 = self.read("w2", dtype, expert)  # [b, d, kernel...]
        else:
            mid = None if self.mid2 is None else self.read("mid2", dtype, expert)
            A2 = self.read("A2", dtype, expert)
            d = A2.shape[1]
            A2 = with_core(A2, mid)  # [rank, d * kernel]
            w2 = (self.read("B2", dtype, expert) @ A2).reshape(-1, d, A2.shape[1] // d)
        return LokrBlock(w1, w2.reshape(w2.shape[0], w2.shape[1], -1), self.factors.factor)


@dataclass
class LokrBlock(Additive):
    w1: torch.Tensor  # [a, c]
    w2: torch.Tensor  # [b, d, kernel]
    scale: float

    def delta(self, start: int, stop: int) -> torch.Tensor:
        import torch

        row = torch.arange(start, stop)
        left = self.w1[row // len(self.w2)]  # [rows, c]
        right = self.w2[row % len(self.w2)]  # [rows, d, kernel]
        return torch.einsum("nc,ndk->ncdk", left, right).flatten(1)  # [rows, c * d * kernel]

    def bound(self) -> float:
        return float(self.w1.abs().max() * self.w2.abs().max())

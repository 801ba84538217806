"""LoKr: the Kronecker product of two small matrices, each whole or of low rank (LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.tensors import Shape, TensorRef
from loratool.updates.base import Additive, Scaling, Update, inner
from loratool.updates.lora import core_size, with_core

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

    def open(self, dtype: torch.dtype, expert: int | None, device: str = "cpu") -> LokrBlock:
        def read(name: str) -> torch.Tensor:
            return self.read(name, dtype, expert, device)

        if self.w1 is not None:
            w1 = read("w1")  # [a, c]
            size1 = w1.abs()
        else:
            B1, A1 = read("B1"), read("A1")
            w1, size1 = B1 @ A1, B1.abs() @ A1.abs()  # [a, c]
        if self.w2 is not None:
            w2 = read("w2")  # [b, d, kernel...]
            size2 = w2.abs()
        else:
            mid = None if self.mid2 is None else read("mid2")
            B2, A2 = read("B2"), read("A2")
            right, size = with_core(A2, mid), core_size(A2, mid)  # [rank, d * kernel]
            w2, size2 = B2 @ right, B2.abs() @ size.abs()  # [b, d * kernel]
            w2, size2 = (x.reshape(len(B2), A2.shape[1], -1) for x in (w2, size2))
        w2, size2 = (x.reshape(x.shape[0], x.shape[1], -1) for x in (w2, size2))  # [b, d, kernel]
        return LokrBlock(w1, w2, self.factors.factor, size1, size2)


@dataclass
class LokrBlock(Additive):
    w1: torch.Tensor  # [a, c]
    w2: torch.Tensor  # [b, d, kernel]
    scale: float
    size1: torch.Tensor  # of w1's shape: its elements' magnitudes, or those of the products they are sums of
    size2: torch.Tensor

    def delta(self, start: int, stop: int) -> torch.Tensor:
        return kronecker_rows(self.w1, self.w2, start, stop)

    def size(self, start: int, stop: int) -> torch.Tensor:
        import torch

        row = torch.arange(start, stop, device=self.w1.device)
        left, right = self.size1.amax(dim=1), self.size2.flatten(1).amax(dim=1)  # [a], [b]
        return left[row // len(right)] * right[row % len(right)]  # [rows]


def kronecker_rows(w1: torch.Tensor, w2: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows start:stop of the Kronecker product of w1 [a, c] and w2 [b, d, kernel]: [rows, c * d * kernel]."""
    import torch

    row = torch.arange(start, stop, device=w1.device)
    left = w1[row // len(w2)]  # [rows, c]
    right = w2[row % len(w2)]  # [rows, d, kernel]
    return torch.einsum("nc,ndk->ncdk", left, right).flatten(1)

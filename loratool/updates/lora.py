"""LoRA: W + scale * (B @ A), for linear, embedding and convolution weights (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from loratool.tensors import Shape, TensorRef
from loratool.updates.base import Additive, Scaling, Update, inner

if TYPE_CHECKING:
    import torch

WINDOW = 1 << 18  # numbers of a left factor that are read at a time
SLICE = 32  # terms of a product that are summed before they are added: the error grows with it, not with the rank


@dataclass(frozen=True)
class Lora(Update):
    """A low-rank delta.

    Shapes: A [rank, in...], B [out, rank], the region [out, in...]; a convolution's kernel dimensions are part of
    `in...`. With `mid` [rank, rank, kernel...] (a Tucker core, arXiv:2309.14859) A is [rank, in].
    """

    kind: ClassVar[str] = "lora"
    A: TensorRef
    B: TensorRef
    factors: Scaling
    mid: TensorRef | None = None

    @property
    def scaling(self) -> Scaling:
        return self.factors

    def expected(self, region: Shape) -> Mapping[str, Shape]:
        return low_rank_shapes(region, inner(self.B), "" if self.mid is None else "mid")

    def ranks(self) -> list[int]:
        return [inner(self.B)]

    def elementwise(self, weight: float) -> bool:
        return self.mid is None  # a contracted core is rounded before it is multiplied

    def open(self, dtype: torch.dtype, expert: int | None, device: str = "cpu") -> LoraBlock:
        mid = None if self.mid is None else self.read("mid", dtype, expert, device)
        A = self.read("A", dtype, expert, device)
        B = LeftFactor(self.part("B", expert), dtype, device)
        return LoraBlock(with_core(A, mid), B, self.factors.factor, core_size(A, mid))


class LeftFactor:
    """B [rows, rank], of which some rows at a time are read where its file allows it: at rank 256 it is large."""

    def __init__(self, ref: TensorRef, dtype: torch.dtype, device: str) -> None:
        self.ref, self.dtype, self.device = ref, dtype, device
        self.first = 0
        first = ref.narrow(0, 0, 0) if ref.in_order else ref
        self.read = first.read(dtype).contiguous().to(device)  # [some rows, rank]
        self.norms = safe_norm(self.read, 1)  # [some rows]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop, [rows, rank]."""
        if start < self.first or stop > self.first + len(self.read):
            count = max(stop - start, WINDOW // max(1, inner(self.ref)))
            count = min(count, self.ref.shape[0] - start)
            self.first = start
            self.read = self.ref.narrow(0, start, count).read(self.dtype).to(self.device)
            self.norms = safe_norm(self.read, 1)
        return self.read[start - self.first : stop - self.first]

    def lengths(self, start: int, stop: int) -> torch.Tensor:
        """The Euclidean norms of rows start:stop, [rows]."""
        self.rows(start, stop)
        return self.norms[start - self.first : stop - self.first]

    def at(self, rows: torch.Tensor) -> torch.Tensor:
        """Single ones of the rows that were read last, [n, rank]."""
        return self.read.index_select(0, rows - self.first)


@dataclass
class LoraBlock(Additive):
    A: torch.Tensor  # [rank, columns]
    B: LeftFactor  # [rows, rank]
    scale: float
    A_size: torch.Tensor  # [rank, columns]: A, or with a core the magnitudes that A's elements are sums of

    def __post_init__(self) -> None:
        self.length = min(len(self.A), SLICE)
        self.steps = -(-len(self.A) // SLICE)

    def delta(self, start: int, stop: int) -> torch.Tensor:
        return self.B.rows(start, stop) @ self.A  # [rows, columns]

    def size(self, start: int, stop: int) -> torch.Tensor:
        # Cauchy-Schwarz: |B[i] @ A[:, j]| <= |B[i]| |A[:, j]|, where |B| @ |A| would cost a product.
        return self.B.lengths(start, stop) * self.longest_column  # [rows]

    @cached_property
    def longest_column(self) -> torch.Tensor:
        import torch

        # Some columns at a time: a norm in float64 takes a copy.
        return torch.stack([safe_norm(part, 0).amax() for part in torch.split(self.A_size, 1024, dim=1)]).amax()

    def apply(self, W: torch.Tensor, start: int, weight: float) -> None:
        # W + scale * (B @ A), fused: no delta is ever materialised.
        B = self.B.rows(start, start + len(W))  # [rows, rank]
        for first in range(0, B.shape[1], SLICE):
            part = slice(first, first + SLICE)
            W.addmm_(B[:, part], self.A[part], alpha=weight * self.scale)

    def apply_at(self, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, weight: float) -> None:
        B, A = self.B.at(rows).T.double(), self.A.index_select(1, columns).double()  # [rank, n]
        values.add_((B * A).sum(dim=0), alpha=weight * self.scale)  # [n]


def safe_norm(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """Euclidean norms along `dim`: in float64, since squares of ordinary factors leave float32; or scaled before."""
    import torch

    norms: torch.Tensor
    if matrix.dtype == torch.float32:
        norms = torch.linalg.vector_norm(matrix, dim=dim, dtype=torch.float64).float()
        return norms
    largest = matrix.abs().amax(dim=dim, keepdim=True).clamp_(min=torch.finfo(matrix.dtype).tiny)
    norms = (matrix / largest).norm(dim=dim) * largest.squeeze(dim)
    return norms


def with_core(A: torch.Tensor, mid: torch.Tensor | None) -> torch.Tensor:
    """The right factor as a matrix [rank, columns], with a Tucker core contracted into it if there is one.

    A_core[m, j, k...] = sum over n of mid[m, n, k...] * A[n, j]   (LyCORIS `functional/general.py`, rebuild_tucker)
    """
    if mid is not None:
        import torch

        A = torch.einsum("mn...,nj->mj...", mid, A)  # [rank, in, kernel...]
    return A.flatten(1)  # [rank, columns]


def core_size(A: torch.Tensor, mid: torch.Tensor | None) -> torch.Tensor:
    """What the rounding error of `with_core` is relative to, [rank, columns]; without a core there is none."""
    return with_core(A.abs(), mid.abs()) if mid is not None else A.flatten(1)


def low_rank_shapes(region: Shape, rank: int, core: str, left: str = "B", right: str = "A") -> dict[str, Shape]:
    """Component shapes of a low-rank product B @ A over `region` [out, in, kernel...], with an optional core."""
    rows, *columns = region
    if not core:
        return {left: (rows, rank), right: (rank, *columns)}
    return {left: (rows, rank), right: (rank, *columns[:1]), core: (rank, rank, *columns[1:])}

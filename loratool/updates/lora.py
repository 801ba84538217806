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

    def open(self, dtype: torch.dtype, expert: int | None) -> LoraBlock:
        mid = None if self.mid is None else self.read("mid", dtype, expert)
        A = self.read("A", dtype, expert)
        return LoraBlock(with_core(A, mid), self.read("B", dtype, expert), self.factors.factor, core_size(A, mid))


@dataclass
class LoraBlock(Additive):
    A: torch.Tensor  # [rank, columns]
    B: torch.Tensor  # [rows, rank]
    scale: float
    size: torch.Tensor  # [rank, columns]: A, or with a core the magnitudes that A's elements are sums of

    def delta(self, start: int, stop: int) -> torch.Tensor:
        return self.B[start:stop] @ self.A  # [rows, columns]

    def bound(self) -> float:
        return product_bound(self.B, self.A)

    def add_magnitude(self, terms: torch.Tensor, start: int, factor: float) -> None:
        # Cauchy-Schwarz: |B[i] @ A[:, j]| <= |B[i]| |A[:, j]|, a rank-1 matrix, where |B| @ |A| would cost a product.
        rows, columns = self.norms
        terms.addr_(rows[start : start + len(terms)], columns, alpha=factor)

    @cached_property
    def norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        return safe_norm(self.B, 1), safe_norm(self.size, 0)  # [rows], [columns]

    def apply(self, W: torch.Tensor, start: int, weight: float) -> None:
        # W + scale * (B @ A), fused: no delta is ever materialised.
        W.addmm_(self.B[start : start + W.shape[0]], self.A, alpha=weight * self.scale)


def safe_norm(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """Euclidean norms along `dim`; scaled before, since squares of ordinary factors can leave float32."""
    import torch

    largest = matrix.abs().amax(dim=dim, keepdim=True).clamp_(min=torch.finfo(matrix.dtype).tiny)
    norms: torch.Tensor = (matrix / largest).norm(dim=dim) * largest.squeeze(dim)
    return norms


def product_bound(B: torch.Tensor, A: torch.Tensor) -> float:
    """No element of B @ A is larger (Cauchy-Schwarz)."""
    return float(B.norm(dim=1).max() * A.norm(dim=0).max())


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

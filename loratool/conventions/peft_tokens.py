"""Trained rows of an embedding, as tensors that are made when they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.tensors import Computed, TensorRef

if TYPE_CHECKING:
    import torch


def patched(table: TensorRef, rows: TensorRef, indices: list[int]) -> TensorRef:
    """A stored table with some of its rows replaced."""

    def make() -> torch.Tensor:
        tensor = table.read().clone()  # [tokens, dim]
        tensor[indices] = rows.read(tensor.dtype)
        return tensor

    return TensorRef(table.name, table.dtype, table.shape, Computed(make), table.shape)


def row_numbers(indices: list[int]) -> TensorRef:
    """Row numbers of a config as an int64 tensor [k]."""

    def make() -> torch.Tensor:
        import torch

        return torch.tensor(indices, dtype=torch.int64, device="cpu")

    shape = (len(indices),)
    return TensorRef("trainable_token_indices", "I64", shape, Computed(make), shape)


def reordered(rows: TensorRef, order: list[int]) -> TensorRef:
    """Rows [k, dim] in another order."""
    return TensorRef(rows.name, rows.dtype, rows.shape, Computed(lambda: rows.read()[order]), rows.shape)

"""Adapters whose numbers were stored in 8 bits: every one of them is a bfloat16 as well, and is read as that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.checkpoint import Checkpoint
from loratool.tensors import FileState, Shape, TensorRef, as_bytes, torch_dtype

if TYPE_CHECKING:
    import torch

# Bits of the exponent, bits of the fraction, and the exponent's bias.
LAYOUTS = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15)}
FEW = 64  # numbers that are widened without torch: an alpha


@dataclass(frozen=True, eq=False)
class Widened:
    """The tensor `source`, its 8-bit floating-point numbers as bfloat16."""

    source: TensorRef

    @property
    def path(self) -> Path | None:
        return self.source.data.path

    @property
    def states(self) -> tuple[FileState, ...]:
        return self.source.data.states

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        return self.source.read(torch_dtype(dtype)).reshape(shape)

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        if self.source.numel > FEW:
            yield as_bytes(self.load(dtype, shape))
            return
        table = _table(self.source.dtype)
        yield memoryview(b"".join(table[byte] for chunk in self.source.chunks() for byte in bytes(chunk)))


def widened(source: Checkpoint) -> Checkpoint:
    """The file with bfloat16 in the place of 8-bit floating point. Scales stored beside it stay unknown tensors."""
    if not any(ref.dtype in LAYOUTS for ref in source.tensors.values()):
        return source
    tensors = {name: _wide(ref) if ref.dtype in LAYOUTS else ref for name, ref in source.tensors.items()}
    count = sum(ref.dtype in LAYOUTS for ref in source.tensors.values())
    note = f"{count} of its tensors are stored in 8-bit floating point, which bfloat16 holds without loss"
    return replace(source, tensors=tensors, notes=(*source.notes, note))


def _wide(ref: TensorRef) -> TensorRef:
    return TensorRef(ref.name, "BF16", ref.shape, Widened(ref), ref.shape)


@cache
def _table(dtype: str) -> tuple[bytes, ...]:
    """The two bytes of the bfloat16 that each 8-bit code stands for."""
    return tuple(_bits(code, *LAYOUTS[dtype]).to_bytes(2, "little") for code in range(256))


def _bits(code: int, exponent_bits: int, fraction_bits: int, bias: int) -> int:
    sign, exponent = code >> 7, code >> fraction_bits & (1 << exponent_bits) - 1
    fraction = code & (1 << fraction_bits) - 1
    if exponent == (1 << exponent_bits) - 1:
        # E4M3 has no infinity, and numbers of the largest exponent: only its largest fraction is none.
        if (exponent_bits == 4 and fraction == 7) or (exponent_bits == 5 and fraction):
            return 0x7FC0  # NaN
        if exponent_bits == 5:
            return sign << 15 | 0x7F80
    if not exponent:
        if not fraction:
            return sign << 15
        exponent = 1
        while not fraction >> fraction_bits:  # a subnormal has its leading bit further down
            fraction, exponent = fraction << 1, exponent - 1
        fraction &= (1 << fraction_bits) - 1
    return sign << 15 | (exponent - bias + 127) << 7 | fraction << 7 - fraction_bits

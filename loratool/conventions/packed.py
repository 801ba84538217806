"""Factors that lie on the layer itself, several projections of one matrix packed into one pair of them.

    X.lora_A [n * rank, in]   X.lora_B [rows of the n trained blocks, rank]

Block i's delta is ``B_i @ A_i``: A_i the i-th `rank` rows of A, B_i the rows of B that belong to it. A plain layer is
one block. The scale is always alpha/rank, with the rank of one block. loralib began with this, litgpt follows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loratool.checkpoint import Checkpoint
from loratool.errors import InvalidFile, Problem
from loratool.names import natural
from loratool.tensors import TensorRef

RULE = "alpha/rank"
FACTORS = ("lora_A", "lora_B")
# Which rows of the result are trained: rebuilt by the producers, and saved by some versions of them.
INDEXES = ("lora_ind", "_lora_ind")


@dataclass(frozen=True)
class Pair:
    """The two factors of one layer: A [blocks * rank, in], B [rows, rank]."""

    module: str
    A: TensorRef
    B: TensorRef

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @property
    def blocks(self) -> int:
        return self.A.shape[0] // self.rank

    def split(self, sizes: Iterable[int]) -> list[tuple[TensorRef, TensorRef]]:
        """(A_i [rank, in], B_i [size, rank]) of every block, for blocks of these numbers of rows."""
        parts, row = [], 0
        for block, size in enumerate(sizes):
            parts.append((self.A.narrow(0, block * self.rank, self.rank), self.B.narrow(0, row, size)))
            row += size
        return parts


def key(module: str, leaf: str) -> str:
    """The tensor `leaf` of a module; a model that is one layer has no module name."""
    return f"{module}.{leaf}" if module else leaf


def owner(name: str) -> str | None:
    """The module whose factor (or index) the tensor is, or None if it is neither."""
    module, _, leaf = name.rpartition(".")
    return module if leaf in (*FACTORS, *INDEXES) else None


def factor_modules(names: Iterable[str]) -> set[str]:
    """Modules that hold at least one factor."""
    return {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in FACTORS}


def pairs(source: Checkpoint) -> list[Pair]:
    """Every layer's factors, in natural order. Raises InvalidFile for all that are single or do not fit together."""
    found, problems = [], []
    for module in sorted(factor_modules(source.tensors), key=natural):
        A, B = (source.tensors.get(key(module, factor)) for factor in FACTORS)
        if A is None or B is None:
            what = f"{module or 'the layer'} has {'lora_B' if A is None else 'lora_A'} but not its partner"
            problems.append(Problem("E-COMPONENTS", what, str(source.path)))
        elif len(A.shape) != 2 or len(B.shape) != 2 or not A.numel or not B.numel or A.shape[0] % B.shape[1]:
            what = f"lora_A is {list(A.shape)}, lora_B {list(B.shape)}; they must be [n * rank, in] and [rows, rank]"
            problems.append(Problem("E-SHAPE", what, module))
        else:
            found.append(Pair(module, A, B))
    if problems:
        raise InvalidFile(problems)
    return found

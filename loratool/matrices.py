"""A tensor as matrices, cut into blocks of rows, and the updates that are open for one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from loratool.layout import NewTensor, Weighted
from loratool.rows import Rows
from loratool.tensors import CHUNK, DTYPE_BITS, MERGEABLE, torch_dtype
from loratool.updates import Block

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = CHUNK  # stored bytes of a row block: small enough for it and its wider copy to stay in the cache
ROLE_ORDER = ("replace", "add", "renormalise")  # section "Merging" of the spec
NARROW = [dtype for dtype in MERGEABLE if DTYPE_BITS[dtype] <= 16]


def compute_dtype(tensor: NewTensor) -> str:
    """float32 where both ends have 16 bits or less and single elements can be settled in float64; else float64."""
    narrow = (tensor.source.dtype if tensor.source else tensor.dtype) in NARROW and tensor.dtype in NARROW
    elementwise = all(item.update.elementwise(weight) for item, weight in tensor.updates)
    components = (ref for item, _ in tensor.updates for ref in item.update.components().values())
    return "F32" if narrow and elementwise and all(ref.dtype != "F64" for ref in components) else "F64"


class Opened(NamedTuple):
    """An update that is open for one matrix, and the rows of the matrix it covers."""

    block: Block
    start: int
    stop: int
    weight: float
    first_pass: bool
    replaces: bool
    terms: int  # k of section 5 of UNDO.md: how often, at most, an element is rounded by it


Part = tuple[Opened, "torch.Tensor", int]  # an update, its rows of a block, the number of the first in its region


class Merged(NamedTuple):
    """A block of rows of a merged tensor. Its memory is used again for the next one.

    Rows are counted through all of a tensor's matrices. `exact` are the numbers that were rounded; None where nothing
    had to be computed, and `values` are `stored`.
    """

    start: int
    stop: int
    stored: torch.Tensor  # [rows, columns]; no rows for a new tensor
    values: torch.Tensor  # [rows, columns], in the output's dtype
    exact: torch.Tensor | None  # [rows, columns], in the compute dtype; with `reproducible` only to its last place
    largest: float  # magnitude before rounding
    source: Rows
    opened: Sequence[Opened]
    first: int  # the number of the matrix's first row


def matrices_of(tensor: NewTensor) -> tuple[int, int, int]:
    """A tensor as (matrices, rows, columns): one matrix per expert where updates see experts, else one."""
    experts = stacked(tensor)
    shape = tensor.shape[1:] if experts else tensor.shape
    rows = shape[0] if shape else 1
    columns = 1
    for dim in shape[1:]:
        columns *= dim
    return tensor.shape[0] if experts else 1, rows, columns


def row_count(tensor: NewTensor) -> int:
    """The rows of all of a tensor's matrices, as `Merged` and `each_block` count them."""
    matrices, rows, _ = matrices_of(tensor)
    return matrices * rows


def sample_of(block: Merged) -> slice | None:
    """The rows of a block that tell how much of a change is left: one in sixteen, in every fourth block.

    In all blocks they would tell the same, and cost an eighth of a merge in small operations.
    """
    number = (block.start - block.first) // block.source.height
    return None if number % 4 else slice(None, None, 16)


def block_rows(tensor: NewTensor) -> list[tuple[int, int]]:
    """The rows start:stop of each block that `each_block` hands out, in its order, counted through all matrices."""
    matrices, rows, columns = matrices_of(tensor)
    blocks = [*blocks_of(rows, columns, tensor)]
    return [(matrix * rows + start, matrix * rows + stop) for matrix in range(matrices) for start, stop in blocks]


def stacked(tensor: NewTensor) -> bool:
    """Whether its first dimension counts experts, of which each is a matrix for updates."""
    return any(item.target.stacked for item, _ in tensor.updates)


def ordered(tensor: NewTensor, matrix: int) -> list[Weighted]:
    """The updates that touch a matrix: replacements, then deltas, then DoRA; in the adapters' order within each."""
    touching = [w for w in tensor.updates if w.item.target.expert in (None, matrix)]
    return sorted(touching, key=lambda w: ROLE_ORDER.index(w.item.update.role))


def held(tensor: NewTensor) -> NewTensor:
    """A tensor of which blocks can be asked for again and again, without reading a whole factor each time."""
    return replace(tensor, updates=tuple(map(_held, tensor.updates)))


def _held(weighted: Weighted) -> Weighted:
    """An update of all experts is opened once per expert, so what can not be sliced in its file is read once before."""
    item = weighted.item
    return (
        weighted if item.target.experts is None else Weighted(replace(item, update=item.update.held()), weighted.weight)
    )


def opened_for(weighted: Weighted, tensor: NewTensor, matrix: int, rows: int, device: str) -> Opened:
    target, update = weighted.item.target, weighted.item.update
    expert = matrix if target.experts is not None else None
    start, stop = target.rows or (0, rows)
    block = update.open(torch_dtype(compute_dtype(tensor)), expert, device)
    products = sum(name.startswith(("B", "mid")) for name in update.components())
    terms = 2 + products * ((update.scaling and update.scaling.rank) or 0)
    return Opened(block, start, stop, weighted.weight, update.first_pass, update.role == "replace", terms)


def inside_of(opened: Sequence[Opened], W: torch.Tensor, start: int, stop: int) -> Iterator[Part]:
    """Each update with its rows of a block, and the number of the first of them within the update's region."""
    for update in opened:
        low, high = max(start, update.start), min(stop, update.stop)
        if low < high:
            yield update, W[low - start : high - start], low - update.start


def height_of(rows: int, columns: int, tensor: NewTensor) -> int:
    """How many rows make a block."""
    return max(1, min(rows, BLOCK_BYTES * 8 // max(1, columns * DTYPE_BITS[tensor.dtype])))


def rows_of(tensor: NewTensor, rows: int, columns: int, device: str = "cpu", height: int = 0) -> Rows:
    height = min(rows, height) or height_of(rows, columns, tensor)
    return Rows(tensor.source, columns, height, torch_dtype(compute_dtype(tensor)), device)


def blocks_of(rows: int, columns: int, tensor: NewTensor, height: int = 0) -> Iterator[tuple[int, int]]:
    height = height or height_of(rows, columns, tensor)
    for start in range(0, rows if columns else 0, height):
        yield start, min(rows, start + height)

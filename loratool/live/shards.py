"""Parameters that lie in pieces on several processes: which piece is here, and the updates narrowed to it.

Nothing is gathered. Of B @ A a process that has some rows needs those of B, one that has some columns those of A. An
update that needs what others have, such as the norms of a DoRA that run across the pieces, is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool.adapter import Targeted
from loratool.maps import cutting
from loratool.maps.cutting import Uncuttable
from loratool.tensors import Shape, TensorRef
from loratool.updates import Dora, ReplaceRows, Update

if TYPE_CHECKING:
    import torch


class Piece(NamedTuple):
    """The part of a tensor that this process has: `start` and `shape` for each dimension."""

    start: Shape
    shape: Shape


def is_distributed(parameter: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # nobody has made one where it was not imported
    return module is not None and isinstance(parameter, module.DTensor)


def piece_of(parameter: Any) -> Piece | str:
    """The part of a DTensor that lies here; or in words, why that is none that can be changed alone."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return "lies on other processes only"
    start, shape = [0] * parameter.dim(), list(parameter.shape)
    for number, placement in enumerate(parameter.placements):
        if type(placement) is Shard:
            dim, parts = placement.dim % parameter.dim(), mesh.size(number)
            each = -(-shape[dim] // parts)  # as torch.chunk: the last pieces are smaller, or empty
            before = min(shape[dim], coordinate[number] * each)
            start[dim], shape[dim] = start[dim] + before, min(each, shape[dim] - before)
        elif not isinstance(placement, Replicate):
            return f"is placed on several processes as {placement}"
    return Piece(tuple(start), tuple(shape))


def narrowed(item: Targeted, piece: Piece) -> Targeted | None:
    """The update of a piece; None where it has no part in it. Raises Uncuttable where no piece can do it alone."""
    target, update = item.target, item.update
    start, shape, whole = piece.start, piece.shape, target.shape
    if target.stacked:
        if target.expert is not None:
            if not start[0] <= target.expert < start[0] + shape[0]:
                return None
            target = replace(target, expert=target.expert - start[0])
        elif shape[0] < whole[0]:
            update = cutting.of_experts(update, start[0], shape[0])
            target = replace(target, experts=shape[0])
        start, shape, whole = start[1:], shape[1:], whole[1:]
    lead = int(target.experts is not None)
    if any(size < full for size, full in zip(shape[2:], whole[2:], strict=True)):
        raise Uncuttable("they are cut along the kernel")
    if isinstance(update, Dora) and shape[1 - update.axis] < whole[1 - update.axis]:
        raise Uncuttable(f"the norm of each {('row', 'column')[update.axis]} is of all its elements")
    if whole:
        first, last = target.rows or (0, whole[0])
        low, high = max(first, start[0]), min(last, start[0] + shape[0])
        if low >= high:
            return None
        if (low, high) != (first, last):
            narrow = _rows(update, lead, low - first, high - first)
            if narrow is None:
                return None
            update = narrow
        rows = (low - start[0], high - start[0])
        target = replace(target, rows=None if rows == (0, shape[0]) else rows)
    if len(whole) > 1 and shape[1] < whole[1]:
        update = _columns(update, lead, start[1], start[1] + shape[1])
    return Targeted(replace(target, shape=piece.shape), update)


def _rows(update: Update, lead: int, start: int, stop: int) -> Update | None:
    if not isinstance(update, ReplaceRows):
        return cutting.rows(update, lead, start, stop)
    import torch

    index = update.index.read()  # [k], ascending
    low, high = torch.searchsorted(index, torch.tensor([start, stop], device="cpu")).tolist()
    if low == high:
        return None
    return ReplaceRows(TensorRef.of(index[low:high] - start), update.value.narrow(0, low, high - low))


def _columns(update: Update, lead: int, start: int, stop: int) -> Update:
    if isinstance(update, ReplaceRows):
        return replace(update, value=update.value.narrow(1, start, stop - start))
    return cutting.turned(cutting.rows(cutting.turned(update, lead), lead, start, stop), lead)


def all_agree(parameters: Iterable[Any], here: bool) -> bool:
    """Whether a call went well on every process that has pieces of these parameters, each of which must ask."""
    meshes = dict.fromkeys(parameter.device_mesh for parameter in parameters)
    if not meshes:
        return here
    import torch
    from torch import distributed

    for mesh in meshes:
        verdict = torch.tensor([int(here)], device=mesh.device_type)
        for dim in range(mesh.ndim):  # one dimension after the other reaches the whole mesh
            distributed.all_reduce(verdict, op=distributed.ReduceOp.MIN, group=mesh.get_group(dim))
        here = bool(verdict.item())
    return here

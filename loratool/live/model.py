"""A model in memory seen as a checkpoint, so that adapters are bound to it, and refused, like to one on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import conventions
from loratool.checkpoint import Checkpoint, Shard
from loratool.errors import InvalidFile, Mismatch, Problem
from loratool.live.parameter import Original, Parameter, Spot
from loratool.live.shards import Piece, is_distributed, piece_of
from loratool.quantised import SIXTEEN_BIT, Foreign
from loratool.tensors import InMemory, Shape, TensorRef, dtype_name
from loratool.wrappers import cleaned

if TYPE_CHECKING:
    import torch
    from torch import nn

PLAIN = ("F64", "F32", "F16", "BF16")  # 8 bits have their scales somewhere else
UNTIE = "give each its own memory first"


@dataclass(frozen=True)
class Unwritable(Foreign):
    """The data of a parameter that can not be changed in place; `method` says why."""

    def problem(self, name: str, where: str = "") -> Problem:
        return Problem("E-UNSUPPORTED", f"the parameter {name} {self.method}", where, self.hint)


@dataclass(frozen=True, eq=False)
class Live(InMemory):
    """The data of a parameter: the bits that it had before any adapter, or those `on_disk`, which are to be the same.

    The latter are for what lies in pieces, of which no process has all bytes.
    """

    original: Original | None = None
    on_disk: TensorRef | None = None

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        assert self.original is not None
        return self.original.load(dtype, shape) if self.on_disk is None else self.on_disk.read().reshape(shape)

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        assert self.original is not None
        yield from self.original.chunks(dtype, shape) if self.on_disk is None else self.on_disk.chunks()


@dataclass(frozen=True)
class Model:
    """A model's parameters by clean names. What can not be changed has no spot; `checkpoint` says why."""

    checkpoint: Checkpoint
    spots: Mapping[str, Spot]


def innermost(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and DistributedDataParallel put around it: they share its parameters."""
    from torch import nn

    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module) or (
            type(model).__name__ == "DistributedDataParallel" and isinstance(inner := model.module, nn.Module)
        ):
            model = inner
        else:
            return model


def read(model: nn.Module, known: Mapping[str, Parameter]) -> Model:
    """The parameters of a model as they are now. `known` are those that adapters changed: their original is bound to.

    Raises Mismatch for a model that has adapters in it already, InvalidFile for names that are not told apart.
    """
    found = dict(model.named_parameters(remove_duplicate=False))
    where = Path(f"<{type(model).__name__}>")
    if not found:
        raise InvalidFile(Problem("E-EMPTY", "the model has no parameters", str(where)))
    names, notes = cleaned([(name, _bare(name, parameter)) for name, parameter in found.items()], where)
    spots: dict[str, Spot] = {}
    tensors: dict[str, TensorRef] = {}
    for name, ref in names.items():
        spot = _spot(name, found[ref.name], ref)
        if isinstance(spot, Spot):
            spots[name] = spot
            original = Original(known.get(name) or Parameter(spot), spot.device)
            tensors[name] = replace(
                ref, data=Live(spot.values, _memory(found[ref.name], spot.values), original=original)
            )
        else:
            tensors[name] = replace(ref, data=spot)
    for one, other in _overlapping(spots):
        for name, beside in ((one, other), (other, one)):
            why = Unwritable(f"shares a part of its memory with {beside}", tensors[name], UNTIE)
            tensors[name] = replace(tensors[name], data=why)
    checkpoint = Checkpoint(where, (Shard(where, tensors, {}, None),), tensors, None, notes)
    if wrapped := conventions.matching(checkpoint):
        what = f"the model is itself a {wrapped[0].TITLE}"
        raise Mismatch(Problem("E-WRAPPED", what, str(where), "take its adapters out first (PEFT: `unload()`)"))
    return Model(checkpoint, spots)


def addresses(model: nn.Module) -> set[int]:
    """Where the parameters of a model lie in this process."""
    found: list[Any] = [each for each in model.parameters() if not (each.is_meta or is_uninitialized(each))]
    return {(each.to_local() if is_distributed(each) else each).data_ptr() for each in found}


def distributed(model: nn.Module) -> list[Any]:
    """The parameters that are spread over processes."""
    _put_back(model)
    return [parameter for parameter in model.parameters() if is_distributed(parameter)]


def _put_back(model: nn.Module) -> None:
    """FSDP2 leaves what a forward pass has gathered in place of the shards: changes of it would be lost."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    for module in model.modules() if kind is not None else ():
        if isinstance(module, kind):
            module.reshard()


def _bare(name: str, parameter: torch.Tensor) -> TensorRef:
    """A parameter by its name, dtype and shape."""
    shape = () if is_uninitialized(parameter) else tuple(parameter.shape)
    try:
        dtype = dtype_name(parameter.dtype)
    except StopIteration:
        dtype = str(parameter.dtype).removeprefix("torch.")  # of no checkpoint: it is refused where it is a target
    return TensorRef(name, dtype, shape, InMemory(parameter), shape)


def is_uninitialized(parameter: Any) -> bool:
    from torch.nn.parameter import is_lazy

    return bool(is_lazy(parameter))


def _spot(name: str, parameter: Any, ref: TensorRef) -> Spot | Foreign:
    """Where a parameter's numbers lie, or why it can not be changed."""
    import torch

    if hasattr(parameter, "quant_state") or ref.dtype not in PLAIN:
        return Foreign(type(parameter).__name__, replace(ref, name=ref.dtype), SIXTEEN_BIT)
    piece: Piece | str = Piece((0,) * len(ref.shape), ref.shape)
    values = parameter
    with torch.no_grad():
        if is_distributed(parameter):
            piece, values = piece_of(parameter), parameter.to_local()
        if isinstance(piece, str):
            return Unwritable(piece, ref, "only shards and replicas are changed in place")
        if parameter.is_meta or is_uninitialized(parameter):
            return Unwritable("has no numbers yet", ref, "load the weights first")
        if type(values.data).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return Unwritable(f"is a {type(values.data).__name__}", ref, "only plain numbers are changed in place")
        if tuple(values.shape) != piece.shape:
            return Unwritable(f"has {list(values.shape)} on this process, not {list(piece.shape)}", ref, "")
        if any(size > 1 and not step for size, step in zip(values.shape, values.stride(), strict=True)):
            return Unwritable("is expanded: several of its elements are one", ref, "make it contiguous first")
        return Spot(name, values.detach(), ref.dtype, ref.shape, piece)


def _memory(parameter: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    """Equal for parameters that are the same numbers."""
    if not values.numel():
        return (id(parameter),)
    return (str(values.device), values.data_ptr(), values.dtype, values.stride())


def _overlapping(spots: Mapping[str, Spot]) -> Iterator[tuple[str, str]]:
    """Pairs of parameters that are in one another's memory, without being the same."""
    extents = []
    for name, spot in spots.items():
        values = spot.values
        if values.numel():
            reach = 1 + sum((size - 1) * step for size, step in zip(values.shape, values.stride(), strict=True))
            start = values.data_ptr()
            same = (start, values.dtype, tuple(values.shape), values.stride())
            extents.append((str(values.device), start, start + reach * values.element_size(), same, name))
    extents.sort(key=lambda extent: extent[:3])
    for one, other in pairwise(extents):
        if one[0] == other[0] and other[1] < one[2] and one[3] != other[3]:
            yield one[4], other[4]

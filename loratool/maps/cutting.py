"""Updates taken apart and put elsewhere: turned, cut along rows, one expert of all. Nothing is read to do it.

Every update here is one of a matrix [out, in] or a bias [out]; with `lead` 1 its components have one more dimension in
front, of experts. What the arithmetic of a kind does not allow raises Uncuttable, with the reason.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.tensors import FileState, Shape, TensorRef, as_bytes
from loratool.updates import Add, Dora, Loha, Lokr, Lora, Replace, Scale, Update

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

KEPT = 4  # tensors of all experts that are held while their slices are used: two factors of two layers

Change = Callable[[TensorRef, int], TensorRef]  # of a component, along one of its dimensions


class Uncuttable(Exception):
    """Why an update has no part of that kind."""


@dataclass(frozen=True, eq=False)
class Derived:
    """A tensor that is made out of another one, whose file is still what is watched."""

    source: TensorRef
    make: Callable[[], torch.Tensor]
    keeper: Keeper | None = None

    @property
    def path(self) -> Path | None:
        return self.source.data.path

    @property
    def states(self) -> tuple[FileState, ...]:
        return self.source.data.states

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        return self.make().reshape(shape)

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        yield as_bytes(self.make())


def derived(
    source: TensorRef, shape: Shape, make: Callable[[], torch.Tensor], keeper: Keeper | None = None
) -> TensorRef:
    return TensorRef(source.name, source.dtype, shape, Derived(source, make, keeper), shape)


class Keeper:
    """Holds the few tensors of all experts that were read last: each of their slices would read all of it again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[TensorRef, torch.Tensor] = OrderedDict()
        self.largest = 0  # bytes

    def expert(self, ref: TensorRef, number: int) -> TensorRef:
        """One expert's part of [experts, ...]: straight out of the file if it lies there in one piece."""
        if not ref.views:
            return ref.select(number)
        self.largest = max(self.largest, ref.nbytes)
        return derived(ref, ref.shape[1:], lambda: self._read(ref)[number], self)

    @property
    def bound(self) -> int:
        """The most bytes that are held at a time; twice one of them while it is put in order."""
        return (KEPT + 1) * self.largest

    def _read(self, ref: TensorRef) -> torch.Tensor:
        with self._lock:  # whoever wants the same one waits for it
            values = self._held.pop(ref, None)
            if values is None:
                while len(self._held) >= KEPT:
                    self._held.popitem(last=False)
                values = ref.read().contiguous()  # [experts, ...]
            self._held[ref] = values
            return values


def each(update: Update, change: Callable[[TensorRef], TensorRef]) -> Update:
    """The same change for every component."""
    changed: dict[str, Any] = {}
    for part in fields(update):
        value = getattr(update, part.name)
        if isinstance(value, TensorRef):
            changed[part.name] = change(value)
        elif isinstance(value, Update):
            changed[part.name] = each(value, change)
    return replace(update, **changed)


def of_expert(update: Update, number: int, keeper: Keeper) -> Update:
    """One expert's part of an update of all."""
    return each(update, lambda ref: keeper.expert(ref, number))


def of_experts(update: Update, start: int, count: int) -> Update:
    """The part of some experts of an update of all."""
    return each(update, lambda ref: ref.narrow(0, start, count))


def turned(update: Update, lead: int) -> Update:
    """The update of the transposed matrix."""

    def T(ref: TensorRef) -> TensorRef:
        if len(ref.shape) != lead + 2:
            raise Uncuttable("it is not an update of a plain matrix")
        return ref.permute(*range(lead), lead + 1, lead)

    def or_none(ref: TensorRef | None) -> TensorRef | None:
        return None if ref is None else T(ref)

    match update:
        case Lora(mid=None):
            return replace(update, A=T(update.B), B=T(update.A))
        case Loha(mid1=None, mid2=None):
            return replace(update, A1=T(update.B1), B1=T(update.A1), A2=T(update.B2), B2=T(update.A2))
        case Lokr(mid2=None):  # kron(w1, w2).T is kron(w1.T, w2.T)
            w1, A1, B1 = or_none(update.w1), or_none(update.B1), or_none(update.A1)
            return Lokr(update.factors, w1, A1, B1, or_none(update.w2), or_none(update.B2), or_none(update.A2))
        case Add() | Replace():
            return replace(update, value=T(update.value))
        case Scale():
            return replace(update, axis=1 - update.axis)
        case Dora():
            return replace(update, direction=turned(update.direction, lead), axis=1 - update.axis)
    raise Uncuttable(f"a {update.kind} update can not be turned")


def rows(update: Update, lead: int, start: int, stop: int) -> Update:
    """Rows start:stop of the update."""
    if isinstance(update, Lokr):
        return _rows_of_lokr(update, lead, start, stop)
    if isinstance(update, Dora) and isinstance(update.direction, Lokr) and update.axis == 0:
        direction = _rows_of_lokr(update.direction, lead, start, stop)
        return replace(update, direction=direction, magnitude=update.magnitude.narrow(lead, start, stop - start))
    return _along_rows(update, lead, lambda ref, dim: ref.narrow(dim, start, stop - start))


def every(update: Update, lead: int, first: int, step: int) -> Update:
    """Rows first, first + step, ... of the update."""

    def change(ref: TensorRef, dim: int) -> TensorRef:
        count = ref.shape[dim] // step
        before, after = ref.shape[:dim], ref.shape[dim + 1 :]
        return ref.reshape(*before, count, step, *after).narrow(dim + 1, first, 1).reshape(*before, count, *after)

    return _along_rows(update, lead, change)


def spread(update: Update, lead: int, size: int, first: int, step: int) -> Update:
    """The update of a matrix of `size` rows that changes rows first, first + step, ... as this one changes its own.

    Only of what adds: the other rows get a delta of zero.
    """
    if not isinstance(update, Lora | Loha | Add):
        raise Uncuttable(f"a {update.kind} update of some of a matrix's columns is not defined")

    def change(ref: TensorRef, dim: int) -> TensorRef:
        shape = (*ref.shape[:dim], size, *ref.shape[dim + 1 :])
        return derived(ref, shape, partial(_spread, ref, dim, shape, first, step))

    return _along_rows(update, lead, change)


def _spread(ref: TensorRef, dim: int, shape: Shape, first: int, step: int) -> torch.Tensor:
    values = ref.read()
    whole = values.new_zeros(shape)
    at = [slice(None)] * dim + [slice(first, first + step * (ref.shape[dim] - 1) + 1, step)]
    whole[tuple(at)] = values
    return whole


def _along_rows(update: Update, lead: int, change: Change) -> Update:
    """A change of every component that has the matrix's rows."""
    match update:
        case Lora():
            return replace(update, B=change(update.B, lead))
        case Loha():
            return replace(update, B1=change(update.B1, lead), B2=change(update.B2, lead))
        case Add() | Replace():
            return replace(update, value=change(update.value, lead))
        case Scale():
            return replace(update, factor=change(update.factor, lead)) if update.axis == 0 else update
        case Dora(axis=0):
            direction = _along_rows(update.direction, lead, change)
            return replace(update, direction=direction, magnitude=change(update.magnitude, lead))
        case Dora():
            raise Uncuttable("the norms of this dora update run over all rows, also those of the other weights in them")
    raise Uncuttable(f"the rows of a {update.kind} update can not be taken apart")


def _rows_of_lokr(update: Lokr, lead: int, start: int, stop: int) -> Lokr:
    """Row i * b + p is row i of w1 times row p of w2 [b, ...]: whole multiples of b are rows of w1."""
    right = update.w2 if update.w2 is not None else update.B2
    assert right is not None, "the components of a kind are complete before it is taken apart"
    b = right.shape[lead]
    if start % b or stop % b:
        raise Uncuttable(
            f"the second factor of this lokr update has {b} rows: rows {start} to {stop} are not a product"
        )
    first, count = start // b, (stop - start) // b
    if update.w1 is not None:
        return replace(update, w1=update.w1.narrow(lead, first, count))
    assert update.B1 is not None, "w1 is whole, or a product"
    return replace(update, B1=update.B1.narrow(lead, first, count))

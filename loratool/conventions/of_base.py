"""Updates whose numbers depend on the base's weights: they can be computed once those are known, and not before.

What comes out is an ordinary update, a difference or a LoRA, that belongs to this base alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.adapter import Adapter
from loratool.conventions.flat_names import Stored
from loratool.errors import ChoiceNeeded, Problem
from loratool.identity import identity_of
from loratool.maps.cutting import Derived
from loratool.rows import Rows
from loratool.tensors import CHUNK, Shape, TensorRef, empty, torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class OfBase(Derived):
    """A component made out of the adapter's own tensor `source`, whose file is watched, and the base's `weight`."""

    weight: TensorRef | None = None


# -- what methods make of a weight -------------------------------------------------------------------------------------


def sent_through(a: TensorRef, b: TensorRef, region: Shape, stored: Stored | None) -> TensorRef:
    """[b | W a]: b [out, ranks], and W [out, in, kernel...] times a [in, ranks], for each position in the kernel.

    Shape [out, ranks of b + ranks of a * kernel]. Without the base it has its shape, and no numbers.
    """
    (out, own), (inputs, ranks) = b.shape, a.shape
    positions = math.prod(region[2:])
    shape = (out, own + ranks * positions)
    dtype = _wider(a, b, *([] if stored is None else [stored.part]))

    def make() -> torch.Tensor:
        import torch

        if stored is None:
            what = f"{a.name} is multiplied by the base's weights, which are not known"
            raise ChoiceNeeded(Problem("E-LAYOUT", what, hint="load it with its base: load(path, base=...)"))
        right = a.read(torch.float64)  # [in, ranks]
        made = empty(shape, torch_dtype(dtype))
        made[:, :own] = b.read()
        for start, W in _blocks(stored.part):
            W = W.reshape(len(W), inputs, positions)
            sent = torch.einsum("oik,ir->ork", W, right)  # [some rows, ranks, kernel]
            made[start : start + len(W), own:] = sent.flatten(1)
        return made

    return _of_base(a, dtype, shape, make, stored)


def spread(a: TensorRef, b: TensorRef, region: Shape) -> TensorRef:
    """What the right factors of `sent_through` are together: b [ranks, in, kernel...] over a [ranks, in].

    a acts alike at each position in the kernel, so each of its ranks is one rank per position here.
    Shape [ranks of b + ranks of a * kernel, in, kernel...].
    """
    own, ranks, positions = b.shape[0], a.shape[0], math.prod(region[2:])
    shape = (own + ranks * positions, *region[1:])
    dtype = _wider(a, b)

    def make() -> torch.Tensor:
        import torch

        wide = torch_dtype(dtype)
        each = torch.kron(a.read(wide), torch.eye(positions, dtype=wide, device="cpu"))  # [ranks * kernel, in * kernel]
        return torch.cat([b.read(wide).flatten(1), each]).reshape(shape)

    return TensorRef(a.name, dtype, shape, Derived(a, make), shape)


def padded(stored: Stored, shape: Shape) -> TensorRef:
    """W [out, in, kernel...] with zeros for further inputs: [out, more, kernel...]."""

    def make() -> torch.Tensor:
        made = empty(shape, torch_dtype(_wider(stored.part))).zero_()
        for start, W in _blocks(stored.part):
            made[start : start + len(W), : W.shape[1]] = W
        return made

    return _of_base(stored.part, _wider(stored.part), shape, make, stored)


def _of_base(
    source: TensorRef, dtype: str, shape: Shape, make: Callable[[], torch.Tensor], stored: Stored | None
) -> TensorRef:
    data = OfBase(source, make, weight=None if stored is None else stored.whole)
    return TensorRef(source.name, dtype, shape, data, shape)


def _wider(*refs: TensorRef) -> str:
    """Float32 holds the product of 16-bit numbers; with a float64 one among them it is float64."""
    return "F64" if any(ref.dtype == "F64" for ref in refs) else "F32"


def _blocks(ref: TensorRef) -> Iterator[tuple[int, torch.Tensor]]:
    """A weight some rows at a time, in float64 and in memory that is used again, with the number of the first."""
    import torch

    source = TensorRef.of(ref.read(), ref.name) if ref.views else ref
    count, columns = ref.shape[0], math.prod(ref.shape[1:])
    height = max(1, min(count, CHUNK // (8 * max(1, columns))))
    with Rows(source, columns, height, torch.float64) as rows:
        for start in range(0, count, height):
            stop = min(count, start + height)
            yield start, rows.widened(rows.read(start, stop), stop - start).reshape(-1, *ref.shape[1:])


# -- whose numbers they are --------------------------------------------------------------------------------------------


def weights(adapter: Adapter) -> dict[str, TensorRef]:
    """The base's weights that components of an adapter are computed from, by the name of their target."""
    return {
        item.target.name: ref.data.weight
        for item in adapter.updates
        for ref in item.update.components().values()
        if isinstance(ref.data, OfBase) and ref.data.weight is not None
    }


def bound(adapter: Adapter) -> Adapter:
    """The adapter with the digests of the weights that its own numbers come from: it fits no others."""
    known = dict(adapter.base.tensors)
    for name, weight in weights(adapter).items():
        if name not in known:
            known[name] = identity_of(weight)
    return replace(adapter, base=replace(adapter.base, tensors=known))

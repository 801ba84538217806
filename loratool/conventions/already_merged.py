"""Weights that hold the delta already: a model was saved merged, with its factors, and nothing in the file says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.adapter import Targeted
from loratool.errors import Mismatch, Problem
from loratool.tensors import FLOATS, Computed, TensorRef, torch_dtype

if TYPE_CHECKING:
    import torch

Rename = Callable[[str], str]


def without(ref: TensorRef, items: Sequence[Targeted]) -> TensorRef:
    """The weight with the updates subtracted again, once it is read: the base's, up to the rounding of the merge."""

    def make() -> torch.Tensor:
        return _subtracted(ref, items).to(torch_dtype(ref.dtype))

    return TensorRef(ref.name, ref.dtype, ref.shape, Computed(make), ref.shape)


def compare_with_base(
    inside: Mapping[str, TensorRef],
    base: Mapping[str, TensorRef],
    rename: Rename,
    updates: Sequence[Targeted],
    said_merged: bool,
    where: str,
) -> list[str]:
    """Notes on whether the file's weights are the base's, or the base's with the delta. Needs known scales.

    Raises Mismatch if they are neither, or not what the user said they are.
    """
    ours = {rename(name): ref for name, ref in inside.items()}
    by_target: dict[str, list[Targeted]] = {}
    for item in updates:
        if item.target.name in ours and item.target.name in base:
            by_target.setdefault(item.target.name, []).append(item)
    states = {name: _state(ours[name], base[name], items) for name, items in by_target.items()}
    merged = [name for name, state in states.items() if state == "merged"]
    if strange := [name for name, state in states.items() if state == "neither"]:
        these = f"{len(strange)} of its {len(states)} weights"
        what = f"{these} are neither the base's nor the base's with the delta: {strange[0]} ..."
        raise Mismatch(
            Problem("E-BASE-MISMATCH", what, where, "is this its base, and --alpha what it was trained with?")
        )
    if said_merged and states and not merged:
        what = "the weights are said to hold the delta already, and they are equal to the base's"
        raise Mismatch(Problem("E-OPTION", what, where, "leave out --already-merged"))
    if merged and not said_merged:
        return [
            f"{len(merged)} of its {len(states)} weights hold the delta already (saved in eval mode): {merged[0]} ...;"
            " they are not the base, `extract` needs --already-merged"
        ]
    return []


def trained_biases(
    inside: Mapping[str, TensorRef], base: Mapping[str, TensorRef], rename: Rename
) -> dict[str, TensorRef]:
    """Biases of the file that are not the base's: trained in place, with bias="all" or "lora_only"."""
    found = {}
    for name, ref in inside.items():
        stored = base.get(rename(name))
        if name.endswith("bias") and stored is not None and stored.shape == ref.shape and not _equal(ref, stored):
            found[name] = ref
    return found


def _state(ref: TensorRef, stored: TensorRef, items: Sequence[Targeted]) -> str:
    """ "base", "merged" or "neither". A frozen weight keeps its bits; a merged one is off by roundings."""
    import torch

    if ref.shape != stored.shape:
        return "neither"
    if _equal(ref, stored):
        return "base"
    base = stored.read(torch.float64)
    left = (_subtracted(ref, items) - base).norm()
    size = base.norm() + (ref.read(torch.float64) - base).norm()
    # The factors' dtype counts too: the trainer multiplied in it, and added and subtracted a few times.
    parts = [part for item in items for part in item.update.components().values()]
    unit = max(torch.finfo(torch_dtype(part.dtype)).eps for part in (ref, stored, *parts))
    return "merged" if left <= 4 * unit * size and left < (ref.read(torch.float64) - base).norm() / 2 else "neither"


def _equal(ref: TensorRef, stored: TensorRef) -> bool:
    """Whether two tensors hold the same numbers, in the narrower of their dtypes."""
    import torch

    if ref.dtype not in FLOATS or stored.dtype not in FLOATS:
        return ref.dtype == stored.dtype and ref.digest() == stored.digest()
    narrow = max(ref.dtype, stored.dtype, key=lambda dtype: torch.finfo(torch_dtype(dtype)).eps)
    return torch.equal(ref.read(torch_dtype(narrow)), stored.read(torch_dtype(narrow)))


def _subtracted(ref: TensorRef, items: Sequence[Targeted]) -> torch.Tensor:
    """The weight minus the deltas, in float64."""
    import torch

    W = ref.read(torch.float64).clone(memory_format=torch.contiguous_format)  # not the file's own memory
    for item in items:
        start, stop = item.target.rows or (0, ref.shape[0])
        region = W[start:stop].flatten(1)  # [rows, columns], a view
        item.update.open(torch.float64, None).apply(region, 0, -1.0)
    return W

"""A quantised weight in the layout it had: merged in float32, with new scales, rounded to its codes.

It is written quantised again, as far as its method can be, or in a dtype without quantisation.

A tile's scale is its largest magnitude over the largest code; a tile that no update changes keeps its scale, and with
it every code. Scales and codes are two tensors of an output, at two places, perhaps of two files: whichever is written
first computes the scales, for both.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from blake3 import blake3

from loratool.blocks import each_block
from loratool.checkpoint import Checkpoint
from loratool.errors import Mismatch, Problem
from loratool.layout import NewTensor, Weighted
from loratool.quantised import CONFIG_KEYS, FP8, Dequantised, Foreign
from loratool.quantised.schemes import Scaled
from loratool.survival import Survival, survival_of
from loratool.tensors import TensorRef, as_bytes, converted, torch_dtype
from loratool.undoing import Written, write_all

if TYPE_CHECKING:
    import torch

Step = Callable[[int], None]
Receive = Callable[["torch.Tensor", int], None]  # rows of the weight, as numbers or codes, and the number of the first


def problems(
    base: Checkpoint, wanted: Mapping[str, Sequence[Weighted]], dtype: str | None, undo: bool
) -> Iterator[Problem]:
    """Why a quantised base can not be merged into as asked; `wanted` are the updates by the names of their tensors."""
    where = str(base.path)
    quantised = {name: ref for name, ref in base.tensors.items() if isinstance(ref.data, Dequantised)}
    if dtype and quantised and (left := [n for n, ref in base.tensors.items() if isinstance(ref.data, Foreign)]):
        what = f"with --dtype all weights are dequantised, and {left[0]} can not be"
        yield Problem("E-QUANTISED", what, where, "leave out --dtype, or merge into a 16-bit checkpoint")
    if undo and quantised and (dtype or any(wanted.get(name) for name in quantised)):
        what = "there is no undo record for quantised weights"
        yield Problem("E-OPTION", what, where, "leave out --undo, keep the base, and unmerge with --base")
    for name, ref in quantised.items():
        updates = wanted.get(name)
        if not updates or dtype:
            continue
        if updates[0].item.target.shape != ref.shape:
            yield Problem("E-QUANTISED", f"{name} is quantised: it can not be resized", where, "use --dtype bf16")
        elif not requantisable(ref):
            assert isinstance(ref.data, Dequantised)
            what = f"{name} is stored as {ref.data.scheme.title}: it is not quantised again"
            yield Problem("E-QUANTISED", what, where, "--dtype bf16 writes the merged checkpoint without quantisation")


def requantisable(weight: TensorRef) -> bool:
    scheme = weight.data.scheme if isinstance(weight.data, Dequantised) else None
    return isinstance(scheme, Scaled) and scheme.codes.dtype in FP8


def new_tensors(weight: TensorRef, updates: tuple[Weighted, ...], dtype: str | None) -> dict[str, NewTensor]:
    """What becomes of the stored tensors of a quantised weight, by their names: new codes and scales; or with a dtype
    one tensor of it, in the place of the codes."""
    assert isinstance(weight.data, Dequantised)
    codes, *others = weight.data.scheme.parts
    if dtype:
        shape = updates[0].item.target.shape if updates else weight.shape
        source = weight if shape == weight.shape else None
        return {codes.name: NewTensor(codes.name, source, dtype, shape, updates, False, codes)}
    parts = {"codes": codes, "scales": others[0]} if updates else {}
    return {
        ref.name: NewTensor(ref.name, weight, ref.dtype, ref.shape, updates, False, ref, part)
        for part, ref in parts.items()
    }


def dropped(base: Checkpoint) -> tuple[TensorRef, ...]:
    """The stored tensors that only serve the quantisation of others."""
    weights = [ref.data for ref in base.tensors.values() if isinstance(ref.data, Dequantised)]
    return tuple(dict.fromkeys(ref for data in weights for ref in (*data.scheme.parts[1:], *data.beside)))


def configs_without(base: Checkpoint) -> dict[Path, bytes]:
    """Every config.json of a folder that speaks of quantisation, without it; by path relative to the folder."""
    found = {}
    for part in [*base.components.values()] or [base]:
        config = part.side_json("config.json") if part.path.is_dir() else None
        if config and any(key in config for key in CONFIG_KEYS):
            config = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
            path = (part.path / "config.json").relative_to(base.path)
            found[path] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    return found


class Requantiser:
    """Writes codes and scales. Holds the scales of a weight until both have been written."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.locks: dict[str, threading.Lock] = {}
        self.scales: dict[str, torch.Tensor] = {}

    def write(self, tensor: NewTensor, out: BinaryIO, step: Step, digests: bool = True) -> Written:
        """Write one part of a weight at the current position of `out`; `step` is told the bytes written."""
        after = blake3()

        def put(values: torch.Tensor) -> None:
            data = as_bytes(values)
            if digests:
                after.update(data)
            write_all(out, data)
            step(len(data))

        scales = self._scales(tensor)
        survival = Survival()
        if tensor.part == "codes":
            survival = each_codes(tensor, scales, lambda codes, _: put(codes))
        else:
            put(scales.to(torch_dtype(tensor.dtype)))
        if not digests or tensor.original is None:
            return Written("", "", 0.0, survival)
        both = tensor.original.digest(), f"blake3:{after.hexdigest()}"
        return Written(*both, 0.0, survival, changed=both[0] != both[1])

    def _scales(self, tensor: NewTensor) -> torch.Tensor:
        assert tensor.source is not None
        name = tensor.source.name
        with self.lock:
            own = self.locks.setdefault(name, threading.Lock())
        with own:
            if name in self.scales:
                return self.scales.pop(name)  # for the second of the two: nobody needs them after it
            self.scales[name] = new_scales(tensor)
            return self.scales[name]


def new_scales(tensor: NewTensor) -> torch.Tensor:
    """The scales of a merged weight [tile rows, tile columns], in float32, as the output's dtype can hold them."""
    import torch

    scheme = _scheme(tensor)
    old = scheme.scales.read(torch.float32)
    peak, moved = torch.zeros_like(old), torch.zeros_like(old)

    def see(W: torch.Tensor, start: int) -> None:
        before = scheme.rows(start, start + len(W))
        _note_peaks(peak, W.abs(), start, scheme.tile)
        _note_peaks(moved, (before != W).float(), start, scheme.tile)

    _merge(tensor, see)
    scale = peak / torch.finfo(torch_dtype(scheme.codes.dtype)).max
    if scheme.powers_of_two:
        scale = torch.exp2(torch.log2(scale).ceil())
    scale = scale.to(torch_dtype(scheme.scales.dtype)).float()
    if not scale.isfinite().all():
        what = f"{tensor.name} would have a scale that is not finite in {scheme.scales.dtype}"
        raise Mismatch(Problem("E-NONFINITE", what, tensor.name, "--dtype bf16 writes it without scales", "R-061"))
    return torch.where((moved > 0) & (scale > 0), scale, old)


def _note_peaks(peaks: torch.Tensor, values: torch.Tensor, start: int, tile: tuple[int, int]) -> None:
    """Raise `peaks` [tile rows, tile columns] to the largest of `values`, rows start.. of a weight, in each tile."""
    import torch

    height, width = tile
    short = peaks.shape[1] * width - values.shape[1]
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    across = padded.view(len(values), peaks.shape[1], width).amax(dim=2)  # [rows, tile columns]
    which = torch.arange(start, start + len(values), device="cpu") // height
    peaks.scatter_reduce_(0, which.unsqueeze(1).expand_as(across), across, "amax")


def each_codes(
    tensor: NewTensor, scales: torch.Tensor, receive: Receive, rows: tuple[int, int] | None = None
) -> Survival:
    """Hand out the codes block by block, or only the blocks that hold some of the rows start:stop.

    Returns how much of those blocks' change is left when they are dequantised.
    """
    import torch

    scheme = _scheme(tensor)
    dtype = torch_dtype(tensor.dtype)
    top = torch.finfo(dtype).max
    survival = Survival()

    def encode(W: torch.Tensor, start: int) -> None:
        nonlocal survival
        stop = start + len(W)
        first, last = start // scheme.tile[0], -(-stop // scheme.tile[0])
        scale = scheme.spread(scales[first:last], start, stop)
        codes = (W / scale.masked_fill(scale == 0, 1)).clamp_(-top, top).to(dtype)  # [rows, columns]
        receive(codes, start)
        before = scheme.rows(start, stop)
        survival = survival.plus(survival_of(before, W, converted(codes, torch.empty_like(W)) * scale))

    _merge(tensor, encode, rows)
    return survival


def _merge(tensor: NewTensor, receive: Receive, rows: tuple[int, int] | None = None) -> None:
    """Compute the merged weight in float32 and hand it on, some rows at a time."""
    each_block(in_float32(tensor), lambda block: receive(block.values, block.start), rows=rows)


def in_float32(tensor: NewTensor) -> NewTensor:
    """The merged weight that a part stands for, before it is quantised again."""
    assert tensor.source is not None
    return replace(tensor, dtype="F32", shape=tensor.source.shape, part="")


def _scheme(tensor: NewTensor) -> Scaled:
    assert tensor.source is not None and isinstance(tensor.source.data, Dequantised)
    scheme = tensor.source.data.scheme
    assert isinstance(scheme, Scaled), "the plan quantises only these again"
    return scheme

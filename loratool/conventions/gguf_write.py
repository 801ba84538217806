"""Writing llama.cpp's LoRA adapters, for the model that its converter makes of the base.

One alpha stands for all matrices, and the scale is alpha / rank: where ranks or scales differ, B is scaled. What is
here is tested by running llama.cpp with the files.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool import folding
from loratool.adapter import Adapter, Target, Targeted
from loratool.bundle import Bundle, Gguf
from loratool.checkpoint import Checkpoint
from loratool.conventions.gguf_names import (
    ARCHITECTURES,
    EMBEDDING,
    HEAD,
    STACKS,
    Architecture,
    architecture_name,
    joined,
    renaming,
    reordered_heads,
    to_pairs,
)
from loratool.conventions.model_config import model_config, whole_config
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.errors import LoratoolError
from loratool.gguf import INVOCATION, Key
from loratool.names import natural
from loratool.tensors import Computed, TensorRef
from loratool.updates import Lora, Scaling

if TYPE_CHECKING:
    import torch

STORED = ("F32", "F16", "BF16")  # what ggml multiplies with
ROUNDING = 2.0**-24  # the most that rounding to float32 changes, relatively
SMALLEST = 2.0**-126  # the first float32 that has all its bits
MERGE = "merge it, and make a GGUF model of the result with llama.cpp's convert_hf_to_gguf.py"

NO_BASE = Misfit((), "its names and rows depend on the model's architecture", "give the base with --base BASE", False)


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    model = _Model.of(base, adapter)
    if isinstance(model, Misfit):
        return [replace(model, names=tuple(adapter.targets()))]
    return grouped((name, model.misfit(name, items)) for name, items in adapter.targets().items())


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    model = _Model.of(base, adapter)
    assert isinstance(model, _Model), "there were no misfits"
    parts = model.parts(adapter)
    loras = {place: _one(parts[place]) for place in sorted(parts, key=lambda place: natural(joined(*place)))}
    alpha = best_alpha(loras.values())
    tensors: dict[str, TensorRef] = {}
    for place, lora in loras.items():
        a, b = model.factors(place, _under(alpha, lora))
        tensors |= {f"{joined(*place)}.lora_a": _stored(a), f"{joined(*place)}.lora_b": _stored(b)}
    keys: dict[str, Key] = {
        "general.architecture": model.name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    if adapter.when:
        keys[INVOCATION] = adapter.when["tokens"]
    return Bundle(Gguf(tensors, keys), (*_notes(parts, loras, alpha),))


# -- names ------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """One of llama.cpp's matrices, or one stack of experts: `blk.LAYER.PART`, or `PART` of the whole model."""

    layer: str | None
    part: str


@dataclass(frozen=True)
class _Model:
    """Where llama.cpp has the base's tensors, by their names: whole ones, those of one expert, transformers' stacks.

    `experts` are the numbers of those that a base stores apart. `head`: whether there is one beside the embedding.
    """

    name: str
    architecture: Architecture
    config: Mapping[str, Any]
    dense: Mapping[str, Place]
    single: Mapping[str, tuple[Place, int]]
    stacks: Mapping[str, tuple[Place, ...]]  # in the order of their rows
    experts: Mapping[Place, int]
    head: bool

    @classmethod
    def of(cls, base: Checkpoint | None, adapter: Adapter) -> _Model | Misfit:
        """What is known of the base's model; why it can not be, for all updates alike."""
        if base is None:
            return NO_BASE
        config, known = whole_config(base.tensors), base.tensors
        name = architecture_name(config)
        if name is None:
            what = f"what llama.cpp calls the class {config.get('architectures')!s:.60} of the base is not known"
            classes = ", ".join(name for architecture in ARCHITECTURES.values() for name in architecture.classes)
            return Misfit((), f"{what} (architectures in its config.json)", f"known are {classes}", False)
        architecture = ARCHITECTURES[name]
        found = (re.search(r"(?:^|\.)layers\.(\d+)\.", target) for target in adapter.targets())
        layers = sorted({match[1] for match in found if match}, key=natural)
        rename, _ = renaming(architecture, layers, known, str(base.path))
        dense = {rename(tensor): Place(layer, part) for layer, part, tensor in architecture.names(layers)}
        head = architecture.head and any(tensor in known and place.part == HEAD for tensor, place in dense.items())
        single: dict[str, tuple[Place, int]] = {}
        stacks: dict[str, tuple[Place, ...]] = {}
        for layer, part in ((layer, part) for layer in layers for part in architecture.experts):
            place, expert = Place(layer, part), 0
            while (tensor := rename(architecture.single(layer, part, expert))) in known:
                single[tensor] = place, expert
                expert += 1
            if not expert:
                tensor = rename(f"model.layers.{layer}.{STACKS[part][0]}")
                stacks[tensor] = (*stacks.get(tensor, ()), place)
        experts = Counter(place for place, _ in single.values())
        return cls(name, architecture, model_config(known), dense, single, stacks, experts, head)

    def misfit(self, name: str, items: list[Targeted]) -> Misfit | None:
        """Why llama.cpp's adapter can not hold the updates of one tensor."""
        target = items[0].target
        if other := sorted({item.update.kind for item in items} - {Lora.kind}):
            return Misfit((), f"a LoRA adapter of llama.cpp has no {other[0]} update", MERGE, False)
        if target.layout == "in_out":
            return Misfit((), "llama.cpp has it as [out, in], and the adapter as [in, out]", MERGE, False)
        if name in self.stacks:
            parts = len(self.stacks[name])
            return None if target.stacked and len(target.shape) == 3 and not target.shape[1] % parts else self._unknown
        if (name not in self.dense and name not in self.single) or len(target.shape) != 2:
            return self._unknown
        return None if name in self.single else self._misfit_dense(self.dense[name], target)

    @property
    def _unknown(self) -> Misfit:
        return Misfit((), f"loratool knows no such matrix of llama.cpp's architecture {self.name}", MERGE, False)

    def _misfit_dense(self, place: Place, target: Target) -> Misfit | None:
        if place.part == HEAD and not self.head:
            return Misfit((), f"llama.cpp has no head beside the embedding in {self.name}", MERGE, False)
        if place.part == EMBEDDING and not self.head:
            why = "the embedding is the head as well, and there llama.cpp aborts on a LoRA of it (token_embd)"
            return Misfit((), why, MERGE, False)
        try:
            self._heads(place, target.shape[0])
        except LoratoolError as error:
            return Misfit((), error.problems[0].message, error.hint, False)
        return None

    def _heads(self, place: Place, rows: int) -> int | None:
        return reordered_heads(self.architecture, place.part, rows, self.config, "")

    # -- tensors ------------------------------------------------------------------------------------------------------

    def parts(self, adapter: Adapter) -> dict[Place, list[Targeted]]:
        """The updates by llama.cpp's matrix, those of experts with targets in its stack [experts, out, in]."""
        found: dict[Place, list[Targeted]] = defaultdict(list)
        for item in adapter.updates:
            name, target = item.target.name, item.target
            if name in self.single:
                place, expert = self.single[name]
                stack = replace(target, shape=(self.experts[place], *target.shape), expert=expert)
                found[place].append(replace(item, target=stack))
            elif name in self.stacks:
                size = target.shape[1] // len(self.stacks[name])
                for number, place in enumerate(self.stacks[name]):
                    found[place] += _within(item, number * size, size)
            else:
                found[self.dense[name]].append(item)
        return {place: items for place, items in found.items() if items}

    def factors(self, place: Place, lora: Lora) -> tuple[TensorRef, TensorRef]:
        """lora_a [rank, in] and lora_b [out, rank], of experts [E, ...]; [tokens, rank] and [dim, rank] of a table."""
        A, B = lora.A, lora.B
        if place.part == EMBEDDING:  # B [tokens, rank]: llama.cpp looks up its rows
            return B, A.T
        heads = None if place.part in self.architecture.experts else self._heads(place, B.shape[0])
        return A, B if heads is None else to_pairs(B, heads)


def _within(item: Targeted, start: int, size: int) -> Iterator[Targeted]:
    """What an update of stacked matrices changes among `size` rows from `start` on, as one of these rows alone."""
    target, update = item.target, item.update
    assert isinstance(update, Lora), "other kinds do not fit"
    first, last = target.rows or (0, target.matrix[0])
    low, high = max(first, start), min(last, start + size)
    if low >= high:
        return
    B = update.B if (low, high) == (first, last) else update.B.narrow(len(update.B.shape) - 2, low - first, high - low)
    rows = None if high - low == size else (low - start, high - start)
    yield Targeted(replace(target, shape=(target.shape[0], size, target.shape[2]), rows=rows), replace(update, B=B))


def _one(items: list[Targeted]) -> Lora:
    update = folding.merged_factors(items).update
    assert isinstance(update, Lora)
    return update


def _stored(ref: TensorRef) -> TensorRef:
    if ref.dtype in STORED:
        return ref

    def make() -> torch.Tensor:
        import torch

        return ref.read(torch.float32)

    return TensorRef(ref.name, "F32", ref.shape, Computed(make), ref.shape)


# -- one alpha --------------------------------------------------------------------------------------------------------


def best_alpha(loras: Iterable[Lora]) -> float:
    """The float32 alpha, not 0 (which means a scale of 1), for which the fewest B have to be scaled.

    Of several such, one for which more of these can be scaled exactly.
    """
    counted = Counter((lora.factors.factor, folding.rank_of(lora)) for lora in loras)
    candidates = dict.fromkeys(alpha for scale, rank in counted if (alpha := _float32(scale * rank)) is not None)

    def cost(alpha: float) -> tuple[int, int]:
        moved = {key: count for key, count in counted.items() if not _fits(alpha, *key)}
        inexact = sum(count for (scale, rank), count in moved.items() if not folding.is_exact(scale / (alpha / rank)))
        return sum(moved.values()), inexact

    return min(candidates, key=cost, default=float(next(rank for _, rank in counted)))


def _float32(value: float) -> float | None:
    """The nearest float32; None where it has fewer bits, or there is none."""
    try:
        (near,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        return None
    return float(near) if abs(near) >= SMALLEST and math.isfinite(near) else None


def _fits(alpha: float, scale: float, rank: int) -> bool:
    """Whether alpha / rank is the scale, to float32: scaling B would round by as much."""
    return abs(alpha / rank - scale) <= ROUNDING * abs(scale)


def _under(alpha: float, lora: Lora) -> Lora:
    """The same delta with the scale that llama.cpp takes."""
    rank = folding.rank_of(lora)
    if _fits(alpha, lora.factors.factor, rank):
        return lora
    return folding.rescaled(lora, Scaling.by("alpha/rank", alpha, rank))


def _notes(parts: Mapping[Place, list[Targeted]], loras: Mapping[Place, Lora], alpha: float) -> Iterator[str]:
    scales = [(lora.factors.factor, folding.rank_of(lora)) for lora in loras.values()]
    moved = [scale / (alpha / rank) for scale, rank in scales if not _fits(alpha, scale, rank)]
    if moved:
        inexact = sum(not folding.is_exact(factor) for factor in moved)
        how = f"{inexact} of them by no power of two and rounded to float32" if inexact else "exactly"
        yield f"llama.cpp has one alpha, {alpha:g}, for all ranks: B of {len(moved)} matrices was scaled, {how}"
    if rounded := sum(alpha / rank != scale for scale, rank in scales) - len(moved):
        yield f"the scale of {rounded} matrices is rounded to what a float32 alpha gives"
    wider = [place for place, items in parts.items() if folding.rank_of(loras[place]) > max(map(_rank, items))]
    if wider:
        yield f"{len(wider)} matrices had several LoRAs: their factors are side by side, in one of a larger rank"
    if any(ref.dtype not in STORED for lora in loras.values() for ref in (lora.A, lora.B)):
        yield "its float64 factors are rounded to float32"


def _rank(item: Targeted) -> int:
    assert isinstance(item.update, Lora)
    return folding.rank_of(item.update)

"""Adapters of Megatron-Bridge and NeMo, gathered from their tensor-parallel ranks into one file.

    X.adapter.linear_in.weight [rank, in]              X.adapter.linear_out.weight [out, rank]
    X.adapter.adapter_{q,k,v,gate,up}.linear_in.weight, ... of CanonicalLoRA, one pair for each projection

X is a Megatron module. The rows of its `linear_qkv` go by query groups, [q..., k, v] of the first group, then of the
second; its `linear_fc1` is [gate; up]. A Hugging Face base has those as tensors of their own. The scale is alpha /
rank, and alpha is in the run's config only: it must be given.

The packages need CUDA and could not be run: this follows the code of ``megatron/bridge/peft/`` and
``models/conversion/`` (`split_qkv_weights`, `_interleave_qkv`, `LoRAMerge`), and is tested against a second
derivation of it, not against the producer. Experts, DoRA and multi-latent attention are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from loratool.adapter import Adapter, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions.choices import Choices
from loratool.conventions.model_config import heads_of, model_config
from loratool.conventions.scales import Scales
from loratool.errors import InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.names import natural
from loratool.tensors import TensorRef
from loratool.updates import Lora

NAME = "megatron"
TITLE = "Megatron-Bridge / NeMo adapter"
KINDS = ("lora",)
TESTED = "code reading only: no producer was run"
ASKS = ("alpha", "scaling")

_PART = re.compile(r"^(?P<module>.+?)\.adapter(?:\.adapter_(?P<key>q|k|v|gate|up))?\.linear_(?P<part>in|out)\.weight$")
_LAYER = re.compile(r"^(?:.*\.)?decoder\.layers\.(?P<layer>\d+)\.(?P<module>.+)$")
WRAPPER = ".to_wrap."  # in names of a model's parameters; its state dict hides it

# Hugging Face's modules for one of Megatron's, in the order of its rows.
_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
_SPLIT = {
    _QKV: {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    _FC1: {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
}
_SINGLE = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
GATHER = "these look like the shards of one tensor-parallel rank: gather them (TP=1) before they are read"


class Pair(NamedTuple):
    """The factors of one module, or with a `key` of one of its projections: A [rank, in], B [out, rank]."""

    module: str
    key: str | None
    A: TensorRef
    B: TensorRef

    @property
    def rank(self) -> int:
        return self.B.shape[1]


def detect(source: Checkpoint) -> bool:
    return any(_PART.match(name) for name in source.tensors)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    where = str(source.path)
    pairs = _pairs(source.tensors, where)
    choices.check_used([pair.module for pair in pairs], where)
    scales = Scales(source, choices)
    reader = _Reader(scales, base if base is not None else unwrap(source, choices), where)
    updates: list[Targeted] = []
    problems: list[Problem] = []
    for pair in pairs:
        try:
            updates += reader.updates(pair)
        except LoratoolError as error:
            problems += error.problems
    if problems:
        raise Mismatch(problems)
    scales.check()
    notes = (*source.notes, *scales.notes())
    return Adapter(tuple(updates), provenance={"convention": NAME}, notes=notes, doubts=tuple(reader.doubts))


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    """The weights beside the adapter, where the whole model was saved."""
    owners = _owners(source.tensors)
    return {
        name.replace(WRAPPER, "."): ref
        for name, ref in source.tensors.items()
        if not (".adapter." in name and name.partition(".adapter.")[0] in owners)
    }


def _owners(names: Iterable[str]) -> set[str]:
    """Modules with an adapter; a model may have modules of that name of its own."""
    return {match["module"] for name in names if (match := _PART.match(name))}


def _pairs(tensors: Mapping[str, TensorRef], where: str) -> list[Pair]:
    """All pairs, in the order of their layers; other parts of adapters, and halves, are problems."""
    parts: dict[tuple[str, str | None], dict[str, TensorRef]] = {}
    problems, owners = [], _owners(tensors)
    for name, ref in tensors.items():
        if match := _PART.match(name):
            module = match["module"].removesuffix(WRAPPER.rstrip("."))
            parts.setdefault((module, match["key"]), {})[match["part"]] = ref
        elif ".adapter." in name and name.partition(".adapter.")[0] in owners:
            what = f"tensor {name!r:.120} is neither linear_in nor linear_out: no plain LoRA"
            problems.append(Problem("E-UNSUPPORTED", what, where, "merge it with Megatron-Bridge"))
    if problems:
        raise Unsupported(problems)
    for (module, key), found in parts.items():
        name = f"{module}.adapter" + (f".adapter_{key}" if key else "")
        if len(found) < 2:
            problems.append(Problem("E-COMPONENTS", f"{name} has only one of linear_in and linear_out", where))
            continue
        A, B = found["in"].shape, found["out"].shape
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not all((*A, *B)):
            what = f"{name}: linear_in is {list(A)}, linear_out {list(B)}; they must be [rank, in] and [out, rank]"
            sharded = len(A) == len(B) == 2 and A[0] and A[0] < B[1] and not B[1] % A[0]
            problems.append(Problem("E-SHAPE", what, where, GATHER if sharded else ""))
    if problems:
        raise InvalidFile(problems)
    found_pairs = [Pair(module, key, found["in"], found["out"]) for (module, key), found in parts.items()]
    return sorted(found_pairs, key=lambda pair: (natural(pair.module), pair.key or ""))


@dataclass
class _Reader:
    """Finds the tensors of a base, Megatron's or Hugging Face's, that a pair changes, and its rows for each."""

    scales: Scales
    base: Mapping[str, TensorRef]  # empty if there is none
    where: str
    doubts: list[str] = field(default_factory=list)

    def updates(self, pair: Pair) -> Iterator[Targeted]:
        own = f"{pair.module}.weight"
        match = _LAYER.match(pair.module)
        module = match["module"] if match else ""
        if (module not in _SPLIT and module not in _SINGLE) or pair.key not in (None, *_SPLIT.get(module, ())):
            what = f"{pair.module}: adapters of this module are not supported"
            known = ", ".join((*_SPLIT, *_SINGLE))
            raise Unsupported(
                Problem("E-UNSUPPORTED", what, self.where, f"merge it with Megatron-Bridge; known: {known}")
            )
        if not self.base:
            if not self.doubts:
                self.doubts.append("the base's names and the order of its rows: they are not Megatron's elsewhere")
            yield self._update(pair, own + (f" ({pair.key})" if pair.key else ""), pair.B)
        elif own in self.base:
            yield from self._into_megatron(pair, module, self.base[own])
        else:
            assert match
            yield from self._into_hugging_face(pair, module, f"model.layers.{match['layer']}.")

    def _into_megatron(self, pair: Pair, module: str, stored: TensorRef) -> Iterator[Targeted]:
        """Fused factors have the base's rows; those of one projection change a part of them."""
        own = f"{pair.module}.weight"
        if pair.key is None:
            yield self._update(pair, own, pair.B)
            return
        out = pair.B.shape[0]
        if module == _FC1:
            self._check_rows(pair, stored, 2 * out)
            start = 0 if pair.key == "gate" else out
            yield self._update(pair, own, pair.B, stored, start)
            return
        heads = heads_of(model_config(self.base), self.where)
        per_group = heads.query // heads.key
        size = self._divided(pair, out, heads.query if pair.key == "q" else heads.key)
        self._check_rows(pair, stored, (heads.query + 2 * heads.key) * size)
        rows, first = (per_group * size, 0) if pair.key == "q" else (size, per_group + (pair.key == "v"))
        for group in range(heads.key):
            start = (group * (per_group + 2) + first) * size
            yield self._update(pair, own, pair.B.narrow(0, group * rows, rows), stored, start)

    def _into_hugging_face(self, pair: Pair, module: str, prefix: str) -> Iterator[Targeted]:
        if module in _SINGLE:
            yield self._update(pair, f"{prefix}{_SINGLE[module]}.weight", pair.B)
        elif pair.key is not None:
            yield self._update(pair, f"{prefix}{_SPLIT[module][pair.key]}.weight", pair.B)
        else:
            parts = self._groups(pair) if module == _QKV else self._halves(pair)
            for owner, B in zip(_SPLIT[module].values(), parts, strict=True):
                yield self._update(pair, f"{prefix}{owner}.weight", B)

    def _groups(self, pair: Pair) -> tuple[TensorRef, TensorRef, TensorRef]:
        """B of q, k and v out of [groups, queries + 2, size, rank]."""
        heads = heads_of(model_config(self.base), self.where)
        size, per_group = self._divided(pair, pair.B.shape[0], heads.query + 2 * heads.key), heads.query // heads.key
        grouped = pair.B.reshape(heads.key, per_group + 2, size, pair.rank)
        counts = ((0, per_group), (per_group, 1), (per_group + 1, 1))
        q, k, v = (
            grouped.narrow(1, start, count).reshape(heads.key * count * size, pair.rank) for start, count in counts
        )
        return q, k, v

    def _halves(self, pair: Pair) -> tuple[TensorRef, TensorRef]:
        half = self._divided(pair, pair.B.shape[0], 2)
        return pair.B.narrow(0, 0, half), pair.B.narrow(0, half, half)

    def _divided(self, pair: Pair, rows: int, parts: int) -> int:
        if rows % parts:
            what = (
                f"{pair.module}: {rows} rows of linear_out do not divide into {parts} parts of the base's config.json"
            )
            raise Mismatch(Problem("E-SHAPE", what, self.where, GATHER))
        return rows // parts

    def _check_rows(self, pair: Pair, stored: TensorRef, rows: int) -> None:
        if stored.shape[:1] != (rows,):
            what = f"{pair.module}: the factors of {pair.key} belong to {rows} rows, the base has {list(stored.shape)}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, f"is this the adapter's base? Or {GATHER}"))

    def _update(self, pair: Pair, name: str, B: TensorRef, stored: TensorRef | None = None, start: int = 0) -> Targeted:
        """Rows start.. of `stored`, or all of the tensor `name`."""
        shape = (B.shape[0], pair.A.shape[1])
        lora = Lora(pair.A, B, self.scales.of(pair.module, pair.rank))
        if stored is not None:
            return Targeted(Target(name, stored.shape, rows=(start, start + shape[0])), lora)
        known = self.base.get(name)
        if known is not None and known.shape != shape:
            what = f"{pair.module}: the factors make {list(shape)} of {name}, the base has {list(known.shape)}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, f"is this the adapter's base? Or {GATHER}"))
        return Targeted(Target(name, shape), lora)

"""llama.cpp's LoRA adapters in GGUF, as its ``convert_lora_to_gguf.py`` writes them from a PEFT adapter.

    blk.N.PART.weight.lora_a [rank, in]      blk.N.PART.weight.lora_b [out, rank]
    token_embd.weight.lora_a [tokens, rank]  token_embd.weight.lora_b [dim, rank]
    blk.N.PART_exps.weight   [E, rank, in]   [E, out, rank]

(NumPy's order; GGUF counts dimensions from the fastest.) The scale is `adapter.lora.alpha` / rank, and 1 for an alpha
of 0 or none, as in ``src/llama-adapter.h``. Names are llama.cpp's and are turned back into Hugging Face's, for the
architectures of `gguf_names.py`. llama.cpp rotates neighbouring numbers of a head where transformers rotates its
halves, so in some architectures the rows of q and k are in another order; it is undone with the numbers of heads in
the base's config.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.adapter import Adapter, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import gguf_write
from loratool.conventions.choices import Choices
from loratool.conventions.gguf_names import (
    ARCHITECTURES,
    EMBEDDING,
    REORDERED,
    STACKS,
    Architecture,
    from_pairs,
    renaming,
    reordered_heads,
    split,
)
from loratool.conventions.model_config import model_config
from loratool.errors import InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.gguf import INVOCATION
from loratool.names import natural
from loratool.tensors import TensorRef
from loratool.updates import Lora, Scaling

NAME = "gguf"
TITLE = "llama.cpp adapter (GGUF)"
KINDS = ("lora",)
TESTED = "gguf 0.19.0; llama.cpp in xllamacpp 2026.10.11549"
OPTIONS: tuple[str, ...] = ()
SUFFIXES = (".gguf",)
ASKS = ()
CONDITIONS = ("tokens",)
misfits, write = gguf_write.misfits, gguf_write.write

_PART = re.compile(r"^(?P<tensor>.+)\.(?P<part>lora_[ab])$")


def detect(source: Checkpoint) -> bool:
    return source.shards[0].path.suffix == ".gguf"  # opened as an adapter, or not at all


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    where = str(source.path)
    metadata = source.metadata
    name = metadata.get("general.architecture", "")
    _refuse_unsupported(metadata, name, where)
    pairs, norms = _sort(source.tensors, where)
    choices.check_used([*pairs], where)
    reader = _Reader(pairs, ARCHITECTURES[name], _alpha(metadata, where), base, where)
    updates = reader.updates()
    if norms:
        reader.notes.append(f"{len(norms)} norm tensors are not used, as llama.cpp does not: {norms[0]} ...")
    notes = (*source.notes, *reader.notes)
    provenance = {"convention": NAME}
    return Adapter(
        updates, provenance=provenance, notes=notes, doubts=tuple(reader.doubts), when=_when(metadata, where)
    )


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return {}


def _refuse_unsupported(metadata: Mapping[str, str], architecture: str, where: str) -> None:
    """Raises Unsupported for what is no LoRA, or has names that are not known."""
    if metadata.get("adapter.type") != "lora":
        what = f"adapter.type is {metadata.get('adapter.type', 'missing')!s:.40}, not lora"
        raise Unsupported(Problem("E-UNSUPPORTED", what, where))
    if architecture not in ARCHITECTURES:
        what = f"llama.cpp's names for the architecture {architecture!r:.40} are not known"
        hint = f"merge the PEFT adapter it was converted from; known are {', '.join(ARCHITECTURES)}"
        raise Unsupported(Problem("E-UNSUPPORTED", what, where, hint))


def _alpha(metadata: Mapping[str, str], where: str) -> float | None:
    """None where llama.cpp takes a scale of 1."""
    text = metadata.get("adapter.lora.alpha", "0")
    try:
        alpha = float(text)
    except ValueError:
        raise InvalidFile(Problem("E-CONFIG", f"adapter.lora.alpha is {text:.40}, not a number", where)) from None
    return alpha or None


def _when(metadata: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """The invocation tokens of an activated LoRA; empty for an adapter that always acts."""
    text = metadata.get(INVOCATION)
    if text is None:
        return {}
    if not re.fullmatch(r"\[\d+(, \d+)*\]", text):
        raise InvalidFile(Problem("E-CONFIG", f"{INVOCATION} is {text:.40}, not a list of token numbers", where))
    return {"tokens": [int(token) for token in text[1:-1].split(", ")]}


def _sort(tensors: Mapping[str, TensorRef], where: str) -> tuple[dict[str, tuple[TensorRef, TensorRef]], list[str]]:
    """The pairs by the tensor they change, and norms, which llama.cpp's loader skips."""
    parts: dict[str, dict[str, TensorRef]] = {}
    norms, problems = [], []
    for name, ref in tensors.items():
        if match := _PART.match(name):
            parts.setdefault(match["tensor"], {})[match["part"]] = ref
        elif name.endswith("_norm.weight"):
            norms.append(name)
        else:
            problems.append(Problem("E-UNUSED", f"tensor {name!r:.80} is neither lora_a nor lora_b", where))
    problems += [
        Problem("E-COMPONENTS", f"{name} has only one of lora_a and lora_b", where)
        for name, found in parts.items()
        if len(found) < 2
    ]
    if problems or not parts:
        raise InvalidFile(problems or [Problem("E-EMPTY", "no adapter tensor in it", where)])
    return {name: (found["lora_a"], found["lora_b"]) for name, found in parts.items()}, norms


@dataclass
class _Reader:
    """Turns pairs into updates of Hugging Face's tensors; what is wrong with one does not hide the next."""

    pairs: Mapping[str, tuple[TensorRef, TensorRef]]
    architecture: Architecture
    alpha: float | None
    base: Mapping[str, TensorRef] | None
    where: str
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    rename: Callable[[str], str] = str  # the base's name for one of Hugging Face's; known once all are seen

    def updates(self) -> tuple[Targeted, ...]:
        layers = sorted({layer for tensor in self.pairs if (layer := split(tensor)[0]) is not None}, key=natural)
        self.rename, notes = renaming(self.architecture, layers, self.base, self.where)
        self.notes += notes
        found: list[Targeted] = []
        problems: list[Problem] = []
        for tensor in sorted(self.pairs, key=natural):
            try:
                found += self._pair(tensor)
            except LoratoolError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        if problems:
            raise Mismatch(problems)
        return tuple(found)

    def _pair(self, tensor: str) -> Iterator[Targeted]:
        a, b = self.pairs[tensor]
        layer, part = split(tensor)
        if layer is not None and part in self.architecture.experts:
            yield from self._experts(tensor, layer, part, a, b)
            return
        name = self.architecture.tensor(layer, part)
        if name is None:
            what = f"{tensor}: the architecture has no such part that loratool knows"
            raise Unsupported(Problem("E-UNSUPPORTED", what, self.where, "merge the PEFT adapter it came from"))
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise InvalidFile(_unfit(tensor, a, b, self.where))
        # Rows of an embedding's lora_a are tokens: it is the left factor of the table's delta.
        A, B = (b.T, a) if part == EMBEDDING else (a, b)
        if A.shape[0] != B.shape[1] or not A.numel or not B.numel:
            raise InvalidFile(_unfit(tensor, a, b, self.where))
        target = Target(self.rename(name), (B.shape[0], A.shape[1]), layout="embedding" if A is not a else "")
        yield Targeted(target, Lora(A, self._ordered(part, B), self._scaling(A.shape[0])))

    def _experts(self, tensor: str, layer: str, part: str, A: TensorRef, B: TensorRef) -> Iterator[Targeted]:
        """lora_a [E, rank, in], lora_b [E, out, rank], for a base that stores one tensor per expert, or one for all."""
        if len(A.shape) != 3 or len(B.shape) != 3 or A.shape[:2] != (B.shape[0], B.shape[2]) or not A.numel * B.numel:
            raise InvalidFile(_unfit(tensor, A, B, self.where))
        experts, out, rank = B.shape
        matrix, scaling = (out, A.shape[2]), self._scaling(rank)
        first = self.rename(self.architecture.single(layer, part, 0))
        stack, index, count = STACKS[part]
        stack = self.rename(f"model.layers.{layer}.{stack}")
        if self.base is None:
            self._doubt("how the base stores its experts")
            name = self.architecture.single(layer, part, "*")
            yield Targeted(Target(name, (experts, *matrix), experts=experts), Lora(A, B, scaling))
        elif first in self.base:
            for expert in range(experts):
                name = self.rename(self.architecture.single(layer, part, expert))
                yield Targeted(Target(name, matrix), Lora(A.select(expert), B.select(expert), scaling))
        elif stack in self.base:
            rows = None if count == 1 else (index * out, (index + 1) * out)
            target = Target(stack, (experts, count * out, A.shape[2]), rows=rows, experts=experts)
            yield Targeted(target, Lora(A, B, scaling))
        else:
            what = f"{tensor}: the base has neither {first} nor {stack}"
            raise Mismatch(Problem("E-TARGET", what, self.where, "is this the Hugging Face model it was made for?"))

    def _doubt(self, what: str) -> None:
        if what not in self.doubts:
            self.doubts.append(what)

    def _scaling(self, rank: int) -> Scaling:
        if self.alpha is None:
            return Scaling("none", rank, None, 1.0)
        return Scaling.by("alpha/rank", self.alpha, rank)

    def _ordered(self, part: str, B: TensorRef) -> TensorRef:
        """B [out, rank] with its rows in transformers' order."""
        if self.base is None:
            if self.architecture.reordered and part in REORDERED:
                self._doubt("the order of the rows of q and k, which depends on the base's numbers of heads")
            return B
        heads = reordered_heads(self.architecture, part, B.shape[0], model_config(self.base), self.where)
        return B if heads is None else from_pairs(B, heads)


def _unfit(tensor: str, a: TensorRef, b: TensorRef, where: str) -> Problem:
    wanted = "[rank, in] and [out, rank], an embedding's [tokens, rank] and [dim, rank]"
    what = f"lora_a and lora_b are {list(a.shape)} and {list(b.shape)}; they must be {wanted}, of all experts or one"
    return Problem("E-SHAPE", what, f"{where}: {tensor}")

"""llama.cpp's LoRA adapters in GGUF, as its ``convert_lora_to_gguf.py`` writes them from a PEFT adapter.

    blk.N.PART.weight.lora_a [rank, in]      blk.N.PART.weight.lora_b [out, rank]
    token_embd.weight.lora_a [tokens, rank]  token_embd.weight.lora_b [dim, rank]
    blk.N.PART_exps.weight   [E, rank, in]   [E, out, rank]

(NumPy's order; GGUF counts dimensions from the fastest.) The scale is `adapter.lora.alpha` / rank, and 1 for an alpha
of 0 or none, as in ``src/llama-adapter.h``. Names are llama.cpp's and are turned back into Hugging Face's, for the
architectures below, whose names are tested against the `gguf` package's own map. llama.cpp rotates neighbouring
numbers of a head where transformers rotates its halves, so in some architectures the rows of q and k are in another
order; it is undone with the numbers of heads in the base's config.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from loratool.adapter import Adapter, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions.choices import Choices
from loratool.conventions.model_config import heads_of, model_config
from loratool.errors import InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.names import natural, prefix_rule
from loratool.tensors import TensorRef
from loratool.updates import Lora, Scaling

NAME = "gguf"
TITLE = "llama.cpp adapter (GGUF)"
KINDS = ("lora",)
TESTED = "gguf 0.19.0; llama.cpp's converter from its description"

_PART = re.compile(r"^(?P<tensor>.+)\.(?P<part>lora_[ab])$")
_TENSOR = re.compile(r"^(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.weight$")

# Hugging Face's name of a tensor of the whole model, and of one in a layer.
_MODEL = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_DENSE = {**_ATTENTION, "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_QWEN_MOE = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_PHI2 = {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
_PHI3 = {
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """The parts of a layer by llama.cpp's name; whether the rows of its q and k are reordered; how experts are split.

    `experts` names one expert's matrix, by part: "{}" is its number.
    """

    parts: Mapping[str, str]
    reordered: bool = False
    experts: Mapping[str, str] = field(default_factory=dict)


_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
# transformers' own stacks [E, ...]: the tensor, and which of its equal parts along the rows.
_STACKS = {
    "ffn_gate_exps": ("mlp.experts.gate_up_proj", 0, 2),
    "ffn_up_exps": ("mlp.experts.gate_up_proj", 1, 2),
    "ffn_down_exps": ("mlp.experts.down_proj", 0, 1),
}

ARCHITECTURES = {
    "llama": Architecture({**_DENSE, "ffn_gate_inp": "block_sparse_moe.gate"}, True, _MIXTRAL_EXPERTS),
    "mistral3": Architecture(_DENSE, reordered=True),
    "granite": Architecture(_DENSE, reordered=True),
    "qwen2": Architecture(_DENSE),
    "qwen3": Architecture(_DENSE),
    "qwen2moe": Architecture({**_ATTENTION, **_QWEN_MOE}, experts=_QWEN_EXPERTS),
    "qwen3moe": Architecture({**_ATTENTION, "ffn_gate_inp": "mlp.gate"}, experts=_QWEN_EXPERTS),
    "gemma": Architecture(_DENSE),
    "gemma2": Architecture(_DENSE),
    "gemma3": Architecture(_DENSE),
    "phi2": Architecture({**_ATTENTION, **_PHI2}),
    "phi3": Architecture(_PHI3),
}


def detect(source: Checkpoint) -> bool:
    return source.shards[0].path.suffix == ".gguf"  # opened as an adapter, or not at all


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    where = str(source.path)
    choices.refuse("config", "adapter", "alpha", "scaling", where=where)
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
    return Adapter(updates, provenance={"convention": NAME}, notes=notes, doubts=tuple(reader.doubts))


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return {}


def _refuse_unsupported(metadata: Mapping[str, str], architecture: str, where: str) -> None:
    """Raises Unsupported for what is no LoRA, acts on some tokens only, or has names that are not known."""
    if metadata.get("adapter.type") != "lora":
        what = f"adapter.type is {metadata.get('adapter.type', 'missing')!s:.40}, not lora"
        raise Unsupported(Problem("E-UNSUPPORTED", what, where))
    if "adapter.alora.invocation_tokens" in metadata:
        what = "an activated LoRA: it changes the model only after its invocation tokens, which no merge can do"
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
        wanted = [name for tensor in self.pairs if (name := self._dense(*_split(tensor))) is not None]
        self.rename, notes = prefix_rule(wanted, wanted if self.base is None else self.base, self.where)
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
        layer, part = _split(tensor)
        if layer is not None and part in self.architecture.experts:
            yield from self._experts(tensor, layer, part, a, b)
            return
        name = self._dense(layer, part)
        if name is None:
            what = f"{tensor}: the architecture has no such part that loratool knows"
            raise Unsupported(Problem("E-UNSUPPORTED", what, self.where, "merge the PEFT adapter it came from"))
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise InvalidFile(_unfit(tensor, a, b, self.where))
        # Rows of an embedding's lora_a are tokens: it is the left factor of the table's delta.
        A, B = (b.T, a) if part == "token_embd" else (a, b)
        if A.shape[0] != B.shape[1] or not A.numel or not B.numel:
            raise InvalidFile(_unfit(tensor, a, b, self.where))
        target = Target(self.rename(name), (B.shape[0], A.shape[1]), layout="embedding" if A is not a else "")
        yield Targeted(target, Lora(A, self._ordered(part, tensor, B), self._scaling(A.shape[0])))

    def _experts(self, tensor: str, layer: str, part: str, A: TensorRef, B: TensorRef) -> Iterator[Targeted]:
        """lora_a [E, rank, in], lora_b [E, out, rank], for a base that stores one tensor per expert, or one for all."""
        if len(A.shape) != 3 or len(B.shape) != 3 or A.shape[:2] != (B.shape[0], B.shape[2]) or not A.numel * B.numel:
            raise InvalidFile(_unfit(tensor, A, B, self.where))
        experts, out, rank = B.shape
        matrix, scaling = (out, A.shape[2]), self._scaling(rank)
        single = f"model.layers.{layer}.{self.architecture.experts[part]}.weight"
        first = self.rename(single.format(0))
        stack, index, count = _STACKS[part]
        stack = self.rename(f"model.layers.{layer}.{stack}")
        if self.base is None:
            self._doubt("how the base stores its experts")
            yield Targeted(Target(single.format("*"), (experts, *matrix), experts=experts), Lora(A, B, scaling))
        elif first in self.base:
            for expert in range(experts):
                name = self.rename(single.format(expert))
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

    def _dense(self, layer: str | None, part: str) -> str | None:
        if layer is None:
            return f"{_MODEL[part]}.weight" if part in _MODEL else None
        owner = self.architecture.parts.get(part)
        return owner and f"model.layers.{layer}.{owner}.weight"

    def _scaling(self, rank: int) -> Scaling:
        if self.alpha is None:
            return Scaling("none", rank, None, 1.0)
        return Scaling.by("alpha/rank", self.alpha, rank)

    def _ordered(self, part: str, tensor: str, B: TensorRef) -> TensorRef:
        """B [out, rank] with its rows in transformers' order."""
        if not self.architecture.reordered or part not in ("attn_q", "attn_k"):
            return B
        if self.base is None:
            self._doubt("the order of the rows of q and k, which depends on the base's numbers of heads")
            return B
        heads = heads_of(model_config(self.base), self.where)
        count = heads.query if part == "attn_q" else heads.key
        out, rank = B.shape
        if out % (2 * count):
            what = f"{tensor}: {out} rows do not divide among {count} heads, as the base's config.json has"
            raise Mismatch(Problem("E-SHAPE", what, self.where, "is this the adapter's base?"))
        # llama.cpp's rows of a head are (0, d/2), (1, d/2 + 1), ...: [heads, d/2, 2] -> [heads, 2, d/2]
        return B.reshape(count, out // count // 2, 2, rank).permute(0, 2, 1, 3).reshape(out, rank)


def _split(tensor: str) -> tuple[str | None, str]:
    """``blk.3.attn_q.weight`` -> ("3", "attn_q"); a name of no such form is no part of any architecture."""
    match = _TENSOR.match(tensor)
    if match is None:
        return None, tensor
    return match["layer"], match["part"]


def _unfit(tensor: str, a: TensorRef, b: TensorRef, where: str) -> Problem:
    wanted = "[rank, in] and [out, rank], an embedding's [tokens, rank] and [dim, rank]"
    what = f"lora_a and lora_b are {list(a.shape)} and {list(b.shape)}; they must be {wanted}, of all experts or one"
    return Problem("E-SHAPE", what, f"{where}: {tensor}")

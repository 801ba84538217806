"""llama.cpp's names of tensors, and its order of rows, for the reader and the writer of its adapters.

The names are tested against the `gguf` package's own map, the classes against what llama.cpp's converter calls each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.conventions.model_config import heads_of
from loratool.errors import Mismatch, Problem
from loratool.names import prefix_rule
from loratool.tensors import TensorRef

EMBEDDING, HEAD = "token_embd", "output"
REORDERED = ("attn_q", "attn_k")  # of an architecture that is `reordered`
_TENSOR = re.compile(r"^(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.weight$")
_TAIL = re.compile(r"(?:^|\.)((?:layers\.\d+|embed_tokens|lm_head)\..+)$")  # of Hugging Face's name

# Hugging Face's name of a tensor of the whole model, and of one in a layer.
MODEL = {EMBEDDING: "model.embed_tokens", HEAD: "lm_head"}
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
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
# transformers' own stacks [E, ...]: the tensor, and which of its equal parts along the rows.
STACKS = {
    "ffn_gate_exps": ("mlp.experts.gate_up_proj", 0, 2),
    "ffn_up_exps": ("mlp.experts.gate_up_proj", 1, 2),
    "ffn_down_exps": ("mlp.experts.down_proj", 0, 1),
}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of some classes of transformers.

    `parts` are those of a layer by llama.cpp's name, `experts` one expert's matrices, where "{}" is its number.
    `reordered`: the rows of q and k are. `head`: there can be a matrix `output` beside `token_embd`.
    """

    classes: tuple[str, ...]
    parts: Mapping[str, str]
    reordered: bool = False
    experts: Mapping[str, str] = field(default_factory=dict)
    head: bool = True

    def tensor(self, layer: str | None, part: str) -> str | None:
        """Hugging Face's tensor, not one of an expert; None if there is none."""
        owner = MODEL.get(part) if layer is None else self.parts.get(part)
        prefix = "" if layer is None else f"model.layers.{layer}."
        return owner and f"{prefix}{owner}.weight"

    def single(self, layer: str, part: str, expert: int | str) -> str:
        """The tensor of one expert, in a checkpoint that stores them apart."""
        return f"model.layers.{layer}.{self.experts[part].format(expert)}.weight"

    def names(self, layers: Iterable[str]) -> Iterator[tuple[str | None, str, str]]:
        """(layer, part, Hugging Face's tensor) of the whole model and of some layers, without experts."""
        for part, owner in MODEL.items():
            yield None, part, f"{owner}.weight"
        for layer in layers:
            for part, owner in self.parts.items():
                yield layer, part, f"model.layers.{layer}.{owner}.weight"


ARCHITECTURES = {
    "llama": Architecture(
        ("LlamaForCausalLM", "LlamaModel", "MistralForCausalLM", "MixtralForCausalLM"),
        {**_DENSE, "ffn_gate_inp": "block_sparse_moe.gate"},
        True,
        _MIXTRAL_EXPERTS,
    ),
    "mistral3": Architecture(("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"), _DENSE, reordered=True),
    "granite": Architecture(("GraniteForCausalLM",), _DENSE, reordered=True),
    "qwen2": Architecture(("Qwen2ForCausalLM", "Qwen2Model"), _DENSE),
    "qwen3": Architecture(("Qwen3ForCausalLM", "Qwen3Model"), _DENSE),
    "qwen2moe": Architecture(("Qwen2MoeForCausalLM",), {**_ATTENTION, **_QWEN_MOE}, experts=_QWEN_EXPERTS),
    "qwen3moe": Architecture(
        ("Qwen3MoeForCausalLM",), {**_ATTENTION, "ffn_gate_inp": "mlp.gate"}, experts=_QWEN_EXPERTS
    ),
    "gemma": Architecture(("GemmaForCausalLM",), _DENSE, head=False),
    "gemma2": Architecture(("Gemma2ForCausalLM",), _DENSE, head=False),
    "gemma3": Architecture(("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), _DENSE),
    "phi2": Architecture(("PhiForCausalLM",), {**_ATTENTION, **_PHI2}),
    "phi3": Architecture(("Phi3ForCausalLM",), _PHI3),
}


def architecture_name(config: Mapping[str, Any]) -> str | None:
    """What llama.cpp calls the architecture of a config.json; None where that is not known here.

    Its converter goes by the class of the language model, or of the whole.
    """
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    classes = text.get("architectures") or config.get("architectures")
    known = {name: ggml for ggml, architecture in ARCHITECTURES.items() for name in architecture.classes}
    if not isinstance(classes, list) or not classes or text.get("model_type") == "mistral4":
        return None  # Mistral 4 goes by a class of Mistral 3 and has other tensors
    return known.get(str(classes[0]))


def split(tensor: str) -> tuple[str | None, str]:
    """``blk.3.attn_q.weight`` -> ("3", "attn_q"); a name of no such form is no part of any architecture."""
    match = _TENSOR.match(tensor)
    if match is None:
        return None, tensor
    return match["layer"], match["part"]


def joined(layer: str | None, part: str) -> str:
    """The opposite of `split`."""
    return f"{part}.weight" if layer is None else f"blk.{layer}.{part}.weight"


def renaming(
    architecture: Architecture, layers: Iterable[str], known: Collection[str] | None, where: str
) -> tuple[Callable[[str], str], list[str]]:
    """How to turn Hugging Face's names into those that a base has, and a note if they differ.

    By all that the base has of these layers, not by what is in one adapter: both directions then come to one rule.
    """
    if known is None:
        return str, []
    tails = {match[1] for name in known if (match := _TAIL.search(name))}
    wanted = [name for _, _, name in architecture.names(layers) if name.removeprefix("model.") in tails]
    return prefix_rule(wanted, known, where)


def reordered_heads(
    architecture: Architecture, part: str, rows: int, config: Mapping[str, Any], where: str
) -> int | None:
    """How many heads the rows of a part are reordered in; None where they are not.

    Raises ChoiceNeeded or Mismatch if the config does not say, or says what can not be.
    """
    if not architecture.reordered or part not in REORDERED:
        return None
    heads = heads_of(config, where)
    count = heads.query if part == "attn_q" else heads.key
    if rows % (2 * count):
        what = f"{part}: {rows} rows do not divide among {count} heads, as the base's config.json has"
        raise Mismatch(Problem("E-SHAPE", what, where, "is this the adapter's base?"))
    return count


def from_pairs(B: TensorRef, heads: int) -> TensorRef:
    """B [out, rank] with its rows in transformers' order: llama.cpp's rows of a head are (0, d/2), (1, d/2 + 1), ..."""
    out, rank = B.shape  # [heads, d/2, 2] -> [heads, 2, d/2]
    return B.reshape(heads, out // heads // 2, 2, rank).permute(0, 2, 1, 3).reshape(out, rank)


def to_pairs(B: TensorRef, heads: int) -> TensorRef:
    """The opposite of `from_pairs`."""
    out, rank = B.shape  # [heads, 2, d/2] -> [heads, d/2, 2]
    return B.reshape(heads, 2, out // heads // 2, rank).permute(0, 2, 1, 3).reshape(out, rank)

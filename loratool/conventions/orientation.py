"""Which way round a base stores a square matrix, from what else it stores. No shape can tell, and no flag proves it."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.names import parent
from loratool.tensors import TensorRef

# Layers of transformers that are usually Conv1D, [in, out]: without the base, a flag alone proves nothing for them.
CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}


def square_layout(name: str, flag: bool, base: Mapping[str, TensorRef]) -> str | None:
    """The layout ("" for [out, in], "in_out") of the square tensor `name`, or None if nothing settles it.

    A matrix and its bias show the layout of every layer that is not square, and layers of one name are of one class:
    GPT-2's square ``attn.c_proj`` is a Conv1D because ``mlp.c_proj`` is one. Without such a namesake the trainer's
    `flag` counts, if the base does not contradict it. Experts' matrices [experts, a, b] are [in, out] where their
    biases lie beside them as ``NAME_bias`` (gpt-oss).
    """
    if len(base[name].shape) == 3:
        return "in_out" if f"{name}_bias" in base else ""
    layouts = {other: _shown(other, ref, base) for other, ref in base.items()}
    namesakes = {layouts[other] for other in layouts if _leaf(other) == _leaf(name)} - {None}
    if len(namesakes) == 1:
        return namesakes.pop()
    shown = set(layouts.values()) - {None}
    if not flag and "in_out" not in shown:
        return ""
    return "in_out" if flag and shown == {"in_out"} else None


def _leaf(name: str) -> str:
    """The last module of a tensor's name: ``h.0.attn.c_proj.weight`` -> ``c_proj``."""
    return parent(name).rpartition(".")[2]


def _shown(name: str, ref: TensorRef, base: Mapping[str, TensorRef]) -> str | None:
    """The layout that a matrix and its bias give away: the bias is as long as the output."""
    if not name.endswith(".weight") or len(ref.shape) != 2 or ref.shape[0] == ref.shape[1]:
        return None
    bias = base.get(f"{parent(name)}.bias")
    if bias is None or len(bias.shape) != 1:
        return None
    return {ref.shape[0]: "", ref.shape[1]: "in_out"}.get(bias.shape[0])

"""Which way round a base stores a square matrix, from what else it stores. No shape can tell, and no flag proves it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from loratool.names import parent
from loratool.tensors import TensorRef

# Layers of transformers that are usually Conv1D, [in, out]: without the base, a flag alone proves nothing for them.
CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}


def shown_layouts(base: Mapping[str, TensorRef]) -> dict[str, set[str]]:
    """The layouts ("" for [out, in], "in_out") that a base's matrices give away, by the last module of their names."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, ref in base.items():
        if (layout := _shown(name, ref, base)) is not None:
            found[_leaf(name)].add(layout)
    return dict(found)


def square_layout(name: str, flag: bool, base: Mapping[str, TensorRef], shown: Mapping[str, set[str]]) -> str | None:
    """The layout of the square tensor `name`, or None if nothing settles it; `shown` is `shown_layouts` of the base.

    A matrix and its bias show the layout of every layer that is not square, and layers of one name are of one class:
    GPT-2's square ``attn.c_proj`` is a Conv1D because ``mlp.c_proj`` is one. Without such a namesake the trainer's
    `flag` counts, if the base does not contradict it. Experts' matrices [experts, a, b] are [in, out] where their
    biases lie beside them as ``NAME_bias`` (gpt-oss).
    """
    if len(base[name].shape) == 3:
        return "in_out" if f"{name}_bias" in base else ""
    namesakes = shown.get(_leaf(name), set())
    if len(namesakes) == 1:
        return next(iter(namesakes))
    anywhere = set[str]().union(*shown.values())
    if not flag and "in_out" not in anywhere:
        return ""
    return "in_out" if flag and anywhere == {"in_out"} else None


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

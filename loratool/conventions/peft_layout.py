"""A LoRA layer as PEFT has it: the shapes of its tensors, and what a LoraConfig says of it.

For the conventions whose files PEFT loads in the end: its own, and diffusers'.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool import folding
from loratool.adapter import Target, Targeted
from loratool.conventions.writing import Misfit
from loratool.names import natural, parent
from loratool.tensors import TensorRef
from loratool.updates import Add, Dora, Lora, Scaling

# -- tensors ----------------------------------------------------------------------------------------------------------


def one_layer(items: Sequence[Targeted]) -> Targeted:
    """The updates of one tensor as a single LoRA or DoRA of all of it."""
    first = items[0]
    if isinstance(first.update, Dora):
        direction = folding.low_rank(first.update)
        assert direction is not None
        return replace(first, update=replace(first.update, direction=folding.without_core(direction)))
    return folding.merged_factors(items)


def up(B: TensorRef, target: Target) -> TensorRef:
    """B [out, rank] as PEFT has it: for a convolution it is one of size 1, [out, rank, 1...]."""
    return B.reshape(*B.shape, *(1 for _ in target.shape[2:])) if len(target.shape) > 2 else B


def magnitude(update: Dora, target: Target) -> TensorRef:
    """DoRA's magnitude [out] as PEFT has it: [1, out, 1...] for a convolution."""
    size = update.magnitude.numel
    convolution = len(target.shape) > 2
    return update.magnitude.reshape(*((1, size, *(1 for _ in target.shape[2:])) if convolution else (size,)))


def bias_terms(layers: Mapping[str, Targeted], biases: Mapping[str, Add]) -> dict[str, TensorRef]:
    """`lora_bias`: every layer's B has a bias, under the layer's scale; zeros where none was trained."""
    found = {}
    for name, item in layers.items() if biases else ():
        lora, bias = folding.low_rank(item.update), biases.get(f"{parent(name)}.bias")
        assert lora is not None
        size = item.target.shape[1 if item.target.layout == "in_out" else 0]
        term = folding.zeros(size) if bias is None else folding.rescaled(bias, lora.factors).value
        found[f"{parent(name)}.lora_B.bias"] = term
    return found


# -- what PEFT has no layer for ---------------------------------------------------------------------------------------


def misfit_dora(item: Targeted, parameter: bool = False) -> Misfit | None:
    """Why PEFT has no such DoRA; a `parameter` is one that no layer of its own class holds."""
    update, target = item.update, item.target
    if not isinstance(update, Dora):
        return None
    if not isinstance(update.direction, Lora):
        return Misfit((), f"PEFT has DoRA on LoRA only, not on {update.direction.kind}")
    if parameter or not target.covers_all:
        return Misfit((), "PEFT has DoRA of whole layers only, not of experts, ranges of rows or bare parameters")
    if update.axis != (1 if target.layout in ("in_out", "embedding") else 0):
        return Misfit((), "PEFT takes DoRA's norm along another axis")
    return None


def mixed_dora(layers: Mapping[str, Sequence[Targeted]]) -> list[Misfit]:
    """`use_dora` is one flag for all layers: of LoRA and DoRA, what is rarer does not fit."""
    dora = [name for name, items in layers.items() if items[0].update.kind == "dora"]
    plain = [name for name in layers if name not in dora]
    if not dora or not plain:
        return []
    rarer, other = (dora, plain) if len(dora) <= len(plain) else (plain, dora)
    word = "LoRA without a magnitude" if rarer is dora else "DoRA"
    return [Misfit(tuple(rarer), f"use_dora is one flag for all layers, and {len(other)} others are {word}")]


# -- the config -------------------------------------------------------------------------------------------------------


def scales(scalings: Mapping[str, Scaling]) -> dict[str, Any]:
    """What a LoraConfig says of ranks and alphas, of scalings by pattern: the usual values, and the others by pattern.

    rsLoRA is one flag for all layers; it stays where all have it.
    """
    rslora = bool(scalings) and all(scaling.rule == "alpha/sqrt(rank)" for scaling in scalings.values())
    ranks = {pattern: scaling.rank for pattern, scaling in scalings.items()}
    alphas = {pattern: _alpha(scaling, rslora) for pattern, scaling in scalings.items()}
    rank, alpha = usual(ranks, 8), usual(alphas, 8)
    patterns = {
        "rank_pattern": {pattern: value for pattern, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern: value for pattern, value in alphas.items() if value != alpha},
    }
    found = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    return found | {key: value for key, value in patterns.items() if value}


def pattern(name: str) -> str:
    """A regular expression for one layer alone: PEFT matches the ends of names, and a dot matches anything."""
    return "^" + re.escape(name)


def _alpha(scaling: Scaling, rslora: bool) -> float:
    assert scaling.rank is not None, "the updates were checked"
    known = scaling.alpha if scaling.rule in ("alpha/rank", "alpha/sqrt(rank)") else None
    if known is None or (scaling.rule == "alpha/sqrt(rank)") != rslora:
        known = folding.by_rank(scaling.factor, scaling.rank).alpha
    assert known is not None
    return plain_number(known)


def plain_number(value: float) -> float:
    """4 for 4.0: people write ranks and alphas so."""
    return int(value) if value == int(value) else value


def usual(values: Mapping[str, Any], default: int) -> Any:
    return Counter(values.values()).most_common(1)[0][0] if values else default


def target_modules(names: Collection[str], known: Collection[str] | None) -> list[str] | str:
    """Full names; their last segments where these are all modules of the base so called (vLLM's users expect them).

    Names in a list match as ends of names. Where the base shows that one would hit another module too, a regular
    expression takes their place. `known` are all modules of the base that own tensors, directly or not; None without
    a base.
    """
    names = sorted(names, key=natural)
    if known is None:
        return names
    ends = {name.rpartition(".")[2] for name in names}
    # A number could be that of a module without tensors, a Dropout in some list.
    if {name for name in known if name.rpartition(".")[2] in ends} == {*names} and not any(map(str.isdigit, ends)):
        return sorted(ends)
    if any(other.endswith("." + name) for other in known for name in names):
        return "|".join(map(re.escape, names))
    return names

"""Writing PEFT's (IA)^3: the keys that `peft_ia3.py` reads, and a config that says which vectors are of inputs.

A vector of outputs multiplies the layer's bias as well, if it has one: so only together with that it is PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from loratool import folding
from loratool.adapter import Adapter, Targeted
from loratool.bundle import Bundle
from loratool.checkpoint import Checkpoint
from loratool.conventions.peft_about import About
from loratool.conventions.peft_folder import INSIDE, PART_OF_A_TENSOR, Homes, folder, leaf
from loratool.conventions.peft_layout import target_modules
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.names import modules, natural, parent
from loratool.updates import Replace, Scale

_MATRICES = {"lora", "dora", "loha", "lokr", "scale"}
_DIMS = (2, 4, 5)  # of the weights of Linear, Conv2d and Conv3d


def is_for(adapter: Adapter) -> bool:
    """Whether all updates of matrices are factors; an adapter of PEFT has one method."""
    return {item.update.kind for item in adapter.updates} & _MATRICES == {Scale.kind}


def misfits(adapter: Adapter, base: Checkpoint | None) -> list[Misfit]:
    targets = adapter.targets()
    layers = {parent(name) for name, items in targets.items() if _is_layer(items)}
    return grouped((name, _misfit(name, targets, layers, adapter, base)) for name in targets)


def _is_layer(items: Sequence[Targeted]) -> bool:
    return any(isinstance(item.update, Scale) and len(item.target.shape) > 1 for item in items)


def _misfit(
    name: str, targets: Mapping[str, list[Targeted]], layers: set[str], adapter: Adapter, base: Checkpoint | None
) -> Misfit | None:
    """Why an adapter of (IA)^3 can not hold the updates of one tensor."""
    items = targets[name]
    target, update = items[0].target, items[0].update
    if adapter.when:
        return Misfit((), "PEFT has no (IA)^3 that acts on some inputs only", bakeable=False)
    if other := sorted({item.update.kind for item in items} - {"scale", "replace"}):
        return Misfit((), f"an (IA)^3 adapter of PEFT has no {other[0]} update")
    if any(not item.target.covers_all for item in items):
        return PART_OF_A_TENSOR if isinstance(update, Replace) else Misfit((), "PEFT has (IA)^3 of whole layers only")
    if len(items) > 1:
        return Misfit((), "PEFT does not replace the weight of a layer of (IA)^3")
    if not isinstance(update, Scale):
        return None
    if len(target.shape) == 1:
        weight = targets.get(f"{parent(name)}.weight", [])
        fits = leaf(name) == "bias" and len(weight) == 1 and _by_output(weight[0]) and _same(update, weight[0].update)
        return None if fits else Misfit((), "PEFT multiplies a bias only by what it multiplies the layer's outputs by")
    if leaf(name) != "weight" or not parent(name) or target.layout == "embedding" or len(target.shape) not in _DIMS:
        return Misfit((), "PEFT has (IA)^3 of Linear, Conv1D, Conv2d and Conv3d layers only")
    if any(parent(name).startswith(outer + ".") for outer in layers):
        return INSIDE
    bias = f"{parent(name)}.bias"
    if not _by_output(items[0]) or isinstance(targets[bias][0].update if bias in targets else None, Scale):
        return None
    if base is None:
        why = "PEFT multiplies the bias of a layer as well, and only the base tells whether it has one"
        return Misfit((), why, "give it with --base BASE", bakeable=False)
    return Misfit((), "PEFT multiplies the layer's bias as well, and here it stays") if bias in base.tensors else None


def _by_output(item: Targeted) -> bool:
    """Whether a matrix is multiplied by one factor per output."""
    return isinstance(item.update, Scale) and item.update.axis == int(item.target.layout == "in_out")


def _same(one: Scale, other: object) -> bool:
    """Whether two vectors are the same numbers."""
    if not isinstance(other, Scale) or one.factor.shape != other.factor.shape:
        return False
    return bool((one.factor.read() == other.factor.read()).all())


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    layers = {item.target.name: item for item in adapter.updates if _is_layer([item])}
    tensors, inputs = {}, []
    for name in sorted(layers, key=natural):
        item, module = layers[name], parent(name)
        assert isinstance(item.update, Scale)
        count, ones = item.update.factor.numel, (1,) * (len(item.target.shape) - 2)
        by_output = _by_output(item)
        shape = (1, count, *ones) if ones or not by_output else (count, 1)
        tensors[f"{module}.ia3_l"] = item.update.factor.reshape(*shape)
        inputs += [] if by_output else [module]
    whole = {item.target.name: item.update.value for item in adapter.updates if isinstance(item.update, Replace)}
    wrapped = [parent(name) for name in layers]
    known = None if base is None else modules(base.tensors)
    about = About.of(adapter, "IA3", base, options)
    homes = Homes.of(whole, dict.fromkeys(wrapped, 1), base, about.saved)
    targets = about.targets(wrapped, known) or target_modules(wrapped, known)
    config = {
        "peft_type": "IA3",
        "inference_mode": True,
        "init_ia3_weights": True,
        "fan_in_fan_out": any(item.target.layout == "in_out" for item in layers.values()),
        "target_modules": targets,
        "feedforward_modules": _feedforward(targets, wrapped, inputs),
        "modules_to_save": [*homes.saved] or None,
    }
    notes = ["vLLM and others that load LoRA only do not load PEFT's (IA)^3"]
    if homes.direct:
        why = "they are loaded into the base model itself, where no other adapter and no switching off undoes them"
        notes.append(f"{len(homes.direct)} whole tensors ({homes.direct[0]} ...) are not in modules_to_save: {why}")
    if options.uniform:
        notes.append(folding.uniform_note((), ()))
    return folder(about, config, {**tensors, **homes.tensors}, notes)


def _feedforward(targets: list[str] | str, layers: Collection[str], inputs: Sequence[str]) -> list[str] | str:
    """Those of the targets that are multiplied at their inputs; as a pattern, where a name of the list is of others
    too. PEFT compares ends of names without regard to dots."""
    if isinstance(targets, list):
        ends = [end for end in targets if any(module.endswith(end) for module in inputs)]
        if {module for module in layers if module.endswith(tuple(ends))} == {*inputs}:
            return ends
    return "|".join(map(re.escape, inputs))

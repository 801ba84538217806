"""`layer_replication`: PEFT repeats layers of the base and adapts the repeated stack, whose weights it shares.

[[0, 2], [1, 2]] makes layers 0, 1, 1 of two. The adapter's layers are those of the longer stack, so the base must grow:
its repeated layers are written as whole tensors. A base that has the longer stack already is taken as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.errors import InvalidFile, Mismatch, Problem
from loratool.tensors import TensorRef

# Where PEFT looks for the list of layers: Llama, BERT and Falcon (peft/tuners/tuners_utils.py, replicate_layers).
_LAYERS = re.compile(r"^(?P<stack>(?:model\.)*(?:bert\.)?(?:layers|encoder\.layer|h))\.(?P<layer>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Replicated:
    """A base with the longer stack of layers, the tensors of it that are copies, and a note on what was done."""

    base: Mapping[str, TensorRef]
    copies: Mapping[str, TensorRef]
    note: str


def replicate(base: Mapping[str, TensorRef], ranges: tuple[tuple[int, int], ...], where: str) -> Replicated:
    """The base that `layer_replication` makes of one. Raises Mismatch if the base has no such layers."""
    order = [layer for start, stop in ranges for layer in range(start, stop)]
    stack, layers = _layers(base, where)
    if len(layers) == len(order) and _is_repeated(layers, order):
        return Replicated(base, {}, f"layer_replication: the base has the {len(order)} layers of the longer stack")
    if max(order) >= len(layers):
        what = f"layer_replication names layer {max(order)}, the base has {len(layers)} layers"
        raise Mismatch(Problem("E-TARGET", what, where, "is this the adapter's base?"))
    grown = {name: ref for name, ref in base.items() if not name.startswith(f"{stack}.")}
    copies = {}
    for new, old in enumerate(order):
        for rest, ref in layers[old].items():
            grown[f"{stack}.{new}.{rest}"] = ref
            if new != old:
                copies[f"{stack}.{new}.{rest}"] = ref
    shorter = [f"{stack}.{layer}" for layer in range(len(order), len(layers))]
    if shorter:
        what = f"layer_replication makes {len(order)} layers of {len(layers)}: {', '.join(shorter)} would have to go"
        raise Mismatch(Problem("E-TARGET", what, where, "make the base of these layers first, and merge into that"))
    note = f"layer_replication: layers {order} of the base become 0 to {len(order) - 1}; config.json needs their number"
    return Replicated(grown, copies, note)


def parse_ranges(value: object, where: str) -> tuple[tuple[int, int], ...]:
    """The ranges [start, stop) of a config's `layer_replication`; () if there are none. Raises InvalidFile."""
    ranges: list[Any] = value if isinstance(value, list) else [value]
    good = all(isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in ranges)
    if value is None or value == []:
        return ()
    if not good or not all(0 <= start < stop <= 10_000 for start, stop in ranges):
        what = f"adapter_config: layer_replication is {value!r:.80}, not a list of [start, stop] ranges"
        raise InvalidFile(Problem("E-CONFIG", what, where, "take the file that the trainer wrote"))
    return tuple((start, stop) for start, stop in ranges)


def _layers(base: Mapping[str, TensorRef], where: str) -> tuple[str, dict[int, dict[str, TensorRef]]]:
    """The stack's name, and its tensors by layer and name within it. Raises Mismatch if there is no one stack."""
    stacks: dict[str, dict[int, dict[str, TensorRef]]] = defaultdict(lambda: defaultdict(dict))
    for name, ref in base.items():
        if (match := _LAYERS.match(name)) is not None:
            stacks[match["stack"]][int(match["layer"])][match["rest"]] = ref
    if len(stacks) == 1:
        (stack, layers), *_ = stacks.items()
        if sorted(layers) == [*range(len(layers))]:
            return stack, layers
    what = f"layer_replication repeats layers, and the base has {len(stacks)} stacks of them"
    hint = "PEFT knows model.layers, encoder.layer and h; is this the adapter's base?"
    raise Mismatch(Problem("E-TARGET", what, where, hint))


def _is_repeated(layers: Mapping[int, Mapping[str, TensorRef]], order: list[int]) -> bool:
    """Whether layers that come from one layer are equal, to the byte, in the tensor that is largest."""
    first: dict[int, int] = {}
    for new, old in enumerate(order):
        one, two = layers[first.setdefault(old, new)], layers[new]
        largest = max(one, key=lambda rest: (one[rest].numel, rest))
        if first[old] != new and (largest not in two or one[largest].digest() != two[largest].digest()):
            return False
    return len(first) < len(order) or order == sorted(order)

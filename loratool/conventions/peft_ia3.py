"""PEFT's (IA)^3: one learned number per output of a layer, or per input of a feedforward layer, times its weights.

``.ia3_l`` is l [out, 1], or [1, in] of a feedforward layer; of convolutions [1, n, 1...] for both. W' = W * l, and
where l is per output the bias is multiplied as well (peft/tuners/ia3/layer.py). Given the base, those are differences.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratool.adapter import Target, Targeted
from loratool.conventions import of_base
from loratool.conventions.flat_names import Stored
from loratool.conventions.peft_base import BaseFacts
from loratool.conventions.peft_kinds import Saved
from loratool.errors import ChoiceNeeded, InvalidFile, Mismatch, Problem
from loratool.names import parent
from loratool.tensors import TensorRef
from loratool.updates import Add, Scaling

DOUBT = "(IA)^3 multiplies the base's weights: only the base can tell by how much that changes them"
NOTE = "(IA)^3 as the differences that it makes to this base's weights and biases: they are for no other base"


def updates(saved: Saved, name: str, facts: BaseFacts, notes: list[str]) -> Iterator[Targeted]:
    """What it does to the weight `name`, and to the bias beside that, if the base is known and has one."""
    (vector,) = saved.take("ia3_l")
    by_input = _is_by_input(saved, vector, facts)
    if sum(dim != 1 for dim in vector.shape) > 1:
        raise saved.bad("it must be one row or column of numbers")
    if facts.base is None:
        if DOUBT not in facts.doubts:
            facts.doubts.append(DOUBT)
        yield _add(name, vector.reshape(vector.numel), "")
    elif saved.stored is not None:
        if NOTE not in notes:
            notes.append(NOTE)
        yield from _known(saved, name, vector, by_input, saved.stored, facts)
    else:
        yield _add(name, vector.reshape(vector.numel), "")  # a target the base does not have: the plan says so


def _known(
    saved: Saved, name: str, vector: TensorRef, by_input: bool, stored: TensorRef, facts: BaseFacts
) -> Iterator[Targeted]:
    count, dims = vector.numel, stored.shape[:2]
    if count not in dims or len(dims) < 2:
        side = "inputs" if by_input else "outputs"
        what = f"{saved.name}: ia3_l has {count} numbers, for the {side} of the base's {list(stored.shape)}"
        raise Mismatch(Problem("E-SHAPE", what, saved.where, "is this the adapter's base?"))
    other = dims[1 - dims.index(count)]
    shape = ((other, count) if by_input else (count, other)) + stored.shape[2:]  # [out, in, kernel...]
    layout = facts.layout(saved.name, name, shape)
    axis = int(by_input) if layout == "" else 1 - int(by_input)
    if dims[axis] != count:
        raise saved.bad(f"the base has {list(stored.shape)}")
    yield _add(name, of_base.scaled(vector, axis, Stored(stored, stored), -1.0), layout)
    bias = facts.stored(f"{parent(name)}.bias")
    if bias is None or by_input:
        return
    if bias.shape != (count,):
        raise saved.bad(f"the base's bias is {list(bias.shape)}")
    yield _add(f"{parent(name)}.bias", of_base.scaled(vector, 0, Stored(bias, bias), -1.0), "")


def _is_by_input(saved: Saved, vector: TensorRef, facts: BaseFacts) -> bool:
    """Whether a layer is one of the feedforward ones: the vector of a matrix shows it, that of a convolution not."""
    told = None if facts.config is None else facts.config.is_feedforward(saved.name)
    if len(vector.shape) > 2 or vector.numel == 1:
        if told is None:
            what = f"{saved.name}: whether it is a feedforward layer is not stored in the tensors"
            raise ChoiceNeeded(Problem("E-CONFIG", what, saved.where, "give --config adapter_config.json"))
        return told
    shown = vector.shape[0] == 1
    if told is not None and told != shown:
        what = f"{saved.name}: ia3_l is {list(vector.shape)}, and feedforward_modules of the config says otherwise"
        raise InvalidFile(Problem("E-CONFIG", what, saved.where, "is it this adapter's own config?"))
    return shown


def _add(name: str, value: TensorRef, layout: str) -> Targeted:
    return Targeted(Target(name, value.shape, layout=layout), Add(value, Scaling("none", None, None, 1.0)))

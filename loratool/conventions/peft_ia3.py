"""PEFT's (IA)^3: one learned number per output of a layer, or per input of a feedforward layer, times its weights.

``.ia3_l`` is l [out, 1], or [1, in] of a feedforward layer; of convolutions [1, n, 1...] for both. W' = W * l, and
where l is per output the bias is multiplied as well (peft/tuners/ia3/layer.py). The numbers are no base's; but how long
the weight's other side is, and whether there is a bias, the file does not say.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratool.adapter import Target, Targeted
from loratool.conventions.peft_base import BaseFacts
from loratool.conventions.peft_kinds import Saved
from loratool.errors import ChoiceNeeded, InvalidFile, Mismatch, Problem
from loratool.names import parent
from loratool.tensors import TensorRef
from loratool.updates import Scale

DOUBT = "(IA)^3 has one side of each weight: only the base can tell the other, and which layers have a bias"


def updates(saved: Saved, name: str, facts: BaseFacts) -> Iterator[Targeted]:
    """What it does to the weight `name`, and to the bias beside that, if the base is known and has one."""
    (vector,) = saved.take("ia3_l")
    by_input = _is_by_input(saved, vector, facts)
    if sum(dim != 1 for dim in vector.shape) > 1:
        raise saved.bad("it must be one row or column of numbers")
    if facts.base is None:
        if DOUBT not in facts.doubts:
            facts.doubts.append(DOUBT)
        yield _unplaced(name, vector)
    elif saved.stored is not None:
        yield from _known(saved, name, vector, by_input, saved.stored, facts)
    else:
        yield _unplaced(name, vector)  # a target the base does not have: the plan says so


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
    factor = vector.reshape(count)
    yield Targeted(Target(name, stored.shape, layout=layout), Scale(factor, axis))
    bias = facts.stored(f"{parent(name)}.bias")
    if bias is None or by_input:
        return
    if bias.shape != (count,):
        raise saved.bad(f"the base's bias is {list(bias.shape)}")
    yield Targeted(Target(f"{parent(name)}.bias", bias.shape), Scale(factor, 0))


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


def _unplaced(name: str, vector: TensorRef) -> Targeted:
    """The factors alone, to be looked at: nothing says what they lie beside."""
    return Targeted(Target(name, (vector.numel,)), Scale(vector.reshape(vector.numel), 0))

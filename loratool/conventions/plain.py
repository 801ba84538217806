"""The plain wrapper of "Build a Large Language Model (From Scratch)", appendix E: LinearWithLoRA.

    X.linear.weight [out, in]   X.lora.A [in, rank]   X.lora.B [rank, out]

forward: linear(x) + scale * (x @ A @ B). The scale is alpha in the first edition and alpha/rank in the later one,
and neither alpha nor the rule is in the state dict: both must be given.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loratool.adapter import Adapter, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions.choices import Choices
from loratool.conventions.scales import Scales
from loratool.errors import InvalidFile, Problem
from loratool.names import natural, prefix_rule
from loratool.tensors import TensorRef
from loratool.updates import Lora

NAME = "plain"
TITLE = "plain LinearWithLoRA wrapper"
KINDS = ("lora",)
TESTED = "the book's class, written again"
ASKS = ("alpha", "scaling")


def detect(source: Checkpoint) -> bool:
    return bool(_wrapped(source))


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    wrapped = _wrapped(source)
    names = {module: f"{_unwrapped(module, wrapped)}.weight" for module in wrapped}
    choices.check_used([*wrapped], str(source.path))
    rename, notes = prefix_rule(names.values(), names.values() if base is None else base, str(source.path))
    scales = Scales(source, choices, asks_rule=True)
    updates, problems = [], []
    for module in sorted(wrapped, key=natural):
        A, B = source.tensors[f"{module}.lora.A"], source.tensors[f"{module}.lora.B"]
        if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[1] != B.shape[0] or not A.numel or not B.numel:
            problems.append(
                Problem(
                    "E-SHAPE",
                    f"lora.A is {list(A.shape)}, lora.B {list(B.shape)}; they must be [in, rank] and [rank, out]",
                    module,
                )
            )
            continue
        rank = B.shape[0]
        target = Target(rename(names[module]), (B.shape[1], A.shape[0]))
        updates.append(Targeted(target, Lora(A.T, B.T, scales.of(module, rank))))
    if problems:
        raise InvalidFile(problems)
    scales.check()
    notes = [*source.notes, *notes, *scales.notes()]
    return Adapter(tuple(updates), provenance={"convention": NAME}, notes=tuple(notes))


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    wrapped = _wrapped(source)
    factors = {f"{module}.lora.{factor}" for module in wrapped for factor in "AB"}
    return {_unwrapped(name, wrapped): ref for name, ref in source.tensors.items() if name not in factors}


def _wrapped(source: Checkpoint) -> Collection[str]:
    """Modules that hold a pair of factors. Other modules may well be called `linear` or `lora`.

    Raises InvalidFile for one factor beside a wrapped weight: its update would be lost.
    """
    factors = {
        factor: {n.removesuffix(f".lora.{factor}") for n in source.tensors if n.endswith(f".lora.{factor}")}
        for factor in "AB"
    }
    halves = sorted(m for m in factors["A"] ^ factors["B"] if f"{m}.linear.weight" in source.tensors)
    if halves:
        raise InvalidFile(
            [Problem("E-COMPONENTS", f"{m} has only one of lora.A and lora.B", str(source.path)) for m in halves]
        )
    return factors["A"] & factors["B"]


def _unwrapped(name: str, owners: Collection[str]) -> str:
    """The name without the `linear` segments that wrappers added; a layer may be wrapped more than once."""
    kept: list[str] = []
    path = ""
    for segment in name.split("."):
        if not (segment == "linear" and path in owners):
            kept.append(segment)
        path = f"{path}.{segment}" if path else segment
    return ".".join(kept)

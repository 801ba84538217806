"""torchtune: ``adapter_model.pt`` beside its config, and state dicts of models with LoRALinear or DoRALinear in them.

    X.weight [out, in]   X.lora_a.weight [rank, in]   X.lora_b.weight [out, rank]   X.magnitude [out]
    X.gate_proj [experts, in, out]   X.lora_gate_a [experts, in, rank]   X.lora_gate_b [experts, rank, out]

and ``up``, ``down`` like ``gate``. The scale is alpha/rank; alpha is in the ``adapter_config.json`` beside
``adapter_model.pt``, or must be given. The names are torchtune's own. Against a base with transformers' names they are
mapped (`torchtune_names`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loratool.adapter import Adapter, BaseIdentity, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import torchtune_names, torchtune_write
from loratool.conventions.choices import Choices
from loratool.conventions.headers import Said
from loratool.conventions.peft_config import chosen_config, parse
from loratool.conventions.scales import Scales
from loratool.conventions.torchtune_names import Naming
from loratool.errors import InvalidFile, LoratoolError, Mismatch, Problem
from loratool.names import natural
from loratool.tensors import TensorRef
from loratool.updates import Dora, Lora, Scaling

NAME = "torchtune"
TITLE = "torchtune checkpoint"
KINDS = ("lora", "dora")
TESTED = "torchtune 0.6.1"
OPTIONS = ("base_name",)
SUFFIXES: tuple[str, ...] = ()
ASKS = ("alpha", "scaling", "config")
CONDITIONS: tuple[str, ...] = ()
PLAIN = torchtune_names.PLAIN
FILE_STEM = torchtune_write.FILE_STEM
misfits, write = torchtune_write.misfits, torchtune_write.write

_PART = re.compile(r"^(?:(?P<module>.+)\.)?(?P<part>lora_a\.weight|lora_b\.weight|magnitude)$")
_EXPERTS = re.compile(r"^(?:(?P<module>.+)\.)?lora_(?P<matrix>gate|up|down)_(?P<part>[ab])$")


def detect(source: Checkpoint) -> bool:
    return has_factors(source.tensors)


def has_factors(names: Mapping[str, TensorRef]) -> bool:
    """Whether a file holds factors under torchtune's names. A `magnitude` alone may be anything."""
    return any(name.endswith((".lora_a.weight", ".lora_b.weight")) or _EXPERTS.match(name) for name in names)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    where = str(source.path)
    modules, experts = _sort(source)
    config = chosen_config(choices.config, _side_config(source), where)
    reader = _Reader(Scales(source, choices), config, where)
    stacks = [f"{module}.{matrix}_proj" for module, matrix in experts]
    choices.check_used([*modules, *stacks], where)
    naming = torchtune_names.naming(base, modules, stacks, where)
    for module, parts in modules.items():
        with reader.collecting():
            reader.updates.append(reader.linear(module, parts, naming))
    for (module, matrix), parts in experts.items():
        with reader.collecting():
            reader.updates.append(reader.experts(module, matrix, parts, naming))
    if reader.problems:
        raise Mismatch(reader.problems)
    reader.scales.check()
    updates = sorted(reader.updates, key=lambda item: (natural(item.target.name), item.target.rows or (0, 0)))
    name = BaseIdentity(str(config.get("base_model_name_or_path") or "")) if config else BaseIdentity()
    notes = (*source.notes, *naming.notes, *reader.scales.notes())
    return Adapter(tuple(updates), name, provenance={"convention": NAME}, notes=notes)


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    modules, experts = _sort(source)
    factors = {ref.name for parts in (*modules.values(), *experts.values()) for ref in parts.values()}
    return {name: ref for name, ref in source.tensors.items() if ref.name not in factors}


def _side_config(source: Checkpoint) -> dict[str, Any] | None:
    """The config that torchtune writes beside ``adapter_model.pt``; any other file's neighbour may be a stranger's."""
    own = source.shards[0].path.stem == FILE_STEM
    return source.side_json("adapter_config.json") if own else None


_Parts = dict[str, TensorRef]


def _sort(source: Checkpoint) -> tuple[dict[str, _Parts], dict[tuple[str, str], _Parts]]:
    """Factors by module, and those of experts by module and matrix. What is neither is the base's."""
    modules: dict[str, _Parts] = {}
    experts: dict[tuple[str, str], _Parts] = {}
    for name, ref in source.tensors.items():
        if (match := _PART.match(name)) is not None:
            modules.setdefault(match["module"] or "", {})[match["part"].partition(".")[0]] = ref
        elif (match := _EXPERTS.match(name)) is not None:
            experts.setdefault((match["module"] or "", match["matrix"]), {})[match["part"]] = ref
    if set(source.tensors) > {ref.name for parts in modules.values() for ref in parts.values()}:
        # In a whole checkpoint a `magnitude` without factors is a parameter of the model's own.
        modules = {name: parts for name, parts in modules.items() if parts.keys() != {"magnitude"}}
    return modules, experts


# -- one module --------------------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Turns factors into updates; problems of all modules are collected."""

    scales: Scales
    config: Mapping[str, Any] | None
    where: str
    updates: list[Targeted] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        # PEFT's defaults are not torchtune's: a config without alpha says nothing.
        if self.config is not None and self.config.get("lora_alpha") is None:
            self.config = None
        self.alpha = None if self.config is None else parse(self.config, self.where).alpha
        self.rank = None if self.config is None else self.config.get("r")

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """What is wrong with one module joins the other problems instead of ending the reading."""
        try:
            yield
        except LoratoolError as error:
            self.problems += error.problems

    def linear(self, module: str, parts: _Parts, naming: Naming) -> Targeted:
        """A [rank, in], B [out, rank], magnitude [out]: canonical but for the order of rows."""
        A, B, magnitude = parts.get("lora_a"), parts.get("lora_b"), parts.get("magnitude")
        if A is None or B is None:
            what = f"{module} has {', '.join(sorted(parts))}, and not both lora_a and lora_b"
            raise InvalidFile(Problem("E-COMPONENTS", what, self.where))
        good = len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1] and A.numel and B.numel
        if not good or (magnitude is not None and magnitude.shape != B.shape[:1]):
            shapes = [f"{part} {list(ref.shape)}" for part, ref in sorted(parts.items())]
            what = f"{module}: {', '.join(shapes)}; they must be [rank, in], [out, rank] and [out]"
            raise InvalidFile(Problem("E-SHAPE", what, self.where))
        (out, rank), columns = B.shape, A.shape[1]
        place = naming.place(module, out)
        update: Lora | Dora = Lora(A, place.ordered(B), self._scaling(module, rank))
        if magnitude is not None:
            update = Dora(update, place.ordered(magnitude), axis=0)
        height = place.stored.shape[0] if place.rows and place.stored else out
        return Targeted(Target(place.name, (height, columns), place.rows), update)

    def experts(self, module: str, matrix: str, parts: _Parts, naming: Naming) -> Targeted:
        """a [experts, in, rank], b [experts, rank, out]; the base is [experts, in, out], and a is the left factor."""
        name, a, b = f"{module}.{matrix}_proj", parts.get("a"), parts.get("b")
        if a is None or b is None:
            what = f"{name} has only one of lora_{matrix}_a and lora_{matrix}_b"
            raise InvalidFile(Problem("E-COMPONENTS", what, self.where))
        good = len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
        if not good or not a.numel or not b.numel:
            what = f"lora_{matrix}_a is {list(a.shape)}, lora_{matrix}_b {list(b.shape)}"
            hint = "they must be [experts, in, rank] and [experts, rank, out]"
            raise InvalidFile(Problem("E-SHAPE", f"{name}: {what}", self.where, hint))
        experts, rows, rank = a.shape
        target = Target(naming.rename(name), (experts, rows, b.shape[2]), experts=experts, layout="in_out")
        return Targeted(target, Lora(b, a, self._scaling(name, rank)))

    def _scaling(self, module: str, rank: int) -> Scaling:
        """alpha/rank with the tensors' rank; a config of another rank belongs to another adapter."""
        if self.alpha is None:
            return self.scales.of(module, rank)
        if self.rank is not None and self.rank != rank:
            what = f"{module} has rank {rank}, the adapter_config says r = {self.rank}"
            raise Mismatch(Problem("E-RANK", what, self.where, "is it this adapter's own config?"))
        return self.scales.of(module, rank, Said(self.alpha, "lora_alpha of adapter_config.json"))

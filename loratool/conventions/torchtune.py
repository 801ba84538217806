"""torchtune: ``adapter_model.pt`` beside its config, and state dicts of models with LoRALinear or DoRALinear in them.

    X.weight [out, in]   X.lora_a.weight [rank, in]   X.lora_b.weight [out, rank]   X.magnitude [out]
    X.gate_proj [experts, in, out]   X.lora_gate_a [experts, in, rank]   X.lora_gate_b [experts, rank, out]

and ``up``, ``down`` like ``gate``. The scale is alpha/rank; alpha is in the ``adapter_config.json`` beside
``adapter_model.pt``, or must be given. The names are torchtune's own. Against a base with transformers' names they are
mapped, and for models with rotary embeddings in Llama's order the rows of q_proj and k_proj are put back into
transformers' order (torchtune/models/convert_weights.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loratool.adapter import Adapter, BaseIdentity, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions.architecture import Architecture, architecture_of
from loratool.conventions.choices import Choices
from loratool.conventions.peft_config import parse
from loratool.errors import ChoiceNeeded, InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.names import missing, natural, prefix_rule
from loratool.tensors import TensorRef
from loratool.updates import Dora, Lora, Scaling

NAME = "torchtune"
TITLE = "torchtune checkpoint"
KINDS = ("lora", "dora")
TESTED = "torchtune 0.6.1"
FILE_STEM = "adapter_model"

_PART = re.compile(r"^(?:(?P<module>.+)\.)?(?P<part>lora_a\.weight|lora_b\.weight|magnitude)$")
_EXPERTS = re.compile(r"^(?:(?P<module>.+)\.)?lora_(?P<matrix>gate|up|down)_(?P<part>[ab])$")
_LAYER = re.compile(r"^(layers\.\d+)\.(.+)$")

# torchtune's modules by transformers' names for them; `fused` where transformers stacks several in one matrix.
_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_FUSED = {
    "attn.q_proj": "self_attn.qkv_proj",
    "attn.k_proj": "self_attn.qkv_proj",
    "attn.v_proj": "self_attn.qkv_proj",
    "mlp.w1": "mlp.gate_up_proj",
    "mlp.w3": "mlp.gate_up_proj",
}
# Which models of transformers torchtune has, by what their conversion does to the weights.
_ROTATED = ("llama", "mistral", "gemma", "gemma2")  # rows of q_proj and k_proj in another order
PLAIN = ("qwen2", "qwen3")  # names only
_STACKED = ("phi3",)  # q, k, v and gate, up in one matrix each


def detect(source: Checkpoint) -> bool:
    return has_factors(source.tensors)


def has_factors(names: Mapping[str, TensorRef]) -> bool:
    """Whether a file holds factors under torchtune's names. A `magnitude` alone may be anything."""
    return any(name.endswith((".lora_a.weight", ".lora_b.weight")) or _EXPERTS.match(name) for name in names)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    where = str(source.path)
    choices.refuse("adapter", "layout", where=where)
    modules, experts = _sort(source)
    choices.check_used([*modules, *(f"{module}.{matrix}_proj" for module, matrix in experts)], where)
    config = choices.config or _side_config(source)
    reader = _Reader(choices, config, where)
    naming = _naming(base, modules, experts, where)
    for module, parts in modules.items():
        with reader.collecting():
            reader.updates.append(reader.linear(module, parts, naming))
    for (module, matrix), parts in experts.items():
        with reader.collecting():
            reader.updates.append(reader.experts(module, matrix, parts, naming))
    if reader.problems:
        raise Mismatch(reader.problems)
    updates = sorted(reader.updates, key=lambda item: (natural(item.target.name), item.target.rows or (0, 0)))
    name = BaseIdentity(str(config.get("base_model_name_or_path") or "")) if config else BaseIdentity()
    notes = (*source.notes, *naming.notes)
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


# -- names and rows of the base ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a module's matrix lies in the base: its tensor, the order of its rows there, and which rows they are."""

    name: str
    heads: tuple[int, int] | None = None  # (number, size) where rows are reordered head by head
    rows: tuple[int, int] | None = None
    stored: TensorRef | None = None

    def ordered(self, ref: TensorRef) -> TensorRef:
        """Rows [out, ...] of torchtune in the base's order.

        Rotary embeddings turn pairs of rows. torchtune keeps a pair's rows side by side, [heads, size/2, 2]; the base
        has the first of all pairs and then the second, [heads, 2, size/2].
        """
        if self.heads is None:
            return ref
        number, size = self.heads
        split = ref.reshape(number, size // 2, 2, *ref.shape[1:])
        return split.permute(0, 2, 1, *range(3, len(split.shape))).reshape(*ref.shape)


@dataclass(frozen=True)
class _Naming:
    """How torchtune's modules are found in a base: by their own names, or by transformers'."""

    base: Mapping[str, TensorRef] | None
    where: str
    architecture: Architecture | None = None
    rename: Callable[[str], str] = str
    notes: tuple[str, ...] = ()

    def place(self, module: str, out: int) -> _Place:
        """Where the rows [out, in] of a module go. Raises Mismatch, Unsupported if the base has no place for them."""
        if self.architecture is None:
            name = self.rename(f"{module}.weight")
            return _Place(name, stored=None if self.base is None else self.base.get(name))
        assert self.base is not None
        own = transformers_name(module, self.architecture)
        if own is None:
            what = f"{module} has no counterpart in a {self.architecture.model_type} model of transformers"
            raise Unsupported(Problem("E-TARGET", what, self.where, "merge into the torchtune checkpoint"))
        name = self.rename(f"{own}.weight")
        stored = self.base.get(name)
        if stored is None:
            raise Mismatch(missing(name, self.base, self.where))
        part = (_LAYER.match(module) or [module] * 3)[2]
        heads = self._heads(module, part, out)
        rows = self._rows(module, part, out, stored) if part in _FUSED and own.endswith(_FUSED[part]) else None
        return _Place(name, heads, rows, stored)

    def _heads(self, module: str, part: str, out: int) -> tuple[int, int] | None:
        model = self.architecture
        if model is None or model.model_type not in _ROTATED or part not in ("attn.q_proj", "attn.k_proj"):
            return None
        number = model.heads if part == "attn.q_proj" else model.kv_heads
        if out != number * model.head_dim or model.head_dim % 2:
            what = f"{module} has {out} rows, the base's config.json means {number} heads of {model.head_dim}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, "is this the adapter's base?"))
        return number, model.head_dim

    def _rows(self, module: str, part: str, out: int, stored: TensorRef) -> tuple[int, int]:
        """The rows of one part of a stacked matrix: [q; k; v] or [gate; up]."""
        model = self.architecture
        assert model is not None
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        attention = {"attn.q_proj": q, "attn.k_proj": kv, "attn.v_proj": kv}
        sizes = attention if part in attention else dict.fromkeys(("mlp.w1", "mlp.w3"), stored.shape[0] // 2)
        if sum(sizes.values()) != stored.shape[0] or out != sizes[part]:
            what = f"{module} has {out} rows; {stored.name} has {stored.shape[0]}, in parts of {[*sizes.values()]}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, "is this the adapter's base?"))
        start = sum([*sizes.values()][: [*sizes].index(part)])
        return start, start + out


def transformers_name(module: str, model: Architecture) -> str | None:
    """``layers.0.attn.output_proj`` -> ``model.layers.0.self_attn.o_proj``; None for what has no counterpart."""
    if module == "output":
        return "lm_head"
    match = _LAYER.match(module)
    names = {**_NAMES, **_FUSED} if model.model_type in _STACKED else _NAMES
    if match is None or match[2] not in names:
        return None
    return f"model.{match[1]}.{names[match[2]]}"


def _naming(
    base: Mapping[str, TensorRef] | None,
    modules: Mapping[str, _Parts],
    experts: Mapping[tuple[str, str], _Parts],
    where: str,
) -> _Naming:
    """How the base calls things: as torchtune does, or as transformers does.

    Raises ChoiceNeeded for transformers' names without a config.json, Unsupported for a model that torchtune lacks.
    """
    wanted = [f"{module}.weight" for module in modules]
    wanted += [f"{module}.{matrix}_proj" for module, matrix in experts]
    if base is None:
        return _Naming(None, where)
    if any(name in base for name in wanted) or not any(_is_transformers(name) for name in base):
        rename, notes = prefix_rule(wanted, base, where)
        return _Naming(base, where, rename=rename, notes=tuple(notes))
    model = architecture_of(base)
    if model is None:
        what = "its names are torchtune's, the base's are transformers', and no config.json says how many heads it has"
        hint = "put the base's config.json beside its weights"
        raise ChoiceNeeded(Problem("E-CONFIG", what, where, hint))
    if model.model_type not in (*_ROTATED, *PLAIN, *_STACKED) or experts:
        kind = "experts" if experts else repr(model.model_type)
        what = f"torchtune's names for {kind} are not mapped to transformers'"
        hint = "merge it into the base in torchtune's own format (FullModelTorchTuneCheckpointer)"
        raise Unsupported(Problem("E-UNSUPPORTED", what, where, hint))
    mapped = [f"{own}.weight" for module in modules if (own := transformers_name(module, model)) is not None]
    rename, notes = prefix_rule(mapped, base, where)
    rows = "; rows of q_proj and k_proj in transformers' order" if model.model_type in _ROTATED else ""
    notes = [*notes, f"torchtune's names mapped to those of a {model.model_type} model{rows}"]
    return _Naming(base, where, model, rename, tuple(notes))


def _is_transformers(name: str) -> bool:
    return re.search(r"(^|\.)layers\.\d+\.(self_attn\.\w+_proj|mlp\.\w+_proj)\.weight$", name) is not None


# -- one module --------------------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Turns factors into updates; problems of all modules are collected."""

    choices: Choices
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

    def linear(self, module: str, parts: _Parts, naming: _Naming) -> Targeted:
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

    def experts(self, module: str, matrix: str, parts: _Parts, naming: _Naming) -> Targeted:
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
            return self.choices.scaling_of(module, rank)
        if self.rank is not None and self.rank != rank:
            what = f"{module} has rank {rank}, the adapter_config says r = {self.rank}"
            raise Mismatch(Problem("E-RANK", what, self.where, "is it this adapter's own config?"))
        return Scaling.by("alpha/rank", self.alpha, rank)

"""torchtune's modules in a base: under their own names, or under transformers', where some have other rows.

Against a base with transformers' names they are mapped, and for models with rotary embeddings in Llama's order the rows
of q_proj and k_proj lie in another order there (torchtune/models/convert_weights.py). Reading goes one way through
these tables, writing the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from loratool.conventions.architecture import Architecture, architecture_of
from loratool.errors import ChoiceNeeded, Mismatch, Problem, Unsupported
from loratool.names import missing, prefix_rule
from loratool.tensors import TensorRef

LAYER = re.compile(r"^(layers\.\d+)\.(.+)$")
_WITHIN = re.compile(r"(?:^|\.)(layers\.\d+)\.(.+)\.weight$")

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
_HEAD, _OWN_HEAD = "output", "lm_head"
# Which models of transformers torchtune has, by what their conversion does to the weights.
ROTATED = ("llama", "mistral", "gemma", "gemma2")  # rows of q_proj and k_proj in another order
PLAIN = ("qwen2", "qwen3")  # names only
STACKED = ("phi3",)  # q, k, v and gate, up in one matrix each
MAPPED = (*ROTATED, *PLAIN, *STACKED)


@dataclass(frozen=True)
class Place:
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
        return ref if self.heads is None else _swapped(ref, self.heads[0], self.heads[1] // 2, 2)

    def undone(self, ref: TensorRef) -> TensorRef:
        """Rows [out, ...] of the base in torchtune's order: `ordered`, the other way."""
        return ref if self.heads is None else _swapped(ref, self.heads[0], 2, self.heads[1] // 2)


def _swapped(ref: TensorRef, heads: int, outer: int, inner: int) -> TensorRef:
    """Rows [heads * outer * inner, ...], counted as [heads, inner, outer]."""
    split = ref.reshape(heads, outer, inner, *ref.shape[1:])
    return split.permute(0, 2, 1, *range(3, len(split.shape))).reshape(*ref.shape)


@dataclass(frozen=True)
class Naming:
    """How torchtune's modules are found in a base: by their own names, or by transformers'."""

    base: Mapping[str, TensorRef] | None
    where: str
    architecture: Architecture | None = None
    rename: Callable[[str], str] = str
    notes: tuple[str, ...] = ()

    def tensor(self, module: str) -> str | None:
        """The base's name for a module's matrix, whether it is there or not; None for what has no counterpart."""
        own = module if self.architecture is None else transformers_name(module, self.architecture)
        return None if own is None else self.rename(f"{own}.weight")

    def place(self, module: str, out: int | None = None) -> Place:
        """Where the rows [out, in] of a module go; with `out` None, as many as the base has.

        Raises Mismatch, Unsupported if the base has no place for them.
        """
        name, model = self.tensor(module), self.architecture
        if name is None:
            what = f"{module} has no counterpart in a {model and model.model_type} model of transformers"
            raise Unsupported(Problem("E-TARGET", what, self.where, "merge into the torchtune checkpoint"))
        stored = None if self.base is None else self.base.get(name)
        if model is None:
            return Place(name, stored=stored)
        assert self.base is not None
        if stored is None:
            raise Mismatch(missing(name, self.base, self.where))
        part = (LAYER.match(module) or [module] * 3)[2]
        heads = self._heads(module, part, stored.shape[0] if out is None else out)
        rows = self._rows(module, part, out, stored) if model.model_type in STACKED and part in _FUSED else None
        return Place(name, heads, rows, stored)

    def _heads(self, module: str, part: str, out: int) -> tuple[int, int] | None:
        model = self.architecture
        if model is None or model.model_type not in ROTATED or part not in ("attn.q_proj", "attn.k_proj"):
            return None
        number = model.heads if part == "attn.q_proj" else model.kv_heads
        if out != number * model.head_dim or model.head_dim % 2:
            what = f"{module} has {out} rows, the base's config.json means {number} heads of {model.head_dim}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, "is this the adapter's base?"))
        return number, model.head_dim

    def _rows(self, module: str, part: str, out: int | None, stored: TensorRef) -> tuple[int, int]:
        """The rows of one part of a stacked matrix: [q; k; v] or [gate; up]."""
        model = self.architecture
        assert model is not None
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        attention = {"attn.q_proj": q, "attn.k_proj": kv, "attn.v_proj": kv}
        sizes = attention if part in attention else dict.fromkeys(("mlp.w1", "mlp.w3"), stored.shape[0] // 2)
        out = sizes[part] if out is None else out
        if sum(sizes.values()) != stored.shape[0] or out != sizes[part]:
            what = f"{module} has {out} rows; {stored.name} has {stored.shape[0]}, in parts of {[*sizes.values()]}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, "is this the adapter's base?"))
        start = sum([*sizes.values()][: [*sizes].index(part)])
        return start, start + out


def transformers_name(module: str, model: Architecture) -> str | None:
    """``layers.0.attn.output_proj`` -> ``model.layers.0.self_attn.o_proj``; None for what has no counterpart."""
    if module == _HEAD:
        return _OWN_HEAD
    match = LAYER.match(module)
    names = {**_NAMES, **_FUSED} if model.model_type in STACKED else _NAMES
    if match is None or match[2] not in names:
        return None
    return f"model.{match[1]}.{names[match[2]]}"


def modules_in(name: str) -> list[str]:
    """The modules of torchtune that lie in a tensor of transformers, after any prefix, in the order of its rows.

    ``model.layers.0.self_attn.o_proj.weight`` -> ``layers.0.attn.output_proj``; [] for what has no counterpart.
    """
    if f".{name}".endswith(f".{_OWN_HEAD}.weight"):
        return [_HEAD]
    match = _WITHIN.search(name)
    tables = (*_NAMES.items(), *_FUSED.items())
    return [f"{match[1]}.{part}" for part, own in tables if own == match[2]] if match is not None else []


def transformers_leaf(module: str) -> str:
    """transformers' last segment for a module: ``layers.0.mlp.w1`` -> ``gate_proj``; its own if there is no other."""
    names = {_HEAD: _OWN_HEAD} | {part.rpartition(".")[2]: own.rpartition(".")[2] for part, own in _NAMES.items()}
    leaf = module.rpartition(".")[2]
    return names.get(leaf, leaf)


def is_transformers(name: str) -> bool:
    """Whether a tensor of a layer is called as transformers calls it, not torchtune."""
    return re.search(r"(^|\.)layers\.\d+\.(self_attn\.\w+_proj|mlp\.\w+_proj)\.weight$", name) is not None


def naming(
    base: Mapping[str, TensorRef] | None, modules: Collection[str], experts: Collection[str], where: str
) -> Naming:
    """How the base calls things: as torchtune does, or as transformers does. `experts` are names of stacked tensors.

    Raises ChoiceNeeded for transformers' names without a config.json, Unsupported for a model that torchtune lacks.
    """
    wanted = [*(f"{module}.weight" for module in modules), *experts]
    if base is None:
        return Naming(None, where)
    if any(name in base for name in wanted) or not any(is_transformers(name) for name in base):
        rename, notes = prefix_rule(wanted, base, where)
        return Naming(base, where, rename=rename, notes=tuple(notes))
    model = architecture_of(base)
    if model is None:
        what = "its names are torchtune's, the base's are transformers', and no config.json says how many heads it has"
        hint = "put the base's config.json beside its weights"
        raise ChoiceNeeded(Problem("E-CONFIG", what, where, hint))
    if model.model_type not in MAPPED or experts:
        kind = "experts" if experts else repr(model.model_type)
        what = f"torchtune's names for {kind} are not mapped to transformers'"
        hint = "merge it into the base in torchtune's own format (FullModelTorchTuneCheckpointer)"
        raise Unsupported(Problem("E-UNSUPPORTED", what, where, hint))
    mapped = [f"{own}.weight" for module in modules if (own := transformers_name(module, model)) is not None]
    rename, notes = prefix_rule(mapped, base, where)
    rows = "; rows of q_proj and k_proj in transformers' order" if model.model_type in ROTATED else ""
    notes = [*notes, f"torchtune's names mapped to those of a {model.model_type} model{rows}"]
    return Naming(base, where, model, rename, tuple(notes))

"""Writing torchtune's adapter: ``adapter_model.pt``, from which its recipes go on, and the config beside it.

torchtune has one rank and one alpha for a whole model, so what differs is padded and rescaled. An adapter for a base
with transformers' names gets torchtune's, and its rows of q_proj and k_proj torchtune's order; without the base that
order can not be known. Tested by loading the file with torchtune.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratool import folding
from loratool.adapter import Adapter, Target, Targeted
from loratool.bundle import Bundle, Content, Pickle, document
from loratool.checkpoint import Checkpoint
from loratool.conventions.architecture import architecture_of
from loratool.conventions.torchtune_names import (
    LAYER,
    MAPPED,
    Naming,
    Place,
    is_transformers,
    modules_in,
    naming,
    transformers_leaf,
)
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.errors import LoratoolError
from loratool.names import natural, parent
from loratool.tensors import Shape, TensorRef
from loratool.updates import Dora, Lora, Update

FILE_STEM = "adapter_model"
_MATRICES = ("gate", "up", "down")
_STACK = re.compile(rf"^(?P<module>.+)\.(?P<matrix>{'|'.join(_MATRICES)})_proj$")
_MLP = ("mlp.w1", "mlp.w2", "mlp.w3")  # torchtune gives LoRA to all three or none
_MERGE = "`loratool merge` writes a whole checkpoint, which torchtune loads"


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    return _Translated.of(adapter, base).misfits


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    translated = _Translated.of(adapter, base)
    layers, notes = translated.layers, [*translated.notes]
    if len({(folding.rank_of(lora), lora.factors.factor) for lora in _loras(layers)}) > 1:
        changed = folding.uniform(layers.values())
        notes.append(folding.uniform_note(layers.values(), changed))
        layers = dict(zip(layers, changed, strict=True))
    more, why = _filling(layers, translated.naming, base)
    layers, notes = {**layers, **more}, [*notes, *why, *_mixed(layers), *_biased(adapter, base)]
    tensors: dict[str, TensorRef] = {}
    for name in sorted(layers, key=natural):
        tensors |= _factors(name, layers[name])
    config = _config(layers)
    if adapter.base.name:
        config["base_model_name_or_path"] = adapter.base.name
    files: dict[str, Content] = {f"{FILE_STEM}.pt": Pickle(tensors), "adapter_config.json": document(config)}
    return Bundle(files, tuple(notes), frozenset(layers))


# -- into torchtune's modules -----------------------------------------------------------------------------------------


@dataclass
class _Translated:
    """An adapter as torchtune sees it: `layers` are one LoRA or DoRA of a whole tensor each, by torchtune's name."""

    naming: Naming
    unnamed: Misfit | None  # why transformers' names can not be mapped
    layers: dict[str, Targeted] = field(default_factory=dict)
    misfits: list[Misfit] = field(default_factory=list)
    joined: int = 0

    @classmethod
    def of(cls, adapter: Adapter, base: Checkpoint | None) -> _Translated:
        targets = adapter.targets()
        result = cls(*_naming(targets, base))
        result.misfits = grouped([(name, result.add(name, items)) for name, items in targets.items()])
        return result

    @property
    def notes(self) -> tuple[str, ...]:
        several = f"{self.joined} tensors had several LoRAs: their factors are side by side, in one of a larger rank"
        return (*self.naming.notes, *([several] if self.joined else []))

    def add(self, name: str, items: list[Targeted]) -> Misfit | None:
        """The updates of one tensor join `layers`, in one or more modules; or why they can not."""
        found = next(filter(None, map(_misfit_kind, items)), None) or _misfit_place(name, items[0].target, self.naming)
        if found or self.unnamed:
            return found or self.unnamed
        try:
            return next(filter(None, [self._put(own, place, items) for own, place in self._places(name)]), None)
        except LoratoolError as error:
            return _no(error.message, error.hint)

    def _places(self, name: str) -> Iterator[tuple[str, Place]]:
        """The tensors of torchtune that the rows of one of the base's lie in. Raises Mismatch."""
        if self.naming.architecture is None:
            yield name, Place(name)
            return
        for module in modules_in(name):
            yield f"{module}.weight", self.naming.place(module)

    def _put(self, own: str, place: Place, items: list[Targeted]) -> Misfit | None:
        """What lies in one tensor of torchtune, as a single update in its order of rows."""
        parts = [part for item in items if (part := _within(item, place.rows)) is not None]
        if not parts:
            return None
        first = parts[0]
        if any(isinstance(part.update, Dora) for part in parts) and (len(parts) > 1 or not first.target.covers_all):
            return _no("torchtune has DoRA of whole layers only, not of some of their rows")
        if isinstance(first.update, Dora):
            direction = folding.low_rank(first.update)
            assert direction is not None, "the kinds were checked"
            whole = replace(first, update=replace(first.update, direction=folding.without_core(direction)))
        else:
            whole = folding.merged_factors(parts)
            self.joined += len(parts) > 1
        self.layers[own] = Targeted(replace(whole.target, name=own), _by_rows(whole.update, place.undone))
        return None


def _naming(targets: Mapping[str, list[Targeted]], base: Checkpoint | None) -> tuple[Naming, Misfit | None]:
    """How the adapter's names are torchtune's; or why those that are transformers' can not be mapped."""
    own = Naming(None, "")
    if base is None:
        if not any(is_transformers(name) or modules_in(name) for name in targets):
            return own, None
        why = "its names are transformers', and the order of torchtune's rows depends on the model"
        return own, _no(why, "give the base with --base BASE")
    if not any(is_transformers(name) for name in base.tensors):
        return own, None
    model = architecture_of(base.tensors)
    if model is None:
        why = "its names are transformers', and no config.json says which model it is and how many heads it has"
        return own, _no(why, "put the base's config.json beside its weights")
    if model.model_type not in MAPPED:
        why = f"torchtune's names for {model.model_type!r} are not mapped to transformers'"
        return own, _no(why, f"known are {', '.join(MAPPED)}; {_MERGE}")
    modules = [module for name in targets for module in modules_in(name)]
    return naming(base.tensors, modules, (), str(base.path)), None


def _within(item: Targeted, rows: tuple[int, int] | None) -> Targeted | None:
    """The part of an update that changes a range of rows, as one of a tensor of these alone: exact, B [rows, rank]."""
    if rows is None:
        return item
    first, last = item.target.rows or (0, item.target.shape[0])
    start, stop = max(first, rows[0]), min(last, rows[1])
    if start >= stop:
        return None
    height, columns = rows[1] - rows[0], item.target.shape[1]
    inner = None if stop - start == height else (start - rows[0], stop - rows[0])
    update = item.update
    if (start, stop) != (first, last):
        update = _by_rows(update, lambda ref: ref.narrow(0, start - first, stop - start))
    return Targeted(replace(item.target, shape=(height, columns), rows=inner), update)


def _by_rows(update: Update, change: Callable[[TensorRef], TensorRef]) -> Lora | Dora:
    """The same update with its rows changed: those of B [rows, rank] and of a magnitude [rows]."""
    if isinstance(update, Dora):
        return replace(update, direction=_by_rows(update.direction, change), magnitude=change(update.magnitude))
    assert isinstance(update, Lora), "the kinds were checked"
    return replace(update, B=change(update.B))


# -- what does not fit ------------------------------------------------------------------------------------------------


def _no(why: str, help: str = _MERGE) -> Misfit:
    return Misfit((), why, help, bakeable=False)


def _misfit_kind(item: Targeted) -> Misfit | None:
    update = item.update
    if isinstance(update, Dora):
        if not isinstance(update.direction, Lora):
            return _no(f"torchtune has DoRA on LoRA only, not on {update.direction.kind}")
        if item.target.stacked:
            return _no("torchtune has no DoRA of experts")
        return _no("torchtune takes DoRA's norm over the inputs, not over the outputs") if update.axis != 0 else None
    return None if isinstance(update, Lora) else _no("torchtune's adapters have LoRA and DoRA only")


def _misfit_place(name: str, target: Target, names: Naming) -> Misfit | None:
    """Why torchtune has no adapter at this tensor, whatever the update."""
    mapped = names.architecture is not None
    if target.stacked:
        match = _STACK.match(name)
        if mapped or match is None or "experts" not in match["module"]:
            return _no("torchtune has LoRA of experts on gate_proj, up_proj and down_proj of its own experts only")
        if len(target.matrix) != 2 or target.layout != "in_out":
            return _no("torchtune's experts are matrices [in, out]")
        return None
    if target.layout == "embedding":
        return _no("torchtune has no LoRA on embeddings")
    if len(target.shape) != 2 or target.layout or not _module(name) or not name.endswith(".weight"):
        return _no("torchtune has LoRA on the weights [out, in] of Linear layers only")
    if mapped and name not in map(names.tensor, modules_in(name)):
        return _no("torchtune's model has no such module")
    if not mapped and "experts" in name:
        return _no("torchtune has LoRA of all experts together only")  # its merge goes by this word in the name
    return None


# -- what torchtune expects besides -----------------------------------------------------------------------------------


def _filling(
    layers: Mapping[str, Targeted], names: Naming, base: Checkpoint | None
) -> tuple[dict[str, Targeted], list[str]]:
    """Zeros for what torchtune wants beside the layers, which all have one rank and scale; and notes.

    Its experts have LoRA on all three matrices, and its merge fails without. Its models have LoRA on the same modules
    in every layer, on all of an MLP or on none of it, and its recipes refuse a file that lacks one. Both factors are
    zeros: the layer stays as it is, in further training as well.
    """
    lora, dtype = next(_loras(layers)), next(_loras(layers)).A.dtype

    def nothing(target: Target) -> Targeted:
        lead, (rows, columns), rank = target.shape[:-2], target.matrix, folding.rank_of(lora)
        A = folding.assembled((*lead, rank, columns), [], dtype)
        B = folding.assembled((*lead, rows, rank), [], dtype)
        return Targeted(target, Lora(A, B, lora.factors))

    experts, notes = _other_experts(layers), []
    lacking = _other_layers(layers, names, base)
    dora = any(isinstance(item.update, Dora) for item in layers.values())
    filled = experts if base is None or dora else [*experts, *lacking]
    if filled:
        notes.append(f"{len(filled)} modules without LoRA ({filled[0].name} ...) hold zeros: torchtune wants all alike")
    if lacking and filled == experts:
        why = f"torchtune's recipes refuse it: {len(lacking)} modules ({lacking[0].name} ...) have no LoRA"
        notes.append(why + ("" if dora else "; given the --base they would hold zeros"))
    return {target.name: nothing(target) for target in filled}, notes


def _other_experts(layers: Mapping[str, Targeted]) -> list[Target]:
    """The matrices [experts, in, out] of experts that have LoRA on others of them only."""
    found = {}
    for name, item in layers.items():
        if (match := _STACK.match(name)) is not None and item.target.stacked:
            count, rows, columns = item.target.shape
            for matrix in _MATRICES:
                turned = (matrix == "down") != (match["matrix"] == "down")
                shape = (count, columns, rows) if turned else (count, rows, columns)
                own = f"{match['module']}.{matrix}_proj"
                found[own] = Target(own, shape, experts=count, layout="in_out")
    return [target for name, target in found.items() if name not in layers]


def _other_layers(layers: Mapping[str, Targeted], names: Naming, base: Checkpoint | None) -> list[Target]:
    """The modules that have LoRA in other layers, or beside LoRA in the same MLP. Shapes are the base's, or unknown."""
    matches = [match for name in layers if (match := LAYER.match(_module(name))) is not None]
    parts = {match[2] for match in matches if f"{match[0]}.weight" in layers}
    parts |= {*_MLP} if parts & {*_MLP} else set()
    if base is None:
        modules: dict[str, Shape] = {f"{match[1]}.{part}": () for match in matches for part in parts}
    else:
        modules = dict(_modules_of(base, names, parts))
    found = {f"{module}.weight": shape for module, shape in modules.items()}
    return [Target(name, found[name]) for name in sorted(found, key=natural) if name not in layers]


def _modules_of(base: Checkpoint, names: Naming, parts: set[str]) -> Iterator[tuple[str, Shape]]:
    """Some of torchtune's modules in each layer of a base, with the shapes [out, in] of their weights."""
    for name, ref in base.tensors.items():
        own = [parent(name)] if name.endswith(".weight") and len(ref.shape) == 2 else []
        for module in own if names.architecture is None else modules_in(name):
            if _part(module) in parts and names.tensor(module) == name:
                first, last = names.place(module).rows or (0, ref.shape[0])
                yield module, (last - first, ref.shape[1])


def _mixed(layers: Mapping[str, Targeted]) -> Iterator[str]:
    plain = [n for n, item in layers.items() if not isinstance(item.update, Dora) and not item.target.stacked]
    if plain and any(isinstance(item.update, Dora) for item in layers.values()):
        yield f"use_dora is for all layers in torchtune's own models; {len(plain)} ({plain[0]} ...) have no magnitude"


def _biased(adapter: Adapter, base: Checkpoint | None) -> Iterator[str]:
    """A note on layers whose forward and merge differ in torchtune (torchtune/modules/peft/dora.py, 0.6.1)."""
    known = {} if base is None else base.tensors
    names = dict.fromkeys(item.target.name for item in adapter.updates if isinstance(item.update, Dora))
    if biased := [name for name in names if f"{parent(name)}.bias" in known]:
        which = f"the bias of {len(biased)} DoRA layers ({biased[0]} ...)"
        yield f"torchtune's forward multiplies {which} with the magnitude as well; its merge does not, nor does PEFT"


# -- the files --------------------------------------------------------------------------------------------------------


def _factors(name: str, item: Targeted) -> Iterator[tuple[str, TensorRef]]:
    """A tensor's keys: a [rank, in], b [out, rank]; of experts a [experts, in, rank], b [experts, rank, out]."""
    lora = folding.low_rank(item.update)
    assert lora is not None, "the kinds were checked"
    if item.target.stacked:
        match = _STACK.match(name)
        assert match is not None, "the names were checked"
        yield f"{match['module']}.lora_{match['matrix']}_a", lora.B
        yield f"{match['module']}.lora_{match['matrix']}_b", lora.A
        return
    yield f"{_module(name)}.lora_a.weight", lora.A
    yield f"{_module(name)}.lora_b.weight", lora.B
    if isinstance(item.update, Dora):
        yield f"{_module(name)}.magnitude", item.update.magnitude


def _config(layers: Mapping[str, Targeted]) -> dict[str, Any]:
    """The four fields that torchtune writes: modules go by the last segment, and by transformers' word for it."""
    lora = next(_loras(layers))
    rank, scaling = folding.rank_of(lora), lora.factors
    alpha = scaling.alpha if scaling.rule == "alpha/rank" else folding.by_rank(scaling.factor, rank).alpha
    assert alpha is not None, "unknown scales were refused"
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted({transformers_leaf(_module(name)) for name in layers}),
        "peft_type": "LORA",
    }


def _loras(layers: Mapping[str, Targeted]) -> Iterator[Lora]:
    for item in layers.values():
        lora = folding.low_rank(item.update)
        assert lora is not None, "the kinds were checked"
        yield lora


def _module(name: str) -> str:
    return parent(name) if name.endswith(".weight") else name


def _part(module: str) -> str:
    """``layers.0.mlp.w1`` -> ``mlp.w1``; "" for what is not in a layer."""
    match = LAYER.match(module)
    return match[2] if match is not None else ""

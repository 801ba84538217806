"""Writing PEFT's saved adapter: a folder that PEFT, transformers, vLLM and the like load.

The keys are those that `peft.py` reads. PEFT loads by the config: it wraps what `target_modules`,
`target_parameters`, `modules_to_save` and `trainable_token_indices` name, and then fills what the keys name. Every
line here is tested by loading the folder with PEFT.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool import folding
from loratool.adapter import Adapter, Targeted
from loratool.bundle import Bundle
from loratool.checkpoint import Checkpoint
from loratool.conventions import peft_write_ia3 as factors
from loratool.conventions import peft_write_products as products
from loratool.conventions.peft_about import About
from loratool.conventions.peft_folder import INSIDE, PART_OF_A_TENSOR, Homes, folder, leaf
from loratool.conventions.peft_layout import (
    bias_terms,
    magnitude,
    misfit_dora,
    mixed_dora,
    one_layer,
    pattern,
    scales,
    target_modules,
    up,
)
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.names import modules, natural, parent
from loratool.tensors import TensorRef
from loratool.updates import Add, Dora, Lora, Replace, ReplaceRows

PAIRING = "0.19.1"  # since this PEFT, A goes with a parameter's last dimension and B with the one before it
NO_LAYERS = "dummy-target-modules"  # PEFT's own word for an adapter that wraps nothing (peft/utils/constants.py)

ATTENTION = Misfit((), "PEFT wraps torch's MultiheadAttention only whole, and adds the delta of its out_proj twice")
ALWAYS = Misfit((), "after invocation tokens PEFT activates LoRAs of linear layers only, and this would always act", "",
                False)  # fmt: skip
DIFFERENCE = Misfit(
    (), "a stored difference can only be the bias of a LoRA layer (lora_bias), without DoRA, embeddings or parameters"
)


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    if factors.is_for(adapter):
        return factors.misfits(adapter, base)
    if (kind := products.kind_of(adapter)) is not None:
        conditional = [Misfit(tuple(adapter.targets()), ALWAYS.why, "", False)] if adapter.when else []
        return [*products.misfits(adapter, kind), *conditional]
    parts = _Parts.of(adapter)
    own = (name for name in adapter.targets() if adapter.when and not parts.is_activated(name))
    return [
        *grouped((name, parts.misfit(name, items)) for name, items in adapter.targets().items()),
        *grouped((name, ALWAYS) for name in own),
        *mixed_dora(parts.layers),
    ]


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    if factors.is_for(adapter):
        return factors.write(adapter, base, options)
    if (kind := products.kind_of(adapter)) is not None:
        return products.write(adapter, kind, base, options)
    parts = _Parts.of(adapter)
    layers, notes = {name: one_layer(items) for name, items in parts.layers.items()}, []
    if options.uniform:
        changed = folding.uniform(layers.values())
        notes.append(folding.uniform_note(layers.values(), changed))
        layers = dict(zip(layers, changed, strict=True))
    tensors: dict[str, TensorRef] = {}
    for name in sorted(layers, key=natural):
        tensors |= parts.factors(name, layers[name])
    tensors |= bias_terms(layers, parts.biases)
    about = About.of(adapter, "TRAINABLE_TOKENS" if parts.only_rows else "LORA", base, options)
    homes = Homes.of(parts.whole, parts.wrapped, base, about.saved)
    tensors |= homes.tensors
    tensors |= {parts.rows_key(name): update.value for name, update in parts.rows.items()}
    config = _config(parts, layers, homes, base, about)
    if adapter.when:
        config["alora_invocation_tokens"] = [*adapter.when["tokens"]]
    return folder(about, config, tensors, (*notes, *_notes(parts, layers, config, homes)))


@dataclass
class _Parts:
    """An adapter's updates by what they become in PEFT, each by the tensor it changes."""

    layers: dict[str, list[Targeted]] = field(default_factory=dict)  # LoRA and DoRA
    whole: dict[str, TensorRef] = field(default_factory=dict)
    rows: dict[str, ReplaceRows] = field(default_factory=dict)
    biases: dict[str, Add] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter) -> _Parts:
        parts = cls()
        for item in adapter.updates:
            name, update = item.target.name, item.update
            if isinstance(update, Lora | Dora):
                parts.layers.setdefault(name, []).append(item)
            elif isinstance(update, Replace):
                parts.whole[name] = update.value
            elif isinstance(update, ReplaceRows):
                parts.rows[name] = update
            elif isinstance(update, Add):
                parts.biases[name] = update
        return parts

    @property
    def in_module(self) -> dict[str, list[str]]:
        """The tensors with LoRA of each module; of parameters, in the order in which PEFT nests its wrappers.

        The innermost is the module's first registered parameter, which no file tells: gate_up comes before down.
        """
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.layers:
            found[parent(name)].append(name)
        return {module: sorted(names, key=lambda name: "down" in leaf(name)) for module, names in found.items()}

    def is_parameter(self, name: str) -> bool:
        """Whether a tensor is a bare parameter for PEFT (`target_parameters`), not the weight of a layer it knows.

        A router beside stacked experts is a module of its own class in transformers 5; as a parameter it can be
        targeted there, and where it is a Linear as well.
        """
        if leaf(name) != "weight" or self.layers[name][0].target.stacked or len(self.in_module[parent(name)]) > 1:
            return True
        beside = f"{parent(parent(name))}.experts."
        return any(other.startswith(beside) and items[0].target.stacked for other, items in self.layers.items())

    def is_activated(self, name: str) -> bool:
        """Whether PEFT can let what changes a tensor act after invocation tokens only: a plain LoRA of a Linear."""
        items = self.layers.get(name, [])
        plain = all(item.update.kind == "lora" and item.target.layout != "embedding" for item in items)
        return bool(items) and plain and len(items[0].target.shape) == 2 and not self.is_parameter(name)

    # -- what does not fit --------------------------------------------------------------------------------------------

    def misfit(self, name: str, items: list[Targeted]) -> Misfit | None:
        """Why PEFT can not hold the updates of one tensor."""
        kinds = Counter(item.update.kind for item in items)
        if foreign := sorted(kinds.keys() & {"loha", "lokr", "scale"}):
            return Misfit((), f"a LoRA adapter of PEFT has no {foreign[0]} update")
        if name in self.layers and (misfit := self._misfit_layer(name)) is not None:
            return misfit
        if "add" in kinds and (kinds["add"] > 1 or not self._is_layer_bias(name, items)):
            return DIFFERENCE
        if any(item.update.kind == "replace" and not item.target.covers_all for item in items):
            return PART_OF_A_TENSOR
        if name in self.rows:
            target = items[0].target
            if len(target.shape) != 2 or target.layout == "in_out" or leaf(name) != "weight" or not parent(name):
                return Misfit((), "PEFT trains single rows of embeddings and Linear layers only")
            if len(items) > 1:
                return Misfit((), "PEFT has either trained rows or LoRA on a table, not both")
        return None

    def _misfit_layer(self, name: str) -> Misfit | None:
        items, module = self.layers[name], parent(name)
        target, parameter = items[0].target, self.is_parameter(name)
        if not module:
            return Misfit((), "PEFT reaches no parameter of the model itself, only those of its modules")
        if name.endswith(".in_proj_weight"):
            return ATTENTION
        if any(module.startswith(outer + ".") for outer in self.in_module):
            return INSIDE
        inner = [leaf(other) for other in self.in_module[module]]
        if len(inner) > 2 or (len(inner) == 2 and sum("down" in leaf for leaf in inner) != 1):
            return Misfit((), f"the order in which PEFT wraps {', '.join(inner)} of one module is in no file")
        if parameter and len(target.matrix) != 2:
            return Misfit((), "PEFT adapts parameters that are matrices, or stacks of them")
        if not parameter and len(target.shape) > 5:
            return Misfit((), "PEFT has no layer of so many dimensions")
        return next((found for item in items if (found := misfit_dora(item, parameter)) is not None), None)

    def _is_layer_bias(self, name: str, items: list[Targeted]) -> bool:
        """Whether a stored difference is the bias of a LoRA layer. `lora_bias` is for all layers or none."""
        plain = all(
            not self.is_parameter(layer) and items[0].target.layout != "embedding" and items[0].update.kind == "lora"
            for layer, items in self.layers.items()
        )
        alone = all(item.target.covers_all for item in items)
        return plain and alone and leaf(name) == "bias" and f"{parent(name)}.weight" in self.layers

    # -- tensors ------------------------------------------------------------------------------------------------------

    def factors(self, name: str, item: Targeted) -> Iterator[tuple[str, TensorRef]]:
        """The keys of one LoRA or DoRA, without the common prefix."""
        update, target = item.update, item.target
        lora = folding.low_rank(update)
        assert lora is not None
        A, B, module = lora.A, lora.B, parent(name)  # [rank, in...], [out, rank]
        if target.layout == "embedding" and not self.is_parameter(name):
            yield f"{module}.lora_embedding_A", B.T  # [rank, tokens]
            yield f"{module}.lora_embedding_B", A.T  # [dim, rank]
        else:
            if target.layout == "in_out":
                A, B = (B.T, A.T) if not target.stacked else (B.permute(0, 2, 1), A.permute(0, 2, 1))
            if target.stacked:
                experts, out, rank = B.shape
                A = A.reshape(experts * rank, A.shape[2])  # expert-major
                B = B.permute(1, 2, 0).reshape(out, rank * experts)  # rank-major
            else:
                B = up(B, target)
            path = module + ".base_layer" * self._outer(name)
            yield f"{path}.lora_A.weight", A
            yield f"{path}.lora_B.weight", B
        if isinstance(update, Dora):
            yield f"{module}.lora_magnitude_vector", magnitude(update, target)

    def _outer(self, name: str) -> int:
        """How many wrappers of other parameters lie around that of this one."""
        order = self.in_module[parent(name)]
        return len(order) - 1 - order.index(name)

    @property
    def wrapped(self) -> dict[str, int]:
        """How many wrappers lie around each module; those for trained rows leave its names as they are."""
        rows = dict.fromkeys(map(parent, self.rows), 0)
        return rows | {module: len(names) for module, names in self.in_module.items()}

    @property
    def only_rows(self) -> bool:
        """Whether all there is are the same rows of some tables: an adapter of PEFT's TrainableTokens."""
        lists = {tuple(update.index.read().tolist()) for update in self.rows.values()}
        return len(lists) == 1 and not self.layers and not self.whole

    def rows_key(self, name: str) -> str:
        return f"{parent(name)}.{'' if self.only_rows else 'token_adapter.'}trainable_tokens_delta"


# -- the config -------------------------------------------------------------------------------------------------------


def _config(
    parts: _Parts, layers: Mapping[str, Targeted], homes: Homes, base: Checkpoint | None, about: About
) -> dict[str, Any]:
    tokens = {parent(name): update.index.read().tolist() for name, update in parts.rows.items()}
    if parts.only_rows:
        rows = next(iter(tokens.values()))
        return {"peft_type": "TRAINABLE_TOKENS", "target_modules": [*tokens], "token_indices": rows}
    scalings = {
        pattern(name if parts.is_parameter(name) else parent(name)): lora.factors
        for name, item in layers.items()
        if (lora := folding.low_rank(item.update))
    }
    parameters = sorted(filter(parts.is_parameter, layers), key=natural)
    linear = [parent(name) for name in layers if name not in parameters]
    biases = [name for name in homes.direct if leaf(name) == "bias"]
    known = None if base is None else modules(base.tensors)
    config = {
        "peft_type": "LORA",
        "inference_mode": True,
        **scales(scalings),
        "init_lora_weights": True,
        "use_dora": any(isinstance(item.update, Dora) for item in layers.values()),
        "fan_in_fan_out": any(layers[f"{module}.weight"].target.layout == "in_out" for module in linear),
        "target_modules": (about.targets(linear, known) or target_modules(linear, known)) if layers else NO_LAYERS,
        "modules_to_save": [*homes.saved] or None,
        "bias": "none" if not biases else "lora_only" if all(map(parts.wrapped.get, map(parent, biases))) else "all",
    }
    optional = {
        "target_parameters": parameters,
        "peft_version": PAIRING if parameters else "",  # what a square parameter is read by
        "trainable_token_indices": tokens,
        "lora_bias": bool(parts.biases),
    }
    return config | {key: value for key, value in optional.items() if value}


def _notes(parts: _Parts, layers: Mapping[str, Targeted], config: Mapping[str, Any], homes: Homes) -> Iterator[str]:
    if several := sum(len(items) > 1 for items in parts.layers.values()):
        yield f"{several} tensors had several LoRAs: their factors are side by side, in one of a larger rank"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield "vLLM reads one rank and one alpha for all layers, not rank_pattern and alpha_pattern: see --uniform"
    if config.get("use_dora") or config.get("modules_to_save") or homes.direct:
        yield "vLLM loads no DoRA and no whole tensors"
    if others := [name for name in homes.direct if leaf(name) != "bias"]:
        why = "they are loaded into the base model itself, where no other adapter and no switching off undoes them"
        yield f"{len(others)} whole tensors ({others[0]} ...) are not in modules_to_save: {why}"
    if not layers and not parts.only_rows:
        yield "no LoRA is left in it: PEFT loads it, consumers that expect one may not"

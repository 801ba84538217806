"""Writing diffusers' adapter: the folder that its `save_lora_weights` makes, and `load_lora_weights` takes.

Below each component's name the tensors are called as PEFT calls them, and the header has a LoraConfig per component:
diffusers hands both to PEFT. Every line here is tested by loading the folder into diffusers' pipelines.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from loratool import folding
from loratool.adapter import Adapter, Targeted
from loratool.bundle import Bundle, Safetensors
from loratool.checkpoint import Checkpoint
from loratool.conventions import flux_names, peft_layout
from loratool.conventions.diffusers_names import (
    FILE_STEM,
    MAGNITUDE,
    MAGNITUDE_IN_TEXT,
    METADATA_KEY,
    NORM,
    Key,
    key_of,
    path_of,
)
from loratool.conventions.diffusers_places import TEXT, Places, pipeline_of, text_encoders
from loratool.conventions.model_class import class_of
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.names import modules, natural, parent
from loratool.tensors import TensorRef
from loratool.updates import Add, Dora, Lora, Replace

# Their loader alone takes norms.
_FLUX = ("FluxTransformer2DModel", "ChromaTransformer2DModel")
# Segments of models in the names of those who made them; no model of diffusers has them.
_ORIGINAL = re.compile(r"(^|\.)(diffusion_model|input_blocks|middle_block|output_blocks|joint_blocks)\.")
# What the loader tells PEFT's names in a text encoder by: without one of these it takes the names before PEFT's only.
_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")

ORIGINAL = Misfit(
    (),
    "these are names of the original model, and diffusers' has others",
    "give diffusers' version of the model with --base BASE",
    bakeable=False,
)
DIFFERENCE = Misfit(
    (),
    "a stored difference can only be the bias of a LoRA layer (lora_bias), without DoRA or embeddings beside it, and"
    " where every layer with LoRA has a bias",
    bakeable=False,
)
WHOLE = Misfit((), "its loaders take no whole tensors, apart from the norms of Flux's attention", bakeable=False)


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    places = Places.of(adapter, base, options)
    components = _components(adapter, places, base)
    found = [
        (name, places.misfit(name) or components[places.of_name[name].component].misfit(name, items))
        for name, items in adapter.targets().items()
    ]
    mixed = [misfit for component in components.values() for misfit in component.mixed()]
    refused = grouped(found) + mixed
    if not refused and not any(component.layers for component in components.values()):
        what = "an adapter of diffusers has LoRA in it, not whole tensors alone"
        return [Misfit(tuple(adapter.targets()), what, bakeable=False)]
    return refused


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    components = _components(adapter, Places.of(adapter, base, options), base).values()
    tensors: dict[str, TensorRef] = {}
    document: dict[str, Any] = {}
    for component in components:
        tensors |= {path_of(component.name, name): ref for name, ref in component.tensors().items()}
        document |= {path_of(component.name, name): value for name, value in component.config().items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(document, sort_keys=True)}
    files = {f"{FILE_STEM}.safetensors": Safetensors(tensors, metadata)}
    found = {path_of(component.name, name) for component in components for name in component.targets()}
    return Bundle(files, tuple(_notes(components, base)), frozenset(found))


# -- one of them ------------------------------------------------------------------------------------------------------


@dataclass
class _Component:
    """The updates of one component, by what they become, and by the names that its tensors have in it."""

    name: str
    before: str = ""  # what stands before these names in the adapter
    kind: str = ""  # its class, where the base's config says it
    known: Collection[str] | None = None  # the base's tensors in it
    layers: dict[str, list[Targeted]] = field(default_factory=dict)  # LoRA and DoRA
    biases: dict[str, Add] = field(default_factory=dict)
    norms: dict[str, TensorRef] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        return self.name in TEXT

    def add(self, name: str, item: Targeted) -> None:
        update = item.update
        if isinstance(update, Lora | Dora):
            self.layers.setdefault(name, []).append(item)
        elif isinstance(update, Add):
            self.biases[name] = update
        elif isinstance(update, Replace):
            self.norms[name] = update.value

    # -- what does not fit --------------------------------------------------------------------------------------------

    def misfit(self, full: str, items: list[Targeted]) -> Misfit | None:
        """Why diffusers can not hold the updates of one tensor."""
        name, kinds = full.removeprefix(self.before), Counter(item.update.kind for item in items)
        if foreign := sorted(kinds.keys() & {"loha", "lokr"}):
            return Misfit((), f"a LoRA adapter of diffusers has no {foreign[0]} update", bakeable=False)
        if "replace_rows" in kinds or ("replace" in kinds and not self._is_norm(name, items)):
            return WHOLE
        if name in self.layers and (misfit := self._misfit_layer(name)) is not None:
            return Misfit((), misfit.why, misfit.help, bakeable=False)
        if "add" in kinds and (kinds["add"] > 1 or not self._is_layer_bias(name, items)):
            return DIFFERENCE
        return None

    def _is_norm(self, name: str, items: list[Targeted]) -> bool:
        fits = self.name == "transformer" and (not self.kind or self.kind in _FLUX)
        whole = len(items) == 1 and items[0].target.covers_all
        return fits and whole and name.endswith(".weight") and NORM.search(name) is not None

    def _misfit_layer(self, name: str) -> Misfit | None:
        items, module = self.layers[name], parent(name)
        target = items[0].target
        if not self.kind and (flux_names.is_original(module) or _ORIGINAL.search(module)):
            return ORIGINAL
        if not module or not name.endswith(".weight"):
            return Misfit((), "PEFT, by which diffusers loads, has no layer for it")
        if target.stacked or len(target.shape) > 5 or target.layout == "in_out":
            what = "stacked experts" if target.stacked else "a Conv1D" if target.layout else "so many dimensions"
            return Misfit((), f"diffusers' adapters have no layer with {what}")
        if key_of(path_of(self.name, f"{module}.lora_A.weight")) != Key(self.name, module, "lora_A.weight"):
            return Misfit((), "its name means another module in an adapter of diffusers")
        if any(module.startswith(parent(other) + ".") for other in self.layers):
            return Misfit((), "it lies inside another module with LoRA")
        if self.is_text and not self._linear():
            return Misfit((), "diffusers does not know a text encoder's adapter by embeddings alone")
        return next((found for item in items if (found := peft_layout.misfit_dora(item)) is not None), None)

    def _linear(self) -> list[str]:
        return [name for name, items in self.layers.items() if items[0].target.layout != "embedding"]

    def _is_layer_bias(self, name: str, items: list[Targeted]) -> bool:
        """Whether a stored difference is the bias of a LoRA layer. `lora_bias` is for all layers or none.

        PEFT can not fuse it into a layer without a bias, not even the zeros that it would be there.
        """
        layer = f"{parent(name)}.weight"
        plain = all(
            items[0].target.layout != "embedding" and items[0].update.kind == "lora" for items in self.layers.values()
        )
        known = self.known
        all_biased = known is None or all(f"{parent(other)}.bias" in known for other in self.layers)
        alone = all(item.target.covers_all for item in items)
        return plain and all_biased and alone and name.endswith(".bias") and layer in self.layers

    def mixed(self) -> list[Misfit]:
        found = peft_layout.mixed_dora(self.layers)
        return [Misfit(tuple(self.before + name for name in one.names), one.why, bakeable=False) for one in found]

    # -- what is written ----------------------------------------------------------------------------------------------

    def _merged(self) -> dict[str, Targeted]:
        return {name: peft_layout.one_layer(items) for name, items in self.layers.items()}

    def tensors(self) -> dict[str, TensorRef]:
        """By key, without the component's name."""
        found, layers = dict(self.norms), self._merged()
        down, up = self._spelling()
        for name, item in layers.items():
            lora, module, target = folding.low_rank(item.update), parent(name), item.target
            assert lora is not None
            if target.layout == "embedding":
                found[f"{module}.lora_embedding_A"] = lora.B.T  # [rank, tokens]
                found[f"{module}.lora_embedding_B"] = lora.A.T  # [dim, rank]
            else:
                found[f"{module}.{down}.weight"] = lora.A  # [rank, in...]
                found[f"{module}.{up}.weight"] = peft_layout.up(lora.B, target)  # [out, rank, 1...]
            if isinstance(item.update, Dora):
                part = MAGNITUDE_IN_TEXT if self.is_text else MAGNITUDE
                found[f"{module}.{part}"] = peft_layout.magnitude(item.update, target)
        return found | peft_layout.bias_terms(layers, self.biases)

    def _spelling(self) -> tuple[str, str]:
        """How the factors are called: as PEFT's, unless diffusers then fails to see what generation of names it is."""
        if self.is_text and not any(parent(name).endswith(_ATTENTION) for name in self.layers):
            return "lora_linear_layer.down", "lora_linear_layer.up"
        return "lora_A", "lora_B"

    def targets(self) -> Iterator[str]:
        """The tensors that the reader finds in it."""
        yield from self.layers
        yield from self.norms
        yield from (f"{parent(name)}.bias" for name in (self.layers if self.biases else ()))

    def config(self) -> dict[str, Any]:
        """The component's LoraConfig; none where it has no LoRA."""
        scalings = {
            self._pattern(parent(name)): lora.factors
            for name, item in self._merged().items()
            if (lora := folding.low_rank(item.update))
        }
        optional = {"lora_bias": True} if self.biases else {}
        return {
            "peft_type": "LORA",
            **peft_layout.scales(scalings),
            "use_dora": any(items[0].update.kind == "dora" for items in self.layers.values()),
            "target_modules": self._target_modules(),
            **optional,
        } if scalings else {}  # fmt: skip

    def _pattern(self, module: str) -> str:
        """One module alone; of a text encoder, with and without the segment that transformers 5 dropped.

        diffusers takes it out of the tensors' names where the model lacks it, not out of the config.
        """
        if not self.is_text:
            return peft_layout.pattern(module)
        return rf"^(text_model\.)?{re.escape(_without_text_model(module))}"

    def _target_modules(self) -> list[str] | str:
        names = [parent(name) for name in self.layers]
        known = None if self.known is None else modules(self.known)
        if not self.is_text:
            return peft_layout.target_modules(names, known)
        plain = {_without_text_model(name) for name in known} if known is not None else None
        found = peft_layout.target_modules([*map(_without_text_model, names)], plain)
        return found if isinstance(found, list) else rf"(text_model\.)?({found})"


def _without_text_model(module: str) -> str:
    return module.removeprefix("text_model.")


def _components(adapter: Adapter, places: Places, base: Checkpoint | None) -> dict[str, _Component]:
    found: dict[str, _Component] = {}
    for item in sorted(adapter.updates, key=lambda item: natural(item.target.name)):
        component, name = places.of_name[item.target.name]
        if component not in found:
            found[component] = _component(component, bool(places.named), base)
        found[component].add(name, item)
    return found


def _component(name: str, named: bool, base: Checkpoint | None) -> _Component:
    before = f"{name}." if named and name else ""
    if base is None:
        return _Component(name, before)
    own = {tensor.removeprefix(before) for tensor in base.tensors if tensor.startswith(before)}
    model = base.components.get(name) if named else base
    return _Component(name, before, "" if model is None else class_of(model), own)


def _notes(components: Collection[_Component], base: Checkpoint | None) -> Iterator[str]:
    if several := sum(len(items) > 1 for component in components for items in component.layers.values()):
        yield f"{several} tensors had several LoRAs: their factors are side by side, in one of a larger rank"
    text = sorted(component.name for component in components if component.is_text)
    if text and text_encoders(pipeline_of(base)) is None:
        what = f"not every pipeline loads an adapter into {' and '.join(text)}"
        yield f"{what}: those that do not, leave it out without a word"
    if count := sum(len(component.norms) for component in components):
        yield f"{count} norms are whole tensors: Flux's pipelines load them into the model, and others refuse the file"

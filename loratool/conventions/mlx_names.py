"""What MLX calls the tensors of its models, and what it stores otherwise: for the reader and the writer of mlx-lm."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from loratool import maps
from loratool.adapter import Adapter, Targeted
from loratool.conventions.model_config import model_config
from loratool.maps.blocks import Place
from loratool.maps.family import Family, Layout
from loratool.names import parent
from loratool.tensors import TensorRef

# Modules of MLX's models that are embeddings, for files without their base: both kinds have two matrices.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings", "embedding", "embed_in")
# Models whose norms MLX stores as weight + 1: whole norms do not fit the Hugging Face base, and look as if they did.
_SHIFTED_NORMS = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "step3p5")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_IN_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?layers)\.(?P<number>\d+)\.(?P<inner>.+)$")


def is_embedding(module: str) -> bool:
    """Whether a module is called as embeddings are."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def may_be_shifted(name: str, base: Mapping[str, TensorRef] | None) -> bool:
    """Whether a tensor is a norm that MLX shifts: nothing shows which of the two the base has."""
    return name.endswith("norm.weight") and base is not None and model_type(base) in _SHIFTED_NORMS


def model_type(base: Mapping[str, TensorRef]) -> str:
    return str(model_config(base).get("model_type", ""))


@dataclass(frozen=True)
class MlxModel:
    """The model of MLX that a base becomes, or is; without a base, what is known of all.

    MLX keeps the names of transformers but for the experts, which it stacks. Maps know where, for the models that they
    list; the base's config.json says which one it is.
    """

    base: Mapping[str, TensorRef] | None

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """The base's tensors as MLX has them; stacks are put together when they are read. {} without a base."""
        base = self.base or {}
        found = dict(base)
        for block in self._base_view.blocks:
            layout = _layout(block.family)
            if layout is None or block.layout is layout:
                continue
            for stored, number in block.tensors:
                found.pop(stored.name(block.path, number), None)
            for stored in layout.tensors:
                name = stored.name(block.path, None)
                found[name] = base.get(name) or Place(block, layout, stored, None).ref(name)
        return found

    @cached_property
    def _base_view(self) -> maps.View:
        base = self.base or {}
        kind = model_type(base)
        return maps.View(base, [family for family in maps.shipped() if kind in family.models])

    @cached_property
    def _view(self) -> maps.View:
        return maps.View(self.tensors, self._base_view.families)

    def renames(self, name: str) -> bool:
        """Whether a tensor of the base is a part of another one in MLX."""
        return self.base is not None and name in self.base and name not in self.tensors

    def led(self, items: Iterable[Targeted]) -> tuple[Targeted, ...]:
        """Updates of the base's tensors as updates of MLX's. Raises Mismatch for those that can not be taken apart."""
        return maps.led(Adapter(tuple(items)), self._view, "").updates

    def back(self, items: Iterable[Targeted]) -> tuple[Targeted, ...]:
        """The opposite of `led`, as a merge into the base does it."""
        return maps.led(Adapter(tuple(items)), self._base_view, "").updates


def is_foreign(name: str) -> bool:
    """Whether a tensor is of experts, in a form in which MLX has none."""
    if _ONE_EXPERT.search(name):
        return True
    for family in maps.shipped():
        matching = {
            layout: stored for layout in family.layouts for stored in layout.tensors if stored.pattern.match(name)
        }
        # A router has a name that it shares with those of other families.
        if any(stored.stacked for stored in matching.values()) and _layout(family) not in matching:
            return True
    return False


def _layout(family: Family) -> Layout | None:
    """How MLX has a family's weights."""
    return next((layout for layout in family.layouts if layout.name == "mlx"), None)


def keys_and_layers(modules: Collection[str], known: Iterable[str]) -> tuple[list[str], int]:
    """mlx-lm's `keys` and `num_layers`, with which it adapts these modules and no others.

    It looks for `keys` in each of the last `num_layers` layers, by names within the layer, and by full names in the
    model. Names within a layer are what its trainer writes: where the tensors `known` of the base show that they hit
    nothing else. In any other case all names are full, and `num_layers` is -1: no layer has such names.
    """
    theirs = {parent(name) for name in known}
    places = {module: match for module in {*theirs, *modules} if (match := _IN_LAYER.match(module)) is not None}
    inside = [module for module in modules if module in places]
    if theirs and inside and len({match["stack"] for match in places.values()}) == 1:
        numbers = [int(places[module]["number"]) for module in inside]
        stack, first, total = (
            places[inside[0]]["stack"],
            min(numbers),
            1 + max(int(m["number"]) for m in places.values()),
        )
        keys = {places[module]["inner"] if module in places else module for module in modules}
        hit = {f"{stack}.{number}.{key}" for number in range(first, total) for key in keys} & theirs
        if hit == {*inside}:
            return sorted(keys), total - first
    return sorted(modules), -1

"""Which module of a base a flattened name means, and which component of a pipeline it belongs to.

The component (UNet, a text encoder) lies somewhere in the base: at its root, or under a prefix that most of its modules
share. The base's own names, flattened the same way, say the rest; in either of Stable Diffusion's spellings. Reading
and writing go by this one table.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from loratool.adapter import Target
from loratool.conventions import spellings
from loratool.tensors import Shape, TensorRef


class Component(NamedTuple):
    """A part of a pipeline: what `--component` calls it, what its keys begin with, and where checkpoints keep it."""

    name: str
    prefix: str
    places: tuple[str, ...] = ()  # prefixes in the base, for components that would fit at several


_UNET_PLACES = ("", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
_CLIP = ("", "cond_stage_model.transformer.", "cond_stage_model.model.", "text_encoder.")
_CLIP_L = ("", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.", "text_encoder.")
_CLIP_G = ("", "conditioner.embedders.1.model.", "text_encoders.clip_g.transformer.", "text_encoder_2.")
COMPONENTS = (
    Component("unet", "lora_unet_", _UNET_PLACES),  # sd-scripts calls every diffusion transformer so
    Component("unet", "diffusion_model.", _UNET_PLACES),
    Component("transformer", "lora_transformer_", _UNET_PLACES),
    Component("te", "lora_te_", _CLIP),
    Component("te1", "lora_te1_", _CLIP_L),
    Component("te2", "lora_te2_", _CLIP_G),
    Component("te3", "lora_te3_", ("", "text_encoders.t5xxl.transformer.", "text_encoder_3.")),
    Component("prior", "lora_prior_unet_", _UNET_PLACES),
    Component("prior-te", "lora_prior_te_"),
    Component("model", "lycoris_"),
)
# Other beginnings that trainers give the same components. They are read, not written.
_T5 = ("", "text_encoders.t5xxl.transformer.", "text_encoder_3.")
OTHERS = (
    *(Component(c.name, c.prefix.replace("lora_", "oft_"), c.places) for c in COMPONENTS[:1] + COMPONENTS[3:7]),
    Component("unet", "unet.", _UNET_PLACES),  # with dots: OneTrainer's, SimpleTuner's, diffusers'
    Component("transformer", "transformer.", _UNET_PLACES),
    Component("te1", "text_encoders.clip_l.transformer.", _CLIP_L),
    Component("te2", "text_encoders.clip_g.transformer.", _CLIP_G),
    Component("te3", "text_encoders.t5xxl.transformer.", _T5),
    Component("text_encoder", "text_encoder.", (*_CLIP, *_CLIP_L[1:3])),
    Component("text_encoder_2", "text_encoder_2.", (*_CLIP_G, *_T5[1:2])),
    Component("text_encoder_3", "text_encoder_3.", _T5),
)
# What scripts leave between a flattened beginning and the module: Wan-Fun's, and the prefixes of ComfyUI's files.
HEADS = ("_", "model_diffusion_model_", "diffusion_model_")
PIPELINE = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")  # diffusers' own prefixes
_WHOLE = Component("model", "")  # names that begin with no known component
_BY_LENGTH = sorted((*COMPONENTS, *OTHERS), key=lambda component: -len(component.prefix))


def component_of(key: str) -> Component:
    """The component whose beginning a key has, the longest one that fits."""
    return next((component for component in _BY_LENGTH if key.startswith(component.prefix)), _WHOLE)


class Stored(NamedTuple):
    """A module's weight in the base: `part` is its own, a range of the rows of `whole` or all of it."""

    part: TensorRef
    whole: TensorRef


class Site(NamedTuple):
    """Where a module lies in the base. With `part`, it is that third of the rows (q, k, v in one projection)."""

    weight: str
    bias: str
    part: int | None = None

    def target(self, parameter: str, region: Shape, base: Mapping[str, TensorRef]) -> Target:
        """What an update of this shape changes, of the module's `parameter` ("weight" or "bias")."""
        name = self.weight if parameter == "weight" else self.bias
        if self.part is None or name not in base:
            return Target(name, region)
        size = region[0]
        return Target(name, base[name].shape, rows=(self.part * size, (self.part + 1) * size))

    def stored(self, base: Mapping[str, TensorRef]) -> Stored:
        weight = base[self.weight]
        if self.part is None or not weight.shape:
            return Stored(weight, weight)
        size = weight.shape[0] // 3
        return Stored(weight.narrow(0, self.part * size, size), weight)


# Flattened name -> (prefix in the base, path after it, site), for every spelling of the base's modules.
Index: TypeAlias = Mapping[str, list[tuple[str, str, Site]]]


def flattened(path: str) -> str:
    return path.replace(".", "_")


def indexed(base: Iterable[str], wanted: Iterable[str]) -> Index:
    """Where in a base, given by its tensors' names, the `wanted` flattened names may lie."""
    wanted = {*wanted}
    index: dict[str, list[tuple[str, str, Site]]] = defaultdict(list)
    for tensor in base:
        path, _, last = tensor.rpartition(".")
        if last not in ("weight", "in_proj_weight"):  # a parameter that is no module's weight goes by its whole name
            for prefix, tail in _tails(tensor):
                if (flat := flattened(tail)) in wanted:
                    index[flat].append((prefix, tail, Site(tensor, "")))
            continue
        bias = f"{path}.{last.removesuffix('weight')}bias"
        for other in (spellings.Spelling("", path), *spellings.others(path)):
            site = Site(tensor, bias, other.part)
            for prefix, tail in _tails(other.path):
                if (flat := flattened(tail)) in wanted:
                    index[flat].append((prefix, tail, site))
    return index


def places(component: Component, flats: Iterable[str], index: Index) -> list[str]:
    """The prefixes under which the base has most of a component's modules; a usual one wins over others."""
    scores = Counter(prefix for flat in flats for prefix in {prefix for prefix, _, _ in index.get(flat, ())})
    best = [prefix for prefix, score in scores.items() if score == max(scores.values())]
    if len(best) > 1:
        best = [prefix for prefix in best if prefix in component.places] or best
    return best


def sites(flat: str, place: str, index: Index) -> dict[str, Site]:
    """Path after the place -> site, for every module there that is called so when flattened."""
    return {tail: site for prefix, tail, site in index.get(flat, ()) if prefix == place}


def _tails(path: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a path at a dot: (prefix with its dot, rest)."""
    yield "", path
    for dot in re.finditer(r"\.", path):
        yield path[: dot.end()], path[dot.end() :]

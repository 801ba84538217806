"""Which component of a diffusers pipeline an adapter's tensors belong to, and whether its loader takes that one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from loratool.adapter import Adapter
from loratool.checkpoint import PIPELINE_INDEX, Checkpoint, read_json
from loratool.conventions.diffusers_names import COMPONENTS
from loratool.conventions.model_class import class_of
from loratool.conventions.writing import Misfit, Options

# How many text encoders the loaders of diffusers' pipelines take (their `_lora_loadable_modules`), by what the class's
# name begins with; the longest beginning counts. What they do not take they leave out without a word.
TEXT_ENCODERS = {
    "StableDiffusion": 1, "StableDiffusionXL": 2, "StableDiffusion3": 2, "Flux": 1, "Flux2": 0, "Flux3": 0,
}  # fmt: skip
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Place(NamedTuple):
    """A component, "" where it is not known, and a tensor's name in it."""

    component: str
    name: str


@dataclass(frozen=True)
class Places:
    """Where the updated tensors lie in a pipeline, by their names in the adapter."""

    of_name: Mapping[str, Place]
    named: frozenset[str]  # components that the names begin with
    wanted: str  # what --as says
    loaded: Collection[str]  # components that the pipeline's loader takes

    @classmethod
    def of(cls, adapter: Adapter, base: Checkpoint | None, options: Options) -> Places:
        """As the reader has it: a base that has components is a pipeline; else the adapter's own names may tell."""
        names = adapter.targets()
        known: Iterable[str] = names if base is None else base.tensors
        named = frozenset(name.partition(".")[0] for name in known) & set(COMPONENTS)
        alone = options.component or ("" if base is None or named else _component_of(base))

        def place(name: str) -> Place:
            first, _, rest = name.partition(".")
            if named:
                return Place(first, rest) if first in named else Place("", name)
            return Place(alone if alone in COMPONENTS else "", name)

        places = {name: place(name) for name in names}
        return cls(places, named, options.component, _loaded(base))

    def misfit(self, name: str) -> Misfit | None:
        """Why it is not known which component has a tensor, or why the loader leaves that component out."""
        component = self.of_name[name].component
        takes = ", ".join(COMPONENTS)
        if self.wanted and self.named - {self.wanted}:
            what = f"the names say themselves which component it is, and --as says {self.wanted}"
            return Misfit((), what, "leave --as out", bakeable=False)
        if self.named and not component:
            return Misfit((), f"diffusers loads adapters into {takes} only", bakeable=False)
        if self.wanted and not component:
            return Misfit((), f"it knows no component {self.wanted!r}", f"--as takes {takes}", bakeable=False)
        if not component:
            help = "say it with --as unet (transformer, text_encoder ...), or give the pipeline's folder as --base BASE"
            return Misfit((), "it is not known to which component of the pipeline they belong", help, bakeable=False)
        if component not in self.loaded:
            return Misfit((), f"this pipeline's loader takes no adapter of its {component}", bakeable=False)
        return None


def _component_of(base: Checkpoint) -> str:
    """Which component a base of one model is, as its pipeline or its own config says; "" if they do not."""
    folder = base.folder.resolve()
    index = folder.parent / PIPELINE_INDEX
    if index.is_file() and isinstance(read_json(index).get(folder.name), list) and folder.name in COMPONENTS:
        return folder.name
    kind = class_of(base)
    if kind.startswith("UNet"):
        return "unet"
    return "transformer" if "Transformer" in kind and kind.endswith("Model") else ""


def pipeline_of(base: Checkpoint | None) -> str:
    index = base.side_json(PIPELINE_INDEX) if base is not None and base.components else None
    return str((index or {}).get("_class_name", ""))


def _loaded(base: Checkpoint | None) -> Collection[str]:
    """The components that the loader of the base's pipeline takes; of a pipeline that is not known, all."""
    count = text_encoders(pipeline_of(base))
    return {*COMPONENTS} - {*TEXT[2 if count is None else count :]}  # none takes a third one


def text_encoders(pipeline: str) -> int | None:
    """How many text encoders the loader of a pipeline's class takes; None if that is not known."""
    beginnings = [known for known in TEXT_ENCODERS if pipeline.startswith(known)]
    return TEXT_ENCODERS[max(beginnings, key=len)] if beginnings else None

"""The keys that an adapter's tensors get in kohya's and LyCORIS's files: component, module, flattened.

    unet.down_blocks.0.attentions.0.proj_in.weight    lora_unet_down_blocks_0_attentions_0_proj_in

The names are spelled as sd-scripts has them: the libraries' spelling of UNets and CLIP, the original one of SDXL's
UNet. What a reader would not find again, or not only there, is a misfit by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from loratool import folding
from loratool.adapter import Adapter, Targeted
from loratool.checkpoint import PIPELINE_INDEX, Checkpoint
from loratool.conventions import spellings
from loratool.conventions.flat_names import Component, Site, flattened, indexed, places, sites
from loratool.conventions.writing import Misfit, Options
from loratool.errors import ChoiceNeeded, Problem
from loratool.names import parent

_PARAMETERS = {"weight": "weight", "in_proj_weight": "weight", "bias": "bias", "in_proj_bias": "bias"}
_PARTS = 3  # query, key and value in one projection
_DENOISERS = {"unet": "unet", "transformer": "transformer", "prior": "prior"}  # of pipelines
_CLASSES = {"UNet2DConditionModel": "unet", "Transformer2DModel": "transformer", "Transformer3DModel": "transformer"}
_UNKNOWN = (
    "which part of a pipeline they belong to is in every key, and nothing tells it",
    "say it with --as: {names}; or give the pipeline's folder with --base BASE",
)


_ONE_BY_ONE = (
    "give the pipeline's folder with --base BASE; or convert one part at a time, as --component text_encoder with --as"
    " te for Stable Diffusion 1 and 2, te1 for what has several text encoders"
)


class Key(NamedTuple):
    """Where an update goes: the module's key and its `parameter`. With `part`, it is that third of the rows."""

    module: str
    parameter: str
    part: int | None = None

    @property
    def target(self) -> str:
        """What the reader calls it where it has no base."""
        return f"{self.module}.{self.parameter}"


class _Place(NamedTuple):
    """A prefix of tensor names, and the component that lies there."""

    prefix: str
    component: Component


@dataclass
class Keys:
    """The keys of all tensors of an adapter, and why some have none."""

    adapter: Adapter
    base: Checkpoint | None
    asked: Component | None
    known: tuple[Component, ...]  # that the convention has
    keys: dict[str, list[Key]] = field(default_factory=dict)  # by tensor name
    places: dict[str, _Place] = field(default_factory=dict)  # by tensor name
    misfits: dict[str, Misfit] = field(default_factory=dict)  # by tensor name

    @classmethod
    def of(cls, adapter: Adapter, base: Checkpoint | None, options: Options, known: tuple[Component, ...]) -> Keys:
        """Raises ChoiceNeeded for a component that does not exist."""
        found = cls(adapter, base, _named(options.component, known) if options.component else None, known)
        targets = adapter.targets()
        for name in targets:
            place = found._place(name)
            if isinstance(place, Misfit):
                found.misfits[name] = place
            else:
                found.places[name] = place
        if found.asked is not None and len({place.prefix for place in found.places.values()}) > 1:
            why = f"they are of several components, and --as {found.asked.name} names a single one"
            found.misfits |= dict.fromkeys(found.places, Misfit((), why, "leave --as out", bakeable=False))
            found.places.clear()
        for name, place in found.places.items():
            found.keys[name] = [*found._keys(name, place)]
            if found.in_parts(name) and targets[name][0].target.shape[0] % _PARTS:
                found.misfits[name] = Misfit((), "its rows are no query, key and value of one size", bakeable=False)
        found._collisions()
        if base is not None:
            found._check_found(base)
        return found

    @property
    def components(self) -> list[Component]:
        return list(dict.fromkeys(place.component for place in self.places.values()))

    @property
    def targets(self) -> frozenset[str]:
        return frozenset(key.target for keys in self.keys.values() for key in keys)

    # -- components ---------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> _Place | Misfit:
        """The component of a tensor, and the prefix that goes with it."""
        path, _, last = name.rpartition(".")
        if not path or last not in _PARAMETERS:
            return Misfit(
                (), "its files name modules, and this is neither the weight nor the bias of one", bakeable=False
            )
        if self.base is not None and self.base.components:
            folder = name.partition(".")[0]
            component = self.asked or self._of_pipeline(folder, self.base)
            if component is None:
                return Misfit((), f"its files have no name for a pipeline's {folder}", bakeable=False)
            return _Place(f"{folder}.", component)
        able = [self.asked] if self.asked else [*self.known]
        prefixes = {prefix: c for c in reversed(able) for prefix in c.places if prefix and name.startswith(prefix)}
        prefix = max(prefixes, key=len, default="")
        if self.asked is not None:
            return _Place(prefix, self.asked)
        if not prefix:
            component = self._of_config()
            return _Place("", component) if component else self._unknown([c for c in self.known if c.name != "model"])
        if (encoder := self._of_encoders(prefix)) is not None:
            return _Place(prefix, encoder)
        rivals = [c for c in self.known if prefix in c.places]
        own = [c for c in rivals if f"{c.name}." == prefix]  # `transformer.` is one before it is a place of a UNet
        if not own and len({c.name for c in rivals if c.name.startswith("te")}) > 1:
            return self._unknown(rivals)
        return _Place(prefix, (own or [prefixes[prefix]])[0])

    def _of_encoders(self, prefix: str) -> Component | None:
        """The component of a pipeline's text encoder without the pipeline, where the adapter has two of them."""
        names = [name for name in self.adapter.targets() if name.startswith("text_encoder")]
        second = [name for name in names if name.startswith("text_encoder_2.")]
        if not second or prefix not in ("text_encoder.", "text_encoder_2."):
            return None
        t5 = any(".encoder.block." in name for name in second)
        wanted = "te1" if prefix == "text_encoder." else "te3" if t5 else "te2"
        return next((component for component in self.known if component.name == wanted), None)

    def _of_pipeline(self, folder: str, base: Checkpoint) -> Component | None:
        """The component of a diffusers pipeline, by the name that the pipeline has for it."""
        listed = base.side_json(PIPELINE_INDEX) or {}
        encoders = [name for name in listed if name.startswith("text_encoder")]  # also those that are left out
        name = _DENOISERS.get(folder, "")
        if folder in encoders:
            several, kind = len(encoders) > 1, listed[folder]
            t5 = isinstance(kind, list) and any(str(part).startswith("T5") for part in kind)
            number = "3" if t5 else folder.removeprefix("text_encoder").strip("_") or "1"
            name = f"te{number}" if several else "te"
        return next((component for component in self.known if component.name == name), None)

    def _of_config(self) -> Component | None:
        """The component that a base of one model is, by the class in its config."""
        config = (self.base.side_json("config.json") if self.base is not None else None) or {}
        kind = str(config.get("_class_name"))  # as FluxTransformer2DModel
        name = next((name for end, name in _CLASSES.items() if kind.endswith(end)), "")
        return next((component for component in self.known if component.name == name), None)

    def _unknown(self, able: Collection[Component]) -> Misfit:
        why, hint = _UNKNOWN
        first = {name.partition(".")[0] for name in self.adapter.targets()}
        if "text_encoder" in first and len(first) > 1:
            hint = _ONE_BY_ONE
        names = ", ".join(dict.fromkeys(component.name for component in able))
        return Misfit((), why, hint.format(names=names), bakeable=False)

    # -- names --------------------------------------------------------------------------------------------------------

    def _keys(self, name: str, place: _Place) -> Iterator[Key]:
        path, _, last = name.removeprefix(place.prefix).rpartition(".")
        for spelling in self._spelled(path, place):
            yield Key(place.component.prefix + flattened(spelling.path), _PARAMETERS[last], spelling.part)

    def _spelled(self, path: str, place: _Place) -> list[spellings.Spelling]:
        own, usual = spellings.Spelling("", path), spellings.libraries(path)
        if place.component.name == "unet":
            # sd-scripts has SDXL's UNet, the one with label_emb, by its original names.
            original = self.base is not None and any(
                name.startswith(f"{place.prefix}label_emb.") for name in self.base.tensors
            )
            return [own] if original else usual
        return usual if place.component.name.startswith("te") else [own]

    def _collisions(self) -> None:
        """Modules that flatten to one key."""
        paths: dict[str, set[str]] = defaultdict(set)
        for name, keys in self.keys.items():
            for key in keys:
                paths[key.module].add(parent(name) + ".in_proj" * name.rpartition(".")[2].startswith("in_proj"))
        for name, keys in self.keys.items():
            if clash := sorted({path for key in keys for path in paths[key.module] if len(paths[key.module]) > 1}):
                self.misfits[name] = _clash(clash)

    def _check_found(self, base: Checkpoint) -> None:
        """What the reader would not find again in this base."""
        groups: dict[_Place, dict[str, list[Key]]] = defaultdict(dict)
        for name, keys in self.keys.items():
            groups[self.places[name]][name] = keys
        for place, group in groups.items():
            flat = {key: key.module.removeprefix(place.component.prefix) for keys in group.values() for key in keys}
            index = indexed(base.tensors, flat.values())
            found = places(place.component, set(flat.values()), index)
            if found and found != [place.prefix]:
                where = " or ".join(repr(other) for other in sorted(found))
                why = f"a reader would take {where} for the place of {place.component.name} in this base"
                self.misfits |= dict.fromkeys(group, Misfit((), why, bakeable=False))
                continue
            for name, keys in group.items():
                hits = [sites(flat[key], place.prefix, index) for key in keys]
                if name not in self.misfits and (misfit := _misfit_of(name, keys, hits, place)) is not None:
                    self.misfits[name] = misfit

    # -- rows ---------------------------------------------------------------------------------------------------------

    def in_parts(self, name: str) -> bool:
        """Whether thirds of a tensor's rows are modules of their own."""
        return any(key.part is not None for key in self.keys.get(name, ()))

    def split(self, name: str, items: list[Targeted]) -> Iterator[tuple[Key, list[Targeted]]]:
        """The updates of one tensor, by the keys they go to: all, or those of each third of its rows."""
        for key in self.keys[name]:
            if key.part is None:
                yield key, items
                continue
            size = items[0].target.shape[0] // _PARTS
            cut = [folding.of_rows(item, key.part * size, (key.part + 1) * size) for item in items]
            if mine := [item for item in cut if item is not None]:
                yield key, mine


def _named(name: str, known: tuple[Component, ...]) -> Component:
    found = next((component for component in known if component.name == name), None)
    if found is None:
        names = ", ".join(dict.fromkeys(component.name for component in known))
        raise ChoiceNeeded(Problem("E-OPTION", f"there is no component {name!r}", hint=f"--as takes {names}"))
    return found


def _clash(paths: list[str]) -> Misfit:
    why = f"{' and '.join(paths[:3])} are one name when flattened"
    return Misfit((), why, "rename one of the modules", bakeable=False)


def _misfit_of(name: str, keys: list[Key], hits: list[dict[str, Site]], place: _Place) -> Misfit | None:
    """Whether the reader finds a tensor, and no other one, where its keys lead."""
    for key, found in zip(keys, hits, strict=True):
        ends = {(site.weight if key.parameter == "weight" else site.bias, site.part) for site in found.values()}
        if not ends:
            return Misfit((), "the base has no weight beside it, by which a reader finds a module", bakeable=False)
        if ends != {(name, key.part)}:
            return _clash(sorted({place.prefix + tail for tail in found} | {parent(name)}))
    return None

"""An adapter for several models of a pipeline as PEFT has it: one folder a model, since PEFT loads one model at a time.

    OUT/unet/adapter_config.json   OUT/text_encoder/adapter_config.json   ...

The names in each are the model's own, without the component before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratool.adapter import Adapter
from loratool.bundle import Bundle, Content
from loratool.checkpoint import Checkpoint
from loratool.conventions import peft_write
from loratool.conventions.diffusers_names import COMPONENTS
from loratool.conventions.writing import Misfit, Options

# Where single-file checkpoints of whole pipelines keep their models: longest beginnings first.
_PLACES = {
    "model.diffusion_model.": "unet",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}

STRAY = Misfit((), "they are of no model of the pipeline that the others are of", bakeable=False)


@dataclass(frozen=True)
class _Component:
    """One model's share of an adapter, by the model's own names; `prefix` is what stood before them."""

    folder: str
    prefix: str
    adapter: Adapter
    base: Checkpoint | None


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    prefixes = _prefixes(adapter, base)
    if not prefixes:
        return peft_write.misfits(adapter, base, options)
    if stray := [name for name in adapter.targets() if not name.startswith(tuple(prefixes))]:
        return [replace(STRAY, names=tuple(stray))]
    return [
        replace(found, names=tuple(component.prefix + name for name in found.names))
        for component in _components(adapter, base, prefixes)
        for found in peft_write.misfits(component.adapter, component.base, options)
    ]


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    prefixes = _prefixes(adapter, base)
    if not prefixes:
        return peft_write.write(adapter, base, options)
    components = _components(adapter, base, prefixes)
    files: dict[str, Content] = {}
    notes = []
    for component in components:
        bundle = peft_write.write(component.adapter, component.base, options)
        place = f"{component.folder}/" if len(components) > 1 else ""
        files |= {place + name: content for name, content in bundle.files.items()}
        notes += [f"{component.folder}: {note}" for note in bundle.notes]
    folders = [component.folder for component in components]
    if len(folders) > 1:
        notes.insert(0, f"{', '.join(folders)}: a folder for each, as PEFT loads into one model at a time")
    parts = {
        component.folder if len(folders) > 1 else "": frozenset(component.adapter.targets()) for component in components
    }
    return Bundle(files, tuple(dict.fromkeys(notes)), parts=parts)


def _prefixes(adapter: Adapter, base: Checkpoint | None) -> dict[str, str]:
    """The component by what names begin with; {} where they are all of one model that is not part of a pipeline."""
    names, read_as = adapter.targets(), adapter.provenance.get("convention", "")
    known: Mapping[str, str] = _PLACES
    if base is not None and base.components:
        known = {f"{name}.": name for name in base.components}
    elif base is None and not read_as.startswith("peft"):  # whose names are those of one model
        known = {**_PLACES, **{f"{name}.": name for name in COMPONENTS}}
    found = {prefix: folder for prefix, folder in known.items() if any(name.startswith(prefix) for name in names)}
    several = len({*found.values()}) > 1
    # One alone may be a model's own segment, as `transformer.h.0` is.
    of_pipeline = (base is not None and bool(base.components)) or read_as in ("diffusers", "kohya", "lycoris")
    return found if several or of_pipeline else {}


def _components(adapter: Adapter, base: Checkpoint | None, prefixes: Mapping[str, str]) -> list[_Component]:
    found = []
    for prefix, folder in prefixes.items():
        updates = tuple(
            replace(item, target=replace(item.target, name=item.target.name.removeprefix(prefix)))
            for item in adapter.updates
            if item.target.name.startswith(prefix)
        )
        found.append(_Component(folder, prefix, replace(adapter, updates=updates), _part(base, prefix, folder)))
    return found


def _part(base: Checkpoint | None, prefix: str, folder: str) -> Checkpoint | None:
    if base is None:
        return None
    if base.components:
        return base.components[folder]
    own = {name.removeprefix(prefix): ref for name, ref in base.tensors.items() if name.startswith(prefix)}
    return replace(base, tensors=own)

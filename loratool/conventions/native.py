"""loratool's own file, as a convention like the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratool import folding
from loratool import format as native_format
from loratool.adapter import Adapter
from loratool.bundle import Bundle, Safetensors
from loratool.checkpoint import Checkpoint
from loratool.conventions.choices import Choices
from loratool.conventions.writing import Misfit, Options
from loratool.tensors import TensorRef

NAME = "native"
TITLE = "loratool adapter"
KINDS = ("lora", "dora", "loha", "lokr", "scale", "replace", "add", "replace_rows")
TESTED = "its own conformance vectors"
OPTIONS = ("uniform", "base_name", "revision")
SUFFIXES = (".safetensors",)
ASKS = ()  # it says everything itself
CONDITIONS = native_format.CONDITIONS


def detect(source: Checkpoint) -> bool:
    return len(source.shards) == 1 and native_format.is_native(source.metadata)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    shard = source.shards[0]
    adapter = native_format.read(shard.path) if shard.header is None else native_format.adapter_of(shard.header)
    return adapter if base is None else _alone(adapter, base)


def _alone(adapter: Adapter, base: Mapping[str, TensorRef]) -> Adapter:
    """For a base that is one component by itself: the adapter of one part by the names that it has there."""
    parts = {item.target.part for item in adapter.updates}
    inside = any(name in base for name in adapter.targets())
    if inside or len(parts) != 1 or "" in parts or not any(item.target.stored in base for item in adapter.updates):
        return adapter
    names = {item.target.name: item.target.stored for item in adapter.updates}
    updates = (replace(item, target=replace(item.target, name=item.target.stored, part="")) for item in adapter.updates)
    known = {names.get(name, name): identity for name, identity in adapter.base.tensors.items()}
    note = f"it is for the {min(parts)} of a pipeline, which this base is taken for"
    return replace(
        adapter,
        updates=tuple(updates),
        base=replace(adapter.base, tensors=known),
        notes=(*adapter.notes, note),
    )


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return {}


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    return []


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    notes = []
    if options.uniform:
        changed = folding.uniform(adapter.updates)
        notes.append(folding.uniform_note(adapter.updates, changed))
        adapter = replace(adapter, updates=changed)
    return Bundle(Safetensors(*native_format.stored(adapter)), tuple(notes))

"""Facts about a file or folder, from headers alone: what `inspect` shows. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool import conventions, receipt
from loratool import format as native_format
from loratool.adapter import Adapter, Targeted
from loratool.binding import led
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.conventions.beside import trainers_own
from loratool.conventions.choices import Choices
from loratool.conventions.load import Loaded, look
from loratool.maps import View, shipped
from loratool.names import listed, natural
from loratool.quantised import logical
from loratool.receipt import Receipt


@dataclass(frozen=True)
class Layer:
    """One update of an adapter."""

    target: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    alpha: float | None
    scaling: str | None
    scale: float | None
    parameters: int
    bytes: int
    dtype: str
    part: str = ""  # rows or expert, where the update is of a part of the tensor


@dataclass(frozen=True)
class Group:
    """Updates that differ only in the numbers in their names."""

    pattern: str
    kind: str
    count: int
    rank: str
    alpha: str
    scale: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class BaseFit:
    """How an adapter goes with a base, as far as headers can tell."""

    path: str
    bytes: int
    share: float  # the adapter's tensor bytes / the base's
    touched: tuple[str, ...]
    missing: tuple[str, ...]
    wrong_shape: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What a path holds. Bytes add up: `file_bytes` == `header_bytes` + `tensor_bytes` for safetensors."""

    path: str
    what: str  # adapter, wrapped checkpoint, merged checkpoint, checkpoint
    convention: str | None
    title: str
    format_version: str | None
    files: int
    file_bytes: int
    header_bytes: int | None  # None for pickles
    tensor_bytes: int
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    base_name: str
    base_digests: int
    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    adapter_parameters: int
    adapter_bytes: int
    fit: BaseFit | None
    receipt: Receipt | None
    notes: tuple[str, ...]
    info: Mapping[str, Any]  # what the adapter says of itself
    metadata: Mapping[str, str]  # and for other tools, under their names
    when: Mapping[str, Any]  # on which inputs it acts; empty for all
    condition: str  # the same in words
    base_revision: str
    base_architecture: str

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "groups": [vars(group) for group in self.groups],
            "layers": [vars(layer) for layer in self.layers],
            "fit": None if self.fit is None else vars(self.fit),
            "receipt": None if self.receipt is None else self.receipt.to_json(),
        }


def inspect_path(path: Path, base_path: Path | None = None, choices: Choices | None = None) -> Summary:
    """Say what is at a path. Raises the errors of reading it; an adapter's unknown scale is shown, not refused."""
    choices = choices or Choices()
    source = open_checkpoint(path)
    base = logical(open_checkpoint(base_path)) if base_path is not None else None
    chosen = conventions.find(source, choices.convention)
    adapter, fitting = None, None
    loaded: Loaded | None = None
    if chosen:
        view = None if base is None else View(base.tensors, choices.maps or shipped())
        loaded = look(source, choices, view)
        adapter = loaded.adapter
        if base is not None and view is not None:
            fitting = led(adapter, base, view, str(path))
    wrapped = bool(chosen and chosen.unwrap(source, choices))
    found = None if adapter else receipt.find(source)
    layers = tuple(_layer(item) for item in adapter.updates) if adapter else ()
    if adapter:
        what = "wrapped checkpoint" if wrapped else "adapter"
    else:
        what = "merged checkpoint" if found else "checkpoint"
    headers = [shard.header.size if shard.header else None for shard in source.shards]
    known = [size for size in headers if size is not None]
    notes = [*((fitting or adapter).notes if adapter else source.notes), *(adapter.doubts if adapter else ())]
    if adapter and not wrapped and (own := trainers_own(source)):
        notes.append(f"beside it, for the trainer to go on with, and no part of it: {listed(own)}")
    notes += [f"{problem.message}; {problem.hint}" for problem in (loaded.problems if loaded else ())]
    notes += [_component(name, part) for name, part in source.components.items()]
    if adapter and adapter.unknown_scales():
        config = " (or --config)" if chosen is conventions.peft_wrapped else ""
        rules = {item.update.scaling.rule for item in adapter.unknown_scales() if item.update.scaling}
        rule = " with --scaling" if "none" in rules else ""
        notes.append(f"alpha is not stored in it: give --alpha{rule}{config}")
    return Summary(
        path=str(path),
        what=what,
        convention=chosen.NAME if chosen else None,
        title=chosen.TITLE if chosen else f"{what}: diffusers pipeline" if source.components else what,
        format_version=native_format.VERSION if chosen is conventions.native else None,
        files=len(source.shards),
        file_bytes=sum(shard.path.stat().st_size for shard in source.shards),
        header_bytes=sum(known) if len(known) == len(headers) else None,
        tensor_bytes=source.nbytes,
        tensors=len(source.tensors),
        parameters=sum(ref.numel for ref in source.tensors.values()),
        dtypes=dict(Counter(ref.dtype for ref in source.tensors.values()).most_common()),
        base_name=adapter.base.name if adapter else "",
        base_digests=len(adapter.base.tensors) if adapter else 0,
        groups=_groups(layers),
        layers=layers,
        adapter_parameters=sum(layer.parameters for layer in layers),
        adapter_bytes=sum(layer.bytes for layer in layers),
        fit=_fit(fitting, base) if fitting and base else None,
        receipt=found,
        notes=tuple(notes),
        info=adapter.info if adapter else {},
        metadata=adapter.metadata if adapter else {},
        when=adapter.when if adapter else {},
        condition=adapter.condition() if adapter else "",
        base_revision=adapter.base.revision if adapter else "",
        base_architecture=adapter.base.architecture if adapter else "",
    )


def _component(name: str, part: Checkpoint) -> str:
    parameters = sum(ref.numel for ref in part.tensors.values())
    return f"component {name}: {len(part.tensors)} tensors with {parameters:,} parameters in {len(part.shards)} files"


def _layer(item: Targeted) -> Layer:
    tensors = item.update.components().values()
    scaling, target = item.update.scaling, item.target
    parts = [f"rows {target.rows[0]}:{target.rows[1]}"] if target.rows else []
    parts += [f"expert {target.expert}"] if target.expert is not None else []
    parts += [f"{target.experts} experts"] if target.experts is not None else []
    return Layer(
        target=target.name,
        kind=item.update.kind,
        shape=target.shape,
        rank=scaling.rank if scaling else None,
        alpha=scaling.alpha if scaling else None,
        scaling=scaling.rule if scaling and scaling.scale is not None else None,
        scale=scaling.scale if scaling else None,
        parameters=sum(ref.numel for ref in tensors),
        bytes=sum(ref.nbytes for ref in tensors),
        dtype="/".join(sorted({ref.dtype for ref in tensors})),
        part=", ".join(parts),
    )


def _groups(layers: Iterable[Layer]) -> tuple[Group, ...]:
    grouped: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        pattern = re.sub(r"(?<=[._])\d+(?=[._])", "*", layer.target)  # kohya's names have "_" for "."
        grouped.setdefault((pattern, layer.kind), []).append(layer)
    return tuple(
        Group(
            pattern,
            kind,
            len(members),
            _span(m.rank for m in members),
            _span(m.alpha for m in members),
            _span(m.scale for m in members),
            sum(m.parameters for m in members),
            sum(m.bytes for m in members),
        )
        for (pattern, kind), members in sorted(grouped.items(), key=lambda entry: natural(entry[0][0]))
    )


def _span(values: Iterable[float | None]) -> str:
    """``16``, ``8..64`` or ``-``: the one value of a group, or its range."""
    known = sorted({value for value in values if value is not None})
    if not known:
        return "-"
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g}..{known[-1]:g}"


def _fit(adapter: Adapter, base: Checkpoint) -> BaseFit:
    targets = {item.target.name: item.target.shape for item in adapter.updates}
    found = [name for name in targets if name in base.tensors]
    adapter_bytes = sum(ref.nbytes for item in adapter.updates for ref in item.update.components().values())
    return BaseFit(
        path=str(base.path),
        bytes=base.nbytes,
        share=adapter_bytes / max(1, base.nbytes),
        touched=tuple(found),
        missing=tuple(name for name in targets if name not in base.tensors),
        wrong_shape=tuple(name for name in found if base.tensors[name].shape != targets[name]),
    )

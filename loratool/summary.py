"""Facts about a file or folder, from headers alone: what `inspect` shows. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratool import conventions, receipt
from loratool import format as native_format
from loratool.adapter import Adapter, Targeted
from loratool.binding import led
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.conventions import Convention
from loratool.conventions.beside import trainers_own
from loratool.conventions.choices import Choices
from loratool.conventions.peft_folder import FILE_STEM
from loratool.errors import LoratoolError, Problem
from loratool.maps import View, shipped
from loratool.names import listed, natural
from loratool.partial import Seen, Unplaced, seen, without_configuration
from loratool.quantised import Dequantised, Foreign, logical
from loratool.receipt import Receipt

# What a file beside the weights is, by its name.
KINDS = {
    "weights": re.compile(r".*\.(?:safetensors|bin|pt|pth|ckpt|gguf|npz|h5|msgpack|onnx)$"),
    "tokenizer": re.compile(
        r"(?:tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|spiece|sentencepiece)[^/]*$"
    ),
    "configuration": re.compile(r".*\.(?:json|ya?ml|toml)$"),
    "text": re.compile(r"(?i)(?:readme|licen[cs]e|notice).*$|.*\.(?:md|txt)$"),
}


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
    adapter: str = ""  # whose it is, where a file holds several


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
    adapter: str = ""


@dataclass(frozen=True)
class Beside:
    """A file in the same folder that is not among the weights which were opened."""

    name: str
    what: str  # weights, the trainer's own, tokenizer, configuration, text, other


@dataclass(frozen=True)
class BaseFit:
    """How an adapter goes with a base, as far as headers can tell."""

    path: str
    bytes: int
    share: float  # the adapter's tensor bytes / the base's
    touched: tuple[str, ...]
    missing: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    quantised: Mapping[str, int]  # how many of its weights are stored in which way


@dataclass(frozen=True)
class Summary:
    """What a path holds. Bytes add up: `file_bytes` == `header_bytes` + `tensor_bytes` for safetensors.

    `problems` are why an adapter can not be used as it is, and `unplaced` its tensors that no update uses; the layers
    are those that could be read all the same. `adapters` are names, where a file holds several.
    """

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
    adapters: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    quantised: Mapping[str, int] = field(default_factory=dict)  # how many of its weights are stored in which way
    beside: tuple[Beside, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "groups": [vars(group) for group in self.groups],
            "layers": [vars(layer) for layer in self.layers],
            "fit": None if self.fit is None else vars(self.fit),
            "receipt": None if self.receipt is None else self.receipt.to_json(),
            "problems": [problem.to_json() for problem in self.problems],
            "unplaced": [vars(tensor) for tensor in self.unplaced],
            "beside": [vars(file) for file in self.beside],
        }


def inspect_path(path: Path, base_path: Path | None = None, choices: Choices | None = None) -> Summary:
    """Say what is at a path, as far as it can be read: what can not is in `problems` and `unplaced`.

    Raises what is wrong with the files themselves, and ChoiceNeeded for an option that means nothing here.
    """
    choices = choices or Choices()
    source = open_checkpoint(path)
    base = logical(open_checkpoint(base_path)) if base_path is not None else None
    view = None if base is None else View(base.tensors, choices.maps or shipped())
    chosen, problems = _convention(source, choices)
    found = seen(source, chosen, choices, view) if chosen else []
    adapters = [one.adapter for one in found if one.adapter is not None]
    adapter = adapters[0] if adapters else None
    fitting = led(adapter, base, view, str(path)) if len(found) == 1 and adapter and base and view else None
    problems += [problem for one in found for problem in one.problems]
    problems += [problem for whole in adapters if not whole.doubts for problem in whole.check()]
    merged = None if chosen else receipt.find(source)
    layers = tuple(_layer(item, one) for one in found if one.adapter for item in one.adapter.updates)
    if chosen:
        what = "wrapped checkpoint" if _is_wrapped(chosen, source, choices, found) else "adapter"
    else:
        what = "merged checkpoint" if merged else "checkpoint"
    headers = [shard.header.size if shard.header else None for shard in source.shards]
    known = [size for size in headers if size is not None]
    quantised, wrong = ({}, []) if chosen else _quantised(source)
    return Summary(
        path=str(path),
        what=what,
        convention=chosen.NAME if chosen else None,
        title=chosen.TITLE if chosen else f"{what}: diffusers pipeline" if source.components else what,
        format_version=native_format.VERSION if chosen is conventions.native else None,
        files=len(source.files),
        file_bytes=sum(path.stat().st_size for path in source.files),
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
        receipt=merged,
        notes=tuple(_notes(source, chosen, found, fitting)),
        info=adapter.info if adapter else {},
        metadata=adapter.metadata if adapter else {},
        when=adapter.when if adapter else {},
        condition=adapter.condition() if adapter else "",
        base_revision=adapter.base.revision if adapter else "",
        base_architecture=adapter.base.architecture if adapter else "",
        adapters=tuple(one.name for one in found if one.name),
        problems=tuple(dict.fromkeys([*problems, *wrong])),
        unplaced=tuple(tensor for one in found for tensor in one.unplaced),
        quantised=quantised,
        beside=tuple(_beside(source)),
    )


def _convention(source: Checkpoint, choices: Choices) -> tuple[Convention | None, list[Problem]]:
    """What a file is read as; where several conventions match, the first of them, and that it has to be said."""
    try:
        return conventions.find(source, choices.convention), []
    except LoratoolError as error:
        if choices.convention is not None:
            raise
        known = conventions.matching(without_configuration(source))
        return known[0] if known else None, list(error.problems)


def _is_wrapped(chosen: Convention, source: Checkpoint, choices: Choices, found: list[Seen]) -> bool:
    """Whether base weights are in the file as well."""
    one = replace(choices, adapter=found[0].name) if found and found[0].name else choices
    try:
        return bool(chosen.unwrap(source, one))
    except LoratoolError:
        return False  # what is wrong is among the problems already


def _notes(source: Checkpoint, chosen: Convention | None, found: list[Seen], fitting: Adapter | None) -> Iterator[str]:
    adapters = [one.adapter for one in found if one.adapter is not None]
    told = [fitting] if fitting else adapters
    yield from dict.fromkeys([note for adapter in told for note in adapter.notes] if told else source.notes)
    yield from dict.fromkeys(doubt for adapter in adapters for doubt in adapter.doubts)
    for name, part in source.components.items():
        yield _component(name, part)
    if own := trainers_own(source) if adapters else []:
        yield f"beside it, for the trainer to go on with, and no part of it: {listed(own)}"
    if names := [one.name for one in found if one.name]:
        yield f"it holds several adapters: {', '.join(names)}; `loratool extract` takes one, with --adapter NAME"
    if any(not one.scaled for one in found):
        yield "ranks are those of the tensors; alpha and scale are not known, because the configuration can not be read"
        return
    unknown = [item for adapter in adapters for item in adapter.unknown_scales()]
    if unknown:
        config = " (or --config)" if chosen and "config" in chosen.ASKS else ""
        rule = " with --scaling" if "none" in {u.update.scaling.rule for u in unknown if u.update.scaling} else ""
        yield f"alpha is not stored in it: give --alpha{rule}{config}"


def _quantised(checkpoint: Checkpoint) -> tuple[dict[str, int], list[Problem]]:
    """How the weights of a base are quantised: by method, how many; and what is wrong with that."""
    try:
        return _methods(logical(checkpoint)), []
    except LoratoolError as error:
        return {}, list(error.problems)


def _methods(base: Checkpoint) -> dict[str, int]:
    found: Counter[str] = Counter()
    for ref in base.tensors.values():
        if isinstance(ref.data, Dequantised):
            found[ref.data.scheme.title] += 1
        elif isinstance(ref.data, Foreign):
            found[f"{ref.data.method}, which is not read"] += 1
    return dict(found.most_common())


def _beside(source: Checkpoint) -> Iterator[Beside]:
    """The other files of a folder of its own."""
    if not (source.path.is_dir() or source.path.stem == FILE_STEM):
        return
    own, trainers = {path.name for path in source.files}, {*trainers_own(source)}
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and path.name not in own:
            kind = next((what for what, kind in KINDS.items() if kind.match(path.name)), "other")
            yield Beside(path.name, "the trainer's own" if path.name in trainers else kind)


def _component(name: str, part: Checkpoint) -> str:
    parameters = sum(ref.numel for ref in part.tensors.values())
    return f"component {name}: {len(part.tensors)} tensors with {parameters:,} parameters in {len(part.shards)} files"


def _layer(item: Targeted, of: Seen) -> Layer:
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
        alpha=scaling.alpha if scaling and of.scaled else None,
        scaling=scaling.rule if scaling and scaling.scale is not None and of.scaled else None,
        scale=scaling.scale if scaling and of.scaled else None,
        parameters=sum(ref.numel for ref in tensors),
        bytes=sum(ref.nbytes for ref in tensors),
        dtype="/".join(sorted({ref.dtype for ref in tensors})),
        part=", ".join(parts),
        adapter=of.name,
    )


def _groups(layers: Iterable[Layer]) -> tuple[Group, ...]:
    grouped: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in layers:
        pattern = re.sub(r"(?<=[._])\d+(?=[._])", "*", layer.target)  # kohya's names have "_" for "."
        grouped.setdefault((layer.adapter, pattern, layer.kind), []).append(layer)
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
            adapter,
        )
        for (adapter, pattern, kind), members in sorted(
            grouped.items(), key=lambda entry: (entry[0][0], natural(entry[0][1]))
        )
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
        quantised=_methods(base),
    )

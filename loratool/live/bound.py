"""Adapters bound to a model as to a base on disk: what each parameter gets of them, and all reasons why it can not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from loratool.adapter import Adapter, BaseIdentity, Targeted
from loratool.binding import Binding, Part
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.conventions.choices import Choices
from loratool.errors import Mismatch, Problem
from loratool.layout import Weighted
from loratool.live.model import Live, Model
from loratool.live.parameter import Parameter, Updates
from loratool.live.shards import narrowed
from loratool.maps.cutting import Uncuttable, each
from loratool.names import missing
from loratool.tensors import TensorRef


class Request(NamedTuple):
    """An adapter to put into a model, as it was asked for."""

    adapter: Path | Adapter
    weight: float
    choices: Choices
    check_base: bool


@dataclass(frozen=True, eq=False)
class Entry:
    """An active adapter: its factors in memory, and by parameter the updates of what of it lies in this process."""

    part: Part
    updates: Mapping[str, Updates]
    request: Request


def bound(
    seen: Model, entries: Sequence[Entry | Request], undo: str | Path
) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """The adapters bound to the model, and notes. Raises Mismatch with all that does not fit."""
    checkpoint = seen.checkpoint
    if isinstance(undo, Path) and any(isinstance(entry, Request) for entry in entries):
        checkpoint = _digested_on_disk(seen, open_checkpoint(undo))
    binding = Binding(checkpoint)
    parts: list[Part] = []
    for entry in entries:
        if isinstance(entry, Entry):
            parts.append(entry.part)
            continue
        binding.read([(entry.adapter, entry.weight)], entry.choices)
        for part in binding.parts:
            parts.append(part if entry.check_base else _unchecked(part))
            binding.problems += _uncheckable(parts[-1], seen, checkpoint)
    binding.parts = parts
    if not binding.problems:
        binding.bind()
    if binding.problems:
        raise Mismatch([_for_a_model(problem) for problem in binding.problems])
    pairs = zip(parts, entries, strict=True)
    active = tuple(entry if isinstance(entry, Entry) else _entry(part, binding, seen, entry) for part, entry in pairs)
    asked = any(isinstance(entry, Request) for entry in entries)
    return active, (*checkpoint.notes, *binding.notes) if asked else ()


def _entry(part: Part, binding: Binding, seen: Model, request: Request) -> Entry:
    """A new adapter with its factors in memory, since its files may be gone when it is taken out."""
    held = {id(item): Targeted(item.target, each(item.update, _in_memory)) for item in part.adapter.updates}
    updates: dict[str, Updates] = {}
    problems = []
    for name, wanted in binding.wanted.items():
        if binding.base.ties.get(name) in binding.wanted:
            continue  # the same memory under another name
        own: list[Weighted] = []
        for item, weight in wanted:
            if id(item) not in held:
                continue
            try:
                narrow = narrowed(held[id(item)], seen.spots[name].piece)
            except Uncuttable as error:
                what = f"{name} lies in pieces on several processes, and they can not be changed alone: {error}"
                problems.append(
                    Problem("E-UNSUPPORTED", what, part.name, "merge it into the checkpoint, and load that")
                )
                continue
            own += [Weighted(narrow, weight)] if narrow is not None else []
        if own:
            updates[name] = tuple(own)
    if problems:
        raise Mismatch(problems)
    adapter = replace(part.adapter, updates=tuple(held.values()), base=BaseIdentity())
    return Entry(part._replace(adapter=adapter, sound=False, given=None), updates, request._replace(adapter=adapter))


def _in_memory(ref: TensorRef) -> TensorRef:
    return TensorRef.of(ref.read().clone(), ref.name)


def _unchecked(part: Part) -> Part:
    return part._replace(adapter=replace(part.adapter, base=BaseIdentity()))


def _uncheckable(part: Part, seen: Model, checkpoint: Checkpoint) -> Iterator[Problem]:
    """An adapter that knows its base by digests, which no process can compute of its pieces."""
    spread = {name for name, spot in seen.spots.items() if spot.sharded}
    pinned = [name for name in part.adapter.base.tensors
              if checkpoint.ties.get(name, name) in spread or (spread and name not in checkpoint.tensors)]  # fmt: skip
    data = [checkpoint.tensors[name].data for name in spread]
    if pinned and not all(isinstance(each, Live) and each.on_disk is not None for each in data):
        what = f"{pinned[0]} lies in pieces on several processes: whether it is the adapter's base can not be checked"
        hint = "give the base's folder as `undo`, which is compared piece by piece; or check_base=False"
        yield Problem("E-BASE-MISMATCH", what, part.name, hint, "R-041")


def _for_a_model(problem: Problem) -> Problem:
    if "--allow-new" not in problem.hint:
        return problem
    return replace(problem, hint="merge it into the checkpoint with --allow-new, and load that")


# --- originals in files ----------------------------------------------------------------------------------------------


def _digested_on_disk(seen: Model, base: Checkpoint) -> Checkpoint:
    """The model, with the bytes of sharded parameters taken from the base; those that change are compared later."""
    tensors = dict(seen.checkpoint.tensors)
    for name, spot in seen.spots.items():
        stored = base.tensors.get(base.ties.get(name, name))
        live = tensors[name].data
        fits = stored is not None and (stored.dtype, stored.shape) == (spot.dtype, spot.shape)
        if spot.sharded and fits and isinstance(live, Live):
            tensors[name] = replace(tensors[name], data=replace(live, on_disk=stored))
    return replace(seen.checkpoint, tensors=tensors)


def in_file(name: str, parameter: Parameter, base: Checkpoint) -> TensorRef | Problem:
    """The tensor of a base that has a parameter's original bits; or why there is none."""
    spot, where = parameter.spot, str(base.path)
    stored = base.tensors.get(base.ties.get(name, name))
    hint = "give the base that was loaded, or undo='compressed'"
    if stored is None:
        return replace(missing(name, base.tensors, where), hint=f"{missing(name, base.tensors, where).hint}; {hint}")
    if not stored.in_order:
        return Problem("E-UNSUPPORTED", f"{name} is not read by rows from this file", where, "use safetensors")
    if (stored.dtype, stored.shape) != (spot.dtype, spot.shape):
        what = f"{stored.dtype} {list(stored.shape)} there, {spot.dtype} {list(spot.shape)} in the model"
        return Problem("E-BASE-MISMATCH", f"{name} is {what}", where, hint)
    if parameter.how.undo != stored and parameter.differs_from(stored):
        return Problem("E-BASE-MISMATCH", f"{name} has other bytes there than the model", where, hint)
    return stored

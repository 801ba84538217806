"""The one way from a file to an adapter: find the convention, leave out what is not wanted, read, bind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratool import conventions
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.conventions import Convention, beside, native
from loratool.conventions.choices import Choices
from loratool.conventions.described import described
from loratool.conventions.widened import widened
from loratool.errors import ChoiceNeeded, LoratoolError, Problem, Unsupported
from loratool.maps import View, absent


@dataclass(frozen=True)
class Loaded:
    """An adapter, what it was stored as, and the patterns of `--only` and `--skip` that matched something in it.

    `beside` names the file of each target that lies beside the adapter's own; `problems` are files there whose weights
    have no place: with one of them it can be looked at, not used.
    """

    adapter: Adapter
    convention: Convention
    source: Checkpoint
    used: frozenset[str] = frozenset()
    beside: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def load(path: Path, choices: Choices, view: View | None = None) -> Loaded:
    """Read the adapter at a path; with a base's view, by the base's names and orientation.

    Raises what `load_source` raises, and what is wrong with the file.
    """
    return load_source(open_checkpoint(path), choices, view)


def load_source(source: Checkpoint, choices: Choices, view: View | None = None) -> Loaded:
    """Raises ChoiceNeeded, InvalidFile, Unsupported, Mismatch; an unknown scale is left to the caller."""
    loaded = look(source, choices, view)
    if loaded.problems:
        raise Unsupported(loaded.problems)
    return loaded


def look(source: Checkpoint, choices: Choices, view: View | None = None) -> Loaded:
    """The same for one that is only looked at: `problems` are left to the caller as well."""
    loaded = load_part(source, choices, view)
    if unused := choices.selection.unused(loaded.used, str(source.path)):
        raise ChoiceNeeded(unused)
    return loaded


def load_part(source: Checkpoint, choices: Choices, view: View | None = None) -> Loaded:
    """The same for one of several: a pattern that matches nothing in this one may match in another."""
    convention = conventions.choose(source, choices.convention)
    choices.refuse_others((*convention.ASKS, "convention"), convention.TITLE, str(source.path))
    used: set[str] = set()
    if choices.selection and convention is not native:  # its keys are counted by its manifest
        source, used = choices.selection.keys(source)
    inside = bool(convention.unwrap(source, choices))
    if convention is not native and not inside:  # a base inside keeps its own dtypes
        source = widened(source)
    adapter = _read(source, convention, choices, view)
    found = beside.Beside()
    if not inside:  # beside a whole checkpoint lies no part of an adapter
        adapter, found = beside.joined(adapter, source, choices.selection, view, used)
        used |= found.used
    if convention is not native:
        adapter = described(adapter, source, choices.config)
    if choices.selection:
        adapter = choices.selection.updates(adapter, used, str(source.path))
    return Loaded(adapter, convention, source, frozenset(used), found.files, tuple(found.problems))


def _read(source: Checkpoint, convention: Convention, choices: Choices, view: View | None) -> Adapter:
    """Bound to a base; where that lacks targets, to what its maps say that it would have."""
    if view is None:
        return convention.read(source, choices, None)
    adapter = None
    try:
        adapter = convention.read(source, choices, view.base)
    except LoratoolError:
        if not view.places:
            raise
    if adapter is not None and (not absent(adapter, view.base) or not view.places):
        return adapter
    try:
        return convention.read(source, choices, view.tensors)
    except LoratoolError:
        if adapter is None:
            raise
        return adapter

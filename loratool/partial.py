"""What of an adapter can be read where not all of it can: for being looked at, never for being used.

A reader refuses a file as a whole. Here it is asked again for its modules apart, those that it refuses are named with
the reason, and what is left can be shown.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from loratool.adapter import Adapter, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import Convention, native, peft_wrapped
from loratool.conventions.choices import Choices
from loratool.conventions.load import look
from loratool.conventions.widened import widened
from loratool.errors import LoratoolError, Problem
from loratool.maps import View
from loratool.tensors import Shape

READS = 500  # of parts of one file: enough to find some dozens of modules among thousands
# Mistakes in what the user asked for are no facts about a file.
ASKED = {"E-OPTION", "E-ADAPTER"}
# Where a module's path ends and its parts begin.
_PARTS = re.compile(
    r"\.(?=(?:lora|lokr|hada|oft|boft|ia3|vera|hra|dora|diff|w_norm|b_norm|set_weight|reshape_weight|alpha|magnitude"
    r"|on_input|processor|token_adapter|trainable_tokens|base_layer|modules_to_save|original_module"
    r"|[ab][12m]\.weight|[qp]_layer\.weight|adapter\.)|m$)"
)


@dataclass(frozen=True)
class Unplaced:
    """A tensor of an adapter that no update uses, and why."""

    name: str
    dtype: str
    shape: Shape
    reason: str


@dataclass(frozen=True)
class Seen:
    """One of the adapters in a file, as far as it can be read; `name` is "" where there is a single one.

    With `problems` it can not be used. `scaled` is whether its scales are those of the file: they are unknown where
    only its configuration can not be read.
    """

    name: str
    adapter: Adapter | None
    problems: tuple[Problem, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    scaled: bool = True


class _Bare(Checkpoint):
    """A checkpoint without its configuration: no side files, no metadata."""

    @property
    def metadata(self) -> Mapping[str, str]:
        return {}

    def side_json(self, name: str) -> dict[str, Any] | None:
        return None


def seen(source: Checkpoint, convention: Convention, choices: Choices, view: View | None) -> list[Seen]:
    """Every adapter in a file, bound to a base's names where a view of one is given and they fit.

    Raises only for what the user asked for and the file does not have.
    """
    pinned = replace(choices, convention=convention.NAME)
    names = peft_wrapped.adapters(source) if convention is peft_wrapped and choices.adapter is None else []
    if len(names) < 2:
        return [_seen("", source, convention, pinned, view)]
    return [_seen(name, source, convention, replace(pinned, adapter=name), view) for name in names]


def _seen(name: str, source: Checkpoint, convention: Convention, choices: Choices, view: View | None) -> Seen:
    try:
        loaded = look(source, choices, view)
        return Seen(name, loaded.adapter, loaded.problems)
    except LoratoolError as error:
        problems = error.problems
        if {problem.code for problem in problems} & ASKED:
            raise
    if view is not None:  # not fitting the base is no reason to show nothing
        found = _seen(name, source, convention, choices, None)
        return replace(found, problems=_once((*problems, *found.problems)))
    if convention is native:  # its manifest says of every tensor what it is
        return Seen(name, None, problems)
    if choices.selection:
        source, _ = choices.selection.keys(source)
    adapter, unplaced = _salvaged(source, convention, choices)
    # A method that is refused by its configuration would be shown as another one without it.
    if adapter is not None or any(problem.code == "E-UNSUPPORTED" for problem in problems):
        return Seen(name, adapter, problems, tuple(unplaced))
    adapter, left = _salvaged(without_configuration(source), convention, replace(choices, config=None))
    return Seen(name, adapter, problems, tuple(unplaced if adapter is None else left), scaled=adapter is None)


def without_configuration(source: Checkpoint) -> Checkpoint:
    return _Bare(**{field.name: getattr(source, field.name) for field in fields(source)})


def _once(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(dict.fromkeys(problems))


def _salvaged(source: Checkpoint, convention: Convention, choices: Choices) -> tuple[Adapter | None, list[Unplaced]]:
    """The updates of the modules that can be read, and the tensors of those that can not."""
    groups, fixed, wrapped = _groups(source, convention, choices)
    source = source if wrapped else widened(source)
    updates: list[Targeted] = []
    unplaced: list[Unplaced] = []
    doubts: dict[str, None] = {}
    reads, waiting = 0, [groups]
    while waiting:
        part = waiting.pop()
        reads += 1
        keys = {key for group in part for key in group}
        try:
            adapter = convention.read(_only(source, keys | fixed), choices, None)
        except LoratoolError as error:
            if len(part) > 1 and reads < READS:
                middle = len(part) // 2
                waiting += [part[middle:], part[:middle]]
                continue
            reason = error.message if error.problems else "no reader knows it alone"
            refs = [source.tensors[key] for key in source.tensors if key in keys]
            unplaced += [Unplaced(ref.name, ref.dtype, ref.shape, reason) for ref in refs]
        else:
            updates += adapter.updates
            doubts |= dict.fromkeys(adapter.doubts)
    if not updates:
        return None, unplaced
    adapter = Adapter(tuple(updates), notes=source.notes, doubts=tuple(doubts))
    return choices.selection.updates(adapter, set(), str(source.path)), unplaced


def _groups(
    source: Checkpoint, convention: Convention, choices: Choices
) -> tuple[list[list[str]], frozenset[str], bool]:
    """The keys by the module they belong to, those that belong to all, and whether these are a base inside."""
    try:
        wrapped = bool(convention.unwrap(source, choices))
    except LoratoolError:
        wrapped = False
    owned: dict[str, list[str]] = defaultdict(list)
    fixed = set()
    for key in source.tensors:
        match = _PARTS.search(key)
        if match is None and wrapped:
            fixed.add(key)
        else:
            owner = key[: match.start()] if match else key.rpartition(".")[0] or key
            owned[owner.replace(".", "_")].append(key)  # flattened names are found with and without dots
    return [*owned.values()], frozenset(fixed), wrapped


def _only(source: Checkpoint, keys: Collection[str]) -> Checkpoint:
    return replace(source, tensors={name: ref for name, ref in source.tensors.items() if name in keys})


def reasons(unplaced: Sequence[Unplaced]) -> Iterator[tuple[str, list[Unplaced]]]:
    """Unplaced tensors by reason."""
    found: dict[str, list[Unplaced]] = defaultdict(list)
    for tensor in unplaced:
        found[tensor.reason].append(tensor)
    yield from found.items()

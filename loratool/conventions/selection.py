"""`--only` and `--skip`: which tensors of an adapter's file are read, and which of its updates are used.

A pattern is shell-style and matches whole names: keys as they stand in the file, or targets as they are called once
they are read. What it leaves out is named in a note.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from loratool.adapter import Adapter, Targeted
from loratool.checkpoint import Checkpoint
from loratool.errors import ChoiceNeeded, Problem
from loratool.names import listed

# Parts that say what other parts of their module mean: without them those would be another update.
MEANING = ("alpha", "scale", "rescale", "dora_scale", "magnitude", "lora_magnitude_vector", "magnitude_vector", "m")


@dataclass(frozen=True)
class Selection:
    """The patterns of both options. Empty `only` is everything."""

    only: Sequence[str] = ()
    skip: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.only or self.skip)

    def keys(self, source: Checkpoint) -> tuple[Checkpoint, set[str]]:
        """The file without the keys that are not wanted, so that no reader has to know them; the patterns that match.

        `only` patterns decide here if each of them names a key; otherwise they are names of targets, and `updates`
        decides. Raises ChoiceNeeded where half of an update would be left.
        """
        names = [*source.tensors]
        used = {pattern for pattern in (*self.only, *self.skip) if fnmatch.filter(names, pattern)}
        kept = {name for name in names if not _matches(name, self.skip)}
        if self.only and used.issuperset(self.only):
            chosen = {name for name in kept if _matches(name, self.only)}
            kept = chosen | {name for name in kept if _owner(name) and _any_below(_owner(name), chosen)}
        gone = [name for name in names if name not in kept]
        if halved := [name for name in gone if _owner(name) and _any_below(_owner(name), kept)]:
            what = f"without {halved[0]} the other tensors of {_owner(halved[0])} would mean something else"
            hint = f"leave out the whole layer: --skip '{_owner(halved[0])}*'"
            raise ChoiceNeeded(Problem("E-OPTION", what, str(source.path), hint))
        if not kept:
            raise ChoiceNeeded(Problem("E-OPTION", "--only and --skip leave no tensor of it", str(source.path)))
        if not gone:
            return source, used
        note = f"left out, as --only and --skip say: {listed(gone)}"
        tensors = {name: ref for name, ref in source.tensors.items() if name in kept}
        return replace(source, tensors=tensors, notes=(*source.notes, note)), used

    def updates(self, adapter: Adapter, used: set[str], where: str) -> Adapter:
        """The adapter without the updates whose targets are not wanted; `used` gets the patterns that match."""
        targets = [*adapter.targets()]
        skipped = [pattern for pattern in self.skip if fnmatch.filter(targets, pattern)]
        chosen = [pattern for pattern in self.only if fnmatch.filter(targets, pattern)]
        kept = [item for item in adapter.updates if self._wants(item, used)]
        used.update(skipped, chosen)
        if len(kept) == len(adapter.updates):
            return adapter
        if not kept:
            raise ChoiceNeeded(Problem("E-OPTION", "--only and --skip leave no update of it", where))
        gone = sorted({item.target.name for item in adapter.updates} - {item.target.name for item in kept})
        note = f"left out, as --only and --skip say: {listed(gone)}"
        return replace(adapter, updates=tuple(kept), notes=(*adapter.notes, note))

    def _wants(self, item: Targeted, by_key: Collection[str]) -> bool:
        if _matches(item.target.name, self.skip):
            return False
        if not self.only or set(self.only) <= set(by_key):
            return True  # keys have decided
        keys = [ref.name for ref in item.update.components().values()]
        return any(_matches(name, self.only) for name in (item.target.name, *keys))

    def unused(self, used: Collection[str], where: str) -> list[Problem]:
        """Patterns that match nothing: mistakes, not no-ops."""
        return [
            Problem("E-OPTION", f"the pattern {pattern!r} of --{name} matches no key and no target", where, hint)
            for name, patterns in (("only", self.only), ("skip", self.skip))
            for pattern in patterns
            if pattern not in used
            for hint in ["patterns are shell-style and match whole names, like '*.q_proj.*'"]
        ]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _owner(key: str) -> str:
    """The module whose update a key gives a meaning to; "" for any other key."""
    owner, _, last = key.removesuffix(".weight").rpartition(".")
    return owner if last in MEANING else ""


def _any_below(module: str, keys: Collection[str]) -> bool:
    return any(key.startswith(f"{module}.") for key in keys)

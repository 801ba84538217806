"""What an adapter says of itself and no merge looks at: `info` in the manifest, and other tools' metadata beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from loratool.errors import Problem
from loratool.format.keys import MAX_FREE_VALUES, METADATA_KEY

# The members of `info` that have a meaning, with what they are. Others are kept as they are.
TEXT, TEXTS, NUMBER, OBJECT = "a string", "a list of strings", "a number", "an object"
INFO = {
    "title": TEXT,
    "description": TEXT,
    "triggers": TEXTS,
    "license": TEXT,
    "authors": TEXTS,
    "source": TEXT,
    "weight": NUMBER,
    "training": OBJECT,
    "config": OBJECT,
}


def is_kept(name: str) -> bool:
    """Whether a member of `__metadata__` may stand beside the manifest: modelspec's, kohya's, or a vendor's name."""
    return name != METADATA_KEY and ("." in name or name.startswith("ss_"))


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """The members of a header's metadata that a native file keeps, in canonical order."""
    return {name: metadata[name] for name in sorted(metadata) if is_kept(name)}


def untyped(info: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Members of `info` that are not what their name says (R-046)."""
    for name, what in INFO.items():
        if name in info and not _is(info[name], what):
            yield Problem("E-MANIFEST", f"info.{name} must be {what}, found {info[name]!r:.80}", where, rule="R-046")


def _is(value: object, what: str) -> bool:
    if what == NUMBER:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if what == TEXTS:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, str if what == TEXT else Mapping)


def too_many(manifest: Mapping[str, Any]) -> bool:
    """Whether what may hold anything (`info`, provenance, vendor keys ...) has more JSON values than R-016 allows."""
    level: list[Any] = [manifest[name] for name in ("info", "provenance", "when") if name in manifest]
    base = manifest.get("base")
    level += [base["added_tokens"]] if isinstance(base, dict) and "added_tokens" in base else []
    level += _vendors(manifest)
    seen = len(level)
    while level and seen <= MAX_FREE_VALUES:
        level = [child for value in level if isinstance(value, list | dict) for child in _children(value)]
        seen += len(level)
    return seen > MAX_FREE_VALUES


def _vendors(manifest: Mapping[str, Any]) -> Iterator[Any]:
    """The values of all vendor keys, wherever the format lets them stand."""
    base, updates = manifest.get("base"), manifest.get("updates")
    tensors = base.get("tensors") if isinstance(base, dict) else None
    known = [*tensors.values()] if isinstance(tensors, dict) else []
    parts = [one.get("parts") for one in known if isinstance(one, dict)]
    places = [manifest, manifest.get("when"), base, *(updates if isinstance(updates, list) else ()), *known]
    places += [part for beside in parts if isinstance(beside, dict) for part in beside.values()]
    for place in places:
        if isinstance(place, dict):
            yield from (value for name, value in place.items() if "." in name)


def _children(value: list[Any] | dict[str, Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value

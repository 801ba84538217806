"""What a base is called in a file that leaves this machine: the id of a published model, never a path."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from loratool.adapter import Adapter
from loratool.checkpoint import WEIGHT_SUFFIXES, Checkpoint
from loratool.conventions.writing import Options
from loratool.errors import ChoiceNeeded, Problem

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?")
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")  # a hub cache's folder of one model
_REVISION = re.compile(r"[0-9a-f]{40}")


def is_id(name: str) -> bool:
    """Whether a name can be that of a published model: ``owner/model``, or one word; no path, no weights file."""
    return _ID.fullmatch(name) is not None and not name.endswith(WEIGHT_SUFFIXES) and not _is_here(name)


def is_path(name: str) -> bool:
    """Whether a name is a path of some machine; ``sd_xl_base_1.0.safetensors`` and the like are names for people."""
    return "\\" in name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or _is_here(name)


def _is_here(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def named(adapter: Adapter, base: Checkpoint | None, options: Options) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter with its base's name as others can use it, and notes on what had to go.

    The user's word counts first, then what the adapter says, then the hub cache that the base lies in. Raises
    ChoiceNeeded for a path as the user's word.
    """
    if options.base_name:
        if not is_id(options.base_name):
            what = (
                f"--base-name {options.base_name} is no model's id, as owner/model is: a path means nothing elsewhere"
            )
            raise ChoiceNeeded(Problem("E-OPTION", what, hint="say the id under which the base is published"))
        return _called(adapter, options.base_name, options.revision), ()
    name = adapter.base.name
    if name and not is_path(name):
        return _called(adapter, name, options.revision or adapter.base.revision), ()
    found = cached(base)
    notes = (f"the base's name in it, {name!r:.200}, is a path and left out",) if name else ()
    if options.revision and found is None:
        what = f"--revision {options.revision} is one of the base, and no name of the base is known"
        raise ChoiceNeeded(Problem("E-OPTION", what, hint="say --base-name as well"))
    if found is None:
        return _called(adapter, "", ""), notes
    return _called(adapter, found[0], options.revision or found[1]), notes


def _called(adapter: Adapter, name: str, revision: str) -> Adapter:
    return replace(adapter, base=replace(adapter.base, name=name, revision=revision))


def cached(base: Checkpoint | None) -> tuple[str, str] | None:
    """The id and the revision of a base that lies in a hub cache, by the names of the folders it lies in."""
    if base is None:
        return None
    folders = base.folder.absolute().parts
    for at, folder in enumerate(folders[:-2]):
        match = _CACHED.fullmatch(folder)
        if match and folders[at + 1] == "snapshots":
            revision = folders[at + 2]
            return f"{match['owner']}/{match['name']}", revision if _REVISION.fullmatch(revision) else ""
    return None

"""What a source says of itself and no merge looks at: its trainer's config, its header's metadata, title and licence.

One table leads both ways: what a safetensors header calls ``modelspec.title`` is `info`'s "title", whatever it is
written to. Metadata that describe the file they stood in (its hash, its network) are left behind.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.container import MAX_DEPTH
from loratool.conventions.peft_folder import FILE_STEM
from loratool.format import is_kept

CONFIG, README = "adapter_config.json", "README.md"
MAX_CONFIG = 100_000  # bytes of a trainer's config that travel with the adapter
MAX_CARD = 1_000_000  # bytes of a README that are looked at
_INTEGERS = 2**53  # beyond, JSON has no integers that every reader takes

# `info`'s names, and what headers call them. A header's value is text; "," parts what is a list in `info`.
MODELSPEC = {
    "title": "modelspec.title",
    "description": "modelspec.description",
    "triggers": "modelspec.trigger_phrase",
    "license": "modelspec.license",
    "authors": "modelspec.author",
}
_PLAIN = {"license": "license", "triggers": "trigger_words", "description": "description", "authors": "author"}
GENERAL = {  # llama.cpp's
    "title": "general.name",
    "description": "general.description",
    "license": "general.license",
    "authors": "general.author",
    "source": "general.url",
}
LISTS = ("triggers", "authors")
# A README's front matter, as model hubs have it: only these, and only on one line.
_CARD = {"license": "license", "instance_prompt": "triggers"}
_CARD_LINE = re.compile(r"(?P<key>\w+):[ \t]+(?P<value>[^\s#>|&*!{\[].*)")
# What a header says of the file it stands in; the output's writer says it of its own.
_OF_THE_FILE = re.compile(r"ss_network_\w+|modelspec\.hash_\w+")


def described(adapter: Adapter, source: Checkpoint, config: Mapping[str, Any] | None = None) -> Adapter:
    """The adapter with what its files say of it; what it says itself (a native file's manifest) stands.

    `config` is the trainer's own, where the user gave one in place of that beside the weights.
    """
    metadata = {**_kept(source.metadata), **adapter.metadata}
    found: dict[str, Any] = {}
    own = is_own(source)
    if own:
        found |= _of_card(source.folder / README)
    for names in (_PLAIN, GENERAL, MODELSPEC):
        found |= {name: _listed(name, text) for name, key in names.items() if (text := source.metadata.get(key))}
    given = config if config is not None else source.side_json(CONFIG) if own else None
    if given and "peft_type" in given and (slim := _slim(given)):  # other trainers' describe a layout that is left
        found["config"] = slim
    return replace(adapter, info={**found, **adapter.info}, metadata=metadata)


def headers(adapter: Adapter) -> dict[str, str]:
    """What of it goes into the header of a safetensors file, of any convention."""
    info = {key: joined(adapter.info[name]) for name, key in MODELSPEC.items() if adapter.info.get(name)}
    return {**info, **adapter.metadata}


def joined(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _listed(name: str, text: str) -> Any:
    return [part.strip() for part in text.split(",") if part.strip()] if name in LISTS else text


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """Kohya's and modelspec's; of other names with a dot, some are ties of tensors, and some scales."""
    known = (key for key in metadata if key.startswith(("ss_", "modelspec.")))
    return {key: metadata[key] for key in known if is_kept(key) and not _OF_THE_FILE.fullmatch(key)}


def is_own(source: Checkpoint) -> bool:
    """Whether what lies beside the weights is theirs: of a folder, or of a file under PEFT's own name."""
    return source.path.is_dir() or source.path.stem == FILE_STEM


def _slim(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what says nothing, and without the base's name and revision, which are the adapter's `base`.

    {} if it is too much to travel.
    """
    slim = {
        key: value
        for key, value in sorted(config.items())
        if value is not None and value not in ([], {}, "") and key not in ("base_model_name_or_path", "revision")
    }
    small = len(json.dumps(slim, ensure_ascii=False).encode("utf-8", "surrogatepass")) <= MAX_CONFIG
    return slim if small and _storable(slim, MAX_DEPTH - 3) else {}


def _storable(value: object, depth: int) -> bool:
    """Whether every reader of JSON takes a value for the same."""
    if isinstance(value, dict):
        return depth > 0 and all(_storable(key, 1) and _storable(child, depth - 1) for key, child in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_storable(child, depth - 1) for child in value)
    if isinstance(value, str):
        return not re.search(r"[\ud800-\udfff]", value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < _INTEGERS


def _of_card(path: Path) -> dict[str, Any]:
    """A README's licence and trigger words. A card that can not be read says nothing."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CARD).decode("utf-8", "replace").removeprefix("\ufeff")
    except OSError:
        return {}
    return dict(_front_matter(text))


def _front_matter(text: str) -> Iterator[tuple[str, Any]]:
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return
    for line in lines[1:]:
        if line.strip() == "---":
            return
        match = _CARD_LINE.fullmatch(line.rstrip())
        if match and match["key"] in _CARD:
            name, value = _CARD[match["key"]], match["value"].strip().strip("'\"")
            yield name, [value] if name in LISTS else value

"""What travels with an adapter's tensors: header entries into headers, tokenizer, card and licence into folders."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from loratool.adapter import Adapter
from loratool.bundle import Bundle, Content, Copied, Gguf, Safetensors
from loratool.checkpoint import Checkpoint
from loratool.conventions.described import GENERAL, MODELSPEC, headers, is_own, joined
from loratool.format import is_native
from loratool.names import listed

# Files beside an adapter that are of use to whoever loads it; a trainer's own (optimizer, scheduler, log) are not.
_USEFUL = re.compile(
    r"tokenizer[\w.-]*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.\w+"
    r"|(image_|video_)?(pre)?processor_config\.json|(readme|licen[sc]e|notice|copying|use_policy)(\.\w+)?",
    re.IGNORECASE,
)


def packed(bundle: Bundle, adapter: Adapter, source: Checkpoint | None, title: str) -> Bundle:
    """The bundle with what the adapter's files said beside its tensors, and notes on what has no place in it."""
    files = {name: _told(content, adapter) for name, content in bundle.files.items()}
    notes = [*_left_out(files.values(), adapter, title)]
    beside = [] if source is None or not is_own(source) else [*_beside(source.folder)]
    names = listed([path.name for path in beside])
    if "" in files:
        if beside:
            notes.append(f"{names} beside it stay there: a {title} is one file")
        return replace(bundle, content=files[""], notes=(*bundle.notes, *notes))
    if beside:
        notes.append(f"{names} are copied as they are")
    folders = {name.rpartition("/")[0] for name in files}
    top = "" if "" in folders or len(folders) > 1 else f"{folders.pop()}/"
    copies: dict[str, Content] = {f"{top}{path.name}": Copied(path) for path in beside}
    return replace(bundle, content={**copies, **files}, notes=(*bundle.notes, *notes))


def _told(content: Content, adapter: Adapter) -> Content:
    """A file with the entries of its header that the adapter brings; those of its writer stand."""
    if isinstance(content, Safetensors) and not is_native(content.metadata):
        return replace(content, metadata={**headers(adapter), **content.metadata})
    if isinstance(content, Gguf):
        general = {key: joined(adapter.info[name]) for name, key in GENERAL.items() if adapter.info.get(name)}
        return replace(content, keys={**content.keys, **general})
    return content


def _left_out(files: Collection[Content], adapter: Adapter, title: str) -> Iterator[str]:
    if any(isinstance(content, Safetensors) for content in files):
        return
    general = any(isinstance(content, Gguf) for content in files)
    placed = {MODELSPEC[name] for name in GENERAL if general and name in MODELSPEC}
    if lost := sorted(headers(adapter).keys() - placed):
        yield f"{listed(lost)} of its header are left out: a {title} has no place for them"


def _beside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and _USEFUL.fullmatch(path.name))

"""An Adapter as a native file in canonical form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import rfc8785

from loratool.adapter import Adapter, BaseIdentity, Targeted, TensorIdentity
from loratool.container import MAX_DEPTH, canonical_order, encode_header
from loratool.errors import ChoiceNeeded, InvalidFile, Problem
from loratool.format import conditions, info
from loratool.format.keys import CORES, FORMAT_NAME, MAX_FREE_VALUES, MAX_MANIFEST, METADATA_KEY, VERSION
from loratool.format.reading import read
from loratool.staging import staged
from loratool.tensors import TensorRef, is_int
from loratool.updates import Dora, Scale


def write(adapter: Adapter, path: Path) -> None:
    """Write an adapter as one native file, whole or not at all. The same adapter gives the same bytes.

    Raises ChoiceNeeded where a scale is unknown, InvalidFile where the adapter contradicts itself, OutputRefused
    where `path` exists.
    """
    with writing(adapter, path):
        pass


@contextmanager
def writing(adapter: Adapter, path: Path, force: bool = False) -> Iterator[None]:
    """Write an adapter that appears at `path` when the block ends well, and not at all if it does not."""
    with staged(path, force) as place:
        with place.open("wb") as file:
            _write_to(adapter, file)
        read(place)  # nothing leaves that a reader would refuse
        yield


def _write_to(adapter: Adapter, file: BinaryIO) -> None:
    tensors, metadata = stored(adapter)
    order = canonical_order((name, tensor.dtype) for name, tensor in tensors.items())
    file.write(encode_header(((n, tensors[n].dtype, tensors[n].shape) for n in order), metadata))
    for name in order:
        for chunk in tensors[name].chunks():
            file.write(chunk)


def stored(adapter: Adapter) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The tensors and the metadata of an adapter's native file. Raises what `write` raises for the adapter."""
    if unknown := adapter.unknown_scales():
        raise ChoiceNeeded(unknown_alpha(unknown))
    if adapter.doubts:
        raise ChoiceNeeded(
            [Problem("E-LAYOUT", d, hint="load it with its base: load(path, base=...)") for d in adapter.doubts]
        )
    if problems := adapter.check():
        raise InvalidFile(problems)
    manifest = manifest_of(adapter)
    if problems := [*_not_json(manifest), *info.untyped(adapter.info, ""), *_condition(adapter)]:
        raise InvalidFile(problems)
    text = canonical_json(manifest)
    if len(text.encode("utf-8")) > MAX_MANIFEST:
        raise InvalidFile(Problem("E-LIMIT", f"the manifest is over {MAX_MANIFEST:,} bytes", rule="R-016"))
    return _named_components(adapter), {METADATA_KEY: text, **_kept(adapter.metadata)}


def _condition(adapter: Adapter) -> Iterator[Problem]:
    if adapter.when:
        yield from conditions.malformed(adapter.when, "")


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """Other tools' metadata in canonical order. Raises InvalidFile for names and values that can not stand there."""
    bad = [name for name, value in metadata.items() if not info.is_kept(name) or not _is_text(name, value)]
    if bad:
        what = f"metadata {bad[0]!r:.80}: a text under a name with a dot or in ss_ can stand beside the manifest"
        raise InvalidFile(Problem("E-CANONICAL", what, rule="R-051"))
    return info.kept(metadata)


def _is_text(*values: object) -> bool:
    """Whether all are strings that UTF-8 can write."""
    try:
        return all(isinstance(value, str) and value.encode("utf-8") is not None for value in values)
    except UnicodeEncodeError:
        return False


def _not_json(manifest: dict[str, Any]) -> Iterator[Problem]:
    """What the caller's own objects are to be for a reader to take them."""
    if info.too_many(manifest):
        what = f"info, provenance and vendor keys hold over {MAX_FREE_VALUES:,} JSON values"
        yield Problem("E-LIMIT", what, rule="R-016")


def unknown_alpha(items: list[Targeted]) -> Problem:
    """The refusal of updates whose alpha nobody has said, naming them."""
    names = [item.target.name for item in items]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return Problem(
        "E-ALPHA",
        f"alpha is not stored in the checkpoint, so the scale of {len(names)} updates is unknown: {shown}",
        hint="load it with alpha and scaling",
    )


def manifest_of(adapter: Adapter) -> dict[str, Any]:
    """The manifest as a JSON document."""
    manifest = {
        "format": FORMAT_NAME,
        "version": VERSION,
        "features": sorted(features_of(adapter)),
        "updates": [_in_part(item) for item in adapter.updates],
        "base": _base(adapter.base),
        "provenance": dict(adapter.provenance),
    }
    optional = {"info": _plain(adapter.info), "when": _plain(adapter.when)}
    return manifest | {name: value for name, value in optional.items() if value}


def _base(base: BaseIdentity) -> dict[str, Any]:
    texts = {name: getattr(base, name) for name in ("name", "revision", "architecture", "tokenizer")}
    tensors = {name: _identity(known) for name, known in base.tensors.items()}
    found = {**texts, "added_tokens": dict(base.added_tokens), "tensors": tensors}
    return {name: value for name, value in found.items() if value}


def _identity(known: TensorIdentity) -> dict[str, Any]:
    own = {"digest": known.digest, "dtype": known.dtype, "shape": list(known.shape)}
    parts = {name: _identity(part) for name, part in known.parts.items()}
    return own | ({"parts": parts} if parts else {})


def _plain(value: Any, level: int = 2) -> Any:
    """A caller's value with dicts and lists for every mapping and tuple, at some level of the manifest's nesting."""
    if level > MAX_DEPTH and isinstance(value, Mapping | list | tuple):
        raise InvalidFile(Problem("E-LIMIT", f"info is nested deeper than {MAX_DEPTH - 1} levels", rule="R-010"))
    if isinstance(value, Mapping):
        return {key: _plain(child, level + 1) for key, child in value.items()}
    return [_plain(child, level + 1) for child in value] if isinstance(value, list | tuple) else value


def features_of(adapter: Adapter) -> set[str]:
    """The features a reader must know to read this adapter."""
    found = {conditions.FEATURE} if adapter.when else set()
    for item in adapter.updates:
        update = item.update
        found |= {update.kind, update.direction.kind if isinstance(update, Dora) else update.kind} - {"lora"}
        found |= {key for key in ("rows", "expert", "experts") if getattr(item.target, key) is not None}
        found |= {"mid"} if CORES & update.components().keys() else set()
    return found


def canonical_json(document: Any) -> str:
    """RFC 8785. Whole numbers beyond 2^53 are doubles like any other number, which the library leaves to its caller."""

    def doubles(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: doubles(child) for key, child in value.items()}
        if isinstance(value, list):
            return [doubles(child) for child in value]
        return float(value) if is_int(value) and abs(value) >= 2**53 else value

    try:
        return rfc8785.dumps(doubles(document)).decode("utf-8")
    except (ValueError, UnicodeEncodeError) as error:  # infinities, lone surrogates
        raise InvalidFile(Problem("E-MANIFEST", f"can not be written as JSON: {error}", rule="R-050")) from None


def _entry(item: Targeted) -> dict[str, Any]:
    target, update = item.target, item.update
    entry: dict[str, Any] = {"target": target.name, "kind": update.kind, "shape": list(target.shape)}
    optional: dict[str, Any] = {
        "rows": list(target.rows) if target.rows else None,
        "expert": target.expert,
        "experts": target.experts,
        "layout": target.layout or None,
    }
    if update.scaling is not None:
        scaling = update.scaling
        optional |= {"rank": scaling.rank, "alpha": scaling.alpha, "scaling": scaling.rule, "scale": scaling.scale}
    if isinstance(update, Dora):
        optional |= {"direction": update.direction.kind, "axis": update.axis}
    if isinstance(update, Scale):
        optional |= {"axis": update.axis}
    return entry | {key: value for key, value in optional.items() if value is not None}


def _in_part(item: Targeted) -> dict[str, Any]:
    """The entry of the manifest: a pipeline's tensor by its component and its name in there."""
    part = {"part": item.target.part} if item.target.part else {}
    return _entry(item) | {"target": item.target.stored} | part


def _named_components(adapter: Adapter) -> dict[str, TensorRef]:
    named = {}
    seen: Counter[str] = Counter()
    for item in adapter.updates:
        stored = item.target.stored
        ordinal, seen[stored] = seen[stored], seen[stored] + 1
        for part, tensor in item.update.components().items():
            named[f"{stored}.{ordinal}.{part}"] = tensor
    return named


def content_digest(adapter: Adapter) -> str:
    """BLAKE3 over what an adapter does, in canonical order: its condition, entries, and the bytes of components.

    Base identity and provenance are left out, so an adapter keeps its digest from one convention to another.
    """
    from blake3 import blake3

    hasher = blake3()
    if adapter.when:
        hasher.update(canonical_json({"when": _plain(adapter.when)}).encode())
    entries = [(canonical_json(_entry(item)).encode(), item.update) for item in adapter.updates]
    for entry, update in sorted(entries, key=lambda pair: pair[0]):
        hasher.update(entry)
        for part, tensor in sorted(update.components().items()):
            hasher.update(f"\n{part} {tensor.dtype} {list(tensor.shape)}\n".encode())
            for chunk in tensor.chunks():
                hasher.update(chunk)
    return f"blake3:{hasher.hexdigest()}"

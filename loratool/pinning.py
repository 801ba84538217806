"""Is this the base that an adapter was trained on? Digests prove it; a name only raises doubts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.conventions.base_names import cached
from loratool.errors import LoratoolError, Problem
from loratool.identity import identity_of
from loratool.maps import View
from loratool.names import listed
from loratool.tensors import TensorRef


def pinned(adapter: Adapter, base: Checkpoint, view: View) -> Adapter:
    """The adapter with the digests of the base's tensors that it changes; they are read whole."""
    stored = _stored(adapter, base, view)
    return replace(
        adapter, base=replace(adapter.base, tensors={name: identity_of(ref) for name, ref in stored.items()})
    )


def unpinned(adapter: Adapter, base: Checkpoint, view: View, where: str) -> Iterator[Problem]:
    """A problem where nothing in the adapter proves the base of some of its targets."""
    open_ = [name for name in _stored(adapter, base, view) if name not in adapter.base.tensors]
    if open_:
        what = f"nothing in it proves that this is its base: there is no digest of {listed(open_)}"
        hint = "`loratool pin ADAPTER --base BASE -o NEW` notes the digests of a base that you trust"
        yield Problem("E-NOT-PINNED", what, where, hint)


def doubts(adapter: Adapter, base: Checkpoint) -> Iterator[str]:
    """What speaks against a base, or does not speak for it, where no digest decides."""
    if adapter.base.tensors:
        return  # they are compared
    theirs, own = adapter.base.name, name_of(base)
    if theirs and own and _word(theirs) != _word(own):
        revision = f" at {adapter.base.revision}" if adapter.base.revision else ""
        yield f"it says that it was trained on {theirs!r:.200}{revision}, and this base calls itself {own!r:.200}"
    found = cached(base)
    if adapter.base.revision and found and found[1] and found[1] != adapter.base.revision:
        yield f"it was trained on revision {adapter.base.revision:.60}, and this base is revision {found[1]}"
    yield "base not proven: it holds no digests of it"


def name_of(base: Checkpoint) -> str:
    """What a base is called: by the hub cache it lies in, or by its own config; "" if by neither."""
    if (found := cached(base)) is not None:
        return found[0]
    try:
        name = (base.side_json("config.json") or {}).get("_name_or_path")
    except LoratoolError:
        return ""
    return name if isinstance(name, str) else ""


def _word(name: str) -> str:
    """The part of a name that copies share: the last, whatever its case."""
    return Path(name.replace("\\", "/").rstrip("/")).name.casefold()


def _stored(adapter: Adapter, base: Checkpoint, view: View) -> Mapping[str, TensorRef]:
    """The base's tensors that the adapter changes, by the names of its targets."""
    found = {name: base.tensors.get(base.ties.get(name, name)) for name in adapter.targets()}
    found |= {name: view.tensors.get(name) for name, ref in found.items() if ref is None and name in view.places}
    return {name: ref for name, ref in found.items() if ref is not None}

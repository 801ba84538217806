"""What a merged checkpoint's own receipt says, against what was asked: read first, and no proof of anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loratool import receipt
from loratool.checkpoint import Checkpoint
from loratool.errors import LoratoolError
from loratool.receipt import MergedAdapter


@dataclass(frozen=True)
class Claim:
    """What a receipt says that was merged, by which tool, and how that differs from what was asked."""

    tool: str
    adapters: tuple[MergedAdapter, ...]
    differences: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {
            "agrees": self.agrees,
            "tool": self.tool,
            "adapters": [vars(adapter) for adapter in self.adapters],
            "differences": list(self.differences),
        }


def claim_of(merged: Checkpoint, asked: Sequence[MergedAdapter]) -> Claim | None:
    """The receipt's claim; None where there is no receipt."""
    try:
        found = receipt.find(merged)
    except LoratoolError as error:
        return Claim("", (), (error.message,))
    if found is None:
        return None
    return Claim(found.tool, found.adapters, tuple(_differences(found.adapters, asked)))


def _differences(claimed: Sequence[MergedAdapter], asked: Sequence[MergedAdapter]) -> Iterator[str]:
    left = [*claimed]
    for one in asked:
        alike = [other for other in left if other.digest == one.digest]
        named = [other for other in left if other.name == one.name]
        found = next((o for o in alike if o.weight == one.weight), None) or next(iter([*alike, *named]), None)
        if found is None:
            yield f"it does not name {one.name}"
            continue
        left.remove(found)
        if found.digest != one.digest:
            yield f"it names {one.name} with other content"
        if found.weight != one.weight:
            yield f"it says {one.name}@{found.weight:g}, not @{one.weight:g}"
    for other in left:
        yield f"it also names {other.name}@{other.weight:g}"

"""The tensors of a merged checkpoint, by the names that they have in its base."""

from __future__ import annotations

from collections.abc import Iterator

from loratool import maps
from loratool.checkpoint import Checkpoint
from loratool.conventions.choices import Choices
from loratool.tensors import TensorRef


class MergedTensors:
    """Finds the base's tensors in a merged checkpoint, where its names, its packing or its ties may be others."""

    def __init__(self, checkpoint: Checkpoint, choices: Choices) -> None:
        self.checkpoint = checkpoint
        self.stored = dict(stored_of(checkpoint))
        self.view = maps.View(checkpoint.tensors, choices.maps or maps.shipped())
        self.used: set[str] = set()
        self.led = 0

    def find(self, name: str) -> TensorRef | None:
        tensors, ties = self.checkpoint.tensors, self.checkpoint.ties
        for known in (name, ties.get(name, "")):
            found = self.stored.get(known) or tensors.get(known)
            if found is not None:
                self.used.add(known)
                return found
        if name in self.view.places:
            self.led += 1
            return self.view.tensors.get(name)
        return None

    def extra(self) -> list[str]:
        """Tensors that nobody has asked for."""
        return [] if self.led else sorted(self.stored.keys() - self.used - self.checkpoint.ties.keys())

    @property
    def notes(self) -> list[str]:
        return [f"{self.led} tensors of the base are named or packed differently in it"] if self.led else []


def stored_of(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    """Every tensor of the files, by the name that it has in a receipt."""
    if not checkpoint.components:
        yield from ((name, ref) for shard in checkpoint.shards for name, ref in shard.tensors.items())
    for component, part in checkpoint.components.items():
        yield from ((f"{component}.{name}", ref) for name, ref in stored_of(part))

"""What was merged into a checkpoint, and whether it is still that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool import receipt
from loratool.checkpoint import open_checkpoint
from loratool.receipt import Receipt
from loratool.unmerging import changed_names
from loratool.workers import Meter, ProgressCallback


@dataclass(frozen=True)
class Status:
    """The receipt of a checkpoint, or None. `changed` are merged tensors that are others by now, where it was asked.

    `checked` counts the digests that were compared, `unproven` the tensors of a merge that noted none.
    """

    path: Path
    receipt: Receipt | None
    changed: tuple[str, ...] = ()
    checked: int = 0
    unproven: int = 0

    @property
    def answer(self) -> bool:
        return self.receipt is not None and not self.changed

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "merged": self.receipt is not None,
            "checked": self.checked,
            "unproven": self.unproven,
            "changed": list(self.changed),
            "receipt": None if self.receipt is None else self.receipt.to_json(),
        }


def status_of(path: Path, check: bool, progress: ProgressCallback | None = None) -> Status:
    """Raises InvalidFile for what is no checkpoint, and for a broken receipt."""
    checkpoint = open_checkpoint(path)
    found = receipt.find(checkpoint)
    if found is None or not check:
        return Status(path, found)
    sizes = {ref.name: ref.nbytes for ref in checkpoint.tensors.values() if ref.name in found.tensors}
    meter = Meter(sum(sizes.values()), progress)
    changed = tuple(
        changed_names(checkpoint, found, digests=True, looked=lambda name: meter.step(sizes.get(name, 0), name))
    )
    checked = sum(bool(tensor.merged) for tensor in found.tensors.values())
    return Status(path, found, changed, checked, len(found.tensors) - checked)

"""One task of a plan: bytes that are copied, or a tensor that is computed, at its own place in an output file.

Tasks know nothing of each other and run in any order, here or on another machine. One that is run again writes the same
bytes at the same place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import BinaryIO

from loratool.blocks import compute
from loratool.errors import InvalidFile, Problem
from loratool.layout import Change, Copy
from loratool.requantise import Requantiser
from loratool.tensors import FileSpan, TensorRef, open_to_read
from loratool.undo import TensorRecorder, UndoRecord
from loratool.undoing import Written, restore, write_all

Step = Callable[[int], None]  # told the bytes that were written


@dataclass(frozen=True)
class Settings:
    """How the tensors of a plan are computed: see `blocks.compute`. `undo` asks for what undoes each change, `record`
    is one to go back with."""

    digests: bool = True
    measure: bool = False
    reproducible: bool = False
    device: str = "cpu"
    undo: bool = False
    record: UndoRecord | None = None


def run_task(
    task: Copy | Change, out: BinaryIO, step: Step, settings: Settings, requantiser: Requantiser
) -> tuple[Written | None, TensorRecorder | None]:
    """Write a task's bytes into its file; return what is known of a computed tensor, and what undoes it."""
    out.seek(task.offset)
    if isinstance(task, Copy):
        _copy(task.source, out, step)
        return None, None
    tensor = task.tensor
    if tensor.part:
        return requantiser.write(tensor, out, step, settings.digests), None
    if settings.record is not None:
        return restore(tensor, settings.record.tensors[tensor.name], out, step, settings.device), None
    recorder = TensorRecorder() if settings.undo and tensor.original is not None else None
    known = compute(
        tensor, out, step, settings.measure, recorder, settings.digests, settings.reproducible, settings.device
    )
    return known, recorder


def _copy(source: TensorRef, out: BinaryIO, step: Step) -> None:
    """Copy bytes: in the kernel where source and system allow it."""
    if isinstance(source.data, FileSpan) and hasattr(os, "copy_file_range"):
        position, left = source.data.offset, source.nbytes
        with open_to_read(source.data.path) as file:
            while left:
                try:
                    count = os.copy_file_range(file.fileno(), out.fileno(), min(left, 64 << 20), offset_src=position)
                except OSError:
                    break  # not between these file systems: what is left goes through memory
                if count == 0:
                    raise InvalidFile(Problem("E-CHANGED", "the file became shorter while it was read", str(file.name)))
                position, left = position + count, left - count
                step(count)
        source = replace(source, shape=(left,), stored_shape=(left,), data=replace(source.data, offset=position))
    for chunk in source.chunks() if source.nbytes else ():
        write_all(out, chunk)
        step(len(chunk))

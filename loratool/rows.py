"""Blocks of rows of one stored tensor, in memory that is used again for every block; on the CPU or on a GPU.

What goes to a GPU passes through two pinned buffers in turn: one is filled from the file while the other is sent.
Every worker has a stream of its own, so that its transfers overlap with another's arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from loratool.tensors import ByRows, FileSpan, TensorRef, as_bytes, converted, open_to_read, read_exactly, torch_dtype

if TYPE_CHECKING:
    import torch


class Rows:
    """Reads `height` rows at a time of a tensor seen as a matrix of `columns`; None stands for a new one, of zeros.

    `last` is what was read last, as it is stored, in the memory of the CPU.
    """

    def __init__(
        self, source: TensorRef | None, columns: int, height: int, compute: torch.dtype, device: str = "cpu"
    ) -> None:
        self.source, self.columns, self.height = source, columns, height
        self.compute, self.device = compute, device
        self.dtype = torch_dtype(source.dtype if source is not None else "U8")
        self.buffers: dict[str, torch.Tensor] = {}
        self.sent: list[Any] = [None, None]  # what tells that a pinned buffer has arrived
        self.turn = 0
        self.stack = ExitStack()

    def __enter__(self) -> Rows:
        self.file: BinaryIO | None = None
        self.held: torch.Tensor | None = None
        source = self.source
        if self.device != "cpu":
            self.stack.enter_context(own_stream(self.device))
        if source is not None and isinstance(source.data, FileSpan) and not source.views:
            self.span = source.data
            self.file = self.stack.enter_context(open_to_read(source.data.path))
        elif source is not None and source.numel and not isinstance(source.data, ByRows):
            self.held = source.read().reshape(-1, self.columns)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def buffer(self, role: str, dtype: torch.dtype, rows: int) -> torch.Tensor:
        """[rows, columns] of memory where the arithmetic is, the same each time."""
        import torch

        if role not in self.buffers:
            self.buffers[role] = torch.empty(self.height, self.columns, dtype=dtype, device=self.device)
        return self.buffers[role][:rows]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop as stored, [rows, columns]; none for a new tensor."""
        if self.file is not None:
            self.last = self._on_host(f"stored {self.turn}", self.dtype, stop - start)
            if self.sent[self.turn] is not None:
                self.sent[self.turn].synchronize()
            self.file.seek(self.span.offset + start * self.columns * self.last.element_size())
            read_exactly(self.file, as_bytes(self.last), self.span.path)
        elif self.held is not None:
            self.last = self.held[start:stop].contiguous()
        elif self.source is not None and isinstance(self.source.data, ByRows):
            self.last = self.source.data.rows(start, stop, self.columns)
        else:
            self.last = self._on_host("none", self.dtype, 0)
        if self.device == "cpu":
            return self.last
        values = self.last.to(self.device, non_blocking=True)
        self.sent[self.turn] = arrival(self.device)
        self.turn = 1 - self.turn
        return values

    def widened(self, stored: torch.Tensor, rows: int) -> torch.Tensor:
        """A block in the compute dtype, [rows, columns]; zeros for a new tensor."""
        W = self.buffer("W", self.compute, rows)
        return converted(stored, W) if self.source is not None else W.zero_()

    def host(self, values: torch.Tensor) -> memoryview:
        """The bytes of a block, in the memory of the CPU."""
        if self.device == "cpu":
            return as_bytes(values)
        return as_bytes(self._on_host(f"out {values.dtype}", values.dtype, len(values)).copy_(values))

    def _on_host(self, role: str, dtype: torch.dtype, rows: int) -> torch.Tensor:
        if role not in self.buffers:
            self.buffers[role] = on_host(self.height, self.columns, dtype, pinned=self.device != "cpu")
        return self.buffers[role][:rows]


# What only a GPU has; tests that have none replace these three.


def on_host(rows: int, columns: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    import torch

    return torch.empty(rows, columns, dtype=dtype, pin_memory=pinned, device="cpu")


def arrival(device: str) -> Any:
    """Something to `synchronize()` on: all that was sent to the device so far, in this thread's stream."""
    import torch

    return torch.cuda.current_stream(device).record_event()


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """What this thread computes waits for nothing that other threads do."""
    import torch

    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield

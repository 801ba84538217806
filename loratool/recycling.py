"""Memory for tensors that callers hold for a while, and that is used again when they let go of it.

Fresh pages cost more than what is computed into them: the system clears each one when it is first touched. A loader
that copies tensor after tensor into a model would pay for them every time.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.tensors import OWN_PAGES, torch_dtype

if TYPE_CHECKING:
    import torch

SPACIOUS = 8  # times what is needed: larger memory is not given away for it, since it may be held for long


class Recycled:
    """Gives out memory for tensors. What comes back is kept, as much as the largest tensor had; `close` ends that."""

    def __init__(self) -> None:
        # Memory can come back at any moment, even while the same thread is in here: the lock is one it can pass.
        self.lock = threading.RLock()
        self.spare: list[mmap.mmap] = []
        self.most = 0  # bytes

    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        """A tensor on the CPU, not set to anything; it goes like any other, with the last reference to its memory."""
        import numpy as np
        import torch

        kind = torch_dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        if nbytes < OWN_PAGES:
            return torch.empty(shape, dtype=kind, device="cpu")
        memory = self._take(nbytes)
        view = np.frombuffer(memory, np.uint8, nbytes)
        weakref.finalize(view, self._give, memory).atexit = False
        return torch.from_numpy(view).view(kind).view(*shape)

    def close(self) -> None:
        with self.lock:
            self.spare, self.most = [], 0

    def _take(self, nbytes: int) -> mmap.mmap:
        with self.lock:
            fitting = [memory for memory in self.spare if nbytes <= len(memory) <= SPACIOUS * nbytes]
            if fitting:
                best = min(fitting, key=len)
                self.spare = [memory for memory in self.spare if memory is not best]
                return best
            self.most = max(self.most, nbytes)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)  # fewer and larger pages to touch first
        return memory

    def _give(self, memory: mmap.mmap) -> None:
        with self.lock:
            self.spare = sorted([*self.spare, memory], key=len)
            while sum(map(len, self.spare)) > self.most:
                self.spare = self.spare[1:]

"""What all that runs on several threads has in common: progress, counted once, and torch on one thread per worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

WORKERS = min(8, os.cpu_count() or 1)  # tasks that run at a time


class Progress(NamedTuple):
    """One step of running work, for a progress callback."""

    done: int  # bytes
    total: int  # bytes
    what: str  # the file being written, or the tensor being checked


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Counts the bytes that the workers are done with, and tells the progress callback, one call at a time."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.lock = threading.Lock()

    def step(self, nbytes: int, what: str) -> None:
        with self.lock:
            self.done += nbytes
            if self.progress is not None:
                self.progress(Progress(self.done, self.total, what))


def workers(count: int) -> ThreadPoolExecutor:
    """Threads with torch on one thread each: blocks are too small to be worth its own, which wait for each other."""
    return ThreadPoolExecutor(count, initializer=_single_threaded)


def _single_threaded() -> None:
    import torch

    torch.set_num_threads(1)  # of this thread: OpenMP keeps the number per thread

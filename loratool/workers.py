"""What all that runs on several threads has in common: progress, counted once, and torch on one thread per worker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple


class Progress(NamedTuple):
    """One step of running work, for a progress callback.

    `done` never falls, `total` never changes, and the last step of work that ends well has `done == total`. Steps come
    from the threads that work, one at a time and in order. An exception in the callback ends the work, like any other
    failure of it: it reaches the caller, nothing that is unfinished stays, and the callback is not called again.
    """

    done: int  # bytes
    total: int  # bytes
    what: str  # the file being written, or the tensor being checked


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Counts the bytes that the workers are done with, and tells the progress callback, one call at a time."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.lock = threading.Lock()
        self.refused: BaseException | None = None

    def step(self, nbytes: int, what: str) -> None:
        with self.lock:
            if self.refused is not None:
                raise self.refused  # the callback of another worker has ended the work
            self.done += nbytes
            if self.progress is None:
                return
            try:
                self.progress(Progress(self.done, self.total, what))
            except BaseException as error:
                self.refused = error
                raise


def workers(count: int) -> ThreadPoolExecutor:
    """Threads with torch on one thread each: blocks are too small to be worth its own, which wait for each other."""
    return ThreadPoolExecutor(count, initializer=_single_threaded)


_starting = threading.Lock()


def _single_threaded() -> None:
    """OpenMP has this number per thread, but torch also starts threads that are yet to come with the last one set.

    That one is the caller's: a thread that ends at once sets it back.
    """
    import torch

    with _starting:
        callers = torch.get_num_threads()  # this thread is new, so it has what threads start with
        torch.set_num_threads(1)
        restorer = threading.Thread(target=torch.set_num_threads, args=(callers,))
        restorer.start()
        restorer.join()

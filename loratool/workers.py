"""What all that runs on several threads has in common: progress, counted once, and torch on one thread per worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, TypeVar, cast

from loratool.errors import ChoiceNeeded, Problem

T = TypeVar("T")

WORKERS = min(8, os.cpu_count() or 1)  # tasks that run at a time
_STARTING = threading.Lock()  # two pools that start at once would put each other's number back

WORKERS = min(8, os.cpu_count() or 1)  # tasks that run at a time


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


def worker_count(threads: int | None) -> int:
    """As many as asked for. Raises ChoiceNeeded for none."""
    if threads is not None and threads < 1:
        raise ChoiceNeeded(Problem("E-OPTION", f"{threads} threads can do nothing"))
    return threads or WORKERS


def workers(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, all started, with one torch thread each: blocks are too small to be worth its own.

    torch keeps the number per thread. But a thread that is new starts with what was set last, in whatever thread: so
    that is asked of a new one before the workers set theirs, and set again by another new one.
    """
    import torch

    pool = ThreadPoolExecutor(count, thread_name_prefix="loratool")
    there = threading.Barrier(count)

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes up the process's number when it is first asked: not later than now
        there.wait()  # each job has a thread of its own

    try:
        with _STARTING, ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1) as after:
            number = before.submit(torch.get_num_threads).result()
            try:
                for _ in each_done(pool, [alone] * count):
                    pass
            finally:
                after.submit(torch.set_num_threads, number).result()
    except BaseException:  # the system has no more threads, or a signal came: nobody may wait for the others
        there.abort()
        pool.shutdown()
        raise
    return pool


def each_done(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Run jobs, and give out what they return as they end. Raises the first error; jobs that wait are given up then.

    The thread that waits may be interrupted by a signal anywhere. It shares no condition variable with the workers, as
    it would in waiting for their futures: an interrupt inside of one leaves it broken for them.
    """
    ended: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

    def run(job: Callable[[], T]) -> None:
        try:
            found = job()
        except BaseException as error:
            ended.put((None, error))
        else:
            ended.put((found, None))

    try:
        for _ in [pool.submit(run, job) for job in jobs]:
            found, error = ended.get()
            if error is not None:
                raise error
            yield cast(T, found)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise

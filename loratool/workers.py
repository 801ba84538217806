"""Threads that run torch on one thread each, and leave the number that the process has for it alone."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from loratool.errors import ChoiceNeeded, Problem

WORKERS = min(8, os.cpu_count() or 1)  # tasks that run at a time
_STARTING = threading.Lock()  # two pools that start at once would put each other's number back


def worker_count(threads: int | None) -> int:
    """As many as asked for. Raises ChoiceNeeded for none."""
    if threads is not None and threads < 1:
        raise ChoiceNeeded(Problem("E-OPTION", f"{threads} threads can do nothing"))
    return threads or WORKERS


def workers(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, all started, with one torch thread each.

    torch keeps the number per thread. But a thread that is new starts with what was set last, in whatever thread: so
    that is asked of a new one before the workers set theirs, and set again by another new one.
    """
    import torch

    pool = ThreadPoolExecutor(count, thread_name_prefix="loratool")
    there = threading.Barrier(count)

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes up the process's number when it is first asked: not later than now
        there.wait()

    with _STARTING, ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1) as after:
        number = before.submit(torch.get_num_threads).result()
        try:
            started = [pool.submit(alone) for _ in range(count)]
        except RuntimeError:  # the system has no more threads
            there.abort()
            pool.shutdown()
            raise
        for done in started:
            done.result()
        after.submit(torch.set_num_threads, number).result()
    return pool

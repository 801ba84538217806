"""Outputs that appear whole or not at all: written beside their place, flushed to the disk, renamed at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loratool.errors import OutputRefused, Problem


def refuse_existing(path: Path) -> Problem | None:
    """A problem if `path` is taken or its parent is missing; checked in the plan and again before the rename."""
    if path.exists() or path.is_symlink():
        return Problem("E-EXISTS", f"the output {path} exists already", str(path), "remove it, or name another with -o")
    if not path.absolute().parent.is_dir():
        return Problem("E-EXISTS", f"the folder {path.absolute().parent} does not exist", str(path), "create it first")
    return None


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A scratch folder beside `path`; what the block makes at the yielded place is renamed to `path` at the end.

    On any exception the folder is removed and `path` does not exist. The yielded place has `path`'s own name inside
    the scratch folder, and is a file or a folder as the block likes.
    """
    if (problem := refuse_existing(path)) is not None:
        raise OutputRefused(problem)
    parent = path.absolute().parent
    scratch: Path | None = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=parent))
        place = scratch / path.name
        yield place
        flush_tree(place)
        if (problem := refuse_existing(path)) is not None:
            raise OutputRefused(problem)
        place.rename(path)
        flush(parent)
    except (BrokenPipeError, ConnectionError):
        raise  # not of this disk: a caller's progress callback talks to somebody
    except OSError as error:
        raise OutputRefused(_disk_problem(error, path)) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def flush_tree(path: Path) -> None:
    """fsync a file, or all files and folders below a folder, before its name can be trusted."""
    if path.is_dir():
        for child in sorted(path.iterdir()):
            flush_tree(child)
    flush(path)


def flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle of a folder to flush
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_problem(error: OSError, path: Path) -> Problem:
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", -1)):
        hint = "free some space, or write to another disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "write to a folder you own"
    return Problem("E-DISK", f"writing failed: {error.strerror or error}", error.filename or str(path), hint)

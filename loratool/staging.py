"""Outputs that appear whole or not at all: written beside their place, flushed to the disk, renamed at the end."""

from __future__ import annotations

import contextlib
import errno
import glob
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
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        return Problem("E-DISK", f"the folder {path.absolute().parent} is not writable", str(path), "write elsewhere")
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
    prefix = f".{path.name}.partial-"
    with abandoned(path):
        pass  # what killed runs have left goes
    ours: os.stat_result | None = None
    try:
        with _scratch(parent, prefix) as scratch:
            place = scratch / path.name
            yield place
            flush_tree(place)
            if (problem := refuse_existing(path)) is not None:
                raise OutputRefused(problem)
            made = place.stat()
            try:
                _move(place, path)
                flush(parent)
            except BaseException:  # it may have its name already
                take_back(path, made)
                raise
            ours = made
    except BaseException as error:
        if ours is not None:  # a signal, while the scratch folder was removed
            take_back(path, ours)
        if not isinstance(error, OSError) or isinstance(error, ConnectionError):
            raise  # a broken pipe is not of this disk: a caller's progress callback talks to somebody
        raise OutputRefused(_disk_problem(error, path)) from error


def take_back(path: Path, ours: os.stat_result) -> None:
    """Remove an output that got its name before something else failed; not another's that has the name by now."""
    with contextlib.suppress(OSError):
        if not os.path.samestat(path.lstat(), ours):
            return
        if path.is_dir():  # at once, so that no kill leaves half of it under its name
            shelter = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.absolute().parent))
            path.rename(shelter / path.name)
            shutil.rmtree(shelter, ignore_errors=True)
        else:
            path.unlink()


@contextlib.contextmanager
def _scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A new scratch folder, held until it is removed at the end."""
    folder: Path | None = None
    lock: int | None = None
    try:
        while folder is None:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            with contextlib.suppress(FileNotFoundError):
                lock = _lock(folder)
            if not _held(folder, lock):  # before it was locked another run took it for abandoned
                folder, lock = None, None
        yield folder
    finally:
        if folder is not None:
            try:
                shutil.rmtree(folder, ignore_errors=True)
            except BaseException:  # a signal, even at the first step: it is answered afterwards
                shutil.rmtree(folder, ignore_errors=True)
                raise
        if lock is not None:
            os.close(lock)


def _held(folder: Path, lock: int | None) -> bool:
    if lock is None:
        return os.name == "nt" and folder.is_dir()
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(lock), folder.stat()):
            return True
    os.close(lock)
    return False


def _move(place: Path, path: Path) -> None:
    """Give a finished output its name, and never that of something else that has appeared meanwhile."""
    if place.is_dir():
        place.rename(path)  # fails over a folder that is not empty, and over a file
        return
    try:
        path.hardlink_to(place)  # a rename would replace a file
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise
        place.rename(path)  # a file system without links


def _lock(folder: Path) -> int | None:
    """A handle that holds the folder for as long as this process lives; None if somebody else holds it.

    The lock goes with the process, however it ends, so a scratch folder that can be locked is abandoned.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nothing is ever taken for abandoned there
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def abandoned(path: Path) -> Iterator[list[Path]]:
    """The scratch folders that killed runs for `path` have left, held until the block ends and then removed."""
    held = {}
    for left in sorted(path.absolute().parent.glob(f".{glob.escape(path.name)}.partial-*")):
        with contextlib.suppress(OSError):  # its run may remove it at this moment
            if left.is_dir() and not left.is_symlink() and (lock := _lock(left)) is not None:
                held[left] = lock
    try:
        yield [*held]
    finally:
        for left, lock in held.items():
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def refuse_small_disk(path: Path, nbytes: int) -> Problem | None:
    """A problem if the disk of `path` has less room than is to be written."""
    free = shutil.disk_usage(path.absolute().parent).free
    if free >= nbytes:
        return None
    return Problem("E-SPACE", f"{nbytes:,} bytes are to be written, {free:,} are free", str(path), "free some space")


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
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR) and path.exists():
        what = f"the output {path} has appeared while it was made"
        return Problem("E-EXISTS", what, str(path), "another run? name another output with -o")
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", -1)):
        hint = "free some space, or write to another disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "write to a folder you own"
    return Problem("E-DISK", f"writing failed: {error.strerror or error}", error.filename or str(path), hint)

"""Outputs that appear whole or not at all: written beside their place, flushed to the disk, renamed at the end."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loratool.errors import OutputRefused, Problem

# What at least one file of a folder looks like that --force may take away.
_OURS = re.compile(
    r".*\.(?:safetensors|pt|pth|bin|ckpt|lora|gguf|npz)|(?:adapter_)?config\.json|model_index\.json"
    r"|loratool_receipt\.json|.*\.index\.json"
)
# What no output has, so that a folder with it is somebody's work: a repository, the steps of a training.
_MORE = re.compile(r"\.git|checkpoint-\d+")


def refuse_existing(path: Path, force: bool = False) -> Problem | None:
    """A problem if `path` is taken or its parent is missing; checked in the plan and again before the rename.

    An empty folder takes nothing. With `force` a file or a folder that looks like a model or an adapter is replaced.
    """
    parent = path.absolute().parent
    if path.exists() or path.is_symlink():
        why, replaceable = _kept(path)
        if why and not (force and replaceable):
            hint = (
                "--force replaces it; or name another with -o" if replaceable else "remove it, or name another with -o"
            )
            return Problem("E-EXISTS", f"the output {path} {why}", str(path), hint)
    if not parent.is_dir():
        return Problem("E-EXISTS", f"the folder {parent} does not exist", str(path), "create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        return Problem("E-DISK", f"the folder {parent} is not writable", str(path), "write elsewhere")
    return None


def _kept(path: Path) -> tuple[str, bool]:
    """Why what stands there stays, "" for nothing, and whether --force may replace it."""
    if path.is_symlink():
        return f"is a link to {path.readlink()}", False
    if not path.is_dir():
        return ("exists already", True) if path.is_file() else ("is neither a file nor a folder", False)
    place, here = path.resolve(), Path.cwd()
    if place in (here, *here.parents):
        return "is the folder you are in" if place == here else "holds the folder you are in", False
    home = Path.home().resolve()
    if place in (home, *home.parents):
        return "is your home folder" if place == home else "holds your home folder", False
    if os.path.ismount(place):
        return "is a mount point, which nothing can be renamed over: name a new folder in it", False
    names = [child.name for child in path.iterdir()]
    if others := sorted(name for name in names if _MORE.fullmatch(name)):
        return f"exists already, and is more than an output: it holds {others[0]}", False
    if names and not any(map(_OURS.fullmatch, names)):
        return f"exists already, and holds no model and no adapter (but {min(names)})", False
    return ("exists already", True) if names else ("", True)


@contextlib.contextmanager
def staged(path: Path, force: bool = False) -> Iterator[Path]:
    """A scratch folder beside `path`; what the block makes at the yielded place is renamed to `path` at the end.

    On any exception the folder is removed and `path` is as it was. The yielded place has `path`'s own name inside
    the scratch folder, and is a file or a folder as the block likes. With `force` it replaces what is there.
    """
    if (problem := refuse_existing(path, force)) is not None:
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
            if (problem := refuse_existing(path, force)) is not None:
                raise OutputRefused(problem)
            if force and path.exists():
                _replace(place, path)
                return
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


def _replace(place: Path, path: Path) -> None:
    """Give a finished output the name of an older one, which is gone afterwards; on a failure it has its name again."""
    if place.is_dir() != path.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if _exchanged(place, path):  # at no moment is there neither
        try:
            flush(path.absolute().parent)
        except BaseException:
            _exchanged(place, path)
            raise
        return  # the old one lies in the scratch folder, and goes with it
    shelter = Path(tempfile.mkdtemp(prefix=f".{path.name}.replaced-", dir=path.absolute().parent))
    old = shelter / path.name
    try:
        path.rename(old)  # into a folder that no other run takes for abandoned
        place.rename(path)
        flush(path.absolute().parent)
    except BaseException:
        if old.exists():
            if path.exists():
                path.rename(place)
            old.rename(path)
        shelter.rmdir()
        raise
    shutil.rmtree(shelter, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the system or the file system can not."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


@contextlib.contextmanager
def given_back(path: Path) -> Iterator[None]:
    """A file that the block replaces is what it was, if the block fails after that."""
    if not path.is_file():
        yield
        return
    before, old = path.stat(), path.with_name(f".{path.name}.replaced-{secrets.token_hex(4)}")
    try:
        old.hardlink_to(path)
    except OSError:  # a file system without links
        shutil.copyfile(path, old)
    try:
        yield
    except BaseException:
        if not path.exists() or not os.path.samestat(before, path.stat()):
            old.replace(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # by now all is done
            old.unlink(missing_ok=True)


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

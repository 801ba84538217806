"""What an output may be called: one rule for every verb.

A name that ends like a weights file is a file, any other name a folder. A suffix that the format can not have is
refused, and so is what would lie in an input, or hold one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from loratool import staging
from loratool.checkpoint import OTHER_SUFFIXES, PICKLE_SUFFIXES
from loratool.errors import OutputRefused, Problem

SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, *OTHER_SUFFIXES)  # of files that hold weights
NATIVE = "a native adapter"


PICKLES = (".pth", ".pt", ".bin")  # that merge and unmerge can write again


def is_pickle(path: Path) -> bool:
    """Whether a name is that of a pickled state dict."""
    return path.name.lower().endswith(PICKLES)


def is_file(out: Path) -> bool:
    """Whether an output of this name is a file."""
    return out.name.lower().endswith(SUFFIXES)


def problems(
    out: Path, what: str, suffixes: tuple[str, ...], folder: bool, *, force: bool, inputs: Iterable[Path] = ()
) -> Iterator[Problem]:
    """Why `what`, a file with one of `suffixes` or with `folder` also a folder, can not be written under this name."""
    if is_file(out):
        if not out.name.endswith(suffixes):
            known = f"one file, NAME{suffixes[0]}" if suffixes and not folder else "a folder"
            if suffixes and folder:
                known += f", or one file, NAME{suffixes[0]}"
            yield Problem("E-OUTPUT", f"{out.name}: {what} is {known}", str(out), _better(out, suffixes))
        elif out.is_dir():
            yield Problem("E-EXISTS", f"{out} is a folder, and the output is a file", str(out), "name another with -o")
            return
    elif not folder:
        what = f"{out.name}: {what} is one file, whose name ends in {' or '.join(suffixes)}"
        yield Problem("E-OUTPUT", what, str(out), f"say -o {out.name}{suffixes[0]}")
    elif out.is_file():
        yield Problem("E-EXISTS", f"{out} is a file, and the output is a folder", str(out), "name another with -o")
        return
    if (problem := staging.refuse_existing(out, force)) is not None:
        yield problem
    elif force and out.exists():
        place = out.resolve()
        if held := [path for path in inputs if place in (path.resolve(), *path.resolve().parents)]:
            hint = "write elsewhere, and move it afterwards"
            yield Problem("E-EXISTS", f"--force would replace {held[0]}, which is read", str(out), hint)


def refuse(*found: Iterable[Problem]) -> None:
    """Raises OutputRefused with all of the problems, if there are any."""
    if problems := [problem for each in found for problem in each]:
        raise OutputRefused(problems)


def _better(out: Path, suffixes: tuple[str, ...]) -> str:
    stem = out.name.removesuffix(next(suffix for suffix in SUFFIXES if out.name.lower().endswith(suffix)))
    return f"say -o {stem or 'NAME'}{suffixes[0] if suffixes else ''}"

"""What an output may be called: one rule for every verb.

A name that ends like a weights file is a file, any other name a folder. A suffix that the format can not have is
refused, and so is what would lie in an input, or hold one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from loratool import staging
from loratool.checkpoint import WEIGHT_SUFFIXES
from loratool.errors import OutputRefused, Problem
from loratool.tensors import FileState

SUFFIXES = WEIGHT_SUFFIXES  # of files that hold weights, whoever reads them
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
        yield from replaced_inputs(out, inputs)


def replaced_inputs(out: Path, inputs: Iterable[Path]) -> Iterator[Problem]:
    """A problem where an output that is replaced is an input, holds one, or is a part of one."""
    place, hint = out.resolve(), "write elsewhere, and move it afterwards"
    for path in inputs:
        found = path.resolve()
        if place in (found, *found.parents):
            yield Problem("E-EXISTS", f"--force would replace {path}, which is read", str(out), hint)
            return
        if found.is_dir() and found in place.parents:
            yield Problem("E-EXISTS", f"--force would replace a part of {path}, which is read", str(out), hint)
            return


def refuse_replaced(out: Path, states: Iterable[FileState]) -> None:
    """Raises OutputRefused where a file that is read lies in an output that is replaced, whatever way led to it."""
    if out.exists():
        refuse(replaced_inputs(out, (state.path for state in states)))


def place(out: str | Path) -> Path:
    """The path that a caller names. Raises OutputRefused for a file's name with a slash behind it."""
    path = Path(out)
    if isinstance(out, str) and out.endswith("/") and is_file(path):
        what = f"{out} is a folder's name by its slash, and a file's by its suffix"
        raise OutputRefused(Problem("E-OUTPUT", what, str(path), "leave out one of them"))
    return path


def refuse(*found: Iterable[Problem]) -> None:
    """Raises OutputRefused with all of the problems, if there are any."""
    if problems := [problem for each in found for problem in each]:
        raise OutputRefused(problems)


def _better(out: Path, suffixes: tuple[str, ...]) -> str:
    stem = out.name.removesuffix(next(suffix for suffix in SUFFIXES if out.name.lower().endswith(suffix)))
    return f"say -o {stem or 'NAME'}{suffixes[0] if suffixes else ''}"

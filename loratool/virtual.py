"""Merged on read: base + adapters with the interface of `safetensors.safe_open`, and nothing written.

A tensor, or the part of it that is asked for, is computed when it is asked for: out of the same blocks as a merge, by
workers with one torch thread each, and so to the same bits as a merged folder has. What an adapter does not touch is
read from its place in the base. Beside what is asked for, a worker holds a block, the factors, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter
from loratool.changes import fitted
from loratool.conventions.choices import Choices
from loratool.errors import Closed, Mismatch, NoSuchTensor, Problem
from loratool.layout import OutputFile, names_clash, output_files
from loratool.ondemand import Engine, Entry
from loratool.slicing import box
from loratool.workers import worker_count

if TYPE_CHECKING:
    import torch


class MergedSlice:
    """One tensor of a merged checkpoint; an index computes what it asks for. As `safe_open(...).get_slice(name)`."""

    def __init__(self, entry: Entry, engine: Engine) -> None:
        self._entry, self._engine = entry, engine

    def get_shape(self) -> list[int]:
        return [*self._entry.shape]

    def get_dtype(self) -> str:
        """The name that a safetensors header has for it, such as "BF16"."""
        return self._entry.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """What the same index gives on the whole tensor, on the CPU.

        Numbers, slices, `...` and None, alone or in a tuple, compute only the rows and keep only the columns that they
        ask for; what else torch takes is applied to the whole tensor. Raises what torch raises for a wrong index.
        """
        import torch

        entry = self._entry
        self._engine.refuse_closed()
        torch.empty(entry.shape, dtype=self._engine.dtype(entry), device="meta")[index]  # wrong ones end here
        part = box(index, entry.shape)
        result: torch.Tensor = self._engine.read(entry, part.bounds)[part.index]
        return result


class MergedFile:
    """One file of a merged checkpoint that is not written: `keys`, `get_tensor`, `get_slice`, `metadata`, `with`.

    As `safetensors.safe_open(path, "pt")` of the merged file. All tensors are on the CPU, in memory of their own.
    Safe to use from several threads.

    Raises NoSuchTensor (also a KeyError) for a wrong name, Closed (also a ValueError) after it was closed, InvalidFile
    with E-CHANGED if the base or an adapter is another file by now, and Mismatch where a merge would not be finite.
    """

    def __init__(self, entries: Mapping[str, Entry], metadata: Mapping[str, str], engine: Engine, path: str) -> None:
        self._entries, self._metadata, self._engine, self._path = entries, metadata, engine, path
        self._open = True

    def keys(self) -> list[str]:
        """The names of its tensors, sorted."""
        return sorted(self.offset_keys())

    def offset_keys(self) -> list[str]:
        """The names of its tensors, in the order of their bytes."""
        self._refuse_closed()
        return [*self._entries]

    def metadata(self) -> dict[str, str] | None:
        self._refuse_closed()
        return dict(self._metadata) or None

    def get_tensor(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor, computed now: into `out`, if that is given, which saves a copy and the memory for it.

        `out` is contiguous, on the CPU, and of the tensor's shape and dtype. What it holds after an error is undefined.
        """
        entry = self._entry(name)
        return self._engine.read(entry, tuple((0, size) for size in entry.shape), out)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, in memory at once."""
        return {name: self.get_tensor(name) for name in self.offset_keys()}

    def get_slice(self, name: str) -> MergedSlice:
        """A tensor of which nothing is computed yet: index it."""
        return MergedSlice(self._entry(name), self._engine)

    def close(self) -> None:
        """Nothing more can be asked of it. What was computed stays with those who have it."""
        self._open = False

    def __enter__(self) -> MergedFile:
        self._refuse_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_closed(self) -> None:
        if not self._open:
            raise Closed(Problem("E-CLOSED", "it was closed", self._path, "open it again"))
        self._engine.refuse_closed()

    def _entry(self, name: str) -> Entry:
        self._refuse_closed()
        try:
            return self._entries[name]
        except KeyError:
            what = f"there is no tensor {name!r:.200}"
            raise NoSuchTensor(Problem("E-NAMES", what, self._path, "`keys()` lists all names")) from None


class MergedFolder(MergedFile):
    """A merged checkpoint that is not written: all its tensors together, and each of its files.

    Names are those of the merged files; of a pipeline, COMPONENT.TENSOR. `metadata` is that of all files together.
    """

    def __init__(self, files: Sequence[OutputFile], notes: Sequence[str], engine: Engine, path: Path) -> None:
        self.notes = tuple(notes)
        self._files = {file.name: _entries(file) for file in files if file.made_of}
        self._metadatas = {file.name: file.metadata for file in files}
        entries: dict[str, Entry] = {}
        for name, contents in self._files.items():
            component = f"{name.rpartition('/')[0]}." if "/" in name else ""
            entries |= {f"{component}{tensor}": entry for tensor, entry in contents.items()}
        metadata = {key: value for found in self._metadatas.values() for key, value in found.items()}
        super().__init__(entries, metadata, engine, str(path))

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the merged files, relative to their folder."""
        return tuple(self._files)

    def open_shard(self, name: str) -> MergedFile:
        """One of `files`. It can be closed alone, and is closed with the folder."""
        self._refuse_closed()
        if name not in self._files:
            what = f"there is no file {name!r:.200}: there are {', '.join(self._files)}"
            raise NoSuchTensor(Problem("E-MISSING", what, self._path))
        return MergedFile(self._files[name], self._metadatas[name], self._engine, f"{self._path} ({name})")

    def close(self) -> None:
        """As of a file; also ends its workers."""
        super().close()
        self._engine.close()

    def __enter__(self) -> MergedFolder:
        self._refuse_closed()
        return self


def _entries(file: OutputFile) -> dict[str, Entry]:
    both = zip(file.tensors, file.made_of, strict=True)
    return {name: Entry(name, dtype, shape, made_of) for (name, dtype, shape), made_of in both}


def open_virtual(
    base: Path,
    adapters: Sequence[tuple[Path | Adapter, float]],
    *,
    dtype: str,
    allow_new: bool,
    choices: Choices,
    reproducible: bool,
    threads: int | None,
) -> MergedFolder:
    """Bind adapters to a base, and lay out what a merge would write. Raises what a merge would raise."""
    count = worker_count(threads)
    fit = fitted(base, adapters, dtype, choices, allow_new)
    if problems := [*names_clash(fit.base), *fit.problems]:
        raise Mismatch(problems)
    dropped = frozenset(ref.name for ref in fit.dropped)
    files = output_files(fit.base, fit.changes, fit.additions, dropped)
    return MergedFolder(files, fit.notes, Engine(count, reproducible, str(base)), base)


def each_tensor(merged: MergedFolder) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors by name, in the order of the files and of their bytes. Closes the folder at the end."""
    with merged:
        for name in merged.offset_keys():
            yield name, merged.get_tensor(name)

"""What a writer hands over: files that are not written yet, one class per container. `convert.py` puts them on disk.

Tensors stay references until their file is written, one after the other: an adapter of a gigabyte needs the memory of
its largest tensor (a pickle needs all of it).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from loratool import gguf
from loratool.container import canonical_order, encode_header
from loratool.tensors import TensorRef


class Content(Protocol):
    """One file. A new container is one class here: its size beforehand, and its bytes."""

    @property
    def nbytes(self) -> int: ...  # about: for the check of free space

    def write(self, file: BinaryIO) -> None: ...


@dataclass(frozen=True)
class Safetensors:
    """Named tensors and string metadata, laid out canonically: the same content gives the same bytes."""

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return len(self._header()) + sum(ref.nbytes for ref in self.tensors.values())

    def write(self, file: BinaryIO) -> None:
        file.write(self._header())
        for name in self._order():
            for chunk in self.tensors[name].chunks():
                file.write(chunk)

    def _order(self) -> list[str]:
        return [*canonical_order((name, ref.dtype) for name, ref in self.tensors.items())]

    def _header(self) -> bytes:
        ordered = ((name, self.tensors[name].dtype, self.tensors[name].shape) for name in self._order())
        return encode_header(ordered, self.metadata)


@dataclass(frozen=True)
class Gguf:
    """Named tensors and keys for llama.cpp, in the order given: strings, numbers as float32, lists as uint32."""

    tensors: Mapping[str, TensorRef]
    keys: Mapping[str, gguf.Key]

    @property
    def nbytes(self) -> int:
        tensors = (ref.nbytes + len(gguf.padding(ref.nbytes)) for ref in self.tensors.values())
        return len(gguf.encode_header(self.keys, self.tensors)) + sum(tensors)

    def write(self, file: BinaryIO) -> None:
        file.write(gguf.encode_header(self.keys, self.tensors))
        for ref in self.tensors.values():
            for chunk in ref.chunks():
                file.write(chunk)
            file.write(gguf.padding(ref.nbytes))


@dataclass(frozen=True)
class Plain:
    """Bytes as they are: YAML, text, anything small."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def write(self, file: BinaryIO) -> None:
        file.write(self.data)


@dataclass(frozen=True)
class Copied:
    """A file of the base's, taken over as it is."""

    path: Path

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    def write(self, file: BinaryIO) -> None:
        with self.path.open("rb") as source:
            shutil.copyfileobj(source, file)


@dataclass(frozen=True)
class Pickle:
    """A tree of dicts for `torch.load`, with tensors at its leaves; `weights_only=True` reads it.

    Written in one go, with all tensors in memory.
    """

    tree: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return 4096 + _bytes_of(self.tree)

    def write(self, file: BinaryIO) -> None:
        import torch

        torch.save(_read(self.tree), file)


def _bytes_of(tree: object) -> int:
    if isinstance(tree, Mapping):
        return sum(256 + _bytes_of(child) for child in tree.values())  # 256: an entry of the archive
    return tree.nbytes if isinstance(tree, TensorRef) else 0


def _read(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _read(child) for key, child in tree.items()}
    return tree.read().contiguous() if isinstance(tree, TensorRef) else tree


def document(content: Mapping[str, Any]) -> Plain:
    """A JSON file, indented, in the order given."""
    return Plain((json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class Bundle:
    """All that an adapter is in one convention: a single file, or a folder of files by their relative paths.

    `notes` says what a user should know: what was folded, and which consumers will not take it. `targets` are the
    tensors that the convention's own reader finds in it without a base, where these are not called as in the adapter.
    `parts` are the same by folder, where each folder is an adapter of its own.
    """

    content: Content | Mapping[str, Content]
    notes: tuple[str, ...] = ()
    targets: frozenset[str] | None = None
    parts: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def files(self) -> Mapping[str, Content]:
        """The files of a folder by path; a single file is called "", being the output itself."""
        return self.content if isinstance(self.content, Mapping) else {"": self.content}

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

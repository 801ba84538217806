"""What a writer hands over: files that are not written yet, one class per container. `convert.py` puts them on disk.

Tensors stay references until their file is written, one after the other: an adapter of a gigabyte needs the memory of
its largest tensor (a pickle needs all of it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from loratool.container import canonical_order, encode_header
from loratool.tensors import TensorRef


class Content(Protocol):
    """One file. A new container is one class here: its size beforehand, its bytes, and the suffixes it goes by."""

    @property
    def suffixes(self) -> tuple[str, ...]: ...  # of its name; () for any

    @property
    def nbytes(self) -> int: ...  # about: for the check of free space

    def write(self, file: BinaryIO) -> None: ...


@dataclass(frozen=True)
class Safetensors:
    """Named tensors and string metadata, laid out canonically: the same content gives the same bytes."""

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str] = field(default_factory=dict)
    suffixes: tuple[str, ...] = (".safetensors",)

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
class Plain:
    """Bytes as they are: YAML, text, anything small."""

    data: bytes
    suffixes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def write(self, file: BinaryIO) -> None:
        file.write(self.data)


def document(content: Mapping[str, Any]) -> Plain:
    """A JSON file, indented, in the order given."""
    return Plain((json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(), (".json",))


@dataclass(frozen=True)
class Bundle:
    """All that an adapter is in one convention: a single file, or a folder of files by their relative paths.

    `notes` says what a user should know: what was folded, and which consumers will not take it.
    """

    content: Content | Mapping[str, Content]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> Mapping[str, Content]:
        """The files of a folder by path; a single file is called "", being the output itself."""
        return self.content if isinstance(self.content, Mapping) else {"": self.content}

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

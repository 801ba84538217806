"""The receipt of a merge: what went into what. It proves an unmerge, and stops a second merge of the same base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from loratool import archives
from loratool.checkpoint import Checkpoint, read_json
from loratool.container import strict_json
from loratool.errors import InvalidFile, Problem, Unsupported
from loratool.tensors import DTYPE_BITS

FILE_NAME = "loratool_receipt.json"  # beside a folder's weights
METADATA_KEY = archives.RECEIPT  # in the header of a single file
FORMAT_NAME = "loratool-receipt"
VERSION = "1.0"
MAX_STAGES = 10  # merges one on top of the other: a receipt is JSON, whose depth is bounded
FORMULA = "W' = round(replaced(W) + sum of weight * scale * delta), DoRA: magnitude * V / ||V||"


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter of a merge: its content digest, its weight, and what it was called."""

    digest: str
    weight: float
    name: str
    updates: int


@dataclass(frozen=True)
class ChangedTensor:
    """One tensor that the merge changed: digests, dtypes and shapes before and after; `base` is None for a new one.

    Digests are "" where the merge was told to leave them out.

    `reversible` is false where the change can not be computed backwards (replacements, DoRA).
    """

    merged: str
    dtype: str
    shape: tuple[int, ...]
    base: str | None
    base_dtype: str
    base_shape: tuple[int, ...]
    reversible: bool
    targets: tuple[str, ...] = ()  # what the adapters call it


@dataclass(frozen=True)
class Replaced:
    """A file beside the weights that is not the base's any more.

    `digest` is that of the base's file, None if the base had none. `now` is the file that stands for it, with the
    digest `merged`; None if there is none. `text` is the base's file itself, where it is small and a text.
    """

    digest: str | None
    now: str | None
    merged: str | None
    text: str | None = None


@dataclass(frozen=True)
class Receipt:
    """What one merge did. `previous` is the receipt of the base, where that was itself the result of a merge."""

    tool: str
    dtype: str
    adapters: tuple[MergedAdapter, ...]
    tensors: Mapping[str, ChangedTensor] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)  # digests of what only the base has: scales, mostly
    replaced: Mapping[str, Replaced] = field(default_factory=dict)  # by the name of the base's file
    previous: Receipt | None = None

    def to_json(self) -> dict[str, Any]:
        document = self._content()
        return {**document, "digest": _digest(document)}

    @property
    def stages(self) -> tuple[Receipt, ...]:
        """The merges one after the other, the first one first; this one last."""
        return (*(self.previous.stages if self.previous else ()), self)

    @property
    def digest(self) -> str:
        """What an undo record names its merge by."""
        return _digest(self._content())

    def _content(self) -> dict[str, Any]:
        previous = {"previous": self.previous.to_json()} if self.previous else {}
        dropped = {"dropped": dict(sorted(self.dropped.items()))} if self.dropped else {}
        files = {name: vars(file) for name, file in sorted(self.replaced.items())}
        return {
            **dropped,
            **previous,
            **({"replaced": files} if files else {}),
            "format": FORMAT_NAME,
            "version": VERSION,
            "tool": self.tool,
            "formula": FORMULA,
            "dtype": self.dtype,
            "adapters": [vars(adapter) for adapter in self.adapters],
            "tensors": {
                name: {**vars(t), "shape": list(t.shape), "base_shape": list(t.base_shape), "targets": list(t.targets)}
                for name, t in sorted(self.tensors.items())
            },
        }

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"


def find(checkpoint: Checkpoint) -> Receipt | None:
    """The receipt of a merged checkpoint, or None if it is not one. Raises InvalidFile for a broken receipt."""
    if checkpoint.path.is_dir():
        path = checkpoint.path / FILE_NAME
        return _parse(read_json(path), path) if path.is_file() else None
    text = checkpoint.metadata.get(METADATA_KEY)
    return None if text is None else _parse(strict_json(text, str(checkpoint.path), "E-RECEIPT", ""), checkpoint.path)


def _digest(content: Mapping[str, Any]) -> str:
    """BLAKE3 of a receipt's content: an edited receipt would have an unmerge restore the wrong thing."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"blake3:{blake3(text.encode()).hexdigest()}"


def _parse(document: Any, path: Path, stages: int = 1) -> Receipt:
    try:
        if stages > MAX_STAGES:
            raise ValueError(f"more than {MAX_STAGES} merges one after the other")
        if not isinstance(document, dict) or document.pop("digest", None) != _digest(document):
            raise ValueError("its own digest is another one")
        if document["format"] != FORMAT_NAME:
            raise KeyError("format")
        if not str(document["version"]).startswith("1."):
            raise Unsupported(
                Problem("E-VERSION", f"receipt version {document['version']}", str(path), "install a newer loratool")
            )
        adapters = tuple(
            MergedAdapter(str(a["digest"]), _weight(a["weight"]), str(a["name"]), int(a["updates"]))
            for a in document["adapters"]
        )
        tensors = {
            str(name): ChangedTensor(
                str(t["merged"]), _dtype(t["dtype"]), _shape(t["shape"]),
                None if t["base"] is None else str(t["base"]), _dtype(t["base_dtype"]), _shape(t["base_shape"]),
                bool(t["reversible"]),
                tuple(map(str, t["targets"])),
            )
            for name, t in document["tensors"].items()
        }  # fmt: skip
        dropped = {str(name): str(digest) for name, digest in document.get("dropped", {}).items()}
        replaced = {
            _file(name): Replaced(
                _text(file["digest"]), None if file["now"] is None else _file(file["now"]), _text(file["merged"]),
                _text(file["text"]),
            )
            for name, file in document.get("replaced", {}).items()
        }  # fmt: skip
        before = _parse(document["previous"], path, stages + 1) if "previous" in document else None
        return Receipt(str(document["tool"]), str(document["dtype"]), adapters, tensors, dropped, replaced, before)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidFile(
            Problem(
                "E-RECEIPT",
                f"the merge receipt is broken: {error}",
                str(path),
                "restore the file, or merge again from the base",
            )
        ) from None


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**1000:
        raise ValueError(f"weight {value!r}")
    return float(value)


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is no text")
    return value


def _file(value: object) -> str:
    """A name relative to the folder of the receipt, that leads to nowhere else."""
    parts = value.split("/") if isinstance(value, str) else []
    if not parts or any(part in ("", ".", "..") or re.search(r"[\\\\:\x00]", part) for part in parts):
        raise ValueError(f"{value!r:.80} is no name of a file in the folder")
    return "/".join(parts)


def _dtype(value: object) -> str:
    if value not in DTYPE_BITS:
        raise ValueError(f"dtype {value!r}")
    return str(value)


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(dim, int) and dim >= 0 for dim in value):
        raise ValueError(f"shape {value!r}")
    return tuple(value)

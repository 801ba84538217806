"""The safetensors container: a header is parsed as an untrusted document, and written canonically.

The safetensors library accepts duplicate names and cannot list a header without its data; a format that people
trust needs the strict reading of ``spec/FORMAT.md`` (rules R-001 to R-006), so the 8 bytes, the JSON and the tiling
are checked here, once, for native adapters and foreign checkpoints alike.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import InvalidFile, Problem
from loratool.tensors import DTYPE_BITS, FileSpan, FileState, Shape, TensorRef, is_int, reading

MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_DEPTH = 16
MAX_DIM = 2**53


@dataclass(frozen=True)
class Header:
    """A parsed safetensors header. `tensors` is in order of data offset; `size` counts the 8 length bytes."""

    path: Path
    size: int
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    file_size: int
    text: str


class _Duplicate(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Duplicate(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def _whole(text: str) -> int:
    if len(text) > 300:  # beyond any double, and slow to read
        raise ValueError(f"{text:.30}... is larger than any double")
    return int(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _depth(document: Any) -> int:
    """How deep lists and objects are nested; without recursion, since the document is not trusted."""
    deep, level = 0, [document]
    while level := [value for value in level if isinstance(value, (dict, list))]:
        deep += 1
        level = [child for value in level for child in (value.values() if isinstance(value, dict) else value)]
    return deep


def strict_json(text: str, where: str, code: str, rule: str) -> Any:
    """Parse JSON: duplicate names, NaN, surrogates and deep nesting are errors, reported under `code` and `rule`."""
    too_deep = Problem("E-LIMIT", f"JSON is nested deeper than {MAX_DEPTH} levels", where, rule=rule)
    try:
        document = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=_whole)
        if "\\u" in text:  # the only way to a lone surrogate, which can not be encoded
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except _Duplicate as error:
        raise InvalidFile(
            Problem("E-DUPLICATE", f"the name {str(error)!r} occurs twice in one JSON object", where, rule="R-003")
        ) from None
    except RecursionError:
        raise InvalidFile(too_deep) from None
    except ValueError as error:
        raise InvalidFile(Problem(code, f"not valid JSON: {error}", where, rule=rule)) from None
    if _depth(document) > MAX_DEPTH:
        raise InvalidFile(too_deep)
    return document


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(is_int(dim) and 0 <= dim <= MAX_DIM for dim in value)


def read_header(path: Path) -> Header:
    """Parse and check the header of a safetensors file. Raises InvalidFile with every problem found."""
    where = str(path)
    with reading(path), path.open("rb") as file:
        state = FileState.noted(path, os.fstat(file.fileno()))
        file_size = state.size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= MAX_HEADER or 8 + length > file_size:
            raise InvalidFile(
                Problem(
                    "E-HEADER",
                    f"not a safetensors file: its first 8 bytes promise a header of {length:,} bytes, the file"
                    f" has {file_size:,}",
                    where,
                    "truncated download, or another format?",
                    "R-001",
                )
            )
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFile(Problem("E-HEADER", f"header is not UTF-8: {error}", where, rule="R-002")) from None
    document = strict_json(text, where, "E-HEADER", "R-002")
    if not isinstance(document, dict) or not text.startswith("{") or not text.rstrip(" ").endswith("}"):
        raise InvalidFile(Problem("E-HEADER", "header is not a JSON object", where, rule="R-002"))
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the safetensors library reads null so
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidFile(Problem("E-HEADER", "`__metadata__` is not an object of strings", where, rule="R-004"))
    tensors = _tensors(state, document, 8 + length, file_size - 8 - length)
    return Header(path, 8 + length, tensors, metadata, file_size, text)


def _tensors(state: FileState, document: Mapping[str, Any], start: int, data_size: int) -> dict[str, TensorRef]:
    """Check every entry and the tiling; return references in order of offset."""
    path = state.path
    problems = [
        problem for name, entry in document.items() if (problem := _check_entry(name, entry, str(path))) is not None
    ]
    if problems:
        raise InvalidFile(problems)
    position = 0
    tensors = {}
    for name, entry in sorted(document.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, end = entry["data_offsets"]
        if begin != position:
            raise InvalidFile(
                Problem(
                    "E-LAYOUT",
                    f"tensor {name!r} begins at byte {begin:,} of the data, the previous one ends at"
                    f" {position:,}: {'overlap' if begin < position else 'a hole'}",
                    str(path),
                    rule="R-006",
                )
            )
        position = end
        shape = tuple(entry["shape"])
        tensors[name] = TensorRef(name, entry["dtype"], shape, FileSpan(path, start + begin, state), shape)
    if position != data_size:
        what = "the file is truncated" if data_size < position else "bytes are left over"
        raise InvalidFile(
            Problem(
                "E-LAYOUT",
                f"tensors end at byte {position:,} of the data, the data has {data_size:,} bytes: {what}",
                str(path),
                rule="R-006",
            )
        )
    return tensors


def _check_entry(name: str, entry: Any, where: str) -> Problem | None:
    if not (
        isinstance(entry, dict)
        and entry.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["dtype"], str)
        and _is_shape(entry["shape"])
        and _is_shape(entry["data_offsets"])
        and len(entry["data_offsets"]) == 2
    ):
        return Problem(
            "E-HEADER", f"entry of tensor {name!r} needs dtype, shape and two data_offsets", where, rule="R-004"
        )
    bits = DTYPE_BITS.get(entry["dtype"])
    if bits is None:
        return Problem("E-TENSOR", f"tensor {name!r} has the unknown dtype {entry['dtype']!r}", where, rule="R-005")
    begin, end = entry["data_offsets"]
    expected = math.prod(entry["shape"]) * bits
    if (end - begin) * 8 != expected:
        return Problem(
            "E-TENSOR",
            f"tensor {name!r:.200} of {entry['dtype']} {entry['shape']!s:.80} needs {(expected + 7) // 8:,} bytes, its"
            f" offsets hold {end - begin:,}",
            where,
            rule="R-005",
        )
    return None


def encode_header(tensors: Iterable[tuple[str, str, Shape]], metadata: Mapping[str, str]) -> bytes:
    """The canonical header (rule R-051) of tensors laid end to end in the given order: (name, dtype, shape)."""
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def canonical_order(tensors: Iterable[tuple[str, str]]) -> Sequence[str]:
    """Names in canonical data order (rule R-052), from (name, dtype) pairs: widest elements first, then by name."""
    return [name for name, dtype in sorted(tensors, key=lambda item: (-DTYPE_BITS[item[1]], item[0]))]

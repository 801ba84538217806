"""The GGUF container of llama.cpp, as far as LoRA adapters use it: its header, parsed as an untrusted document, and
written.

    "GGUF"  u32 version  u64 tensors  u64 keys
    keys:     string name, u32 type, value        (a string is a u64 length and UTF-8)
    tensors:  string name, u32 dimensions, u64 each (fastest first), u32 type, u64 offset
    padding to `general.alignment`, data

Every length is compared with what is left of the file before anything of that size is read. Models are told by their
first keys and refused: a merge writes the safetensors base, which llama.cpp converts.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from loratool.errors import InvalidFile, Problem, Unsupported
from loratool.tensors import CHUNK, DTYPE_BITS, Data, FileSpan, FileState, Shape, TensorRef, as_bytes, reading

if TYPE_CHECKING:
    import torch

MAX_HEADER = 1 << 25  # bytes; an adapter's header has no vocabulary in it
MAX_DIMS = 4  # ggml's own limit
MAX_NAME = 1024
INVOCATION = "adapter.alora.invocation_tokens"  # the one array that an adapter's meaning hangs on
ALIGNMENT = 32  # of tensors that are written: what a reader expects where no key says another

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _U32, _F32 = 8, 9, 4, 6

# ggml's tensor types. Q8_0 is the one block format that the converter of adapters writes.
_DTYPES = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_Q8_0, _Q8_BLOCK, _Q8_BYTES = 8, 32, 34


class Gguf(NamedTuple):
    """Keys as text (an array is only counted), and tensors with the dimensions of NumPy, slowest first."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorRef]


@dataclass(frozen=True)
class Q8Span:
    """Blocks of 32 numbers, each one float16 scale and 32 signed bytes, read as float32: their product is exact."""

    span: FileSpan

    @property
    def path(self) -> Path:
        return self.span.path

    @property
    def states(self) -> tuple[FileState, ...]:
        return self.span.states

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        import torch

        blocks = math.prod(shape) // _Q8_BLOCK
        raw = self.span.load("U8", (blocks, _Q8_BYTES))
        scale = raw[:, :2].contiguous().view(torch.float16).float()  # [blocks, 1]
        values = raw[:, 2:].contiguous().view(torch.int8).float()  # [blocks, 32]
        return (scale * values).reshape(shape)

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        data = as_bytes(self.load(dtype, shape))
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


def read_gguf(path: Path) -> Gguf:
    """Header of an adapter in GGUF. Raises InvalidFile for a broken one, Unsupported for a model."""
    with reading(path), path.open("rb") as file:
        state = FileState.noted(path, os.fstat(file.fileno()))
        cursor = _Cursor(file, state.size, str(path))
        tensor_count = _prelude(cursor)
        metadata = _keys(cursor, cursor.number("<Q"))
        if metadata.get("general.type") != "adapter":
            raise _not_an_adapter(cursor.where)
        entries = _entries(cursor, tensor_count)
    alignment = _alignment(metadata, cursor)
    start = -(-cursor.position // alignment) * alignment
    return Gguf(metadata, _tensors(state, entries, start, alignment, cursor))


@dataclass
class _Cursor:
    """A place in a file, which never asks for more than there is."""

    file: BinaryIO
    size: int
    where: str
    position: int = 0
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        self.limit = min(self.size, MAX_HEADER)

    def fail(self, what: str, code: str = "E-HEADER") -> InvalidFile:
        return InvalidFile(Problem(code, what, self.where, "truncated download, or another format?"))

    def need(self, count: int) -> None:
        if count > self.limit - self.position:
            raise self.fail(
                f"its header asks for {count:,} bytes at byte {self.position:,}; the file has {self.size:,} and a"
                f" header at most {MAX_HEADER:,}"
            )

    def bytes(self, count: int) -> bytes:
        self.need(count)
        raw = self.file.read(count)
        if len(raw) < count:
            raise self.fail("the file became shorter while it was read", "E-CHANGED")
        self.position += count
        return raw

    def skip(self, count: int) -> None:
        self.need(count)
        self.file.seek(count, os.SEEK_CUR)
        self.position += count

    def number(self, code: str) -> int:
        (value,) = struct.unpack(code, self.bytes(struct.calcsize(code)))
        return int(value)

    def text(self, limit: int = MAX_HEADER) -> str:
        size = self.number("<Q")
        if size > limit:
            raise self.fail(f"a name has {size:,} bytes")
        try:
            return self.bytes(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"text in its header is not UTF-8: {error}") from None


def _prelude(cursor: _Cursor) -> int:
    """Magic and version; the number of tensors."""
    if cursor.size < 24 or cursor.bytes(4) != b"GGUF":
        raise cursor.fail("not a GGUF file: it does not begin with GGUF")
    version = cursor.number("<I")
    if version not in (2, 3):
        swapped = version and not version % (1 << 24)
        what = "it is big-endian" if swapped else f"its version is {version}, 2 and 3 are read"
        raise Unsupported(Problem("E-UNSUPPORTED", what, cursor.where, "convert the adapter again"))
    return cursor.number("<Q")


def _keys(cursor: _Cursor, count: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for _ in range(count):
        name = cursor.text(MAX_NAME)
        kind = cursor.number("<I")
        value = _integers(cursor, kind) if name == INVOCATION else _value(cursor, kind)
        if name in found:
            raise cursor.fail(f"the key {name!r} occurs twice", "E-DUPLICATE")
        if name == "general.type" and value != "adapter":
            raise _not_an_adapter(cursor.where)  # before the vocabulary of a model is walked through
        found[name] = value
    return found


def _integers(cursor: _Cursor, kind: int) -> str:
    """A list of integers, as JSON writes it."""
    item, count = (cursor.number("<I"), cursor.number("<Q")) if kind == _ARRAY else (0, 0)
    code = _SCALARS.get(item, "")
    if kind != _ARRAY or code[-1:] not in {*"BbHhIiQq"}:
        raise cursor.fail("a list of token numbers is none")
    cursor.need(count * struct.calcsize(code))
    return str([cursor.number(code) for _ in range(count)])


def _value(cursor: _Cursor, kind: int) -> str:
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        (value,) = struct.unpack(_SCALARS[kind], cursor.bytes(struct.calcsize(_SCALARS[kind])))
        return repr(value)
    if kind != _ARRAY:
        raise cursor.fail(f"a key has the unknown type {kind}")
    item, count = cursor.number("<I"), cursor.number("<Q")
    if item in _SCALARS:
        cursor.skip(count * struct.calcsize(_SCALARS[item]))
    elif item == _STRING:
        for _ in range(count):  # each takes 8 bytes at least, so the file's end stops it
            cursor.skip(cursor.number("<Q"))
    else:
        raise cursor.fail(f"an array of type {item}: arrays of arrays are not read")
    return f"[{count} values]"


class _Entry(NamedTuple):
    name: str
    shape: Shape
    kind: int
    offset: int


def _entries(cursor: _Cursor, count: int) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for _ in range(count):
        name = cursor.text(MAX_NAME)
        dims = cursor.number("<I")
        if dims > MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} has {dims} dimensions", "E-TENSOR")
        shape = tuple(cursor.number("<Q") for _ in range(dims))[::-1]
        if name in found:
            raise cursor.fail(f"the tensor {name!r} occurs twice", "E-DUPLICATE")
        found[name] = _Entry(name, shape, cursor.number("<I"), cursor.number("<Q"))
    return found


def _alignment(metadata: Mapping[str, str], cursor: _Cursor) -> int:
    text = metadata.get("general.alignment", "32")
    if not text.isdecimal() or not 0 < int(text) <= 1 << 20 or int(text) & (int(text) - 1):
        raise cursor.fail(f"general.alignment is {text:.40}, not a power of two")
    return int(text)


def _tensors(
    state: FileState, entries: Mapping[str, _Entry], start: int, alignment: int, cursor: _Cursor
) -> dict[str, TensorRef]:
    found: dict[str, TensorRef] = {}
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        dtype, nbytes = _stored(entry, cursor)
        if entry.offset < position or entry.offset % alignment or start + entry.offset + nbytes > cursor.size:
            what = (
                f"tensor {entry.name!r} claims {nbytes:,} bytes at {entry.offset:,} of the data: outside it, over"
                " another tensor, or not aligned"
            )
            raise cursor.fail(what, "E-LAYOUT")
        position = entry.offset + nbytes
        span = FileSpan(state.path, start + entry.offset, state)
        data: Data = Q8Span(span) if entry.kind == _Q8_0 else span
        found[entry.name] = TensorRef(entry.name, dtype, entry.shape, data, entry.shape)
    return found


def _stored(entry: _Entry, cursor: _Cursor) -> tuple[str, int]:
    """The dtype that a tensor is read as, and the bytes it takes."""
    numel = math.prod(entry.shape)
    if entry.kind == _Q8_0:
        if not entry.shape or entry.shape[-1] % _Q8_BLOCK:
            raise cursor.fail(f"tensor {entry.name!r} is Q8_0 with rows of {entry.shape[-1:]} elements", "E-TENSOR")
        return "F32", numel // _Q8_BLOCK * _Q8_BYTES
    dtype = _DTYPES.get(entry.kind)
    if dtype is None:
        what = f"tensor {entry.name!r} is of ggml type {entry.kind}: F32, F16, BF16 and Q8_0 are read"
        raise Unsupported(Problem("E-DTYPE", what, cursor.where, "convert the adapter again with --outtype f32"))
    return dtype, numel * DTYPE_BITS[dtype] // 8


def _not_an_adapter(where: str) -> Unsupported:
    what = "a GGUF model, not an adapter: GGUF is read for adapters only"
    hint = "merge into the safetensors checkpoint it was made from, then convert the result"
    return Unsupported(Problem("E-UNSUPPORTED", what, where, hint))


# -- writing ----------------------------------------------------------------------------------------------------------


Key = str | float | Sequence[int]


def encode_header(keys: Mapping[str, Key], tensors: Mapping[str, TensorRef]) -> bytes:
    """Everything before the data: text keys are strings, numbers float32, lists arrays of uint32; each tensor is
    followed by its `padding`.

    Version 3, little-endian. Tensors must be of a dtype that ggml has.
    """
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys) + 1)
    for key, value in keys.items():
        head += _text(key)
        if isinstance(value, str):
            head += struct.pack("<I", _STRING) + _text(value)
        elif isinstance(value, Sequence):
            head += struct.pack(f"<IIQ{len(value)}I", _ARRAY, _U32, len(value), *value)
        else:
            head += struct.pack("<If", _F32, value)
    head += _text("general.alignment") + struct.pack("<II", _U32, ALIGNMENT)
    offset = 0
    for name, ref in tensors.items():
        dims = ref.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kinds[ref.dtype], offset)
        offset += ref.nbytes + len(padding(ref.nbytes))
    return head + padding(len(head))


def padding(nbytes: int) -> bytes:
    """What comes after so many bytes, so that the next tensor is aligned."""
    return bytes(-nbytes % ALIGNMENT)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw

"""The undo record of a merge: the bits that rounding took away, so that an unmerge gives the base back exactly.

The base is predicted by subtracting the updates from the merged tensor. What is stored is the difference between the
true and the predicted number, as order-preserving integer codes; most differences are 0. Another machine's GEMM may
give other last bits, so every element whose prediction could round differently within a proven error band is stored
literally. ``spec/UNDO.md`` is the normative text.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loratool.container import encode_header, read_header, strict_json
from loratool.errors import InvalidFile, Problem, Unsupported
from loratool.receipt import Receipt
from loratool.staging import staged
from loratool.tensors import DTYPE_BITS, FileSpan, Shape, TensorRef, as_bytes, is_int, open_to_read, read_exactly

if TYPE_CHECKING:
    import torch

METADATA_KEY = "loratool.undo"
FORMAT_NAME = "loratool-undo"
VERSION = "1.0"

_LITERAL = -128  # in the stream of differences: the true bits follow in the stream of literals
_COUNTS = struct.Struct("<II")  # of marked and of literal elements, before the three streams of a block


# --- one block -------------------------------------------------------------------------------------------------------


def encode_block(true: torch.Tensor, predicted: torch.Tensor, band: torch.Tensor) -> bytes:
    """What turns the prediction of a block back into its true numbers, compressed.

    `true` is in the stored dtype, `predicted` and `band` in the compute dtype, all of one shape: any prediction within
    `band` of this one will do for decoding. `band` is overwritten.
    """
    import torch
    import zstandard

    bits = _bits(true)
    low = _bits((predicted - band).to(true.dtype))
    high = _bits(band.add_(predicted).to(true.dtype))
    literal = (low != high) | ~band.isfinite()
    if not bool(predicted.sum().isfinite()):
        literal |= ~predicted.isfinite()
    marked = (bits != low).logical_or_(literal)
    where = marked.view(-1).nonzero().view(-1)  # [marked]
    values = bits.view(-1)[where]
    difference = _code(values).long() - _code(low.view(-1)[where])
    escaped = literal.view(-1)[where] | (difference > 127) | (difference < -127)
    literals = values[escaped]
    stream = difference.masked_fill_(escaped, _LITERAL).to(torch.int8)
    mask = _packed(marked.view(-1))
    head = _COUNTS.pack(len(where), len(literals))
    content = b"".join((head, mask, stream.numpy().tobytes(), literals.numpy().tobytes()))
    return zstandard.ZstdCompressor(level=1).compress(content)


def decode_block(content: bytes, predicted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The true numbers of a block, in the stored dtype, from a prediction in the compute dtype.

    Raises ValueError for content that is not a block of this size.
    """
    import numpy as np
    import torch
    import zstandard

    guess = predicted.to(dtype).contiguous()
    bits = _bits(guess).view(-1)
    count, width = bits.numel(), guess.element_size()
    masked = (count + 7) // 8
    limit = _COUNTS.size + masked + count * (1 + width)
    try:
        if zstandard.frame_content_size(content) > limit:
            raise ValueError("a block is larger than its tensor's")
        plain = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(
            content, max_output_size=limit, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(plain) < _COUNTS.size + masked:
        raise ValueError("a block is too short")
    marked, literals = _COUNTS.unpack_from(plain)
    if literals > marked or len(plain) != _COUNTS.size + masked + marked + literals * width:
        raise ValueError("a block has another size than its counts say")
    flags = np.unpackbits(np.frombuffer(plain, np.uint8, masked, _COUNTS.size), count=count)
    where = torch.from_numpy(flags.nonzero()[0])
    start = _COUNTS.size + masked
    stream = torch.from_numpy(np.frombuffer(plain, np.int8, marked, start).copy())
    escaped = stream == _LITERAL
    if len(where) != marked or int(escaped.sum()) != literals:
        raise ValueError("a block has other marks than its counts say")
    codes = _code(bits[where]).long() + stream
    kept = torch.iinfo(bits.dtype)
    if marked and not bool(((codes >= kept.min) & (codes <= kept.max) | escaped).all()):
        raise ValueError("a difference leads out of the dtype")
    restored = _code(codes.clamp_(kept.min, kept.max).to(bits.dtype))  # the code is its own inverse
    raw = np.frombuffer(plain, f"<i{width}", literals, start + marked).copy()
    restored[escaped] = torch.from_numpy(raw)
    bits[where] = restored
    return guess


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of floating-point numbers as signed integers of the same width."""
    import torch

    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _code(bits: torch.Tensor) -> torch.Tensor:
    """Order-preserving codes: neighbouring floating-point numbers get neighbouring integers."""
    import torch

    width = 8 * bits.element_size()
    return bits ^ ((bits >> (width - 1)) & torch.iinfo(bits.dtype).max)


def _packed(flags: torch.Tensor) -> bytes:
    import numpy as np

    return np.packbits(flags.numpy()).tobytes()


# --- the record ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UndoTensor:
    """What the record holds of one changed tensor. `height` is the number of rows of a block, `blocks` their bytes."""

    base: str
    merged: str
    dtype: str
    shape: Shape
    height: int
    blocks: tuple[int, ...]
    data: TensorRef
    norms: tuple[TensorRef, ...]  # float64, one per DoRA update and matrix, in order

    def read_blocks(self) -> Iterator[bytes]:
        """The compressed blocks, one after the other."""
        assert isinstance(self.data.data, FileSpan)
        with open_to_read(self.data.data.path) as file:
            file.seek(self.data.data.offset)
            for size in self.blocks:
                buffer = bytearray(size)
                read_exactly(file, memoryview(buffer), self.data.data.path)
                yield bytes(buffer)


@dataclass(frozen=True)
class UndoRecord:
    """An undo record: it belongs to one receipt, and to no other."""

    receipt: str
    tensors: Mapping[str, UndoTensor]


class TensorRecorder:
    """Collects the blocks of one tensor while it is merged."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = []
        self.norms: list[torch.Tensor] = []
        self.height = 0


@dataclass
class UndoWriter:
    """Gathers the blocks of all tensors in a scratch file, in the order in which the workers finish."""

    scratch: Path
    lock: Any = field(default_factory=threading.Lock)
    entries: dict[str, tuple[dict[str, Any], int, int, list[torch.Tensor]]] = field(default_factory=dict)

    def add(self, name: str, recorder: TensorRecorder) -> None:
        sizes = [len(block) for block in recorder.blocks]
        entry = {"height": recorder.height, "blocks": sizes, "norms": len(recorder.norms)}
        with self.lock, self.scratch.open("ab") as file:
            start = file.tell()
            file.writelines(recorder.blocks)
            self.entries[name] = (entry, start, sum(sizes), recorder.norms)

    def finish(self, place: Path, receipt: Receipt) -> None:
        """Write the record: a canonical header, then norms, then blocks by tensor name."""
        tensors = {}
        for name, (entry, *_) in self.entries.items():
            known = receipt.tensors[name]
            facts = {"base": known.base, "merged": known.merged, "dtype": known.base_dtype}
            tensors[name] = {**entry, **facts, "shape": list(known.base_shape)}
        manifest = {"format": FORMAT_NAME, "version": VERSION, "receipt": receipt.digest, "tensors": tensors}
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        names = sorted(self.entries)
        norms = [(f"{name}.norm.{n}", norm) for name in names for n, norm in enumerate(self.entries[name][3])]
        layout: list[tuple[str, str, Shape]] = [(name, "F64", tuple(norm.shape)) for name, norm in norms]
        layout += [(f"{name}.blocks", "U8", (self.entries[name][2],)) for name in names]
        with place.open("wb") as out, self.scratch.open("rb") as source:
            out.write(encode_header(layout, {METADATA_KEY: text}))
            for _, norm in norms:
                out.write(as_bytes(norm))
            for name in names:
                _, start, size, _ = self.entries[name]
                source.seek(start)
                _copy(source, out, size)


def _copy(source: BinaryIO, out: BinaryIO, left: int) -> None:
    while left:
        piece = source.read(min(left, 1 << 20))
        out.write(piece)
        left -= len(piece)


@contextmanager
def writing(path: Path) -> Iterator[tuple[UndoWriter, Path]]:
    """A writer, and the place where its finished record must be when the block ends."""
    with staged(path) as place:
        scratch = place.parent / f"{path.name}.blocks"
        scratch.touch()
        yield UndoWriter(scratch), place


def read(path: Path) -> UndoRecord:
    """Read an undo record's header. Raises InvalidFile, or Unsupported for a later version."""
    header = read_header(path)
    where = str(path)
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise InvalidFile(Problem("E-UNDO", "not an undo record", where, "give the file that merge --undo wrote"))
    document = strict_json(text, where, "E-UNDO", "")
    try:
        if document["format"] != FORMAT_NAME:
            raise ValueError(f"format {document['format']!r}")
        if not isinstance(document["version"], str):
            raise ValueError("version is no string")
        if not document["version"].startswith("1."):
            raise Unsupported(Problem("E-VERSION", f"undo record version {document['version']}", where,
                                      "install a newer loratool"))  # fmt: skip
        tensors = {name: _tensor(name, entry, header.tensors) for name, entry in document["tensors"].items()}
        known = {ref.name for tensor in tensors.values() for ref in (tensor.data, *tensor.norms)}
        if stray := header.tensors.keys() - known:
            raise ValueError(f"tensor {min(stray)!r} belongs to nothing")
        return UndoRecord(str(document["receipt"]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidFile(
            Problem("E-UNDO", f"the undo record is broken: {error}", where, "use --base instead")
        ) from None


def _tensor(name: str, entry: Mapping[str, Any], stored: Mapping[str, TensorRef]) -> UndoTensor:
    data, blocks, shape = stored[f"{name}.blocks"], entry["blocks"], entry["shape"]
    norms = tuple(stored[f"{name}.norm.{n}"] for n in range(_count(entry["norms"])))
    if data.dtype != "U8" or sum(map(_count, blocks)) != data.nbytes or any(ref.dtype != "F64" for ref in norms):
        raise ValueError(f"the blocks of {name!r} do not add up")
    if entry["dtype"] not in DTYPE_BITS:
        raise ValueError(f"dtype {entry['dtype']!r}")
    dims = tuple(map(_count, shape))
    height = _count(entry["height"])
    if not height:
        raise ValueError(f"the blocks of {name!r} have no rows")
    return UndoTensor(
        str(entry["base"]), str(entry["merged"]), entry["dtype"], dims, height, tuple(blocks), data, norms
    )


def _count(value: object) -> int:
    if not is_int(value) or not 0 <= value < 2**53:  # type: ignore[operator]  # is_int has looked
        raise ValueError(f"{value!r:.40} is not a count")
    return int(value)  # type: ignore[call-overload,no-any-return]

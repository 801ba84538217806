"""The undo record of a merge: the bits that rounding took away, so that an unmerge gives the base back exactly.

The base is predicted by subtracting the updates from the merged tensor, rounded as if computed exactly, so that every
machine predicts the same. What is stored is where the prediction is wrong, and by how much, in order-preserving integer
codes: mostly by one. The few elements that float64 can not decide are stored literally. ``spec/UNDO.md`` is normative.
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
from loratool.rounding import bits, positions
from loratool.staging import staged
from loratool.tensors import DTYPE_BITS, FileSpan, Shape, TensorRef, as_bytes, is_int, open_to_read, read_exactly

if TYPE_CHECKING:
    import torch

METADATA_KEY = "loratool.undo"
FORMAT_NAME = "loratool-undo"
VERSION = "1.0"

_LITERAL = -128  # among the differences: the true bits are among the literals
_LONG = 255  # among the gaps
_HEAD = struct.Struct("<IIII")  # marks, literals, and the bytes of the first two of three frames: gaps, differences


# --- one block -------------------------------------------------------------------------------------------------------


def encode_block(true: torch.Tensor, guess: torch.Tensor, literal: torch.Tensor) -> bytes:
    """What turns the prediction of a block back into its true numbers, compressed.

    `true` and `guess` are of one shape and dtype; `literal` are the flat indices, ascending, of the elements for which
    another machine may predict something else.
    """
    import numpy as np

    own = bits(true).cpu().reshape(-1).numpy()
    predicted = bits(guess).cpu().reshape(-1).numpy()
    marked = own != predicted
    if len(literal):
        marked[literal.cpu().numpy()] = True
    where = positions(marked)  # [marks]
    values = own[where]
    true_code, code = _code(values).astype(np.int64), _code(predicted[where]).astype(np.int64)
    difference = true_code - code
    escaped = (difference > 127) | (difference < -127) | ((difference < 0) != (true_code < code))  # 64 bits may wrap
    if len(literal):
        escaped |= np.isin(where, literal.cpu().numpy(), assume_unique=True)
    literals = values[escaped]
    difference[escaped] = _LITERAL
    parts = (_gaps(where).tobytes(), difference.astype(np.int8).tobytes(), literals.tobytes())
    frames = [_compressor().compress(part) for part in parts]
    return b"".join((_HEAD.pack(len(where), len(literals), len(frames[0]), len(frames[1])), *frames))


def decode_block(content: bytes, guess: torch.Tensor) -> torch.Tensor:
    """The true numbers of a block, from their prediction, which is overwritten.

    Raises ValueError for content that is not a block of this size.
    """
    import numpy as np
    import torch

    guess = guess.cpu().contiguous()
    own = bits(guess).view(-1).numpy()
    if len(content) < _HEAD.size:
        raise ValueError("a block is too short")
    marks, literals, *sizes = _HEAD.unpack_from(content)
    first, second = _HEAD.size + sizes[0], _HEAD.size + sizes[0] + sizes[1]
    if literals > marks or marks > own.size or second > len(content):
        raise ValueError("a block has another size than its counts say")
    gaps = np.frombuffer(_unpacked(content[_HEAD.size : first], marks + own.size // _LONG), np.uint8)
    difference = np.frombuffer(_unpacked(content[first:second], marks), np.int8)
    raw = np.frombuffer(_unpacked(content[second:], literals * own.itemsize), np.uint8)
    ends = gaps != _LONG
    where = np.cumsum(gaps + ends, dtype=np.int64)[ends] - 1  # a gap of 255 is followed by no mark
    escaped = difference == _LITERAL
    found = (len(where), len(difference), int(np.count_nonzero(escaped)), len(raw))
    if found != (marks, marks, literals, literals * own.itemsize):
        raise ValueError("a block has other marks than its counts say")
    if marks and where[-1] >= own.size:
        raise ValueError("a block marks an element that is not there")
    codes, step, kept = _code(own[where]).astype(np.int64), difference.astype(np.int64), torch.iinfo(bits(guess).dtype)
    low, high = kept.min - np.minimum(step, 0), kept.max - np.maximum(step, 0)  # of 64 bits, a sum would wrap
    if not ((codes >= low) & (codes <= high) | escaped).all():
        raise ValueError("a difference leads out of the dtype")
    restored = _code((codes + step).astype(own.dtype))  # the code is its own inverse
    restored[escaped] = raw.view(own.dtype.newbyteorder("<"))
    own[where] = restored
    return guess


def _code(numbers: Any) -> Any:
    """Order-preserving codes of bits: neighbouring floating-point numbers get neighbouring integers."""
    width = 8 * numbers.itemsize
    return numbers ^ ((numbers >> (width - 1)) & ((1 << (width - 1)) - 1))


def _gaps(where: Any) -> Any:
    """The unmarked elements before each mark, one byte each: 255 stands for as many, and no mark after them."""
    import numpy as np

    gaps = np.diff(where, prepend=-1) - 1
    ends = np.cumsum(gaps // _LONG + 1) - 1
    found = np.full(ends[-1] + 1 if len(ends) else 0, _LONG, np.uint8)
    found[ends] = gaps % _LONG
    return found


def _compressor() -> Any:
    import zstandard

    return zstandard.ZstdCompressor(level=1)


def _unpacked(frame: bytes, limit: int) -> bytes:
    """The content of one zstd frame, of at most `limit` bytes."""
    import zstandard

    codec = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    try:
        claimed = zstandard.frame_content_size(frame)  # -1 for no claim
        if claimed == 0:
            return _empty(frame, codec.decompressobj())
        content = b""
        if claimed <= limit:
            content = codec.decompress(frame, max_output_size=max(1, limit), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if max(claimed, len(content)) > limit:
        raise ValueError("a block is larger than its tensor's")
    return content


def _empty(frame: bytes, stream: Any) -> bytes:
    """The content of one whole frame that claims to have none: zstandard itself looks no further than the claim."""
    for start in range(0, len(frame), 64):  # little can come out of so few bytes
        if stream.eof or stream.decompress(frame[start : start + 64]):
            raise ValueError("a frame claims to be empty")
    if not stream.eof or stream.unused_data:
        raise ValueError("a frame claims to be empty")
    return b""


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
def writing(path: Path, force: bool = False) -> Iterator[tuple[UndoWriter, Path]]:
    """A writer, and the place where its finished record must be when the block ends."""
    with staged(path, force) as place:
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

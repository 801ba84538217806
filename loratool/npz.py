"""NumPy's archives (.npz), as older versions of mlx-lm wrote them: listed without reading a number.

An archive is a zip file with one .npy per array: a short header in Python's spelling, then the bytes. Headers are
matched, not evaluated, and only uncompressed arrays are taken, so that every tensor is a span of the file.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from loratool.errors import InvalidFile, Problem, Unsupported
from loratool.tensors import DTYPE_BITS, FileSpan, FileState, Shape, TensorRef, reading

MAX_HEADER = 10_000  # bytes of one array's description; NumPy's own limit
MAX_DIM = 2**53

# NumPy has no bfloat16: MLX writes it as two bytes of nothing in particular.
_DTYPES = {
    "f8": "F64", "f4": "F32", "f2": "F16", "V2": "BF16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8",
    "u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL",
}  # fmt: skip
_DESCRIPTION = re.compile(
    r"\{'descr': '(?P<order>[<|])(?P<dtype>\w\d)', 'fortran_order': (?P<fortran>True|False),"
    r" 'shape': \((?P<shape>[\d, ]{0,400})\)(?:, ?)?\}\s*"
)


def read_npz(path: Path) -> Mapping[str, TensorRef]:
    """The arrays of an archive by name, in stored order. Raises InvalidFile, or Unsupported for compressed ones."""
    where = str(path)
    try:
        with reading(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
            state = FileState.noted(path, os.fstat(file.fileno()))
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _refuse_unsupported(entries, where)
            found = {entry.filename.removesuffix(".npy"): _tensor(file, entry, state) for entry in entries}
            _refuse_truncated(found.values(), state.size)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise InvalidFile(Problem("E-HEADER", f"not a readable .npz archive: {error}", where)) from None
    if len(found) < len(entries):
        raise InvalidFile(Problem("E-DUPLICATE", "two arrays have one name", where))
    return found


def _refuse_unsupported(entries: list[zipfile.ZipInfo], where: str) -> None:
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        what = f"{packed[0]} is compressed, as {len(packed)} of {len(entries)} arrays are"
        hint = "save it again: numpy.savez('new.npz', **numpy.load('old.npz'))"
        raise Unsupported(Problem("E-UNSUPPORTED", what, where, hint))


def _refuse_truncated(refs: Iterable[TensorRef], size: int) -> None:
    for ref in refs:
        if isinstance(ref.data, FileSpan) and ref.data.offset + ref.nbytes > size:
            raise ValueError(f"{ref.name} ends behind the file's {size:,} bytes")


def _tensor(file: BinaryIO, entry: zipfile.ZipInfo, state: FileState) -> TensorRef:
    """The span of one array; raises ValueError or struct.error where its bytes are not what they should be."""
    name = entry.filename
    file.seek(entry.header_offset)
    local = file.read(30)  # a zip entry's own header, whose lengths may differ from the directory's
    signature, name_size, extra_size = struct.unpack("<4s22xHH", local)
    if signature != b"PK\x03\x04":
        raise ValueError(f"{name} is not where the directory says")
    start = entry.header_offset + 30 + name_size + extra_size
    file.seek(start)
    magic, major = struct.unpack("<6sBx", file.read(8))
    if magic != b"\x93NUMPY" or major not in (1, 2, 3) or not name.endswith(".npy"):
        raise ValueError(f"{name} is not a .npy array")
    width, code = (2, "<H") if major == 1 else (4, "<I")
    (size,) = struct.unpack(code, file.read(width))
    if size > MAX_HEADER:
        raise ValueError(f"the description of {name} has {size:,} bytes")
    dtype, shape, fortran = _description(file.read(size), name)
    begin = start + 8 + width + size
    if begin - start + math.prod(shape) * DTYPE_BITS[dtype] // 8 != entry.file_size:
        raise ValueError(f"{name} of {dtype} {list(shape)!s:.80} does not fill its {entry.file_size:,} bytes")
    stored = shape[::-1] if fortran else shape
    ref = TensorRef(name.removesuffix(".npy"), dtype, stored, FileSpan(state.path, begin, state), stored)
    return ref.permute(*reversed(range(len(shape)))) if fortran and len(shape) > 1 else ref


def _description(raw: bytes, name: str) -> tuple[str, Shape, bool]:
    """dtype, shape, and whether the first dimension is the fastest."""
    match = _DESCRIPTION.fullmatch(raw.decode("latin-1"))
    if match is None or match["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is described as {raw[:80]!r}")
    shape = tuple(int(dim) for dim in match["shape"].replace(",", " ").split())
    if len(shape) > 8 or math.prod(shape) > MAX_DIM:
        raise ValueError(f"the shape of {name} is impossible")
    return _DTYPES[match["dtype"]], shape, match["fortran"] == "True"

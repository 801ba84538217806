"""One number out of a file, such as a stored alpha, read without torch: `inspect` shows scales."""

from __future__ import annotations

import struct

from loratool.errors import InvalidFile, Problem
from loratool.tensors import TensorRef

_CODES = {"F16": "<e", "F32": "<f", "F64": "<d"}


def scalar(ref: TensorRef, where: str) -> float:
    """The value of a tensor [] or [1] of floating-point numbers. Raises InvalidFile for any other tensor."""
    if ref.numel != 1 or ref.dtype not in (*_CODES, "BF16"):
        what = f"tensor {ref.name!r} is {ref.dtype} {list(ref.shape)}, not one floating-point number"
        raise InvalidFile(Problem("E-SHAPE", what, where, "save it as one, as the trainer does"))
    raw = b"".join(map(bytes, ref.chunks()))
    if ref.dtype == "BF16":
        raw = b"\0\0" + raw  # the upper half of a float32
    return float(struct.unpack(_CODES.get(ref.dtype, "<f"), raw)[0])

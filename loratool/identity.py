"""What a tensor of a base is, by digests, and whether another one is the same (spec, section 9).

A quantised weight is what its numbers come from: the codes under its name, and scales, offsets and tables beside them.
"""

from __future__ import annotations

from collections.abc import Collection

from loratool.adapter import TensorIdentity
from loratool.quantised import parts, stored_part
from loratool.tensors import TensorRef


def identity_of(ref: TensorRef, function: str = "blake3") -> TensorIdentity:
    """The identity of a base's tensor; all its bytes are read. `function` is blake3 or sha256."""
    codes = stored_part(ref)
    others = {name: TensorIdentity(o.digest(function), o.dtype, o.shape) for name, o in _others(ref).items()}
    return TensorIdentity(codes.digest(function), codes.dtype, codes.shape, others)


def difference(ref: TensorRef, known: TensorIdentity) -> str:
    """What makes a base's tensor another one than was recorded; "" if it is the same.

    Digests are computed last: names, dtypes and shapes cost nothing.
    """
    others = _others(ref)
    if others.keys() != known.parts.keys():
        return f"stored {_with(others)}, not {_with(known.parts)}"
    pairs = [("", stored_part(ref), known), *((name, others[name], known.parts[name]) for name in sorted(others))]
    for name, stored, wanted in pairs:
        if (stored.dtype, stored.shape) != (wanted.dtype, wanted.shape):
            what = f"{stored.dtype} {list(stored.shape)}, not {wanted.dtype} {list(wanted.shape)}"
            return f"{what} in its {name}" if name else what
    for name, stored, wanted in pairs:
        if stored.digest(wanted.digest.partition(":")[0]) != wanted.digest:
            return f"of other bytes in its {name}" if name else "of other bytes"
    return ""


def _others(ref: TensorRef) -> dict[str, TensorRef]:
    """The stored tensors beside the codes of a quantised weight, by their names within its module."""
    module = stored_part(ref).name.rpartition(".")[0] + "."
    return {part.name.removeprefix(module): part for part in parts(ref)[1:]}


def _with(names: Collection[str]) -> str:
    return f"with {', '.join(sorted(names))}" if names else "without scales"

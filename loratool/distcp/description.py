"""The `.metadata` of a torch.distributed.checkpoint folder: a pickle, run with stand-ins for the classes torch writes.

A stand-in only keeps what it was pickled with: nothing of torch is called, and torch is not needed.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeGuard

from loratool.container import MAX_DIM
from loratool.pickles import DTYPES, Dtype, Nonsense, Restricted, refuse_long, refuse_memo_bomb, refusing
from loratool.tensors import Shape, is_int, reading

MAX_DIMS = 64


class _Record:
    """An instance of one of torch's classes: what it was pickled with."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "state", state)

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


class Metadata(_Record): ...


class TensorEntry(_Record): ...


class ObjectEntry(_Record): ...


class Chunk(_Record): ...


class Index(_Record): ...


class Stored(_Record): ...


class Properties(_Record): ...


class Other(_Record): ...


def _text(name: object) -> object:
    return name


def _nothing(*_: object) -> None:
    return None


_CHECKPOINT = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where torch before 2.2 had some of them
_ALLOWED: dict[tuple[str, str], Any] = {
    (f"{_CHECKPOINT}.metadata", "Metadata"): Metadata,
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): TensorEntry,
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"): ObjectEntry,
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"): Chunk,
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): Index,
    (f"{_CHECKPOINT}.metadata", "StorageMeta"): Other,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): Stored,
    **{(module, "TensorProperties"): Properties for module in (f"{_CHECKPOINT}.metadata", _SHARDED)},
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _nothing,
    (_SHARDED, "MEM_FORMAT_ENCODING"): _nothing,
    ("torch.serialization", "_get_layout"): _text,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, f"{kind}Path"): _nothing for module in ("pathlib", "pathlib._local")
       for kind in ("Posix", "Windows", "PurePosix", "PureWindows")},
    **{("torch", name): Dtype(dtype) for name, dtype in DTYPES.items()},
    **{("torch", name): f"torch.{name}" for name in
       ("complex32", "complex128", "quint8", "qint8", "qint32", "quint4x2", "quint2x4", "float4_e2m1fn_x2")},
}  # fmt: skip


def unpickled(path: Path) -> Metadata:
    with reading(path):
        refuse_long(path.stat().st_size, str(path))
        program = path.read_bytes()
    hint = "load the checkpoint with the trainer that wrote it, and save the model's state dict as safetensors"
    with refusing(str(path), "a checkpoint's description", hint):
        refuse_memo_bomb(program)
        found = Restricted(program, _ALLOWED).load()
        if not isinstance(found, Metadata):
            raise Nonsense("it describes no checkpoint")
    return found


def is_shape(value: Any) -> TypeGuard[Shape]:
    """Whether a value is what torch.Size becomes, within bounds."""
    return isinstance(value, tuple) and len(value) <= MAX_DIMS and all(
        is_int(dim) and 0 <= dim <= MAX_DIM for dim in value
    )  # fmt: skip

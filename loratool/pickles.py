"""PyTorch's pickled checkpoints (.pt, .pth, .bin), without ever running what is in them.

A pickle is a program. Names, dtypes and shapes are listed by an unpickler that knows only the few constructors a
state dict needs and refuses every other one, which needs no torch; the numbers come from
``torch.load(weights_only=True)``, memory-mapped. Both refuse a pickle that would call anything else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool.errors import InvalidFile, Problem, Unsupported
from loratool.tensors import CHUNK, InMemory, Shape, TensorRef, as_bytes, dtype_name

if TYPE_CHECKING:
    import torch

Tree = dict[Any, Any]  # nested dicts; the leaves that matter are TensorRefs

MAX_PICKLE = 100_000_000  # bytes of the object description, the data excluded
MAX_DEPTH = 8

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "complex64": "C64", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


def read_tree(path: Path) -> Tree:
    """The nested dicts of a pickled checkpoint, with a TensorRef for every tensor.

    Raises InvalidFile for a broken file, Unsupported for a pickle that asks for more than a state dict needs.
    """
    if zipfile.is_zipfile(path):
        tree = _list(path)
    else:  # torch's format before 1.6: not listable without reading it all
        tree = _loaded(path, mmap=False)
    if not isinstance(tree, dict):
        raise Unsupported(
            Problem(
                "E-PICKLE",
                f"the file holds a {type(tree).__name__}, not a state dict",
                str(path),
                "save model.state_dict() instead of the model",
            )
        )
    return tree


@dataclass(frozen=True)
class _PickleFile:
    """One file, loaded by torch the first time that one of its tensors is needed."""

    path: Path

    @cached_property
    def tree(self) -> Any:
        return _torch_load(self.path, mmap=True)

    def tensor(self, keys: tuple[Any, ...]) -> torch.Tensor:
        value = self.tree
        for key in keys:
            value = value[key]
        tensor: torch.Tensor = value.detach()
        return tensor


@dataclass(frozen=True)
class Pickled:
    """A tensor of a pickle. `storage` is equal for tensors that share their memory: tied weights."""

    file: _PickleFile
    keys: tuple[Any, ...]
    storage: tuple[Any, ...]

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        return self.file.tensor(self.keys)

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        data = as_bytes(self.load(dtype, shape))
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


class _Stored(NamedTuple):
    """What a rebuilt tensor amounts to, without data."""

    dtype: str
    shape: Shape
    storage: tuple[Any, ...]


class _Storage(NamedTuple):
    dtype: str
    key: str


def _tensor_v2(storage: _Storage, offset: int, size: Shape, stride: Shape, *_: object) -> _Stored:
    return _Stored(storage.dtype, tuple(size), (storage.key, offset, tuple(stride)))


def _tensor_v3(
    storage: _Storage, offset: int, size: Shape, stride: Shape, grad: object, hooks: object, dtype: str, *_: object
) -> _Stored:
    return _Stored(dtype, tuple(size), (storage.key, offset, tuple(stride)))


def _parameter(data: _Stored, *_: object) -> _Stored:
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): "U8",
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _Refused(Exception):
    pass


class _Lister(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(dtype, key)


def _list(path: Path) -> Any:
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(names) != 1:
                raise InvalidFile(Problem("E-PICKLE", "a zip file, but not one that torch.save wrote", where))
            if archive.getinfo(names[0]).file_size > MAX_PICKLE:
                raise InvalidFile(Problem("E-LIMIT", f"the object description is over {MAX_PICKLE:,} bytes", where))
            program = archive.read(names[0])
        tree = _Lister(io.BytesIO(program)).load()
    except _Refused as error:
        raise Unsupported(
            Problem(
                "E-PICKLE",
                f"the pickle wants to call {error}, which a state dict does not need; nothing was run",
                where,
                "ask for safetensors, or save only model.state_dict() with torch.save",
            )
        ) from None
    except (InvalidFile, OSError):
        raise
    except Exception as error:  # a hostile pickle can raise anything the pickle machine knows
        raise InvalidFile(Problem("E-PICKLE", f"not a readable checkpoint: {error}", where)) from None
    return _referenced(tree, _PickleFile(path), ())


def _referenced(value: Any, file: _PickleFile, keys: tuple[Any, ...]) -> Any:
    if isinstance(value, _Stored):
        return TensorRef(str(keys[-1]), value.dtype, value.shape, Pickled(file, keys, value.storage), value.shape)
    if isinstance(value, dict) and len(keys) < MAX_DEPTH:
        return {key: _referenced(child, file, (*keys, key)) for key, child in value.items()}
    return value


def _loaded(path: Path, mmap: bool) -> Any:
    import torch

    def referenced(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            data = value.detach()
            return TensorRef(name, dtype_name(data.dtype), tuple(data.shape), InMemory(data), tuple(data.shape))
        if isinstance(value, dict):
            return {key: referenced(child, str(key)) for key, child in value.items()}
        return value

    return referenced(_torch_load(path, mmap), "")


def _torch_load(path: Path, mmap: bool) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for broken files
        raise InvalidFile(
            Problem(
                "E-PICKLE",
                f"torch.load(weights_only=True) refuses it: {str(error).splitlines()[0]}",
                str(path),
                "ask for safetensors, or save only model.state_dict() with torch.save",
            )
        ) from None

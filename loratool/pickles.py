"""PyTorch's pickled checkpoints (.pt, .pth, .bin), without ever running what is in them.

A pickle is a program. Names, dtypes and shapes are listed by an unpickler that knows only the few constructors a
state dict needs and refuses every other one, which needs no torch; the numbers come from
``torch.load(weights_only=True)``, memory-mapped. Both refuse a pickle that would call anything else.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeGuard

from loratool.errors import InvalidFile, LoratoolError, Problem, Unsupported
from loratool.tensors import (
    CHUNK,
    DTYPE_BITS,
    FileSpan,
    FileState,
    InMemory,
    Shape,
    TensorRef,
    as_bytes,
    is_int,
    reading,
)

if TYPE_CHECKING:
    import torch

Tree = dict[Any, Any]  # nested dicts; the leaves that matter are TensorRefs

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")  # under which trainers nest a state dict
MAX_PICKLE = 100_000_000  # bytes of the object description, the data excluded

_ADVICE = "ask for safetensors, or save only model.state_dict() with torch.save"
_SPREAD = (b"DTensor", b"ShardedTensor")  # classes of tensors of which a rank has pieces
GATHER = (
    "have whole tensors saved (StateDictOptions(full_state_dict=True), FULL_STATE_DICT), or all ranks to one"
    " torch.distributed.checkpoint folder, which is read; of verl's files,"
    " `python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir OUT` makes whole ones"
)

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "complex64": "C64", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


def read_tree(path: Path) -> Tree:
    """The nested dicts of a pickled checkpoint, with a TensorRef for every tensor.

    Raises InvalidFile for a broken file, Unsupported for a pickle that asks for more than a state dict needs.
    """
    if _is_zip(path):
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


def strewn(path: Path) -> Iterator[TensorRef]:
    """Every tensor that an archive holds, wherever in it and as often as it is there, its keys in its `data`."""
    with refusing(str(path), "a state dict", _ADVICE), reading(path), zipfile.ZipFile(path) as archive:
        tree, _ = _listed(archive, str(path))
    left: list[tuple[tuple[Any, ...], Any]] = [((), tree)]
    file, seen = _PickleFile(FileState.of(path)), set[int]()
    while left:
        keys, value = left.pop()
        if isinstance(value, _Stored):
            data = Pickled(file, keys, (path, *value.storage))
            yield TensorRef(".".join(map(str, keys)), value.dtype, value.shape, data, value.shape)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:  # a pickle may hold itself
            seen.add(id(value))
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            left += [((*keys, key), child) for key, child in inside]


def _is_zip(path: Path) -> bool:
    with reading(path), path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


@dataclass(frozen=True)
class _PickleFile:
    """One file, loaded by torch the first time that one of its tensors is needed."""

    state: FileState

    @property
    def path(self) -> Path:
        return self.state.path

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

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def states(self) -> tuple[FileState, ...]:
        return (self.file.state,)

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        return self.file.tensor(self.keys).reshape(shape)

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
    dtype: Dtype
    key: str
    numel: int


class Dtype(str):
    """A dtype that the pickle names as torch's, not a text that happens to look like one."""


class Nonsense(Exception):
    """A description that no tensor can have."""


def _tensor_v2(storage: object, offset: object, size: object, stride: object, *_: object) -> _Stored:
    return _described(storage, offset, size, stride, storage.dtype if isinstance(storage, _Storage) else None)


def _tensor_v3(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> _Stored:
    return _described(storage, offset, size, stride, dtype)


def _described(storage: object, offset: object, size: object, stride: object, dtype: object) -> _Stored:
    """Check that a tensor lies inside its storage."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, Dtype):
        raise Nonsense("a tensor without a storage, or of no dtype")
    if not _are_counts(size) or not _are_counts(stride) or not is_int(offset) or len(size) != len(stride):
        raise Nonsense(f"a tensor of size {size!r:.50}, stride {stride!r:.50}, offset {offset!r:.50}")
    assert isinstance(offset, int)
    last = offset + sum((dim - 1) * step for dim, step in zip(size, stride, strict=True))
    itemsize = DTYPE_BITS[str(dtype)] // 8
    if offset < 0 or (0 not in size and (last + 1) * itemsize > storage.numel * DTYPE_BITS[storage.dtype] // 8):
        raise Nonsense(f"a tensor of size {size!r:.50} beyond its storage")
    return _Stored(str(dtype), tuple(size), (storage.key, offset, tuple(stride)))


def _are_counts(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(is_int(value) and 0 <= value < 2**62 for value in values)


def _parameter(data: object, *_: object) -> _Stored:
    if not isinstance(data, _Stored):
        raise Nonsense("a parameter without a tensor")
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): Dtype("U8"),
    **{("torch", name): Dtype(dtype) for name, dtype in (_STORAGES | DTYPES).items()},
}


class _Refused(Exception):
    """A name that is not allowed. `spread` is whether the pickle is about tensors that are spread over ranks."""

    def __init__(self, name: str, spread: bool) -> None:
        super().__init__(name)
        self.spread = spread


class Restricted(pickle.Unpickler):
    """Runs a pickle that may name what is `allowed`, by module and name, and gets what stands there; nothing else."""

    def __init__(self, program: bytes, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(program))
        self.allowed = allowed
        self.spread = any(name in program for name in _SPREAD)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}", self.spread) from None

    def persistent_load(self, pid: Any) -> Any:
        raise Nonsense(f"it asks for {pid!r:.80}, which is outside of it")


class _Lister(Restricted):
    def __init__(self, program: bytes, sizes: Mapping[str, int]) -> None:
        super().__init__(program, _ALLOWED)
        self.sizes = sizes  # bytes of each storage in the archive

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", Dtype() as dtype, str(key), _, int(numel), *_) if numel >= 0:
                if numel * DTYPE_BITS[dtype] // 8 <= self.sizes.get(key, -1):
                    return _Storage(dtype, key, numel)
        raise Nonsense(f"the storage {pid!r:.80} is not in the archive")


@contextmanager
def refusing(where: str, kind: str, hint: str) -> Iterator[None]:
    """What goes wrong with a pickle in this block is an error of the file; `kind` is what it should be."""
    try:
        yield
    except _Refused as error:
        what = f"the pickle wants to call {error}, which {kind} does not need; nothing was run"
        if error.spread:
            what, hint = "its tensors are spread over ranks, and these are the pieces of one (DTensor)", GATHER
        raise Unsupported(Problem("E-PICKLE", what, where, hint)) from None
    except LoratoolError:
        raise
    except Exception as error:  # a hostile pickle can raise anything the pickle machine knows
        raise InvalidFile(Problem("E-PICKLE", f"not a readable checkpoint: {error}", where)) from None


def _list(path: Path) -> Any:
    state = FileState.of(path)
    with refusing(str(path), "a state dict", _ADVICE), reading(path), zipfile.ZipFile(path) as archive:
        tree, _ = _listed(archive, str(path))
    return _referenced(tree, _PickleFile(state), ())


def _listed(archive: zipfile.ZipFile, where: str) -> tuple[Any, str]:
    """What torch.save wrote, its tensors as what they amount to; and the folder of their storages in the archive."""
    names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(names) != 1:
        raise InvalidFile(Problem("E-PICKLE", "a zip file, but not one that torch.save wrote", where))
    refuse_long(archive.getinfo(names[0]).file_size, where)
    program = archive.read(names[0])
    folder = names[0].removesuffix("data.pkl") + "data/"
    sizes = {i.filename.removeprefix(folder): i.file_size for i in archive.infolist() if _is_stored(i, folder)}
    refuse_memo_bomb(program)
    return _Lister(program, sizes).load(), folder


def tensor_within(file: BinaryIO, start: int, state: FileState, name: str) -> TensorRef:
    """The one tensor of a torch.save archive that begins at byte `start` of a file, as a span of it.

    `file` is a view of the archive alone. Raises InvalidFile or Unsupported for anything else.
    """
    where = str(state.path)
    with refusing(where, f"the tensor {name}", _ADVICE), reading(state.path), zipfile.ZipFile(file) as archive:
        found, folder = _listed(archive, where)
        if not isinstance(found, _Stored):
            raise Nonsense(f"there is a {type(found).__name__} in the place of {name}")
        order = folder.removesuffix("data/") + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise Nonsense(f"{name} is not stored in little-endian order")
        key, offset, stride = found.storage
        entry = archive.getinfo(folder + key)
        file.seek(entry.header_offset)
        local = file.read(30)  # a zip entry's own header, whose lengths may differ from the directory's
        name_size, extra_size = struct.unpack("<26xHH", local)
        data = entry.header_offset + 30 + name_size + extra_size
        nbytes = (offset + math.prod(found.shape)) * DTYPE_BITS[found.dtype] // 8
        if not local.startswith(b"PK\x03\x04") or data + nbytes > file.seek(0, io.SEEK_END):
            raise Nonsense(f"the data of {name} does not lie in its archive")
        span = FileSpan(state.path, start + data + offset * DTYPE_BITS[found.dtype] // 8, state)
        return _laid_out(TensorRef(name, found.dtype, found.shape, span, found.shape), stride)


def _laid_out(ref: TensorRef, stride: tuple[int, ...]) -> TensorRef:
    """A tensor whose elements lie in the order of the strides: some permutation of its dimensions, without gaps."""
    order = sorted(range(len(stride)), key=lambda dim: (-stride[dim], ref.shape[dim] == 1))
    step = 1
    for dim in reversed(order) if ref.numel else ():
        if ref.shape[dim] != 1 and stride[dim] != step:
            raise Nonsense(f"the elements of {ref.name} lie with gaps, or on top of each other: stride {stride}")
        step *= ref.shape[dim]
    moved = [dim for dim in order if ref.shape[dim] != 1]
    if not ref.numel or moved == sorted(moved):
        return ref
    stored = tuple(ref.shape[dim] for dim in order)
    back = tuple(order.index(dim) for dim in range(len(order)))
    return replace(ref, shape=stored, stored_shape=stored).permute(*back)


def _is_stored(entry: zipfile.ZipInfo, folder: str) -> bool:
    return entry.filename.startswith(folder) and entry.compress_type == zipfile.ZIP_STORED


def refuse_long(size: int, where: str) -> None:
    """Raises InvalidFile for a description that is longer than any checkpoint's."""
    if size > MAX_PICKLE:
        raise InvalidFile(Problem("E-LIMIT", f"the object description is over {MAX_PICKLE:,} bytes", where))


def refuse_memo_bomb(program: bytes) -> None:
    """The pickle machine allocates as many memo slots as an index names: more than there are bytes is an attack."""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "LONG_BINPUT" and argument is not None and argument > len(program):
            raise Nonsense(f"a memo index of {argument:,}")


def _referenced(value: Any, file: _PickleFile, keys: tuple[Any, ...]) -> Any:
    """Descriptions as references, in a dict and the dicts in it: deeper ones hold no weights (and may be endless)."""
    if isinstance(value, _Stored):
        data = Pickled(file, keys, (file.path, *value.storage))
        return TensorRef(str(keys[-1]) if keys else "", value.dtype, value.shape, data, value.shape)
    if isinstance(value, dict) and len(keys) < 2 and (not keys or keys[0] in STATE_KEYS):
        return {key: _referenced(child, file, (*keys, key)) for key, child in value.items()}
    return value


def _loaded(path: Path, mmap: bool) -> Any:
    import torch

    def referenced(value: Any, keys: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.stride())
            ref = TensorRef.of(value.detach(), str(keys[-1]) if keys else "")
            return replace(ref, data=InMemory(value.detach(), place))
        if isinstance(value, dict) and len(keys) < 2 and (not keys or keys[0] in STATE_KEYS):
            return {key: referenced(child, (*keys, key)) for key, child in value.items()}
        return value

    return referenced(_torch_load(path, mmap), ())


def _torch_load(path: Path, mmap: bool) -> Any:
    import torch

    try:
        with reading(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except InvalidFile:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for broken files
        raise InvalidFile(
            Problem(
                "E-PICKLE",
                f"torch.load(weights_only=True) refuses it{_reason(error)}",
                str(path),
                _ADVICE,
            )
        ) from None


def _reason(error: Exception) -> str:
    """What torch says is wrong, without its advice to load the file unsafely."""
    called = re.search(r"(?:GLOBAL|global)\s+([\w.]+)", str(error))
    if called:
        return f": it wants to call {called[1]}"
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line.lower()]
    return f": {lines[0].strip():.200}" if lines and "Weights only load failed" not in lines[0] else ""

"""A tensor that has not been read yet: its dtype, its shape, and where its bytes are.

Adapters and checkpoints are made of these references, so that headers alone answer `inspect` (no torch import), and
a merge holds only the rows it is working on. A reference can be viewed (transposed, reshaped, narrowed) without
reading; the views are replayed when `read` fetches the numbers.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

from loratool.errors import InvalidFile, Problem

if TYPE_CHECKING:
    import torch

# Bits per element of every dtype a safetensors header can name.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

FLOATS = ("F64", "F32", "F16", "BF16")  # what adapters are made of
MERGEABLE = (*FLOATS, "F8_E4M3", "F8_E5M2")  # what a merge rounds to: fp8 without a scale is a float like any other

_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

OWN_PAGES = 1 << 18  # bytes from which on memory is not left to malloc
CHUNK = 1 << 20  # bytes moved at a time: large enough for sequential I/O, small enough for the cache

Shape = tuple[int, ...]


def is_int(value: object) -> bool:
    """Whether a value out of JSON or a pickle is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(value: Any) -> Any:
    """A number out of a config as the whole number that it is: 4 for 4.0. Anything else as it stands."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    >>> torch_dtype("BF16")
    torch.bfloat16
    """
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    short = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in _TORCH_NAMES.items() if torch_name == short)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, in row-major order, without a copy."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tensor on the CPU, not set to anything.

    A large one gets pages of its own, which go back to the system with it. malloc would keep them: glibc takes blocks
    of up to 32 MB for ordinary ones once a first of their size was freed, and holes between others stay resident.
    """
    import torch

    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < OWN_PAGES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).reshape(shape)


def converted(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out.copy_(values)`, in a sixth of the time where 8-bit floating point becomes wider on a CPU: by a table."""
    import torch

    narrow = values.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    if not narrow or out.element_size() == 1 or values.device.type != "cpu" or not values.is_contiguous():
        return out.copy_(values)
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(values.dtype).to(out.dtype)
    index = values.view(torch.uint8).view(-1).int()
    torch.index_select(table, 0, index, out=out.view(-1))
    return out


def extremes(values: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest element; NaN if there is any. Quick passes, where `isfinite().all()` is slow."""
    if not values.numel():
        return 0.0, 0.0
    values = values.detach()
    values = values.float() if values.element_size() == 1 else values  # torch has no order of fp8
    return float(values.amin()), float(values.amax())


def all_finite(values: torch.Tensor) -> bool:
    return all(math.isfinite(value) for value in extremes(values))


class FileState(NamedTuple):
    """An input file as it was when it was first read."""

    path: Path
    size: int
    mtime: int  # nanoseconds
    file: tuple[int, int]  # device and inode: another file may have the same size and time

    @classmethod
    def of(cls, path: Path) -> FileState:
        return cls.noted(path, path.stat())

    @classmethod
    def noted(cls, path: Path, stat: os.stat_result) -> FileState:
        return cls(path, stat.st_size, stat.st_mtime_ns, (stat.st_dev, stat.st_ino))

    def check(self) -> None:
        """Raises InvalidFile if the file is another one by now."""
        try:
            same = FileState.of(self.path) == self
        except OSError:
            same = False
        if not same:
            raise InvalidFile(Problem("E-CHANGED", "it was changed while it was read", str(self.path), "run it again"))


class Data(Protocol):
    """Where the bytes of a stored tensor are: in files (`path` is the first, `states` are as they were), or not."""

    @property
    def path(self) -> Path | None: ...

    @property
    def states(self) -> tuple[FileState, ...]: ...

    def load(self, dtype: str, shape: Shape) -> torch.Tensor: ...

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]: ...


@runtime_checkable
class ByRows(Protocol):
    """Data that is made some rows at a time."""

    def rows(self, start: int, stop: int, columns: int) -> torch.Tensor:
        """Rows start:stop of the tensor seen as a matrix of `columns`, contiguous."""


@runtime_checkable
class InOrder(Protocol):
    """Data of which a part can be read without the rest."""

    def after(self, elements: int, dtype: str) -> Data:
        """What comes after so many elements, in row-major order."""


@dataclass(frozen=True)
class FileSpan:
    """Bytes of a file, from `offset` on."""

    path: Path
    offset: int
    state: FileState | None = field(default=None, compare=False, repr=False)

    @property
    def states(self) -> tuple[FileState, ...]:
        return () if self.state is None else (self.state,)

    def after(self, elements: int, dtype: str) -> FileSpan:
        return replace(self, offset=self.offset + elements * DTYPE_BITS[dtype] // 8)

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        tensor = empty(shape, torch_dtype(dtype))
        if tensor.numel():
            with open_to_read(self.path) as file:
                file.seek(self.offset)
                read_exactly(file, as_bytes(tensor), self.path)
        return tensor

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        left = math.prod(shape) * DTYPE_BITS[dtype] // 8
        buffer = memoryview(bytearray(min(left, CHUNK)))
        with open_to_read(self.path) as file:
            file.seek(self.offset)
            while left:
                part = buffer[: min(left, len(buffer))]
                read_exactly(file, part, self.path)
                yield part
                left -= len(part)


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor that somebody holds already. `storage` is equal for tensors that share their memory."""

    tensor: torch.Tensor
    storage: tuple[Any, ...] = ()
    path: None = None
    states: tuple[FileState, ...] = ()

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        return self.tensor.detach().cpu().reshape(shape)

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        yield as_bytes(self.load(dtype, shape))


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor that is made when it is needed, out of others or of numbers in a config."""

    make: Callable[[], torch.Tensor]
    path: None = None
    states: tuple[FileState, ...] = ()

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        return self.make().reshape(shape)

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        yield as_bytes(self.make())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system refuses in this block is an error of this input, not of an output, and it is told by name."""
    try:
        yield
    except OSError as error:
        raise InvalidFile(Problem("E-READ", f"can not be read: {error.strerror or error}", str(path))) from error


def open_to_read(path: Path) -> FileIO:
    """A file opened unbuffered."""
    with reading(path):
        return path.open("rb", buffering=0)


def read_exactly(file: BinaryIO | FileIO, buffer: memoryview, path: Path) -> None:
    """Fill `buffer` from an unbuffered file; a short file is an error, not a short tensor."""
    done = 0
    while done < len(buffer):
        with reading(path):
            count = file.readinto(buffer[done:])  # type: ignore[union-attr]  # both of them have it
        if not count:
            raise InvalidFile(Problem("E-CHANGED", "the file became shorter while it was read", str(path)))
        done += count


@dataclass(frozen=True)
class TensorRef:
    """One tensor of a file (or of memory), as stored, seen through zero or more views.

    `name` is the name it is stored under, for messages. `dtype` is a safetensors dtype name; `shape` is the shape
    after the views.
    """

    name: str
    dtype: str
    shape: Shape
    data: Data
    stored_shape: Shape
    views: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str = "") -> TensorRef:
        """A reference to a tensor in memory."""
        shape = tuple(tensor.shape)
        return cls(name, dtype_name(tensor.dtype), shape, InMemory(tensor), shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def in_order(self) -> bool:
        """Whether `narrow` along dim 0 is to read so many rows, and no others."""
        return not self.views and isinstance(self.data, InOrder)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8

    def permute(self, *dims: int) -> TensorRef:
        return replace(self, shape=tuple(self.shape[d] for d in dims), views=(*self.views, ("permute", dims)))

    @property
    def T(self) -> TensorRef:
        """The transposed view of a matrix: [a, b] -> [b, a]."""
        return self.permute(1, 0)

    def reshape(self, *shape: int) -> TensorRef:
        if shape == self.shape:
            return self
        if not self.views:
            return replace(self, shape=shape, stored_shape=shape)
        return replace(self, shape=shape, views=(*self.views, ("reshape", shape)))

    def narrow(self, dim: int, start: int, length: int) -> TensorRef:
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        if dim == 0 and not self.views and isinstance(self.data, InOrder):  # only these rows are then read
            data = self.data.after(start * math.prod(self.shape[1:]), self.dtype)
            return replace(self, shape=shape, stored_shape=shape, data=data)
        return replace(self, shape=shape, views=(*self.views, ("narrow", (dim, start, length))))

    def select(self, index: int) -> TensorRef:
        """The `index`-th slice along dim 0: [E, ...] -> [...]."""
        return self.narrow(0, index, 1).reshape(*self.shape[1:])

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Fetch the numbers: a CPU tensor of `shape`, converted to `dtype` if one is given."""
        tensor = self.data.load(self.dtype, self.stored_shape)
        for verb, arguments in self.views:
            tensor = tensor.narrow(*arguments) if verb == "narrow" else getattr(tensor, verb)(arguments)
        return tensor if dtype in (None, tensor.dtype) else converted(tensor, empty(tensor.shape, dtype))

    def chunks(self) -> Iterator[memoryview]:
        """The raw little-endian bytes in row-major order, a piece at a time. A piece is only valid until the next."""
        if self.views:
            yield as_bytes(self.read())
        else:
            yield from self.data.chunks(self.dtype, self.stored_shape)

    def digest(self, function: str = "blake3") -> str:
        """BLAKE3 (or SHA-256) of the raw bytes, as ``blake3:HEX``. The shape and dtype are not part of it."""
        from blake3 import blake3

        hasher = hashlib.sha256() if function == "sha256" else blake3()
        for chunk in self.chunks():
            hasher.update(chunk)
        return f"{function}:{hasher.hexdigest()}"


def files_of(refs: Iterable[TensorRef]) -> set[FileState]:
    """The files that tensors come from, as they were when they were first read."""
    return {state for ref in refs for state in ref.data.states}

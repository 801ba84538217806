"""Tasks of a plan on other machines that see the same files: what is sent there, and what is done there.

A call has everything it needs: absolute paths and offsets of base and output, and the factors of its updates, by path
and offset too, or as bytes where they lie in no file that can be read in part. Never bytes of the base.

A call writes its own range of a file, flushes it (only the machine that wrote can), and may be run any number of times:
it writes the same bytes at the same place. So a worker that was taken for lost, whose call is done again, does no harm
by going on: while the output is made, and after it has got its name, it writes what is there already; what was removed
meanwhile it does not find, or nobody ever will. The same bytes need the same kind of CPU, though: the last bits of
float32 sums differ between kinds. `reproducible` gives the same bits on all of them.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from loratool.errors import InvalidFile, LoratoolError, OutputRefused, Problem
from loratool.gguf import Q8Span
from loratool.layout import Change, Copy
from loratool.pickles import Pickled
from loratool.pieces import Pieces
from loratool.plan import refuse_device
from loratool.quantised import Dequantised
from loratool.requantise import Requantiser
from loratool.resume import Journal
from loratool.tasks import Settings, run_task
from loratool.tensors import CHUNK, FileSpan, FileState, Shape, TensorRef, files_of, torch_dtype
from loratool.undo import TensorRecorder
from loratool.undoing import Written
from loratool.version import TOOL

if TYPE_CHECKING:
    import torch

INSTALL = "install the same releases of loratool and torch on all workers (and on Dask's scheduler)"
SHARE = "run workers where this path is the same on a shared file system, or keep base, adapters and output on one"


# --- what is sent ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Carried:
    """A tensor that travels with its task: numbers of an adapter."""

    raw: bytes = field(repr=False)
    path: None = None
    states: tuple[FileState, ...] = ()

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        import torch

        if not self.raw:
            return torch.empty(shape, dtype=torch_dtype(dtype), device="cpu")
        return torch.frombuffer(bytearray(self.raw), dtype=torch_dtype(dtype)).reshape(shape)

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        data = memoryview(self.raw)
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


def lies_in_files(ref: TensorRef) -> bool:
    """Whether a path and an offset (or a key) are enough to read a tensor on another machine."""
    if isinstance(ref.data, Dequantised):
        return all(map(lies_in_files, ref.data.scheme.parts))
    if isinstance(ref.data, Pieces):
        return all(lies_in_files(piece.ref) for piece in ref.data.pieces)
    return isinstance(ref.data, FileSpan | Q8Span | Pickled)


def factors(task: Copy | Change) -> list[TensorRef]:
    """The tensors of a task that are an adapter's."""
    updates = task.tensor.updates if isinstance(task, Change) else ()
    return [ref for item, _ in updates for ref in item.update.components().values()]


def sources(task: Copy | Change) -> list[TensorRef]:
    """The tensors of a task that are the base's."""
    if isinstance(task, Copy):
        return [task.source]
    found = [task.tensor.source, task.tensor.original]
    return [ref for ref in found if ref is not None]


def portable(value: Any, known: dict[int, Any] | None = None) -> Any:
    """A task, or any part of one, so that it can be sent: paths absolute, and factors that lie in no file read.

    What was the same object stays it, `known` by its id: a pickled base is opened once by a call.
    """
    known = {} if known is None else known
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, TensorRef) and not lies_in_files(value):
        raw = b"".join(map(bytes, value.chunks()))
        return TensorRef(value.name, value.dtype, value.shape, Carried(raw), value.shape)
    if isinstance(value, tuple):
        parts = [portable(part, known) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    if id(value) not in known:
        own = {part.name: portable(getattr(value, part.name), known) for part in fields(value) if part.init}
        known[id(value)] = replace(value, **own)
    return known[id(value)]


@dataclass(frozen=True)
class Site:
    """What all workers must see and have alike: the staging folder, known by its journal; torch; what computes."""

    folder: Path
    journal: Path
    first_line: str
    device: str
    inputs: tuple[FileState, ...]
    torch: str

    @classmethod
    def of(cls, folder: Path, journal: Journal, device: str, inputs: Sequence[FileState]) -> Site:
        import torch

        return cls(
            folder.absolute(),
            journal.path.absolute(),
            journal.first_line,
            device,
            portable(tuple(inputs)),
            str(torch.__version__),
        )

    def packed(self) -> tuple[str, bytes]:
        """What `look` takes."""
        return TOOL, pickle.dumps(self)

    def call(self, name: str, tasks: Sequence[Copy | Change], settings: Settings) -> tuple[str, bytes]:
        """Some tasks of one file as what `perform` takes."""
        here = replace(self, inputs=())  # the tasks know their own
        return TOOL, pickle.dumps(_Call(here, self.folder / name, portable(tuple(tasks)), settings))


@dataclass(frozen=True)
class _Call:
    site: Site
    path: Path  # the file that is written
    tasks: tuple[Copy | Change, ...]
    settings: Settings


# --- what is done there ----------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A worker's answer to `look`: its machine, and what is wrong there, with what helps."""

    host: str
    wrong: tuple[tuple[str, str], ...]


class Recorded(NamedTuple):
    """What a `TensorRecorder` has gathered, as it is sent back: `norms` are arrays of float64."""

    height: int
    blocks: list[bytes]
    norms: list[Any]

    def recorder(self) -> TensorRecorder:
        import torch

        found = TensorRecorder()
        found.height, found.blocks = self.height, self.blocks
        found.norms = [torch.from_numpy(norm) for norm in self.norms]
        return found


class Report(NamedTuple):
    """What is known of the tensors of a call, by name; or the error that ended it.

    An error is sent back as a value, so that it can not be taken for one of the executor's.
    """

    written: Mapping[str, Written]
    undo: Mapping[str, Recorded]
    error: Exception | None = None


def look(tool: str, raw: bytes) -> Seen:
    """Whether calls can be performed here. `raw` is only unpacked by the release that has packed it."""
    host = f"{socket.gethostname()}, process {os.getpid()}"
    if tool != TOOL:
        return Seen(host, ((f"has {TOOL}, not {tool}", INSTALL),))
    return Seen(host, tuple(_wrong(cast(Site, pickle.loads(raw)))))


def perform(tool: str, raw: bytes) -> Report:
    """Run the tasks of a call, in this thread."""
    try:
        if tool != TOOL:
            raise OutputRefused(_refusal(f"has {TOOL}, not {tool}", INSTALL))
        call = cast(_Call, pickle.loads(raw))
        for what, hint in _wrong(call.site):  # workers may join at any time, and machines lose their mounts
            raise OutputRefused(_refusal(what, hint))
        return _performed(call)
    except Exception as error:
        return Report({}, {}, error)


def _performed(call: _Call) -> Report:
    written: dict[str, Written] = {}
    undo: dict[str, Recorded] = {}
    requantiser = Requantiser()  # scales and codes of a weight in two files are two calls: each computes the scales
    with _one_thread(), _opened(call.path) as out:
        for task in call.tasks:
            for state in files_of((*sources(task), *factors(task))):
                if not _is_there(state):
                    raise InvalidFile(Problem("E-CHANGED", "it was changed while it was read", str(state.path)))
            known, recorder = run_task(task, out, lambda _: None, call.settings, requantiser)
            if isinstance(task, Change) and known is not None:
                written[task.tensor.name] = known
                if recorder is not None:
                    norms = [norm.numpy() for norm in recorder.norms]
                    undo[task.tensor.name] = Recorded(recorder.height, recorder.blocks, norms)
        os.fsync(out.fileno())
    return Report(written, undo)


def _opened(path: Path) -> BinaryIO:
    """A file to write a range of. Not to read: an NFS client that may read completes the pages at both ends of a range
    with what it believes is beside it, and writes them whole, over what a neighbour has written."""
    return open(path, "wb", buffering=0, opener=lambda name, _: os.open(name, os.O_WRONLY))


def _refusal(what: str, hint: str) -> Problem:
    return Problem("E-WORKER", f"a worker on {socket.gethostname()} {what}", hint=hint)


def _wrong(site: Site) -> Iterator[tuple[str, str]]:
    """Why this machine can not do what is asked."""
    import torch

    if torch.__version__ != site.torch:
        yield f"has torch {torch.__version__}, not {site.torch}: bits could differ", INSTALL
    try:
        refuse_device(site.device)
    except LoratoolError as error:
        yield f"has no device {site.device}: {error.message}", error.hint
    try:
        with site.journal.open(encoding="utf-8") as journal:
            seen = journal.readline() == site.first_line
    except OSError:
        seen = False
    if not seen or not os.access(site.folder, os.W_OK):
        yield f"{'can not write to' if seen else 'does not see'} {site.folder}", SHARE
    if lost := [state for state in site.inputs if not _is_there(state)]:
        more = f" and {len(lost) - 1} more files" if lost[1:] else ""
        yield f"does not see {lost[0].path} as it is here{more}", SHARE


def _is_there(state: FileState) -> bool:
    """Whether a path leads to the same file here. Devices have other numbers on each machine, and times may be cut."""
    try:
        found = state.path.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns // 10**9) == (state.size, state.mtime // 10**9)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread, as in the workers of a local merge: it is an executor's to run calls side by side."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Folders of torch.distributed.checkpoint: a pickled `.metadata`, and tensors in pieces in `.distcp` files.

`.metadata` is not trusted: every piece is looked up in its file, and all of them must tile their tensor.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from loratool import places
from loratool.container import MAX_DIM, read_header
from loratool.distcp.description import Chunk, Index, Metadata, Properties, Stored, TensorEntry, is_shape, unpickled
from loratool.errors import ChoiceNeeded, InvalidFile, LoratoolError, Problem, Unsupported
from loratool.names import listed
from loratool.pickles import STATE_KEYS, Dtype, tensor_within
from loratool.pieces import Piece, Pieces, untiled
from loratool.tensors import DTYPE_BITS, FileSpan, FileState, Shape, TensorRef, is_int, reading

SHARD = 5_000_000_000  # bytes of tensors in one file of an output

_FILE = re.compile(r"[^/\\:\x00]{1,255}")
_INCOMPLETE = "incomplete download, or a save that was interrupted?"


@dataclass(frozen=True)
class Distributed:
    """What a folder holds: the tensors of its state dict, by the names they have in it."""

    tensors: Mapping[str, TensorRef]
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    def shards(self) -> list[tuple[str, dict[str, TensorRef]]]:
        """The tensors in files of a bearable size for an output, each with the stem of its name."""
        groups: list[dict[str, TensorRef]] = [{}]
        size = 0
        for name, ref in self.tensors.items():
            if groups[-1] and size + ref.nbytes > SHARD:
                groups.append({})
                size = 0
            groups[-1][name] = ref
            size += ref.nbytes
        if len(groups) == 1:
            return [("model", groups[0])]
        return [(f"model-{n:05}-of-{len(groups):05}", group) for n, group in enumerate(groups, 1)]


class _Wanted(NamedTuple):
    """One piece of a tensor, and where it is said to be."""

    name: str
    full: str  # with the keys that its state dict lies under
    dtype: str
    offsets: Shape
    sizes: Shape
    start: int
    length: int

    def __str__(self) -> str:
        return f"the piece of {self.name} at {list(self.offsets)}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * DTYPE_BITS[self.dtype] // 8


@dataclass
class _Reader:
    """One folder, while it is read; `problems` are all that were found."""

    folder: Path
    metadata: Metadata
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, code: str, what: str, hint: str = "") -> None:
        self.problems.append(Problem(code, what, str(self.folder), hint))


def read(folder: Path) -> Distributed:
    """Read what `.metadata` says, and look up every piece of the state dict. No numbers are read.

    Raises InvalidFile with all problems found, ChoiceNeeded for several state dicts, Unsupported.
    """
    path = folder / places.METADATA
    metadata = unpickled(path)
    listing = metadata.get("state_dict_metadata")
    if not isinstance(listing, dict) or not all(isinstance(name, str) for name in listing):
        raise InvalidFile(Problem("E-PICKLE", "it lists no tensors by their names", str(path)))
    names, notes = _state_dict(listing, metadata.get("planner_data"), folder)
    reader = _Reader(folder, metadata)
    found = _read(reader, {name: (full, listing[full]) for name, full in names.items()})
    if reader.problems:
        raise InvalidFile(reader.problems)
    files = {path, *folder.glob(f"*{places.PIECES}")} | {
        state.path for ref in found.values() for state in ref.data.states
    }
    return Distributed(found, tuple(sorted(files)), tuple(notes))


# --- which tensors ---------------------------------------------------------------------------------------------------


def _state_dict(listing: Mapping[str, Any], planner: object, folder: Path) -> tuple[dict[str, str], Iterator[str]]:
    """The full names of the one state dict's tensors, by the names in it; and notes on what is no part of it.

    torch joins the keys of nested dicts to a name, and `planner_data` says what they were.
    """
    paths = {full: _path(planner, full) for full in listing}
    found: dict[tuple[object, ...], dict[str, str]] = defaultdict(dict)
    for full, path in paths.items():
        place = _place(path)
        if place is not None and isinstance(listing[full], TensorEntry):
            root, name = place
            if name in found[root]:
                raise InvalidFile(Problem("E-DUPLICATE", f"two of its tensors are called {name}", str(folder)))
            found[root][name] = full
    counters = [full for full in found.get((), {}).values() if _numel(listing[full]) > 1]
    if len(found) > 1 and () in found and not counters:
        del found[()]  # steps and the like, beside the state dict
    if len(found) > 1:
        what = f"tensors lie at several places: {', '.join('.'.join(map(str, r)) or 'the top level' for r in found)}"
        hint = "save one state dict to a folder of its own"
        raise ChoiceNeeded(Problem("E-AMBIGUOUS", what, str(folder), hint))
    if not found:
        keys = listed(list(dict.fromkeys(str(path[0]) for path in paths.values())))
        raise InvalidFile(Problem("E-EMPTY", f"no state dict in it; its keys are {keys}", str(folder)))
    names = next(iter(found.values()))
    return names, _left_out(listing, paths, {*names.values()}, next(iter(found)))


def _path(planner: object, full: str) -> tuple[object, ...]:
    path = planner.get(full) if isinstance(planner, dict) else None
    known = isinstance(path, tuple) and path and all(isinstance(part, str) or is_int(part) for part in path)
    return path if known and isinstance(path, tuple) else (full,)


def _place(path: tuple[object, ...]) -> tuple[tuple[object, ...], str] | None:
    """Under which keys a state dict lies, and the name in it; None for what is in none, as an optimizer's tensors."""
    for depth, part in enumerate(path[:-1]):
        if part in STATE_KEYS:
            return path[: depth + 1], ".".join(map(str, path[depth + 1 :]))
        if str(part).startswith("opt"):
            return None
    return ((), str(path[0])) if len(path) == 1 else None


def _numel(entry: TensorEntry) -> int:
    size = entry.get("size")
    return math.prod(size) if is_shape(size) else 2


def _left_out(
    listing: Mapping[str, Any],
    paths: Mapping[str, tuple[object, ...]],
    read: set[str],
    root: tuple[object, ...],
) -> Iterator[str]:
    tensors: Counter[str] = Counter()
    objects: Counter[str] = Counter()
    for full, path in paths.items():
        if full not in read:
            label = full if root and path[: len(root)] == root else str(path[0])
            (tensors if isinstance(listing[full], TensorEntry) else objects)[label] += 1
    if tensors:
        names = listed([f"{label} ({count:,})" for label, count in tensors.items()])
        yield f"tensors that are no part of its state dict are left out: {names}"
    if objects:
        names = listed([*objects])
        yield f"{objects.total():,} objects that are no tensors are left out: {names}"


# --- where they lie --------------------------------------------------------------------------------------------------


def _read(reader: _Reader, entries: Mapping[str, tuple[str, Any]]) -> dict[str, TensorRef]:
    """Every tensor, as the pieces that `.metadata` says it is in; what is wrong goes to the reader's problems."""
    stored = _stored(reader)
    by_file: dict[str, list[_Wanted]] = defaultdict(list)
    shapes: dict[str, tuple[str, Shape]] = {}
    for name, (full, entry) in entries.items():
        described = _described(reader, full, entry)
        if described is None:
            continue
        dtype, shape, chunks = described
        shapes[name] = dtype, shape
        for offsets, sizes in chunks:
            info = stored.get((full, offsets))
            if info is None:
                reader.wrong("E-INDEX", f"no file is named for the piece of {name} at {list(offsets)}", _INCOMPLETE)
            elif (file := _file(reader, name, info)) is not None:
                wanted = _Wanted(name, full, dtype, offsets, sizes, info.get("offset"), info.get("length"))
                by_file[file].append(wanted)
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for file, its_own in by_file.items():
        for one, ref in _in_file(reader, reader.folder / file, its_own):
            pieces[one.name].append(Piece(one.offsets, ref))
    if reader.problems:
        return {}
    return {name: _joined(name, *shapes[name], sorted(pieces[name], key=_offsets), reader.folder) for name in shapes}


def _offsets(piece: Piece) -> Shape:
    return piece.offsets


def _stored(reader: _Reader) -> dict[tuple[str, Shape], Stored]:
    """Where every piece lies, by the full name of its tensor and its offsets."""
    found: dict[tuple[str, Shape], Stored] = {}
    listing = reader.metadata.get("storage_data")
    for index, info in listing.items() if isinstance(listing, dict) else ():
        if not isinstance(index, Index) or not isinstance(info, Stored):
            reader.wrong("E-INDEX", "its list of places has something else in it")
            break
        name, offsets = index.get("fqn"), index.get("offset")
        if not isinstance(name, str) or not is_shape(offsets):
            continue  # an object
        if (name, offsets) in found:
            reader.wrong("E-DUPLICATE", f"the piece of {name} at {list(offsets)} has two places")
        found[name, offsets] = info
    return found


def _described(reader: _Reader, full: str, entry: TensorEntry) -> tuple[str, Shape, list[tuple[Shape, Shape]]] | None:
    """dtype and shape of a tensor, and offsets and sizes of its pieces that are not empty, which tile it."""
    properties, shape, chunks = entry.get("properties"), entry.get("size"), entry.get("chunks")
    state = properties.state if isinstance(properties, Properties) else None
    if isinstance(state, dict):
        state = (state.get("dtype"), state.get("layout", "torch.strided"))
    if not isinstance(state, tuple) or len(state) < 2 or not is_shape(shape) or not isinstance(chunks, list):
        reader.wrong("E-TENSOR", f"the description of {full} is incomplete")
        return None
    dtype, layout = state[:2]
    if not isinstance(dtype, Dtype):
        reader.wrong("E-TENSOR", f"{full} has the dtype {dtype!r:.40}, which is not read")
        return None
    if layout != "torch.strided":
        reader.wrong("E-TENSOR", f"{full} is {layout!r:.40}: only dense tensors are read", "save it dense")
        return None
    found: dict[tuple[Shape, Shape], None] = {}  # replicas may be listed twice
    for chunk in chunks:
        offsets, sizes = (chunk.get("offsets"), chunk.get("sizes")) if isinstance(chunk, Chunk) else (None, None)
        if not is_shape(offsets) or not is_shape(sizes) or not len(offsets) == len(sizes) == len(shape):
            reader.wrong("E-TENSOR", f"a piece of {full} has another number of dimensions, or none")
            return None
        if 0 not in sizes:
            found[offsets, sizes] = None
    try:
        what = untiled(shape, [tuple((a, a + b) for a, b in zip(*box, strict=True)) for box in found])
    except ValueError as error:
        reader.wrong("E-LIMIT", f"{full} has {error}")
        return None
    if what:
        reader.wrong("E-LAYOUT", f"{full}: {what}", _INCOMPLETE if "missing" in what else "")
        return None
    return str(dtype), shape, list(found)


def _file(reader: _Reader, name: str, info: Stored) -> str | None:
    """The name of the file that a piece lies in, in this very folder."""
    file, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(file, str) or not _FILE.fullmatch(file) or file in (".", ".."):
        reader.wrong("E-INDEX", f"a piece of {name} is said to be outside of the folder: {file!r:.80}")
        return None
    if not (is_int(start) and is_int(length) and 0 <= start <= MAX_DIM and 0 <= length <= MAX_DIM):
        reader.wrong("E-LAYOUT", f"a piece of {name} is said to be at {start!r:.40}, {length!r:.40} bytes long")
        return None
    if info.get("transform_descriptors"):
        what = f"{name} is transformed ({info.get('transform_descriptors')!r:.60}), which only its writer can undo"
        raise Unsupported(Problem("E-UNSUPPORTED", what, str(reader.folder), "save it without extensions"))
    return file


def _in_file(reader: _Reader, path: Path, wanted: Sequence[_Wanted]) -> Iterator[tuple[_Wanted, TensorRef]]:
    """The pieces in one file, each checked against what is said of it."""
    if not path.is_file():
        reader.wrong("E-INDEX", f"{path.name} is missing, with {len(wanted):,} pieces of tensors", _INCOMPLETE)
        return
    places.refuse_stand_in(path)
    with reading(path), path.open("rb") as file:
        state = FileState.of(path)
        plain = _safetensors(path, file)
        for one in wanted:
            if one.start + one.length > state.size:
                what = f"{one} ends at byte {one.start + one.length:,} of {path.name}, which has {state.size:,}"
                reader.wrong("E-LAYOUT", what, _INCOMPLETE)
                continue
            if one.nbytes > one.length:
                what = f"{one} needs {one.nbytes:,} bytes for {one.dtype} {list(one.sizes)}, and has {one.length:,}"
                reader.wrong("E-TENSOR", what)
                continue
            view = cast(BinaryIO, io.BufferedReader(_View(file, one.start, one.length)))
            try:
                ref = plain.get(one.full) or tensor_within(view, one.start, state, one.name)
            except LoratoolError as error:
                reader.problems += error.problems
                continue
            if (ref.dtype, ref.shape) != (one.dtype, one.sizes):
                what = f"{one} is {ref.dtype} {list(ref.shape)} in {path.name}, and {one.dtype} {list(one.sizes)} by"
                reader.wrong("E-TENSOR", f"{what} {places.METADATA}")
                continue
            yield one, ref


def _safetensors(path: Path, file: BinaryIO) -> Mapping[str, TensorRef]:
    """The pieces in a file that was written with the serialization format SAFETENSORS, by the full names."""
    start = file.read(9)
    is_header = start[8:] == b"{" and int.from_bytes(start[:8], "little") + 8 <= path.stat().st_size
    return read_header(path).tensors if is_header else {}


class _View(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length = file, start, length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise ValueError("a place before its beginning")
        self.position = origin + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self.length - self.position)]
        self.file.seek(self.start + self.position)
        found = self.file.read(len(wanted))
        wanted[: len(found)] = found
        self.position += len(found)
        return len(found)


def _joined(name: str, dtype: str, shape: Shape, pieces: Sequence[Piece], folder: Path) -> TensorRef:
    if not pieces:
        return TensorRef(name, dtype, shape, FileSpan(folder / places.METADATA, 0), shape)
    if len(pieces) == 1:
        return replace(pieces[0].ref, name=name)
    return TensorRef(name, dtype, shape, Pieces(shape, tuple(pieces)), shape)

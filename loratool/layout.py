"""The files of an output checkpoint: which bytes are copied from where, and which tensors are computed.

Shard names, tensor order, dtypes and untouched bytes are the base's. Every task knows its own place in the output,
so tasks can run in any order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from loratool.adapter import Targeted
from loratool.archives import RECEIPT
from loratool.checkpoint import Checkpoint, Shard, read_json
from loratool.container import encode_header
from loratool.errors import Problem
from loratool.quantised.comfy import HEADER_KEY
from loratool.tensors import DTYPE_BITS, FileSpan, Shape, TensorRef, reading


class Weighted(NamedTuple):
    """An update with the weight its adapter was given."""

    item: Targeted
    weight: float


@dataclass(frozen=True)
class NewTensor:
    """What becomes of one tensor: computed from `source` (None: it is new, or its shape is) by `updates`.

    `original` is the base's tensor even where its shape is another one. `reversible` is whether the updates can be
    subtracted again, as all are additive. `part` says which part of a weight that is quantised again this is: "codes"
    or "scales"; dtype and shape are then the part's, and `source` is the weight.
    """

    name: str
    source: TensorRef | None
    dtype: str
    shape: Shape
    updates: tuple[Weighted, ...] = ()
    reversible: bool = True
    original: TensorRef | None = None
    part: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Copy:
    """Bytes taken over as they are."""

    source: TensorRef
    offset: int

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


@dataclass(frozen=True)
class Change:
    """A tensor computed block by block and written at `offset`."""

    tensor: NewTensor
    offset: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


@dataclass(frozen=True)
class OutputFile:
    """One weights file: its header, its size, and the tasks that fill it. `name` is relative to the output's folder."""

    name: str
    header: bytes
    size: int
    tasks: tuple[Copy | Change, ...]
    tensors: tuple[tuple[str, str, Shape], ...]  # (name, dtype, shape) in order of offset
    metadata: Mapping[str, str]
    same_as: Path | None = None  # the input file, where the output is to be equal to it
    made_of: tuple[TensorRef | NewTensor, ...] = ()  # what each of `tensors` is: stored so, or computed

    def with_metadata(self, metadata: Mapping[str, str]) -> OutputFile:
        """The same file with other metadata; tasks move with the header's length."""
        header = encode_header(self.tensors, metadata)
        shift = len(header) - len(self.header)
        tasks = tuple(replace(task, offset=task.offset + shift) for task in self.tasks)
        return replace(self, header=header, size=self.size + shift, tasks=tasks, metadata=metadata, same_as=None)


def output_files(
    base: Checkpoint,
    changes: Mapping[str, NewTensor],
    additions: Sequence[NewTensor] = (),
    dropped: frozenset[str] = frozenset(),
) -> tuple[OutputFile, ...]:
    """The base's files with some tensors changed (by stored name), some added to the last file, some left out.

    A pipeline's files are those of its components, each with its own index. A pickled component that does not change
    is not among them: it stays as it is, as a companion.
    """
    if base.components:
        return tuple(
            file
            for name, part in base.components.items()
            for file in _component_files(name, part, changes, additions, dropped)
        )
    return tuple(
        _output_file(shard, changes, additions if shard is base.shards[-1] else (), dropped) for shard in base.shards
    )


def joined(base: Checkpoint, name: str) -> Checkpoint:
    """A checkpoint as one file of this name: the tensors of all its shards, in their order."""
    if len(base.shards) == 1 and base.index is None:
        return base
    tensors = {own: ref for shard in base.shards for own, ref in shard.tensors.items()}
    return replace(base, shards=(Shard(base.folder / name, tensors, base.metadata, None),), index=None)


def _component_files(
    component: str,
    part: Checkpoint,
    changes: Mapping[str, NewTensor],
    additions: Sequence[NewTensor],
    dropped: frozenset[str],
) -> Iterator[OutputFile]:
    """The files of one component, in its folder; tensors are called in its header what the component calls them."""
    prefix = f"{component}."
    own = {name.removeprefix(prefix): new for name, new in changes.items() if name.startswith(prefix)}
    new = [addition for addition in additions if addition.name.startswith(prefix)]
    gone = frozenset(name.removeprefix(prefix) for name in dropped if name.startswith(prefix))
    if part.pickled and not (own or new or gone):
        return
    bare = [_output_file(shard, own, new if shard is part.shards[-1] else (), gone, prefix) for shard in part.shards]
    yield from (replace(file, name=f"{component}/{file.name}") for file in bare)
    index = output_index(part, bare)
    if index is not None:
        # A file that is all header: what is written before any task, and never has one.
        yield OutputFile(f"{component}/{index[0]}", index[1], len(index[1]), (), (), {})


def _output_file(
    shard: Shard,
    changes: Mapping[str, NewTensor],
    additions: Sequence[NewTensor],
    dropped: frozenset[str],
    prefix: str = "",
) -> OutputFile:
    planned: list[TensorRef | NewTensor] = [
        changes.get(name, ref) for name, ref in shard.tensors.items() if name not in dropped
    ]
    planned += additions
    names = [name for name in shard.tensors if name not in dropped] + [
        new.name.removeprefix(prefix) for new in additions
    ]
    tensors = tuple((name, item.dtype, item.shape) for name, item in zip(names, planned, strict=True))
    metadata = {key: value for key, value in shard.metadata.items() if key != RECEIPT}  # it is of an earlier merge
    metadata = metadata if shard.header else {"format": "pt", **metadata}  # what transformers expects of a shard
    if dropped:  # nothing is quantised any more
        metadata = {key: value for key, value in metadata.items() if key != HEADER_KEY}
    header = encode_header(tensors, metadata)
    kept = tensors == tuple((name, ref.dtype, ref.shape) for name, ref in shard.tensors.items())
    kept &= shard.header is not None and metadata == shard.metadata
    if kept and shard.header:
        with reading(shard.path), shard.path.open("rb") as file:
            header = file.read(shard.header.size)  # nothing moves: the base's own header, to the byte
    tasks: list[Copy | Change] = []
    position = len(header)
    for item in planned:
        nbytes = item.nbytes
        if isinstance(item, NewTensor):
            tasks.append(Change(item, position))
        elif nbytes:
            _append_copy(tasks, item, position)
        position += nbytes
    untouched = kept and not any(isinstance(task, Change) for task in tasks)
    same_as = shard.path if untouched else None
    return OutputFile(output_name(shard), header, position, tuple(tasks), tensors, metadata, same_as, tuple(planned))


def _append_copy(tasks: list[Copy | Change], source: TensorRef, offset: int) -> None:
    """Add a copy, joined to the one before if both are neighbours in one file."""
    if isinstance(source.data, FileSpan) and not source.views:
        span = source.data
        source = _span(span, source.nbytes)
        last = tasks[-1] if tasks else None
        if isinstance(last, Copy) and isinstance(last.source.data, FileSpan):
            before, nbytes = last.source.data, last.source.nbytes
            if before.path == span.path and before.offset + nbytes == span.offset:
                tasks[-1] = Copy(_span(before, nbytes + source.nbytes), last.offset)
                return
    tasks.append(Copy(source, offset))


def _span(data: FileSpan, nbytes: int) -> TensorRef:
    return TensorRef(data.path.name, "U8", (nbytes,), data, (nbytes,))


def raw(path: Path, offset: int, nbytes: int) -> TensorRef:
    """Bytes of a file."""
    return _span(FileSpan(path, offset), nbytes)


def names_clash(base: Checkpoint) -> Iterator[Problem]:
    """Two weights files can not have one name in an output."""
    names = [output_name(shard) for shard in base.shards]
    if len({(shard.path.parent, name) for shard, name in zip(base.shards, names, strict=True)}) < len(names):
        yield Problem("E-OUTPUT", f"two weights files would have one name: {', '.join(names)}", str(base.path))


def output_name(shard: Shard) -> str:
    """The name a weights file gets in the output: pickles become safetensors, under the name loaders look for."""
    return f"{shard.stem}.safetensors" if shard.stem else _safetensors_name(shard.path)


def _safetensors_name(path: Path) -> str:
    if path.suffix == ".safetensors":
        return path.name
    return re.sub(r"^pytorch_model", "model", path.stem) + ".safetensors"


def output_index(base: Checkpoint, files: Sequence[OutputFile]) -> tuple[str, bytes] | None:
    """The index file (name, content) of a sharded output: the base's own bytes where they still hold."""
    if base.index is None and (base.components or len(files) == 1):
        return None
    weight_map = {name: file.name for file in files for name, _, _ in file.tensors}
    total = sum(file.size - len(file.header) for file in files)
    if base.index is None:  # pieces of a torch.distributed.checkpoint, in several files now
        made = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return "model.safetensors.index.json", (json.dumps(made, indent=2) + "\n").encode("utf-8")
    document = read_json(base.index)
    metadata = document.get("metadata")
    if document["weight_map"] == weight_map and isinstance(metadata, dict) and metadata.get("total_size") == total:
        with reading(base.index):
            return base.index.name, base.index.read_bytes()
    document["weight_map"] = dict(sorted(weight_map.items()))
    document["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    document["metadata"].pop("total_parameters", None)  # not recounted
    stem = base.index.name.removesuffix(".index.json")
    return _safetensors_name(Path(stem)) + ".index.json", (json.dumps(document, indent=2) + "\n").encode("utf-8")

"""A pickled checkpoint written again as one: the same archive, object description and all, with other numbers in it.

What is no tensor, nested dicts, ties and the order of everything stay, since the pickle in it is copied as it is. So no
tensor may change its dtype or shape, or come and go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loratool.archives import Archive, open_archive
from loratool.checkpoint import Checkpoint, Shard
from loratool.errors import LoratoolError, Problem
from loratool.layout import Change, Copy, NewTensor, OutputFile, raw
from loratool.pickles import Pickled, strewn
from loratool.tensors import DTYPE_BITS, Shape, TensorRef

_HINT = "a name that ends in .safetensors writes it as that"


@dataclass(frozen=True)
class Repacked:
    """An archive that is to be written again, and the storages that get other numbers."""

    archive: Archive
    file: OutputFile
    storages: tuple[str, ...]


def misfits(base: Checkpoint, changes: Mapping[str, NewTensor], others: bool) -> Iterator[Problem]:
    """Why the output can not be an archive like the base's; `others` is whether tensors come or go."""
    where = str(base.path)
    if others:
        what = "a .pth has the input's own tensors, and here some come or go"
        yield Problem("E-OUTPUT", what, where, _HINT)
    try:
        archive = open_archive(base.path)
    except LoratoolError as error:
        what = f"only what torch.save writes since 1.6 is written again as it is ({error.message})"
        yield Problem("E-OUTPUT", what, where, _HINT)
        return
    shard = base.shards[0]
    spans = {name: _span(archive, ref) for name, ref in shard.tensors.items()}
    spread = _everywhere(archive, shard)
    for name, new in changes.items():
        ref, span = shard.tensors[name], spans[name]
        if span is None or new.part:
            yield Problem("E-OUTPUT", f"{name} does not lie in one piece in the archive", where, _HINT)
        elif (new.dtype, new.shape) != (ref.dtype, ref.shape):
            what = f"{name} would be {new.dtype} {[*new.shape]}, and is {ref.dtype} {[*ref.shape]} in the archive"
            yield Problem("E-OUTPUT", what, where, _HINT)
        else:
            for other, where_it_is, place in spread[_key(ref)]:
                if other == name or place[0] >= span[1] or span[0] >= place[1]:
                    continue
                if spans.get(other) != span or other not in changes or changes[other].updates != new.updates:
                    what = f"{name} and {where_it_is} share some of their memory: one can not change without the other"
                    yield Problem("E-OUTPUT", what, where, _HINT)
                    break


def repacked(shard: Shard, changes: Mapping[str, NewTensor], name: str) -> Repacked:
    """The file `name` with these tensors changed. Its size is without a receipt."""
    archive = open_archive(shard.path)
    placed: list[tuple[int, int, NewTensor]] = []  # tied tensors lie at one place, and get the same numbers there
    for stored, new in changes.items():
        span = _span(archive, shard.tensors[stored])
        assert span is not None, "misfits() has looked"
        placed.append((*span, new))
    tasks: list[Copy | Change] = []
    at = 0
    for start, end, new in sorted(placed, key=lambda item: item[:2]):
        if start > at:
            tasks.append(Copy(raw(shard.path, at, start - at), at))
        tasks.append(Change(new, start))
        at = end
    tasks.append(Copy(raw(shard.path, at, archive.end - at), at))
    tensors = tuple((stored, ref.dtype, ref.shape) for stored, ref in shard.tensors.items())
    made_of = tuple(changes.get(stored, ref) for stored, ref in shard.tensors.items())
    file = OutputFile(name, b"", archive.end + archive.tail_size(None), tuple(tasks), tensors, {}, made_of=made_of)
    storages = {_key(shard.tensors[stored]) for stored in changes}
    return Repacked(archive, file, tuple(sorted(storages)))


def _span(archive: Archive, ref: TensorRef) -> tuple[int, int] | None:
    """Where a tensor's bytes lie in the archive, from and to; None where they are in pieces."""
    if not isinstance(ref.data, Pickled) or not ref.numel:
        return None
    _, key, offset, stride = ref.data.storage
    if any(size > 1 and step != own for size, step, own in zip(ref.shape, stride, _strides(ref.shape), strict=True)):
        return None
    start = archive.storage(key).start + offset * DTYPE_BITS[ref.dtype] // 8
    return start, start + ref.nbytes


def _everywhere(archive: Archive, shard: Shard) -> dict[str, list[tuple[str, str, tuple[int, int]]]]:
    """All tensors of the archive by storage, those beside the state dict too: the name in it ("" for those), where it
    is, and its first byte with the end of its last."""
    own = {ref.data.keys: name for name, ref in shard.tensors.items() if isinstance(ref.data, Pickled)}
    found: dict[str, list[tuple[str, str, tuple[int, int]]]] = {}
    for ref in strewn(archive.path):
        assert isinstance(ref.data, Pickled)
        _, key, offset, stride = ref.data.storage
        if ref.numel:
            width = DTYPE_BITS[ref.dtype] // 8
            start = archive.storage(key).start + offset * width
            last = sum((size - 1) * step for size, step in zip(ref.shape, stride, strict=True))
            place = (start, start + (last + 1) * width)
            found.setdefault(str(key), []).append((own.get(ref.data.keys, ""), ref.name, place))
    return found


def _strides(shape: Shape) -> list[int]:
    """Of a tensor in one piece, row by row."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _key(ref: TensorRef) -> str:
    assert isinstance(ref.data, Pickled)
    return str(ref.data.storage[1])

"""loratool's own file, as a convention like the others."""

from __future__ import annotations

from collections.abc import Mapping

from loratool import format as native_format
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.conventions.choices import Choices
from loratool.tensors import TensorRef

NAME = "native"
TITLE = "loratool adapter"


def detect(source: Checkpoint) -> bool:
    return len(source.shards) == 1 and native_format.is_native(source.metadata)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    shard = source.shards[0]
    return native_format.read(shard.path) if shard.header is None else native_format.adapter_of(shard.header)


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return {}

"""What a base's own ``config.json`` says of its architecture, where a layout depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.checkpoint import read_json
from loratool.errors import InvalidFile, Problem
from loratool.tensors import TensorRef, is_int, whole


@dataclass(frozen=True)
class Architecture:
    """The model type of transformers, and how its attention is divided into heads."""

    model_type: str
    heads: int
    kv_heads: int
    head_dim: int


def model_type_of(base: Mapping[str, TensorRef]) -> str:
    """The model type alone, "" where no config says it; the rest of the config need not be there."""
    path = _config_of(base)
    return "" if path is None else str(read_json(path).get("model_type", ""))


def architecture_of(base: Mapping[str, TensorRef]) -> Architecture | None:
    """The architecture that the config beside the base's weights describes; None if there is no config.

    Raises InvalidFile for a config whose numbers of heads are missing or impossible.
    """
    path = _config_of(base)
    if path is None:
        return None
    config = read_json(path)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    heads, kv_heads, head_dim, width = (whole(config.get(name)) for name in names)
    kv_heads = heads if kv_heads is None else kv_heads
    if head_dim is None and _is_count(heads) and _is_count(width):
        head_dim = width // heads
    if not all(_is_count(number) for number in (heads, kv_heads, head_dim)):
        what = f"num_attention_heads {heads!r}, num_key_value_heads {kv_heads!r}, head_dim {head_dim!r}: not all counts"
        raise InvalidFile(Problem("E-CONFIG", what, str(path), "take the config.json that belongs to the base"))
    return Architecture(str(config.get("model_type", "")), heads, kv_heads, head_dim)


def _config_of(base: Mapping[str, TensorRef]) -> Path | None:
    folder = next((ref.data.path.parent for ref in base.values() if ref.data.path is not None), None)
    path = None if folder is None else folder / "config.json"
    return path if path is not None and path.is_file() else None


def _is_count(value: object) -> bool:
    return is_int(value) and 1 <= value <= 2**31  # type: ignore[operator]  # is_int has looked

"""What a base's own ``config.json`` says of its architecture, where a layout depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.checkpoint import read_json
from loratool.errors import InvalidFile, Problem
from loratool.tensors import TensorRef, is_int


@dataclass(frozen=True)
class Architecture:
    """The model type of transformers, and how its attention is divided into heads."""

    model_type: str
    heads: int
    kv_heads: int
    head_dim: int


def architecture_of(base: Mapping[str, TensorRef]) -> Architecture | None:
    """The architecture that the config beside the base's weights describes; None if there is no config.

    Raises InvalidFile for a config whose numbers of heads are missing or impossible.
    """
    folder = next((ref.data.path.parent for ref in base.values() if ref.data.path is not None), None)
    if folder is None or not (folder / "config.json").is_file():
        return None
    path = folder / "config.json"
    config = read_json(path)
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    kv_heads = heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"]
    head_dim = config.get("head_dim")
    if head_dim is None and _is_count(heads) and _is_count(width):
        head_dim = width // heads  # type: ignore[operator]  # both have been looked at
    if not all(_is_count(number) for number in (heads, kv_heads, head_dim)):
        what = f"num_attention_heads {heads!r}, num_key_value_heads {kv_heads!r}, head_dim {head_dim!r}: not all counts"
        raise InvalidFile(Problem("E-CONFIG", what, str(path), "take the config.json that belongs to the base"))
    assert heads is not None and kv_heads is not None and head_dim is not None
    return Architecture(str(config.get("model_type", "")), heads, kv_heads, head_dim)


def _is_count(value: object) -> bool:
    return is_int(value) and 1 <= value <= 2**31  # type: ignore[operator]  # is_int has looked

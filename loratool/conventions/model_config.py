"""What the base's ``config.json`` says about its attention: some conventions store its rows in another order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.checkpoint import read_json
from loratool.errors import ChoiceNeeded, Problem
from loratool.tensors import TensorRef, is_int, whole


@dataclass(frozen=True)
class Heads:
    """Numbers of heads: `query` of them, and `key` of the keys and of the values."""

    query: int
    key: int


def whole_config(base: Mapping[str, TensorRef]) -> dict[str, Any]:
    """The config.json beside the base's weights; {} where there is none."""
    for ref in base.values():
        path = ref.data.path
        if path is not None and (file := path.parent / "config.json").is_file():
            return read_json(file)
    return {}


def model_config(base: Mapping[str, TensorRef]) -> dict[str, Any]:
    """The language model's part of `whole_config`."""
    config = whole_config(base)
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def heads_of(config: Mapping[str, Any], where: str) -> Heads:
    """Raises ChoiceNeeded where the config does not say what is needed."""
    query = whole(config.get("num_attention_heads"))
    key = whole(config.get("num_key_value_heads", query))
    numbers = {"num_attention_heads": query, "num_key_value_heads": key}
    for name, value in numbers.items():
        if not is_int(value) or value < 1 or query % value:
            what = f"the order of the query and key rows needs {name}, and the base's config.json says {value!r:.40}"
            hint = "put the model's own config.json beside the base's weights"
            raise ChoiceNeeded(Problem("E-CONFIG", what, where, hint))
    return Heads(*numbers.values())

"""PEFT's keys: which module a tensor belongs to, and which part of it. Saved and wrapped names, of all its methods."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from loratool.errors import Problem, Unsupported
from loratool.tensors import TensorRef

PREFIX = "base_model.model."

_LYCORIS = r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2"
# What follows the module path. Whole tensors (`.weight`, `.bias`, parameters of any name) have none of these.
# LoRA's factors are modules, with a weight; those of AdaLoRA, LoHa and LoKr are parameters, without.
PART = re.compile(
    r"^(?P<module>.*?)\.?(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta|trainable_tokens_delta"
    rf"|token_adapter\.base_layer\.weight|lora_A|lora_B|lora_E|ranknum|{_LYCORIS})$"
)
# The same parts with the adapter's name in them, as a wrapped model's state dict has them.
WRAPPED_PART = re.compile(
    rf"^(?P<before>(?:.*\.)?(?:lora_A|lora_B|lora_E|ranknum|{_LYCORIS}|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|trainable_tokens_delta|(?P<saved>modules_to_save)))"
    r"\.(?P<adapter>(?!weight$|bias$)[^.]+)(?P<after>\.(?(saved).+|(?:weight|bias)))?$"
)
# Parts of other methods, and of LoRA variants whose delta is another formula.
_METHODS = (
    r"ia3_|p?vera_|oft_|boft_|vblora_|randlora_|fourierft_|waveft_|hra_|hira_|glora_|gralora_|delora_|tinylora_|unilora_"
    r"|shira_|road_|c3a_|miss_|bone_|psoft_|adamss_|deft_|beft_|frod_|lily_|peanut_|ln_tuning_"
)
FOREIGN = re.compile(rf"\.((?:{_METHODS}|lora_diag|lora_[A-Z])\w*)\b")
_FOREIGN_WRAPPED = re.compile(rf"(?:^|\.)((?:{_METHODS})\w*)\.(?!weight$|bias$)[^.]+(?:\.weight|\.bias)?$")


@dataclass
class Module:
    """The parts that were saved for one wrapped module.

    `depth` counts wrappers inside it (MoE parameters nest); `nested` is whether it lies inside another wrapped module.
    """

    name: str
    depth: int = 0
    nested: bool = False
    parts: dict[str, TensorRef] = field(default_factory=dict)


@dataclass
class Keys:
    """The keys of one adapter: parts by module, whole tensors by the base's name for them, and notes."""

    modules: list[Module]
    whole: dict[str, TensorRef]
    notes: list[str]


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether adapter names are in the keys. `modules_to_save.NAME` alone is no sign: PEFT saves it in folders too."""
    matches = (WRAPPED_PART.match(name) for name in names)
    return any(match is not None and not match["saved"] for match in matches)


def foreign_wrapped(names: Iterable[str]) -> str | None:
    """The part of a wrapped checkpoint that belongs to a method which is not read, e.g. ``ia3_l``; or None."""
    listed = list(names)
    if not any(".base_layer." in name for name in listed):
        return None
    return next((match[1] for name in listed if (match := _FOREIGN_WRAPPED.search(name))), None)


def sort_keys(parts: Mapping[str, TensorRef], where: str) -> Keys:
    """Keys by module, and whole tensors by the base's name. Raises Unsupported for parts of other methods."""
    found: dict[tuple[str, int], Module] = {}
    keys = Keys([], {}, [])
    problems = []
    for key, ref in parts.items():
        match = PART.match(key)
        if match:
            module = _without_layers(match["module"])
            part = match["part"].removeprefix("token_adapter.")
            found.setdefault((module.name, module.depth), module).parts[part] = ref
        elif foreign := FOREIGN.search("." + key):
            what = f"tensor {ref.name!r}: {foreign[1]} belongs to a method that is not supported"
            problems.append(Problem("E-UNSUPPORTED", what, where, "merge it with PEFT"))
        elif (trained := _trained_copy(key, parts)) is not None:
            # bias="all" saves a trained head's bias three times; modules_to_save has the trained one.
            keys.notes.append(f"{ref.name}: {trained} is the trained copy, this one is not used")
        else:
            keys.whole[key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = ref
    if problems:
        raise Unsupported(problems)
    keys.modules = list(found.values())
    return keys


def _trained_copy(key: str, keys: Container[str]) -> str | None:
    """The key of the trained head tensor that `key` is another copy of, if the file has both."""
    plain = re.sub(r"\.(original_module|modules_to_save\.[^.]+|modules_to_save)(?=\.)", "", key, count=1)
    return plain if plain != key and plain in keys else None


def _without_layers(path: str) -> Module:
    """A module's own path, without the `base_layer` segments that wrapping put into it."""
    if "base_layer" not in path:
        return Module(path)
    segments = path.split(".")
    inner = len(segments)
    while inner and segments[inner - 1] == "base_layer":
        inner -= 1
    own = [segment for segment in segments[:inner] if segment != "base_layer"]
    return Module(".".join(own), len(segments) - inner, nested=len(own) < inner)

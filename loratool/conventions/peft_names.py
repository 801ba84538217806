"""PEFT's keys: which module a tensor belongs to, and which part of it. Saved and wrapped names, of all its methods."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from loratool.conventions import peft_methods
from loratool.errors import Problem, Unsupported
from loratool.names import listed, natural
from loratool.tensors import TensorRef

PREFIX = "base_model.model."

_LYCORIS = r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2"
# What follows the module path. Whole tensors (`.weight`, `.bias`, parameters of any name) have none of these.
# LoRA's factors are modules, with a weight; those of AdaLoRA, LoHa and LoKr are parameters, without.
PART = re.compile(
    r"^(?P<module>.*?)\.?(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta|trainable_tokens_delta"
    rf"|token_adapter\.base_layer\.weight|lora_A|lora_B|lora_E|ranknum|ia3_l|{_LYCORIS})$"
)
# The same parts with the adapter's name in them, as a wrapped model's state dict has them.
WRAPPED_PART = re.compile(
    rf"^(?P<before>(?:.*\.)?(?:lora_A|lora_B|lora_E|ranknum|{_LYCORIS}|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|trainable_tokens_delta|(?P<saved>modules_to_save)))"
    r"\.(?P<adapter>(?!weight$|bias$)[^.]+)(?P<after>\.(?(saved).+|(?:weight|bias)))?$"
)


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


def saved_name(name: str) -> str:
    """A key without PEFT's prefix, which lies behind the name of a part where that part alone was wrapped."""
    outer, prefix, rest = name.partition(PREFIX)
    return outer + rest if prefix and (not outer or outer.endswith(".")) else name


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether adapter names are in the keys. `modules_to_save.NAME` alone is no sign: PEFT saves it in folders too."""
    matches = (WRAPPED_PART.match(name) for name in names)
    return any(match is not None and not match["saved"] for match in matches)


def foreign_wrapped(names: Iterable[str]) -> dict[str, set[str]]:
    """The methods in a wrapped checkpoint that are not read, with their modules; {} if there are none."""
    known = list(names)
    wrapped = any(".base_layer." in name for name in known)
    return _by_method(peft_methods.of_wrapped_key(name) for name in known if wrapped)


def foreign_problems(found: Mapping[str, set[str]], where: str) -> list[Problem]:
    """One refusal per method, by name."""
    problems = []
    for method, owners in sorted(found.items()):
        why, helps = peft_methods.why_not(method)
        what = f"{method} is not supported: {why}; it is in {listed(sorted(owners, key=natural))}"
        problems.append(Problem("E-UNSUPPORTED", what, where, helps))
    return problems


def _by_method(found: Iterable[tuple[str, str] | None]) -> dict[str, set[str]]:
    methods: dict[str, set[str]] = {}
    for method, module in filter(None, found):
        methods.setdefault(method, set()).add(module.removeprefix(PREFIX))
    return methods


def sort_keys(parts: Mapping[str, TensorRef], where: str) -> Keys:
    """Keys by module, and whole tensors by the base's name. Raises Unsupported for parts of other methods."""
    found: dict[tuple[str, int], Module] = {}
    keys = Keys([], {}, [])
    foreign = _by_method(peft_methods.of_key(key) for key in parts if not PART.match(key))
    if foreign:
        raise Unsupported(foreign_problems(foreign, where))
    for key, ref in parts.items():
        match = PART.match(key)
        if match:
            module = _without_layers(match["module"])
            part = match["part"].removeprefix("token_adapter.")
            found.setdefault((module.name, module.depth), module).parts[part] = ref
        elif (trained := _trained_copy(key, parts)) is not None:
            # bias="all" saves a trained head's bias three times; modules_to_save has the trained one.
            keys.notes.append(f"{ref.name}: {trained} is the trained copy, this one is not used")
        else:
            keys.whole[key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = ref
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

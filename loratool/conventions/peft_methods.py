"""PEFT's other methods, which are refused by name: why a merge can not have them, and what helps.

A folder tells its method in `peft_type`; tensors without a config tell it by what their parts begin with.
"""

from __future__ import annotations

import re

# Methods whose modules hold parts called after them: `ia3_l` is IA3's. BONE is what PEFT called MISS before 0.18.
METHODS = (
    "ADAMSS", "BEFT", "BOFT", "BONE", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
    "IA3", "LILY", "LN_TUNING", "MISS", "OFT", "OSF", "PEANUT", "POLY", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHADOW",
    "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
# They learn inputs, or attention states before the input's: no weight changes.
PROMPTS = (
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING",
)  # fmt: skip
# What they add depends on the input, or on the task.
DYNAMIC = ("LILY", "POLY", "SHADOW", "XLORA")

_PART = rf"(?P<method>{'|'.join(METHODS).lower()})_\w*"
_KEY = re.compile(rf"(?:^|\.)(?P<part>{_PART}|lora_diag|lora_[A-Z]\w*)\b")
_WRAPPED_KEY = re.compile(rf"(?:^|\.)(?P<part>{_PART})\.(?!weight$|bias$)[^.]+(?:\.weight|\.bias)?$")


def of_key(key: str) -> tuple[str, str] | None:
    """The method that a saved tensor belongs to, and the module it is of; None if it is none of these."""
    return _found(_KEY.search(key))


def of_wrapped_key(key: str) -> tuple[str, str] | None:
    """The same for a key that has the adapter's name in it."""
    return _found(_WRAPPED_KEY.search(key))


def _found(match: re.Match[str] | None) -> tuple[str, str] | None:
    if match is None:
        return None
    module = match.string[: match.start("part")].removesuffix(".").removesuffix(".base_layer")
    return (match["method"] or "").upper() or f"a variant of LoRA ({match['part']})", module


def why_not(kind: object) -> tuple[str, str]:
    """Why a method is not read, to follow its name, and what helps."""
    if kind in PROMPTS:
        return "it changes no weight, so there is nothing to merge", "run it with PEFT"
    if kind in DYNAMIC:
        return "what it adds depends on the input or the task, so no merge can hold it", "run it with PEFT"
    if kind == "IA3":
        return "a wrapped checkpoint of it is not read", "save it with PEFT's save_pretrained(), or merge_and_unload()"
    return "its change of the weights is of no kind that loratool has", "merge it with PEFT's merge_and_unload()"

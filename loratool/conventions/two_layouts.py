"""Denoisers are published with two sets of names, the original repository's and diffusers'. Which one is this?"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Blocks, after any prefix, with dots or flattened.
_DIFFUSERS = re.compile(r"(?:^|.*[._])(?:single_)?transformer_blocks[._]\d")
_ORIGINAL = re.compile(
    r"(?:^|.*\.|.*(?<!transformer)_)(?:double_blocks|single_blocks|joint_blocks|double_layers|single_layers|blocks)[._]\d"
)


def hint(wanted: Iterable[str], base: Iterable[str]) -> str:
    """What helps where an adapter has one set of names and the base the other; "" where that is not so."""
    theirs, ours = _layout(wanted), _layout(base)
    if (theirs, ours) == ("diffusers", "original"):
        return (
            "the adapter has diffusers' names, the base is the original file of the model: "
            "give diffusers' version as the base (the pipeline's folder, or its transformer/)"
        )
    if (theirs, ours) == ("original", "diffusers"):
        return (
            "the adapter has the original model's names, the base diffusers': "
            "give the original file of the model as the base (one .safetensors file)"
        )
    return ""


def _layout(names: Iterable[str]) -> str:
    """Which of the two most blocks are named by; "" where none is."""
    blocks = [name for name in names if "attentions" not in name]  # a UNet's have transformer blocks inside
    diffusers = sum(_DIFFUSERS.match(name) is not None for name in blocks)
    original = sum(_ORIGINAL.match(name) is not None for name in blocks)
    if diffusers == original:
        return ""
    return "diffusers" if diffusers > original else "original"

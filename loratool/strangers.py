"""Why an adapter's targets are not in a base: one line for all of them, before the names one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loratool.checkpoint import Checkpoint
from loratool.errors import Problem
from loratool.maps import View
from loratool.names import absent, missing

HEADS = ("lm_head.weight", "embed_out.weight")
UNTIE = "save the base with untied embeddings first (transformers: tie_word_embeddings=False)"
FEW = 3  # as many as are told one by one need no summary
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")
_LAYER = re.compile(r"^(.*?\.)(\d+)\.")


def not_in_the_base(lost: Sequence[str], count: int, base: Checkpoint, view: View, where: str) -> Iterator[Problem]:
    """The refusals of targets that the base lacks, of `count` in all: what they have in common first.

    `view` knows where the rules of maps would have led. Near names, whose search takes time, are told of the first few
    only.
    """
    if len(lost) > FEW:
        what = f"{'none' if len(lost) == count else f'{count - len(lost):,}'} of the adapter's {count:,} targets"
        what += f" {'is' if count - len(lost) < 2 else 'are'} in the base"
        yield Problem("E-TARGET", f"{what}{_reason(lost, base)}", where, _hint(lost, count, base))
    for number, name in enumerate(lost):
        near = missing(name, base.tensors, where) if number < FEW else Problem("E-TARGET", absent(name), where)
        if name.endswith(HEADS):
            yield replace(near, hint=f"the base's head is its embedding: {UNTIE}")
        elif why := view.why_not(name):
            yield replace(near, message=f"{near.message}; {why}")
        else:
            yield near


def _reason(lost: Sequence[str], base: Checkpoint) -> str:
    """Which of the usual mistakes it is, as far as names tell; "" if none."""
    if (shard := _SHARD.search(base.path.name)) is not None:
        return f": it is one shard of {int(shard[1])}"
    stacks = _layers(base.tensors)
    beyond = [
        match for name in lost if (match := _LAYER.match(name)) and int(match[2]) >= stacks.get(match[1], 1 << 62)
    ]
    if len(beyond) == len(lost):
        last = max(int(match[2]) for match in beyond)
        return f": it has {stacks[beyond[0][1]]} layers in {beyond[0][1][:-1]}, the adapter goes to number {last}"
    return f": it calls its tensors {_example(base.tensors)}, the adapter {lost[0]}"


def _hint(lost: Sequence[str], count: int, base: Checkpoint) -> str:
    if _SHARD.search(base.path.name):
        return "give the folder with all shards and their index"
    if len(lost) < count:
        return "is this the adapter's base? --skip PATTERN leaves out targets that are not wanted"
    return "another model, or another layout of the same: take the base it was trained on; --map FILE can lead names"


def _layers(names: Mapping[str, object]) -> dict[str, int]:
    """``{"model.layers.": 24}``: how many layers a stack has, by what comes before the number."""
    found: dict[str, int] = {}
    for name in names:
        if (match := _LAYER.match(name)) is not None:
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _example(names: Mapping[str, object]) -> str:
    """A name that shows how a base calls things: of a layer's matrix, where it has one."""
    return next((name for name in names if _LAYER.match(name) and name.endswith("weight")), next(iter(names)))

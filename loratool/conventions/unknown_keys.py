"""Keys of a file that no reader knows: what they are where that is known, and what can be done about them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from loratool.errors import Problem
from loratool.names import listed

BUNDLE = "bundle_emb."  # OneTrainer's: bundle_emb.NAME.clip_l
# Parts that the LyCORIS reader knows beside factors of diffusers' names.
_OF_LYCORIS = re.compile(r"\.(?:dora_scale|diff|diff_b|diff_m|w_norm|b_norm|set_weight|reshape_weight|magnitude)$")
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)")


def refusals(keys: Iterable[str], where: str) -> Iterator[Problem]:
    """Why tensors that belong to no update are not passed over: embeddings by name, everything else by its kind."""
    embeddings: list[str] = []
    others: list[str] = []
    for key in keys:
        (embeddings if key.startswith(BUNDLE) else others).append(key)
    if embeddings:
        names = listed(sorted({key.split(".")[1] for key in embeddings}))
        what = f"{len(embeddings)} tensors are embeddings of prompt words ({names}), which are no change of the base"
        hint = f"--skip '{BUNDLE}*' leaves them out; the prompts need them as files of their own (textual inversion)"
        yield Problem("E-UNSUPPORTED", what, where, hint)
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in others:
        kinds[_pattern(key)].append(key)
    for pattern, members in kinds.items():
        count = "1 tensor is" if len(members) == 1 else f"{len(members)} tensors are"
        what = f"{count} no part of an adapter that this convention knows: {listed(members)}"
        hint = f"let its trainer merge it; --skip '{pattern}' leaves them out, if the model can do without"
        yield Problem("E-UNSUPPORTED", what, where, hint)


def of_diffusers(keys: Iterable[str], where: str) -> Iterator[Problem]:
    """The same for a file of diffusers' own, whose loader leaves out what it does not know."""
    names = [*keys]
    if known := [name for name in names if _OF_LYCORIS.search(name)]:
        what = f"{listed(known)}: diffusers leaves them out, and what it then loads is not what was trained"
        yield Problem("E-UNSUPPORTED", what, where, "--from lycoris reads the file with them")
    yield from refusals([name for name in names if name not in known], where)


def alike(module: str) -> str:
    """A pattern for the keys of this module in every layer: ``a.0.k`` -> ``a.*.k.*``."""
    return f"{_NUMBER.sub('*', module)}.*"


def _pattern(key: str) -> str:
    """A pattern for this key and its like in other layers: ``a.0.x`` -> ``*.x``, where that has dots enough."""
    last = key.rpartition(".")[2]
    owner = key.rpartition(".")[0]
    if last in ("weight", "bias"):
        before = owner.rpartition(".")[2]
        return f"*.{before}.{last}" if before and "." in owner else _NUMBER.sub("*", key)
    return f"*.{last}" if owner else key

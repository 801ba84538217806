"""`when`: an adapter that acts on some inputs only. No merge can do that, so none may happen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratool.errors import Problem
from loratool.tensors import is_int

FEATURE = "conditional"
CONDITIONS = ("tokens", "prompts", "routing")


def malformed(when: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """What is wrong with a condition (R-045): it is one of the three, and has something in it."""
    if len([name for name in when if "." not in name]) != 1 or not when.keys() & set(CONDITIONS):
        what = f"when must have one of {', '.join(CONDITIONS)}, found {', '.join(map(str, when)) or 'nothing'}"
        yield Problem("E-MANIFEST", what, where, rule="R-045")
        return
    tokens, prompts, routing = (when.get(name) for name in CONDITIONS)
    if "tokens" in when and not (isinstance(tokens, list | tuple) and tokens and all(map(_is_token, tokens))):
        yield Problem("E-MANIFEST", "when.tokens must be a list of token numbers from 0", where, rule="R-045")
    if "prompts" in when and not (isinstance(prompts, list | tuple) and prompts and all(map(_is_text, prompts))):
        yield Problem("E-MANIFEST", "when.prompts must be a list of texts", where, rule="R-045")
    if "routing" in when and not _is_text(routing):
        yield Problem("E-MANIFEST", "when.routing must be a text", where, rule="R-045")


def _is_token(value: object) -> bool:
    return is_int(value) and 0 <= value <= 2**53  # type: ignore[operator]  # is_int has looked


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)

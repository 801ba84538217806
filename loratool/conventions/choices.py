"""What a user adds to files that do not say everything: alpha, scaling rule, adapter name, layout."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loratool.conventions.selection import Selection
from loratool.errors import ChoiceNeeded, Problem
from loratool.maps import Family
from loratool.updates import RULES, Scaling

T = TypeVar("T")

# The fields of `Choices` that answer a question, and the options that set them.
_ANSWERS = {
    "alpha": "alpha", "scaling": "scaling", "config": "config", "adapter": "adapter", "layout": "layout",
    "components": "component", "convention": "from", "enable_lora": "enable-lora", "already_merged": "already-merged",
}  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """Answers to what a file leaves open. Patterns are shell-style (``*q_proj*``), matched on module names.

    `alpha` maps patterns to alphas, tried in order; `layout` maps patterns to "in_out" or "out_in", for square
    matrices whose orientation nothing shows; `config` is a PEFT adapter_config; `components` names the parts of a
    pipeline ("unet", "te1") that are wanted of an adapter for several, all if empty. `enable_lora` maps patterns to one
    digit per block of a packed matrix, 1 for those that were trained (``101``: query and value of query, key, value).
    `already_merged` says that the weights in a wrapped checkpoint hold the delta as well. `maps` are rules for names
    that the base does not have, instead of those that come with the library. `convention` is what to read, where
    several match, and `selection` what of it.
    """

    alpha: Mapping[str, float] = field(default_factory=dict)
    scaling: str | None = None
    config: Mapping[str, Any] | None = None
    adapter: str | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    components: Sequence[str] = ()
    enable_lora: Mapping[str, str] = field(default_factory=dict)
    already_merged: bool = False
    maps: Sequence[Family] = ()
    convention: str | None = None
    selection: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        if wrong_alpha := [alpha for alpha in self.alpha.values() if not math.isfinite(alpha)]:
            raise ChoiceNeeded(Problem("E-OPTION", f"alpha {wrong_alpha[0]} is not a finite number"))
        if negative := [alpha for alpha in self.alpha.values() if alpha < 0]:  # no trainer has one
            hint = "an adapter that is to be taken away gets the weight -1: ADAPTER@-1"
            raise ChoiceNeeded(Problem("E-OPTION", f"alpha {negative[0]:g} is negative", hint=hint))
        if self.scaling is not None and self.scaling not in RULES:
            raise ChoiceNeeded(Problem("E-OPTION", f"scaling {self.scaling!r} is not one of {', '.join(RULES)}"))
        if wrong := [value for value in self.layout.values() if value not in ("in_out", "out_in")]:
            raise ChoiceNeeded(Problem("E-OPTION", f"layout {wrong[0]!r} is not in_out or out_in"))
        if wrong := [value for value in self.enable_lora.values() if not re.fullmatch("0*1[01]*", value)]:
            what = f"enable_lora {wrong[0]!r} is not one digit per block, 1 for the trained ones, like 101"
            raise ChoiceNeeded(Problem("E-OPTION", what))

    def scaling_of(self, module: str, rank: int, rule: str | None = None) -> Scaling:
        """The scale that the user gave for a module; one with unknown scale if none, or no rule, was given.

        `rule` is that of a convention that has only one: then alpha is enough, and another rule is a mistake.
        """
        if rule is not None and self.scaling not in (None, rule):
            raise ChoiceNeeded(Problem("E-OPTION", f"the scale here is always {rule}, not {self.scaling}", module))
        alpha = _first(self.alpha, module)
        if rule is None and (alpha is None or self.scaling is None):
            return Scaling("none", rank, None, None)
        return Scaling.by(rule or self.scaling or "", alpha, rank)

    def alphas_of(self, module: str) -> list[tuple[str, float]]:
        """The patterns of `alpha` that match a module, with their alphas; the first one holds."""
        return [(pattern, alpha) for pattern, alpha in self.alpha.items() if fnmatch.fnmatchcase(module, pattern)]

    def layout_of(self, module: str) -> str | None:
        return _first(self.layout, module)

    def enabled_of(self, module: str) -> str | None:
        return _first(self.enable_lora, module)

    def refuse_others(self, asked: Collection[str], kind: str, where: str) -> None:
        """An answer to a question that a convention does not have is a mistake, not a no-op. `asked` are those it has.

        Raises ChoiceNeeded with all of them.
        """
        given = [name for name in _ANSWERS if name not in asked and getattr(self, name)]
        if given:
            raise ChoiceNeeded([self._superfluous(name, kind, where) for name in given])

    @staticmethod
    def _superfluous(name: str, kind: str, where: str) -> Problem:
        option = f"--{_ANSWERS[name]}"
        alone = name in ("adapter", "components")
        why = " holds a single one, without a name" if alone else " leaves nothing of that open"
        what = f"{option} means nothing here: a {kind}{why}"
        return Problem("E-OPTION", what, where, f"leave {option} out")

    def unknown_scale_hint(self, rule: str = "none", asked: Collection[str] = ()) -> str:
        """What to add so that the scale is known; `rule` is what the convention says of it, "none" if nothing, `asked`
        are the answers that it has use for."""
        config = "; or --config adapter_config.json" if "config" in asked and self.config is None else ""
        return self._alpha_hint(rule) + config

    def _alpha_hint(self, rule: str) -> str:
        if rule != "none" and not self.alpha:
            return f"give --alpha X, or --alpha PATTERN=X per layer; the scale of this convention is always {rule}"
        if self.alpha and self.scaling is None:
            return "add --scaling: alpha/rank (usual), alpha (first edition of LLMs from scratch) or alpha/sqrt(rank)"
        if self.alpha:
            return "no --alpha pattern matches these layers: add one, or --alpha X for all"
        return "give --alpha X, or --alpha PATTERN=X per layer, with --scaling alpha/rank, alpha or alpha/sqrt(rank)"

    def check_used(self, modules: list[str], where: str) -> None:
        """A pattern that matches no module is a mistake, not a no-op."""
        given = [*self.alpha, *self.layout, *self.enable_lora]
        idle = [p for p in given if not any(fnmatch.fnmatchcase(m, p) for m in modules)]
        if idle:
            raise ChoiceNeeded(
                Problem(
                    "E-OPTION",
                    f"the pattern {idle[0]!r} matches no layer",
                    where,
                    f"layers are named like {', '.join(modules[:3])}",
                )
            )


def _first(patterns: Mapping[str, T], module: str) -> T | None:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if fnmatch.fnmatchcase(module, pattern)), None)

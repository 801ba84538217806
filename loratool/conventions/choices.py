"""What a user adds to files that do not say everything: alpha, scaling rule, adapter name, layout."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratool.errors import ChoiceNeeded, Problem
from loratool.updates import RULES, Scaling


@dataclass(frozen=True)
class Choices:
    """Answers to what a file leaves open. Patterns are shell-style (``*q_proj*``), matched on module names.

    `alpha` maps patterns to alphas, tried in order; `layout` maps patterns to "in_out" or "out_in", for square
    matrices whose orientation nothing shows; `config` is a PEFT adapter_config; `components` names the parts of a
    pipeline ("unet", "te1") that are wanted of an adapter for several, all if empty.
    """

    alpha: Mapping[str, float] = field(default_factory=dict)
    scaling: str | None = None
    config: Mapping[str, Any] | None = None
    adapter: str | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    components: Sequence[str] = ()

    def __post_init__(self) -> None:
        if wrong_alpha := [alpha for alpha in self.alpha.values() if not math.isfinite(alpha)]:
            raise ChoiceNeeded(Problem("E-OPTION", f"alpha {wrong_alpha[0]} is not a finite number"))
        if self.scaling is not None and self.scaling not in RULES:
            raise ChoiceNeeded(Problem("E-OPTION", f"scaling {self.scaling!r} is not one of {', '.join(RULES)}"))
        if wrong := [value for value in self.layout.values() if value not in ("in_out", "out_in")]:
            raise ChoiceNeeded(Problem("E-OPTION", f"layout {wrong[0]!r} is not in_out or out_in"))

    def scaling_of(self, module: str, rank: int) -> Scaling:
        """The scale that the user gave for a module; one with unknown scale if none, or no rule, was given."""
        alpha = next((value for pattern, value in self.alpha.items() if fnmatch.fnmatchcase(module, pattern)), None)
        if alpha is None or self.scaling is None:
            return Scaling("none", rank, None, None)
        return Scaling.by(self.scaling, alpha, rank)

    def layout_of(self, module: str) -> str | None:
        return next((value for pattern, value in self.layout.items() if fnmatch.fnmatchcase(module, pattern)), None)

    def refuse(self, *names: str, where: str) -> None:
        """An answer to a question that the convention does not have is a mistake, not a no-op."""
        if given := [name for name in names if getattr(self, name)]:
            raise ChoiceNeeded(Problem("E-OPTION", f"--{given[0]} means nothing for this convention", where))

    def unknown_scale_hint(self) -> str:
        """What to add so that the scale is known."""
        if self.alpha and self.scaling is None:
            return "add --scaling: alpha/rank (usual), alpha (first edition of LLMs from scratch) or alpha/sqrt(rank)"
        if self.alpha:
            return "no --alpha pattern matches these layers: add one, or --alpha X for all"
        return "give --alpha X, or --alpha PATTERN=X per layer, with --scaling alpha/rank, alpha or alpha/sqrt(rank)"

    def check_used(self, modules: list[str], where: str) -> None:
        """A pattern that matches no module is a mistake, not a no-op."""
        idle = [p for p in [*self.alpha, *self.layout] if not any(fnmatch.fnmatchcase(m, p) for m in modules)]
        if idle:
            raise ChoiceNeeded(
                Problem(
                    "E-OPTION",
                    f"the pattern {idle[0]!r} matches no layer",
                    where,
                    f"layers are named like {', '.join(modules[:3])}",
                )
            )

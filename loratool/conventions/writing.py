"""What `convert` asks of a writer, and what a writer answers about an adapter that its convention can not hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How to write, where a convention leaves a choice. A field here is one option of `convert`, with a default that
    means "as the adapter has it". A writer's OPTIONS names those that it knows; `convert` refuses the others.

    `uniform`: all LoRA updates at one rank and one scale (`folding.uniform`), for consumers that read only one.
    `component`: which part of a pipeline ("unet", "te1") an adapter of one model alone belongs to.
    `task_type`: what PEFT calls the task ("CAUSAL_LM").
    `base_name`, `revision`: the id under which the base is published.
    """

    uniform: bool = False
    component: str = ""
    task_type: str = ""
    base_name: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Misfit:
    """Updates that a convention can not hold, and why.

    `names` are the tensors they change. `why` completes "CONVENTION can not hold them: ...". `help` names what else
    would do. Where `bakeable`, the updates can be replaced by the whole merged tensor (`folding.bake`).
    """

    names: tuple[str, ...]
    why: str
    help: str = ""
    bakeable: bool = True


def grouped(found: Iterable[tuple[str, Misfit | None]]) -> list[Misfit]:
    """One misfit per reason, of (tensor name, what is wrong with its updates) pairs."""
    names: dict[Misfit, list[str]] = {}
    for name, misfit in found:
        if misfit is not None:
            names.setdefault(misfit, []).append(name)
    return [Misfit(tuple(group), reason.why, reason.help, reason.bakeable) for reason, group in names.items()]

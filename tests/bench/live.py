"""Adapters in a model that is in memory: how long it waits for them, and what is kept to take them out again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def timed(base: Path, one: Path, other: Path, undo: str) -> dict[str, float]:
    """Seconds to apply an adapter, to swap it for another one, and to remove that; and the share of the changed bytes
    that is kept. What is there afterwards must be the base again."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    import loratool

    state = {name: value for file in sorted(base.glob("*.safetensors")) for name, value in load_file(file).items()}
    model = nn.Module()
    for name, value in state.items():
        module = model
        *path, last = name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(value.clone(), requires_grad=False))
    found: dict[str, float] = {}

    def take(what: str, action: Callable[[], object]) -> None:
        started = time.perf_counter()
        action()
        found[what] = time.perf_counter() - started

    handles: list[loratool.Handle] = []
    take("apply", lambda: handles.append(loratool.apply(model, one, undo=undo)))
    report = handles[0].report
    found["kept"] = report.undo_bytes / sum(state[name].nbytes for name in report.survival)
    take("swap", lambda: handles[0].swap(other))
    take("remove", handles[0].remove)
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())
    return found

"""What wrappers leave in the names of a model's tensors: DDP, torch.compile, FSDP, activation checkpointing."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from loratool.errors import InvalidFile, Problem
from loratool.tensors import TensorRef

# Segments anywhere in a name: torch.compile, FSDP1, activation checkpointing.
WRAPPER_SEGMENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
EMA_COUNTER = "n_averaged"  # of torch's AveragedModel


def cleaned(stored: list[tuple[str, TensorRef]], path: Path) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """Names without what wrappers add: marked segments anywhere, a leading `module.` only if every name has it."""
    names = {name: ".".join(s for s in name.split(".") if s not in WRAPPER_SEGMENTS) for name, _ in stored}
    if all(name.startswith("module.") or name == EMA_COUNTER for name in names.values()):
        names.pop(EMA_COUNTER, None)  # beside an averaged model, not part of it
    while names and all(name.startswith("module.") for name in names.values()):
        names = {name: clean.removeprefix("module.") for name, clean in names.items()}
    for name in names:
        if not name.isascii() and name != name.encode("utf-8", "ignore").decode("utf-8"):
            raise InvalidFile(Problem("E-NAMES", f"the tensor name {name!a} is not Unicode", str(path)))
    by_clean: dict[str, list[str]] = defaultdict(list)
    for name, clean in names.items():
        by_clean[clean].append(name)
    clashes = [f"{' and '.join(group)}" for group in by_clean.values() if len(group) > 1]
    if clashes:
        raise InvalidFile(
            Problem("E-NAMES", f"names differ only in wrapper prefixes: {'; '.join(clashes[:3])}", str(path))
        )
    changed = sum(name != clean for name, clean in names.items())
    notes = (f"{changed} names cleaned of wrapper prefixes (module., _orig_mod., FSDP)",) if changed else ()
    return {names[name]: tensor for name, tensor in stored if name in names}, notes

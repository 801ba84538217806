"""What base and adapters make of each tensor, before anything says where the result goes: a file, memory, a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loratool import conventions, quantised, receipt, requantise
from loratool.adapter import Adapter
from loratool.binding import Binding, Part
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.conventions import Convention
from loratool.conventions.choices import Choices
from loratool.errors import ChoiceNeeded, LoratoolError, Mismatch, Problem
from loratool.format import content_digest
from loratool.layout import NewTensor, Weighted
from loratool.maps import View
from loratool.pinning import unpinned
from loratool.quantised import Dequantised
from loratool.receipt import MergedAdapter, Receipt
from loratool.tensors import MERGEABLE, FileState, TensorRef, files_of

DTYPES = {"keep": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Fitted:
    """Adapters bound to a base. With `problems` there is nothing else in it.

    `parts` are the adapters, `merged` names them as a receipt does. `changes` are what becomes of the base's tensors,
    by stored names, `additions` are tensors that the base lacks, `dropped` those that served a quantisation which is
    gone.
    """

    base: Checkpoint
    problems: tuple[Problem, ...] = ()
    parts: tuple[Part, ...] = ()
    merged: tuple[MergedAdapter, ...] = ()
    changes: Mapping[str, NewTensor] = field(default_factory=dict)
    additions: tuple[NewTensor, ...] = ()
    dropped: tuple[TensorRef, ...] = ()
    notes: tuple[str, ...] = ()
    idle: tuple[Problem, ...] = ()  # adapters that change nothing
    view: View = field(default_factory=lambda: View({}, ()))  # of the base, under the names of its maps
    previous: Receipt | None = None  # of a base that is itself the result of a merge


def fitted(
    base_path: Path,
    adapters: Sequence[tuple[Path | Adapter, float]],
    dtype: str,
    choices: Choices,
    allow_new: bool = False,
    undo: bool = False,
    onto_merged: bool = False,
) -> Fitted:
    """Open a base and bind adapters to it. What does not fit is in `problems`; `undo` asks for what can be undone.
    A base that is itself the result of a merge is taken where the adapters prove that they were trained on it, or
    `onto_merged`.

    Raises ChoiceNeeded for an unknown dtype, Mismatch for a base that is merged or wrapped already, and what is wrong
    with the base's files.
    """
    if dtype not in DTYPES:
        raise ChoiceNeeded(Problem("E-OPTION", f"dtype {dtype!r} is not one of {', '.join(DTYPES)}"))
    base = open_checkpoint(base_path)
    previous = _earlier(base)
    base = quantised.logical(base)
    binding = Binding(base, allow_new)
    binding.read(adapters, choices)
    binding.bind()
    if previous is not None and not onto_merged and not _prove(binding):
        what = "this checkpoint is the result of a merge already: it has a receipt"
        hint = "merge all adapters at once from the original base, or `loratool unmerge` it first; where an adapter was"
        hint += " trained on the merged model, merge with --onto-merged puts it on top"
        raise Mismatch(Problem("E-MERGED", what, str(base.path), hint))
    if problems := [*binding.problems, *requantise.problems(base, binding.wanted, DTYPES[dtype], undo)]:
        return Fitted(base, tuple(problems))
    parts = tuple(binding.parts)
    merged = tuple(MergedAdapter(content_digest(p.original), p.weight, p.name, len(p.original.updates)) for p in parts)
    seen = [adapter.digest for adapter in merged]
    twice = [f"{a.name} is merged more than once" for n, a in enumerate(merged) if a.digest in seen[:n]]
    changes, additions = _new_tensors(base, binding.wanted, DTYPES[dtype])
    dropped = requantise.dropped(base) if DTYPES[dtype] else ()
    before = {a.digest for stage in (previous.stages if previous else ()) for a in stage.adapters}
    again = [f"{a.name} is in this base already: an earlier merge put it there" for a in merged if a.digest in before]
    notes = (*base.notes, *binding.notes, *twice, *again)
    return Fitted(
        base,
        (),
        parts,
        merged,
        changes,
        tuple(additions),
        tuple(dropped),
        notes,
        tuple(binding.idle),
        binding.view,
        previous,
    )


def inputs(made_of: TensorRef | NewTensor) -> set[FileState]:
    """The files that the bytes of a tensor come from, as they were when they were first read."""
    refs = [made_of] if isinstance(made_of, TensorRef) else []
    if isinstance(made_of, NewTensor):
        refs += [ref for item, _ in made_of.updates for ref in item.update.components().values()]
        refs += [made_of.source] if made_of.source else []
        refs += quantised.parts(made_of.source)
    return files_of(refs)


def _earlier(base: Checkpoint) -> Receipt | None:
    """The receipt of a base that is the result of a merge. Raises Mismatch for what can be no base."""
    for checkpoint in base.components.values():
        if receipt.find(checkpoint) is not None:
            what = "this component of the pipeline is the result of a merge already: it has a receipt of its own"
            hint = "merge all adapters at once into the original pipeline, or `loratool unmerge` the component first"
            raise Mismatch(Problem("E-MERGED", what, str(checkpoint.path), hint))
    for convention in conventions.matching(base):
        what, hint = (
            f"the base is itself a {convention.TITLE}",
            "`loratool extract BASE -o NAME.lora.safetensors --base-out DIR` writes the clean base first "
            "(with --adapter NAME where it holds several)",
        )
        if not _holds_weights(base, convention):
            hint = "the base comes first: are the two swapped?"
        raise Mismatch(Problem("E-WRAPPED", what, str(base.path), hint))
    found = receipt.find(base)
    if found is not None and len(found.stages) >= receipt.MAX_STAGES:
        what = f"this is the result of {len(found.stages)} merges one on top of the other, the most there can be"
        raise Mismatch(Problem("E-LIMIT", what, str(base.path), "merge all adapters at once from the original base"))
    return found


def _prove(binding: Binding) -> bool:
    """Whether every adapter holds digests that show: this base, as it is, is the one it was trained on."""
    proven = [not [*unpinned(part.original, binding.base, binding.view, part.name)] for part in binding.parts]
    return bool(proven) and all(proven) and not binding.problems


def _holds_weights(base: Checkpoint, convention: Convention) -> bool:
    """Whether base weights lie beside the factors. What can not be taken apart may well hold some."""
    try:
        return bool(convention.unwrap(base, Choices()))
    except LoratoolError:
        return True


def _new_tensors(
    base: Checkpoint, wanted: Mapping[str, list[Weighted]], dtype: str | None
) -> tuple[dict[str, NewTensor], list[NewTensor]]:
    """What becomes of each tensor: those with updates, and with a dtype given every floating-point one."""
    changes: dict[str, NewTensor] = {}
    additions = []
    for name, stored in base.tensors.items():
        updates = tuple(wanted.get(name, ()))
        if isinstance(stored.data, Dequantised):
            changes |= requantise.new_tensors(stored, updates, dtype)
            continue
        new_dtype = dtype if dtype and stored.dtype in MERGEABLE else stored.dtype
        if updates or new_dtype != stored.dtype:
            shape = updates[0].item.target.shape if updates else stored.shape
            source = stored if shape == stored.shape else None
            reversible = all(item.update.role == "add" for item, _ in updates)
            changes[stored.name] = NewTensor(stored.name, source, new_dtype, shape, updates, reversible, stored)
    for name, weighted in wanted.items():
        if name not in base.tensors and weighted:
            value = next(ref for item, _ in weighted for ref in item.update.components().values())
            additions.append(
                NewTensor(name, None, dtype or value.dtype, weighted[0].item.target.shape, tuple(weighted))
            )
    return changes, additions

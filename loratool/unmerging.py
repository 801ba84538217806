"""The way back, decided before a byte is written: which adapters were merged, and what brings each tensor back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loratool import companions, outputs, quantised, receipt, repacked
from loratool.adapter import Adapter
from loratool.binding import Binding, Part
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.companions import Companions
from loratool.conventions import of_base
from loratool.conventions.choices import Choices
from loratool.errors import AnswerIsNo, InvalidFile, Mismatch, Problem
from loratool.format import content_digest
from loratool.layout import NewTensor, Weighted, joined, names_clash, output_files, output_index
from loratool.names import listed
from loratool.plan import Plan, alone, companions_of, output_problems, settled
from loratool.receipt import Receipt
from loratool.tensors import TensorRef
from loratool.undo import UndoRecord
from loratool.undo import read as read_undo


def plan_unmerge(
    merged_path: Path,
    adapters: Sequence[tuple[Path | Adapter, float | None]],
    out: Path,
    *,
    base_path: Path | None = None,
    undo_path: Path | None = None,
    exact: bool = False,
    choices: Choices | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    force: bool = False,
) -> Plan:
    """Check everything about an unmerge. With a base it is exact; without one, additive updates are subtracted."""
    folders = [Path(adapter) for adapter, _ in adapters if not isinstance(adapter, Adapter)]
    inputs = [*folders, *(path for path in (base_path, undo_path) if path is not None)]
    outputs.refuse(output_problems(merged_path, out, inputs, force))
    merged = open_checkpoint(merged_path)
    found = receipt.find(merged)
    if found is None:
        raise Mismatch(
            Problem(
                "E-RECEIPT",
                "no merge receipt: nothing shows what was merged into it",
                str(merged_path),
                f"a merge by loratool leaves {receipt.FILE_NAME}",
            )
        )
    problems = [*names_clash(merged)]
    base = open_checkpoint(base_path) if base_path is not None else None
    against = quantised.logical(base or _unmerged_view(merged, found))
    given = [(adapter, math.nan if weight is None else weight) for adapter, weight in adapters]
    binding = Binding(against)
    binding.read(given, choices or Choices())
    problems += binding.problems
    if base is None and (unknown := [*_of_the_merged(binding)]):
        raise Mismatch([*problems, *unknown])
    parts = _matched(binding.parts, found, problems)
    record = read_undo(undo_path) if undo_path is not None else None
    # A record proves what comes out instead.
    problems += [changed_since(name, merged.path) for name in changed_names(merged, found, digests=record is None)]
    if base is not None and record is not None:
        problems.append(Problem("E-OPTION", "both a base and an undo record", hint="either of them is enough"))
    if record is not None:
        problems += _not_the_record(record, found, str(undo_path))
    if base is not None:
        problems += _not_the_base(base, merged, found)
    elif record is None:
        lost = [
            name
            for name, tensor in found.tensors.items()
            if (not tensor.reversible and tensor.base is not None) or tensor.base_shape != tensor.shape
        ]
        if lost or exact:
            what = (
                f"{len(lost)} tensors were replaced, renormalised or quantised anew, such as {lost[0]}"
                if lost
                else ("bits were rounded away")
            )
            raise AnswerIsNo(
                [
                    *problems,
                    Problem(
                        "E-NOT-EXACT",
                        f"without the base this can not be taken out{'' if lost else ' exactly'}: {what}",
                        str(merged_path),
                        "give --base BASE, or --undo RECORD if the merge wrote one",
                    ),
                ]
            )
    if problems:
        raise Mismatch(problems)
    changes, dropped = _old_tensors(merged, found, base, parts, exact=record is not None)
    is_exact = base is not None or record is not None
    earlier = found.previous if is_exact else None  # of something approximate it would be a claim that does not hold
    single = outputs.is_file(out)
    folder = base.path if base is not None and base.path.is_dir() else None
    beside = companions.unmerged(merged.path, companions_of(merged, found.tensors), found, folder)
    if base is not None and found.dropped:
        merged, dropped = base, []  # parts that a merge left out have their places in the base's files
        beside = Companions(tuple(companions_of(merged, found.tensors)))
    if single and merged.path.is_dir():
        beside, merged = alone(merged, beside), joined(merged, out.name)
    files = output_files(merged, changes, dropped=frozenset(dropped))
    again = None
    if outputs.is_pickle(out):
        if wrong := [*repacked.misfits(merged, changes, bool(dropped))]:
            raise Mismatch(wrong)
        again = repacked.repacked(merged.shards[0], changes, out.name)
        files = (again.file,)
    elif single:
        bare = {key: value for key, value in files[0].metadata.items() if key != receipt.METADATA_KEY}
        if earlier is not None:
            bare[receipt.METADATA_KEY] = earlier.dumps()
        files = (replace(files[0], name=out.name).with_metadata(bare),)
    plan = Plan(
        "unmerge",
        merged.path,
        out,
        single,
        files,
        beside,
        output_index(merged, files),
        found.adapters,
        "keep",
        (*binding.notes, *beside.notes, *_of_the_stages(found, earlier)),
        is_exact,
        found,
        record=record,
        previous=earlier,
        force=force,
        repacked=again,
    )
    return settled(plan, threads, max_memory, device)


def _of_the_stages(found: Receipt, earlier: Receipt | None) -> Iterator[str]:
    """What is left, where merges were made one on top of the other: only the last one is taken out."""
    if found.previous is None:
        return
    names = ", ".join(f"{a.name}@{a.weight:g}" for a in found.previous.adapters)
    left = "its receipt comes back" if earlier else "it has no receipt any more, not being exact"
    yield f"taken out is the last of {len(found.stages)} merges; the one before it, of {names}, stays: {left}"


def _of_the_merged(binding: Binding) -> Iterator[Problem]:
    """Adapters whose numbers come from the base's weights, where there are only those of the merged checkpoint."""
    for part in binding.parts:
        weights = of_base.weights(part.original)
        if theirs := [name for name, weight in weights.items() if weight is binding.base.tensors.get(name)]:
            what = f"its updates of {listed(theirs)} are computed from the base's weights, which are not here"
            hint = "give --base BASE, or instead of the adapter what `convert --to native --base BASE` makes of it"
            yield Problem("E-RECEIPT", what, part.name, hint)


def _unmerged_view(merged: Checkpoint, found: Receipt) -> Checkpoint:
    """The merged checkpoint with the tensors that the base had: names and shapes to bind adapters to."""
    new = {name for name, tensor in found.tensors.items() if tensor.base is None}
    return replace(merged, tensors={name: ref for name, ref in merged.tensors.items() if ref.name not in new})


def _matched(parts: list[Part], found: Receipt, problems: list[Problem]) -> list[Part]:
    """The given adapters in the receipt's order, with its weights; others, and missing ones, are problems.

    A part's weight is NaN where none was given: the receipt knows it.
    """
    left = [(part, content_digest(part.original)) for part in parts if part.sound]
    ordered = []
    for known in found.adapters:
        hits = [entry for entry in left if entry[1] == known.digest]
        if not hits:
            what = f"the adapter {known.name!r} ({known.digest[:19]}...) was merged and is not among those given"
            problems.append(Problem("E-RECEIPT", what, hint="give every adapter that was merged"))
            continue
        hit = min(hits, key=lambda entry: entry[0].weight != known.weight)
        left.remove(hit)
        if not math.isnan(hit[0].weight) and hit[0].weight != known.weight:
            what = f"{known.name!r} was merged with weight {known.weight:g}, not {hit[0].weight:g}"
            problems.append(Problem("E-RECEIPT", what, hint="leave the weight out: the receipt knows it"))
        ordered.append(hit[0]._replace(weight=known.weight))
    problems += [
        Problem("E-RECEIPT", f"{part.name} was not merged into this", hint="`loratool inspect` shows what was")
        for part, _ in left
    ]
    return ordered


def _stored(checkpoint: Checkpoint) -> dict[str, tuple[str, TensorRef]]:
    """A checkpoint's tensors by stored name, as receipts have them, with the clean name that adapters use."""
    return {ref.name: (name, ref) for name, ref in checkpoint.tensors.items()}


def changed_names(
    merged: Checkpoint, found: Receipt, digests: bool, looked: Callable[[str], None] = lambda name: None
) -> Iterator[str]:
    """The tensors of a merge that are not what it wrote; `looked` is told the name of each, after it was compared."""
    stored = _stored(merged)
    for name, known in found.tensors.items():
        ref = stored[name][1] if name in stored else None
        if (
            ref is None
            or (ref.dtype, ref.shape) != (known.dtype, known.shape)
            or (digests and known.merged and ref.digest() != known.merged)
        ):
            yield name
        looked(name)


def changed_since(name: str, merged: Path) -> Problem:
    what = f"{name} is not what the merge wrote: it was changed since"
    return Problem("E-RECEIPT", what, str(merged), "unmerge the original output of the merge")


def _not_the_base(base: Checkpoint, merged: Checkpoint, found: Receipt) -> Iterator[Problem]:
    """Tensors of the base that are not those of the merge, and untouched ones that were changed since."""
    originals, stored = _stored(base), _stored(merged)
    for name, known in found.tensors.items():
        ref = originals[name][1] if name in originals else None
        if known.base is not None and (
            ref is None
            or (ref.dtype, ref.shape) != (known.base_dtype, known.base_shape)
            or (known.base and ref.digest() != known.base)
        ):
            what = f"{name} is missing in this base" if ref is None else f"{name} has other bytes in this base"
            hint = "give the base of this merge"
            yield Problem("E-BASE-MISMATCH", f"{what}: another one was merged", str(base.path), hint, "R-041")
    for name, digest in found.dropped.items():
        if name not in originals or (digest and originals[name][1].digest() != digest):
            what = f"{name}, which only the base has, is another one"
            yield Problem("E-BASE-MISMATCH", what, str(base.path), "give the base of this merge", "R-041")
    for name, (_, ref) in stored.items():
        if name not in found.tensors and (name not in originals or originals[name][1].digest() != ref.digest()):
            what = f"{name}, which the merge did not touch, is another one in the base"
            yield Problem("E-BASE-MISMATCH", what, str(base.path), "one of the two was changed since the merge")


def _not_the_record(record: UndoRecord, found: Receipt, where: str) -> Iterator[Problem]:
    """Why an undo record is not that of this merge."""
    changed = {name for name, known in found.tensors.items() if known.base is not None}
    if record.receipt != found.digest or record.tensors.keys() != changed:
        yield Problem("E-UNDO", "the undo record belongs to another merge", where, "give the record of this merge")
        return
    for name, tensor in record.tensors.items():
        known = found.tensors[name]
        if (tensor.base, tensor.merged, tensor.dtype, tensor.shape) != (
            known.base, known.merged, known.base_dtype, known.base_shape
        ):  # fmt: skip
            yield Problem("E-UNDO", f"the record and the receipt disagree about {name}", where, "use --base instead")


def _old_tensors(
    merged: Checkpoint, found: Receipt, base: Checkpoint | None, parts: list[Part], exact: bool
) -> tuple[dict[str, NewTensor], list[str]]:
    """Each changed tensor on its way back: the base's own bytes, or the updates with opposite weights.

    For an `exact` way back by an undo record the updates keep the order and the weights of the merge.
    """
    stored, originals = _stored(merged), _stored(base) if base else {}
    given = [(part.adapter.targets(), part.weight) for part in parts if part.weight != 0]
    changes: dict[str, NewTensor] = {}
    dropped = []
    for name, known in found.tensors.items():
        if known.base is None:
            dropped.append(name)
            continue
        source: TensorRef | None = stored[name][1]
        updates = [
            Weighted(item, weight)
            for targets, weight in given
            for target in known.targets
            for item in targets.get(target, ())
        ]
        if base is not None:
            source, updates = originals[name][1], []
        elif exact and known.shape != known.base_shape:
            source, updates = None, []  # the record has all of it
        elif not exact:
            updates = [Weighted(item, -weight) for item, weight in reversed(updates)]
            if any(item.update.role != "add" for item, _ in updates):
                what = f"{name} was replaced or renormalised, the receipt says otherwise"
                raise InvalidFile(Problem("E-RECEIPT", what, str(merged.path)))
        changes[name] = NewTensor(name, source, known.base_dtype, known.base_shape, tuple(updates))
    return changes, dropped

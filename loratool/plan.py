"""Everything that is decided and checked before the first byte of an output is written.

A plan reports all its problems at once. It is data: it can be printed (`--dry-run`), turned into JSON, and run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratool import quantised, receipt, requantise, staging
from loratool.adapter import Adapter
from loratool.binding import Binding, Part
from loratool.changes import fitted, inputs
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.conventions import of_base
from loratool.conventions.choices import Choices
from loratool.errors import AnswerIsNo, ChoiceNeeded, InvalidFile, Mismatch, OutputRefused, Problem
from loratool.format import content_digest
from loratool.layout import Change, NewTensor, OutputFile, Weighted, names_clash, output_files, output_index
from loratool.maps.cutting import Derived
from loratool.matrices import BLOCK_BYTES, compute_dtype
from loratool.names import listed
from loratool.receipt import MergedAdapter, Receipt
from loratool.tensors import CHUNK, DTYPE_BITS, FileState, TensorRef
from loratool.undo import UndoRecord
from loratool.undo import read as read_undo
from loratool.workers import WORKERS, worker_count


@dataclass(frozen=True)
class Plan:
    """What a merge or an unmerge will do."""

    verb: str
    source: Path
    out: Path
    single: bool  # the output is one file, not a folder
    files: tuple[OutputFile, ...]
    companions: tuple[Path, ...]
    index: tuple[str, bytes] | None
    adapters: tuple[MergedAdapter, ...]
    dtype: str
    notes: tuple[str, ...] = ()
    exact: bool = True
    receipt: Receipt | None = None  # of the checkpoint that is unmerged
    digests: bool = True  # of the changed tensors, for the receipt
    threads: int = WORKERS
    reproducible: bool = False  # the same bits on every machine
    device: str = "cpu"  # what computes the blocks
    link: bool = False  # untouched files become hard links
    resume: bool = False  # keep the verified files of an interrupted run
    inputs: tuple[FileState, ...] = ()
    undo: Path | None = None  # the record to write
    record: UndoRecord | None = None  # the record to read
    rewritten: Mapping[Path, bytes] = field(default_factory=dict)  # companions that are not copied as they are
    dropped: tuple[TensorRef, ...] = ()  # stored tensors that only served a quantisation which is gone

    @property
    def changes(self) -> list[NewTensor]:
        return [task.tensor for file in self.files for task in file.tasks if isinstance(task, Change)]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def memory(self) -> int:
        """An upper bound of the bytes held at a time, beside the interpreter and torch."""
        largest = sorted((_memory(tensor) for tensor in self.changes), reverse=True)[: self.threads]
        return sum(largest) + self.threads * CHUNK + _kept(self.changes)

    def to_json(self) -> dict[str, Any]:
        changes = self.changes
        return {
            "verb": self.verb,
            "source": str(self.source),
            "out": str(self.out),
            "exact": self.exact,
            "dtype": self.dtype,
            "adapters": [vars(adapter) for adapter in self.adapters],
            "tensors_changed": len(changes),
            "tensors_total": sum(len(file.tensors) for file in self.files),
            "bytes_to_write": self.nbytes,
            "memory_bound": self.memory,
            "threads": self.threads,
            "device": self.device,
            "digests": self.digests,
            "reproducible": self.reproducible,
            "undo": None if self.undo is None else str(self.undo),
            "files": [{"name": file.name, "bytes": file.size} for file in self.files],
            "companions": [path.as_posix() for path in self.companions],
            "changes": [
                {
                    "tensor": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "computed_in": compute_dtype(tensor),
                    "updates": [
                        {"kind": item.update.kind, "weight": weight, "rank": scaling.rank if scaling else None,
                         "scale": scaling.scale if scaling else None}
                        for item, weight in tensor.updates
                        for scaling in [item.update.scaling]
                    ],
                }
                for tensor in changes
            ],
            "dropped": [ref.name for ref in self.dropped],
            "notes": list(self.notes),
        }  # fmt: skip


def _memory(tensor: NewTensor) -> int:
    width = DTYPE_BITS[compute_dtype(tensor)] // 8
    factors = sum(ref.numel * width * 2 for item, _ in tensor.updates for ref in item.update.components().values())
    rows = max(BLOCK_BYTES, math.prod(tensor.shape[1:]) * 8)  # a block is at least one row
    scaled = math.prod(tensor.source.shape[1:]) * 8 * width if tensor.source and tensor.part else 0
    return factors + 10 * rows * width // 2 + scaled


def _kept(changes: Iterable[NewTensor]) -> int:
    """The bytes of all experts' factors that are held while each expert takes its own."""
    refs = (ref for tensor in changes for item, _ in tensor.updates for ref in item.update.components().values())
    return sum(keeper.bound for keeper in {ref.data.keeper for ref in refs if isinstance(ref.data, Derived)} if keeper)


# --- merge -----------------------------------------------------------------------------------------------------------


def plan_merge(
    base_path: Path,
    adapters: Sequence[tuple[Path | Adapter, float]],
    out: Path,
    *,
    dtype: str = "keep",
    allow_new: bool = False,
    choices: Choices | None = None,
    digests: bool = True,
    reproducible: bool = False,
    undo: Path | None = None,
    link: bool = False,
    resume: bool = False,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
) -> Plan:
    """Check everything about a merge and lay out its files. Raises the errors of `loratool.errors`, all at once."""
    fit = fitted(base_path, adapters, dtype, choices or Choices(), allow_new, undo is not None)
    base, changes, additions, dropped = fit.base, fit.changes, fit.additions, fit.dropped
    folders = [Path(adapter) for adapter, _ in adapters if not isinstance(adapter, Adapter)]
    if problems := [
        *_output_problems(base, out, folders),
        *_undo_problems(undo, out, digests, resume),
        *fit.problems,
    ]:
        raise Mismatch(problems)
    notes = [*fit.notes]
    single = _single(base, out)
    files = output_files(base, changes, additions, frozenset(ref.name for ref in dropped))
    touched = [*changes, *(new.name for new in additions)]
    if stale := base.left_out(_components(base, touched)):
        names = ", ".join(map(str, stale[:3])) + (" ..." if stale[3:] else "")
        notes.append(f"not in the output, because nothing was merged into them: {names}")
    if single:
        files = (replace(files[0], name=out.name),)
    if dtype != "keep" and base.path.is_dir():
        notes.append("config.json is copied as it is: its torch_dtype may name another dtype than the weights now have")
    plan = Plan(
        "merge",
        base.path,
        out,
        single,
        files,
        tuple(_companions(base, touched)),
        output_index(base, files),
        fit.merged,
        dtype,
        tuple(notes),
        digests=digests,
        reproducible=reproducible,
        undo=undo,
        link=link,
        resume=resume,
        rewritten=requantise.configs_without(base) if dropped else {},
        dropped=dropped,
    )
    return settled(plan, threads, max_memory, device)


def _undo_problems(undo: Path | None, out: Path, digests: bool, resume: bool) -> Iterator[Problem]:
    """Options that do not go together: an undo record is proven by digests, and so is what is resumed."""
    if resume and not digests:
        yield Problem("E-OPTION", "only digests can verify what is resumed", hint="leave out --no-digests or --resume")
    if resume and undo is not None:
        yield Problem("E-OPTION", "an undo record is written in one run", hint="leave out --resume")
    if undo is None:
        return
    if (problem := staging.refuse_existing(undo)) is not None:
        yield replace(problem, hint="name another with --undo")
    place = undo.resolve()
    if out.resolve() in (place, *place.parents):
        yield Problem("E-OUTPUT", "the undo record would lie inside the output", str(undo), "write it somewhere else")
    if not digests:
        yield Problem("E-OPTION", "an undo record needs the digests that prove it", str(undo), "leave out --no-digests")


def settled(plan: Plan, threads: int | None = None, max_memory: int | None = None, device: str = "cpu") -> Plan:
    """The plan with as many workers as asked for and as fit into the memory allowed, its inputs noted.

    Raises OutputRefused for a disk that is too small, Mismatch for memory that is, ChoiceNeeded for a device that is
    not there.
    """
    refuse_device(device)
    plan = replace(plan, device=device)
    plan = replace(plan, threads=worker_count(threads))
    while max_memory is not None and plan.memory > max_memory:
        if plan.threads == 1:
            what = f"the largest tensor needs {plan.memory:,} bytes with its factors, {max_memory:,} are allowed"
            raise Mismatch(Problem("E-MEMORY", what, str(plan.source), "allow more with --max-memory"))
        plan = replace(plan, threads=plan.threads - 1)
    copied = [file.size for file in plan.files if not (plan.link and file.same_as)]
    beside = [(plan.source / path).stat().st_size for path in plan.companions]
    if (problem := staging.refuse_small_disk(plan.out, sum(copied) + sum(beside))) is not None:
        raise OutputRefused(problem)
    return replace(plan, inputs=tuple(sorted(_inputs(plan))))


def refuse_device(device: str) -> None:
    """Raises ChoiceNeeded for a device that torch could not use here."""
    if device == "cpu":
        return
    import torch

    hint = "leave --device out: the CPU is as fast as the disk for most merges"
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ChoiceNeeded(Problem("E-OPTION", f"device {device!r} is not cpu, cuda or cuda:N", hint=hint))
    if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ChoiceNeeded(Problem("E-OPTION", f"there is no GPU {device!r} that torch could use here", hint=hint))


def _inputs(plan: Plan) -> set[FileState]:
    """The files that the plan's bytes come from, as they were when they were first read."""
    tasks = [task for file in plan.files for task in file.tasks]
    read = [inputs(task.tensor if isinstance(task, Change) else task.source) for task in tasks]
    return {FileState.of(plan.source / path) for path in plan.companions}.union(*read)


def _single(base: Checkpoint, out: Path) -> bool:
    return base.path.is_file() and out.suffix == ".safetensors"


def _companions(base: Checkpoint, touched: Iterable[str]) -> list[Path]:
    return [path for path in base.companions(_components(base, touched)) if path.name != receipt.FILE_NAME]


def _components(base: Checkpoint, touched: Iterable[str]) -> set[str]:
    """The components of a pipeline that own one of the tensors, given by stored names."""
    return {name.partition(".")[0] for name in touched} & base.components.keys()


def _output_problems(source: Checkpoint, out: Path, folders: Sequence[Path]) -> Iterator[Problem]:
    above = out.absolute().resolve().parents
    for folder in {source.path, *folders}:
        if folder.is_dir() and folder.resolve() in above:
            what = f"the output would lie inside the input folder {folder}"
            yield Problem("E-OUTPUT", what, str(out), "write it somewhere else")
    if (problem := staging.refuse_existing(out)) is not None:
        yield problem
    if out.suffix == ".safetensors" and source.path.is_dir():
        yield Problem("E-OUTPUT", "the input is a folder, so the output is one too", str(out), "give a folder with -o")
    yield from names_clash(source)


# --- unmerge ---------------------------------------------------------------------------------------------------------


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
) -> Plan:
    """Check everything about an unmerge. With a base it is exact; without one, additive updates are subtracted."""
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
    folders = [Path(adapter) for adapter, _ in adapters if not isinstance(adapter, Adapter)]
    problems = list(_output_problems(merged, out, [*folders, *([base_path] if base_path else [])]))
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
    single = _single(merged, out)
    if base is not None and found.dropped:
        merged, dropped = base, []  # parts that a merge left out have their places in the base's files
    files = output_files(merged, changes, dropped=frozenset(dropped))
    if single:
        bare = {key: value for key, value in files[0].metadata.items() if key != receipt.METADATA_KEY}
        files = (replace(files[0], name=out.name).with_metadata(bare),)
    plan = Plan(
        "unmerge",
        merged.path,
        out,
        single,
        files,
        tuple(_companions(merged, found.tensors)),
        output_index(merged, files),
        found.adapters,
        "keep",
        tuple(binding.notes),
        base is not None or record is not None,
        found,
        record=record,
    )
    return settled(plan, threads, max_memory, device)


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

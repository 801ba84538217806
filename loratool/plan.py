"""Everything that is decided and checked before the first byte of an output is written.

A plan reports all its problems at once. It is data: it can be printed (`--dry-run`), turned into JSON, and run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool import companions, outputs, receipt, repacked, staging
from loratool.adapter import Adapter
from loratool.changes import DTYPES, Fitted, fitted, inputs
from loratool.checkpoint import PIPELINE_INDEX, Checkpoint
from loratool.companions import Companions
from loratool.conventions.choices import Choices
from loratool.errors import ChoiceNeeded, Mismatch, OutputRefused, Problem
from loratool.layout import Change, NewTensor, OutputFile, joined, names_clash, output_files, output_index
from loratool.maps.cutting import Derived
from loratool.matrices import BLOCK_BYTES, compute_dtype
from loratool.names import listed
from loratool.pinning import unpinned
from loratool.receipt import MergedAdapter, Receipt
from loratool.repacked import Repacked
from loratool.tensors import CHUNK, DTYPE_BITS, FileState, TensorRef
from loratool.undo import UndoRecord
from loratool.workers import WORKERS, worker_count


@dataclass(frozen=True)
class Plan:
    """What a merge or an unmerge will do."""

    verb: str
    source: Path
    out: Path
    single: bool  # the output is one file, not a folder
    files: tuple[OutputFile, ...]
    companions: Companions
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
    previous: Receipt | None = None  # of a base that is itself the result of a merge
    allow_unchanged: bool = False  # write a merge that changes nothing as well
    force: bool = False  # the output, and the undo record, replace what is there
    repacked: Repacked | None = None  # the one file, where it is a pickle like the input
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
            **self.companions.to_json(),
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


def plan_merge(
    base_path: Path,
    adapters: Sequence[tuple[Path | Adapter, float]],
    out: Path,
    *,
    dtype: str = "keep",
    allow_new: bool = False,
    allow_unchanged: bool = False,
    require_pinned: bool = False,
    onto_merged: bool = False,
    choices: Choices | None = None,
    digests: bool = True,
    reproducible: bool = False,
    undo: Path | None = None,
    link: bool = False,
    resume: bool = False,
    force: bool = False,
    form: str = "",
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    tokenizer: str = "",
) -> Plan:
    """Check everything about a merge and lay out its files. Raises the errors of `loratool.errors`, all at once.

    What is wrong with the outputs' names is raised before anything is read.
    """
    folders = [Path(adapter) for adapter, _ in adapters if not isinstance(adapter, Adapter)]
    form = form or ("pth" if outputs.is_pickle(out) else "")
    outputs.refuse(
        output_problems(base_path, out, folders, force),
        _undo_problems(undo, out, digests, resume, force, [base_path, *folders]),
        _form_problems(base_path, out, form),
    )
    fit = fitted(base_path, adapters, dtype, choices or Choices(), allow_new, undo is not None, onto_merged)
    base, changes, additions, dropped = fit.base, fit.changes, fit.additions, fit.dropped
    single = outputs.is_file(out)
    touched = [*changes, *(new.name for new in additions)]
    beside = (
        Companions()
        if fit.problems
        else companions.merged(
            base,
            companions_of(base, touched),
            changes,
            additions,
            folders,
            [config if isinstance(config := part.original.info.get("config"), dict) else {} for part in fit.parts],
            dtype=DTYPES[dtype],
            dequantised=bool(dropped),
            tokenizer=tokenizer,
        )
    )
    if single and base.path.is_dir() and not fit.problems:
        beside = alone(base, beside)
    if problems := [
        *names_clash(base),
        *_unlike_files(base, link),
        *fit.problems,
        *(repacked.misfits(base, changes, bool(additions or dropped)) if form and not fit.problems else ()),
        *beside.problems,
        *(() if allow_unchanged else fit.idle),
        *(_unpinned(fit) if require_pinned else ()),
    ]:
        raise Mismatch(problems)
    notes = [*fit.notes, *beside.notes, *(problem.message for problem in fit.idle)]
    whole = joined(base, out.name) if single else base
    files = output_files(whole, changes, additions, frozenset(ref.name for ref in dropped))
    notes += _rewritten(base, files)
    if stale := base.left_out(_components(base, touched)):
        names = ", ".join(map(str, stale[:3])) + (" ..." if stale[3:] else "")
        notes.append(f"not in the output, because nothing was merged into them: {names}")
    if single:
        files = (replace(files[0], name=out.name),)
    again = repacked.repacked(base.shards[0], changes, out.name if single else base.path.name) if form else None
    plan = Plan(
        "merge",
        base.path,
        out,
        single,
        files if again is None else (again.file,),
        beside,
        output_index(whole, files),
        fit.merged,
        dtype,
        tuple(notes),
        digests=digests,
        reproducible=reproducible,
        undo=undo,
        link=link,
        resume=resume,
        dropped=dropped,
        allow_unchanged=allow_unchanged,
        previous=fit.previous,
        force=force,
        repacked=again,
    )
    return settled(plan, threads, max_memory, device)


def _unpinned(fit: Fitted) -> Iterator[Problem]:
    """Adapters that do not prove their base, although that is asked for."""
    for part in fit.parts:
        yield from unpinned(part.original, fit.base, fit.view, part.name)


def _form_problems(base: Path, out: Path, form: str) -> Iterator[Problem]:
    """Why the output can not be a pickle."""
    named = outputs.is_pickle(out)
    if form not in ("", "pth"):
        yield Problem("E-OPTION", f"{form!r} is no form of an output", hint="--as pth, or leave it out")
    elif form and base.exists() and not (base.is_file() and outputs.is_pickle(base)):
        what = "a pickle is written only where the base is one, a .pth, .pt or .bin file"
        yield Problem("E-OUTPUT", what, str(out), "name a folder with -o" if named else "leave out --as pth")
    elif form and outputs.is_file(out) and not named:
        what = f"{out.name} is no name of a pickle"
        yield Problem("E-OUTPUT", what, str(out), "say -o NAME.pth, or leave out --as pth")


def _undo_problems(
    undo: Path | None, out: Path, digests: bool, resume: bool, force: bool, read: Sequence[Path]
) -> Iterator[Problem]:
    """Options that do not go together: an undo record is proven by digests, and so is what is resumed."""
    if resume and not digests:
        yield Problem("E-OPTION", "only digests can verify what is resumed", hint="leave out --no-digests or --resume")
    if resume and undo is not None:
        yield Problem("E-OPTION", "an undo record is written in one run", hint="leave out --resume")
    if undo is None:
        return
    if (problem := staging.refuse_existing(undo, force)) is not None:
        yield replace(problem, hint=problem.hint.replace("-o", "--undo"))
    elif force and undo.is_file():
        yield from outputs.replaced_inputs(undo, read)
    elif undo.is_dir():
        yield Problem("E-EXISTS", f"{undo} is a folder, and a record is a file", str(undo), "name another with --undo")
    place = undo.resolve()
    if out.resolve() in (place, *place.parents):
        yield Problem("E-OUTPUT", "the undo record would lie inside the output", str(undo), "write it somewhere else")
    if not digests:
        yield Problem("E-OPTION", "an undo record needs the digests that prove it", str(undo), "leave out --no-digests")


def _unlike_files(base: Checkpoint, link: bool) -> Iterator[Problem]:
    """What can not be where the output's files are not the base's."""
    if link and all(shard.header is None for shard in base.shards):
        what = "there is nothing to link: no file of this base is a file of the output, which is safetensors"
        yield Problem("E-OPTION", what, str(base.path), "leave out --link")


def _rewritten(base: Checkpoint, files: Sequence[OutputFile]) -> Iterator[str]:
    """What is said of an output whose files are not those of its base."""
    if not any(shard.stem for shard in base.shards):
        return
    yield f"the base's tensors lie in pieces; the output has them whole, in {listed([file.name for file in files])}"
    if base.path.is_dir() and base.side_json(companions.CONFIG) is None:
        yield f"there is no {companions.CONFIG} in the base's folder, and so none in the output: add that of the model"


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
    beside = [path.stat().st_size for path in _copied(plan)]
    if (problem := staging.refuse_small_disk(plan.out, sum(copied) + sum(beside))) is not None:
        raise OutputRefused(problem)
    plan = replace(plan, inputs=tuple(sorted(_inputs(plan))))
    for out in (plan.out, *([plan.undo] if plan.undo else [])) if plan.force else ():
        outputs.refuse_replaced(out, plan.inputs)
    return plan


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
    return {FileState.of(path) for path in _copied(plan)}.union(*read)


def _copied(plan: Plan) -> list[Path]:
    """The files that companions are copied from."""
    origins = (plan.companions.origin(name, plan.source) for name in plan.companions.names)
    return [path for path in origins if path is not None]


def alone(source: Checkpoint, beside: Companions) -> Companions:
    """What lies beside one file that is made of a folder: nothing. Notes say what stays behind, and what would have to
    be edited."""
    left = [path.as_posix() for path in companions_of(source, ())]
    notes = [f"the output is one file: {listed(left)} of {source.path.name} are not in it"] if left else []
    notes += [f"the {path} that is used with it has to say: {edit}" for path, edit in beside.edits]
    return Companions(notes=tuple(notes), problems=tuple(p for p in beside.problems if p.code == "E-OPTION"))


def companions_of(base: Checkpoint, touched: Iterable[str]) -> list[Path]:
    return [path for path in base.companions(_components(base, touched)) if path.name != receipt.FILE_NAME]


def _components(base: Checkpoint, touched: Iterable[str]) -> set[str]:
    """The components of a pipeline that own one of the tensors, given by stored names."""
    return {name.partition(".")[0] for name in touched} & base.components.keys()


def output_problems(source: Path, out: Path, folders: Sequence[Path], force: bool) -> Iterator[Problem]:
    """Why a checkpoint made of `source` can not be written under this name. Nothing of it is read yet."""
    above = out.absolute().resolve().parents
    for folder in {source, *folders}:
        if folder.is_dir() and folder.resolve() in above:
            what = f"the output would lie inside the input folder {folder}"
            yield Problem("E-OUTPUT", what, str(out), "write it somewhere else")
    suffixes = (".safetensors", *((source.suffix, *outputs.PICKLES) if outputs.is_pickle(source) else ()))
    pipeline = (source / PIPELINE_INDEX).is_file()
    what = "the output of a pipeline" if pipeline else "a checkpoint"
    yield from outputs.problems(out, what, () if pipeline else suffixes, True, force=force, inputs=[source, *folders])

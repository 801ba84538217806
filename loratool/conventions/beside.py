"""Trained weights that lie beside an adapter's file: they are part of the adapter, as whole tensors.

Trainers write what they train without LoRA (a projector, a vision tower, a value head, norms, embeddings) to a second
file. A merge without it is another model than the one that was trained. What a trainer keeps for itself lies there too.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratool import conventions
from loratool.adapter import Adapter, Target, Targeted
from loratool.checkpoint import PICKLE_SUFFIXES, Checkpoint, open_checkpoint
from loratool.conventions.peft_folder import FILE_STEM
from loratool.conventions.peft_names import PREFIX
from loratool.conventions.selection import Selection
from loratool.errors import LoratoolError, Problem, Unsupported
from loratool.maps import View
from loratool.names import listed, prefix_rule
from loratool.places import files_below, is_trainers_own
from loratool.tensors import TensorRef
from loratool.updates import Replace

# Rows for new tokens, under names of no tensor, as vLLM took them: where they go is in no file.
NEW_ROWS = {"input_embeddings", "output_embeddings"}
NOT_A_MODULE = re.compile(r"\.base_layer(?=\.)|\.modules_to_save(\.default)?(?=\.)")


@dataclass
class Beside:
    """What was found beside an adapter: updates, the file of each target, the patterns that matched, problems."""

    updates: list[Targeted] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # target -> file
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def files_beside(source: Checkpoint) -> list[Path]:
    """The other weights files of an adapter's own folder, the trainer's excepted.

    A folder is an adapter's own if it was given as one, or if the file has PEFT's name: any other file may lie among
    strangers.
    """
    return [path for path in _others(source) if not _is_trainers(path)]


def trainers_own(source: Checkpoint) -> list[str]:
    """Names of the files beside an adapter that a trainer keeps for itself."""
    return [path.name for path in _others(source) if _is_trainers(path)]


def joined(
    adapter: Adapter, source: Checkpoint, selection: Selection, view: View | None, by_key: Collection[str]
) -> tuple[Adapter, Beside]:
    """The adapter with what lies beside it, by the base's names where a base is given.

    `by_key` are the patterns that matched keys of the adapter's own file. Files that can not be read, or whose place in
    a base is not known, are problems: each by its name.
    """
    found = Beside()
    trained = {item.target.name for item in adapter.updates if item.update.role != "replace"}
    whole = {item.target.name: item for item in adapter.updates if isinstance(item.update, Replace)}
    models: dict[str, str] = {}  # shards of one checkpoint -> a name in them that the adapter changes
    read: list[tuple[Path, dict[str, TensorRef]]] = []
    for path in files_beside(source):
        if skipping := [pattern for pattern in selection.skip if fnmatch.fnmatchcase(path.name, pattern)]:
            found.used.update(skipping)
            found.notes.append(f"left out, as --skip says: {path.name}, which lies beside it")
            continue
        try:
            tensors = _tensors(path, source, selection, by_key, found)
            named = _named(tensors, view, path)
        except LoratoolError as error:
            found.problems += [_refused(path, problem) for problem in error.problems]
            continue
        if known := [name for name in named if name in trained]:
            models.setdefault(_checkpoint_of(path), known[0])
        read.append((path, named))
    for path, named in read:
        if (name := models.get(_checkpoint_of(path))) is not None:
            what = f"{_checkpoint_of(path)} beside it holds {name}, which the adapter changes: it is a model"
            if (note := f"{what}, and is not read") not in found.notes:
                found.notes.append(note)
            continue
        added = {name: ref for name, ref in named.items() if not _has_it(whole.get(name), ref)}
        found.updates += [Targeted(Target(name, ref.shape), Replace(ref)) for name, ref in added.items()]
        found.files |= dict.fromkeys(added, path.name)
        if added:
            count = f"{len(added)} tensor" + "s" * (len(added) > 1)
            found.notes.append(f"{path.name} lies beside it and is part of it: {count}, {listed(added)}")
    _look_below(source, selection, trained, found)
    notes = (*adapter.notes, *found.notes)
    return replace(adapter, updates=(*adapter.updates, *found.updates), notes=notes), found


def _look_below(source: Checkpoint, selection: Selection, trained: Collection[str], found: Beside) -> None:
    """Weights in folders below the adapter's are no part of it: they are named, and refused where they would be lost.

    Other adapters and whole models lie there too.
    """
    if not _is_own_folder(source):
        return
    kinds: dict[str, list[str]] = defaultdict(list)
    for path in files_below(source.folder):
        name = path.relative_to(source.folder).as_posix()
        if skipping := [pattern for pattern in selection.skip if fnmatch.fnmatchcase(name, pattern)]:
            found.used.update(skipping)
            kinds["left out, as --skip says"].append(name)
            continue
        try:
            opened = open_checkpoint(path)
        except LoratoolError as error:
            if error.code != "E-EMPTY":
                kinds["not readable"].append(name)
            continue
        if conventions.matching(opened):
            kinds["adapters of their own"].append(name)
        elif _is_model(opened, trained):
            kinds["models"].append(name)
        else:
            what = f"{name} lies below the adapter, and what was trained in it would be lost: {listed(opened.tensors)}"
            hint = f"--skip '{name}' leaves it out; a file beside the adapter's own is merged with it"
            found.problems.append(Problem("E-BESIDE", what, str(path), hint))
    found.notes += [
        f"below it lie, and are not read with it: {listed(names)} ({kind})" for kind, names in kinds.items()
    ]


def _is_model(opened: Checkpoint, trained: Collection[str]) -> bool:
    """Whether weights are those of a whole model: by its config, or because they hold what the adapter changes."""
    config = opened.side_json("config.json") or {}
    plain = {NOT_A_MODULE.sub("", name.removeprefix(PREFIX)) for name in opened.tensors}
    return "architectures" in config or "model_type" in config or bool(plain & {*trained})


def _is_own_folder(source: Checkpoint) -> bool:
    return source.path.is_dir() or source.path.stem == FILE_STEM


def _others(source: Checkpoint) -> Iterator[Path]:
    if not _is_own_folder(source):
        return
    own = {path.name for path in source.files}
    for path in sorted(source.folder.iterdir()):
        if path.suffix in (".safetensors", *PICKLE_SUFFIXES) and path.name not in own and path.is_file():
            yield path


def _checkpoint_of(path: Path) -> str:
    """One name for all shards of a checkpoint: ``model-00001-of-00003.safetensors`` -> ``model-*-of-00003...``."""
    return re.sub(r"-\d+(?=-of-\d+\.)", "-*", path.name)


def _is_trainers(path: Path) -> bool:
    return is_trainers_own(path.name)


def _tensors(
    path: Path, source: Checkpoint, selection: Selection, by_key: Collection[str], found: Beside
) -> dict[str, TensorRef]:
    """The tensors of a file that are wanted; none if it is an adapter of its own, or holds no tensor."""
    try:
        opened = open_checkpoint(path)
    except LoratoolError as error:
        if error.code == "E-EMPTY":
            return {}
        raise
    if conventions.matching(opened):
        if opened.tensors.keys() != source.tensors.keys():  # otherwise this adapter, in another format
            found.notes.append(f"{path.name} beside it is an adapter of its own, and is not read with this one")
        return {}
    if opened.tensors.keys() <= NEW_ROWS:
        what = f"rows for new tokens ({listed(opened.tensors)}), and no file says to which tokens they belong"
        raise Unsupported(Problem("E-BESIDE", what))
    wanted, skipped = {}, []
    for name, ref in opened.tensors.items():
        if matching := [pattern for pattern in selection.skip if fnmatch.fnmatchcase(name, pattern)]:
            found.used.update(matching)
            skipped.append(name)
        elif selection.only and set(selection.only) <= set(by_key) and not _matches(name, selection.only):
            skipped.append(name)
        else:
            wanted[name] = ref
    if skipped:
        found.notes.append(f"left out of {path.name}, as --only and --skip say: {listed(skipped)}")
    return wanted


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _named(tensors: Mapping[str, TensorRef], view: View | None, path: Path) -> dict[str, TensorRef]:
    """The tensors by the base's names, as far as it has them; otherwise as PEFT's model calls them inside."""
    trained = {name: ref for name, ref in tensors.items() if ".original_module." not in name}
    plain = {NOT_A_MODULE.sub("", name.removeprefix(PREFIX)): ref for name, ref in trained.items()}
    if len(plain) < len(trained):
        raise Unsupported(Problem("E-NAMES", "two of its tensors have one name in the base", str(path)))
    if view is None:
        return plain
    rename, _ = prefix_rule(plain, view.base, str(path))
    if view.places and any(rename(name) not in view.base for name in plain):
        rename, _ = prefix_rule(plain, view.tensors, str(path))
    return {rename(name): ref for name, ref in plain.items()}


def _has_it(item: Targeted | None, ref: TensorRef) -> bool:
    """Whether the adapter's own file has the same tensor as well."""
    if item is None or not isinstance(item.update, Replace):
        return False
    value = item.update.value
    return (value.dtype, value.shape) == (ref.dtype, ref.shape) and value.digest() == ref.digest()


def _refused(path: Path, problem: Problem) -> Problem:
    """A file whose weights would be lost."""
    what = f"{path.name} lies beside the adapter, and what was trained in it would be lost: {problem.message}"
    return Problem("E-BESIDE", what, str(path), f"--skip '{path.name}' leaves it out")

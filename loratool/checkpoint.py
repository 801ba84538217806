"""Checkpoints on disk: one file, or shards with an index; safetensors or pickles. Lazy, with no idea of LoRA."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from loratool.container import Header, read_header, strict_json
from loratool.errors import ChoiceNeeded, InvalidFile, Problem
from loratool.pickles import STATE_KEYS, Pickled, Tree, read_tree
from loratool.tensors import InMemory, TensorRef

T = TypeVar("T")

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".lora")  # the last is litgpt's lit_model.pth.lora
# Weights in other formats beside the ones that are read: stale after a merge, so they are not companions.
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".tflite")
PREFERRED = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
# Segments that wrappers leave in names: torch.compile, FSDP1, activation checkpointing.
WRAPPER_SEGMENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
EMA_COUNTER = "n_averaged"  # of torch's AveragedModel
SKIPPED_FOLDERS = {".git", ".cache", "__pycache__"}


@dataclass(frozen=True)
class Shard:
    """One weights file. `header` is None for a pickle; `tensors` goes by stored names, in stored order."""

    path: Path
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    header: Header | None


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of a checkpoint, none of them read yet.

    `tensors` goes by clean names: without the prefixes and segments that DDP, torch.compile, FSDP and activation
    checkpointing leave. `notes` says what was cleaned.
    """

    path: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorRef]
    index: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def metadata(self) -> Mapping[str, str]:
        return {key: value for shard in self.shards for key, value in shard.metadata.items()}

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors.values())

    def side_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file beside the weights, or None if there is none."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def companions(self) -> list[Path]:
        """Files of the folder that are not weights, relative to it; a single file has none."""
        if not self.path.is_dir():
            return []
        return sorted(
            path.relative_to(self.path)
            for path in self.path.rglob("*")
            if path.is_file()
            and not path.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
            and not SKIPPED_FOLDERS & set(path.relative_to(self.path).parts)
            and ".partial-" not in path.as_posix()  # left by a killed run
        )

    @cached_property
    def ties(self) -> Mapping[str, str]:
        """Names that stand for another tensor of the checkpoint: absent ones recorded as dropped by safetensors'
        `save_model`, and the second and later names of one storage in a pickle."""
        dropped = {
            name: kept for name, kept in self.metadata.items() if kept in self.tensors and name not in self.tensors
        }
        first: dict[tuple[Any, ...], str] = {}
        for name, tensor in self.tensors.items():
            storage = tensor.data.storage if isinstance(tensor.data, Pickled | InMemory) else ()
            if storage and tensor.numel:
                kept = first.setdefault((*storage, tensor.shape), name)
                if kept != name:
                    dropped[name] = kept
        return dropped


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a weights file, or a folder with weights. Reads headers only.

    Raises InvalidFile with what is wrong, ChoiceNeeded if a folder has several unrelated weights files.
    """
    if not path.exists():
        raise InvalidFile(Problem("E-MISSING", f"{path} does not exist", str(path), "check the path"))
    files, index = (_files_of(path), None) if path.is_file() else _find_weights(path)
    if index is not None:
        weight_map = _weight_map(index)
        files = [index.parent / name for name in sorted(set(weight_map.values()))]
        _all_there(files, index)
    shards = tuple(_readable(file, _open_shard) for file in files)
    if index is not None:
        _check_index(index, weight_map, shards)
    tensors, notes = _clean([(name, tensor) for shard in shards for name, tensor in shard.tensors.items()], path)
    if not tensors:
        raise InvalidFile(Problem("E-EMPTY", "there is no tensor in it", str(path)))
    return Checkpoint(path, shards, tensors, index, notes)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a side file (config, index), parsed strictly."""
    try:
        text = _readable(path, lambda file: file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidFile(Problem("E-JSON", f"not UTF-8: {error}", str(path))) from None
    document = strict_json(text, str(path), "E-JSON", "")
    if not isinstance(document, dict):
        raise InvalidFile(Problem("E-JSON", "not a JSON object", str(path)))
    return document


def _readable(path: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file; a disk that fails is an error that names it."""
    try:
        return read(path)
    except OSError as error:
        raise InvalidFile(Problem("E-READ", f"can not be read: {error.strerror or error}", str(path))) from error


def _files_of(path: Path) -> list[Path]:
    if path.suffix == ".safetensors" or path.suffix in PICKLE_SUFFIXES:
        return [path]
    hint = "give the folder itself" if path.name.endswith(".index.json") else "safetensors, .pt, .pth and .bin are read"
    raise InvalidFile(Problem("E-SUFFIX", f"{path.name} is not a weights file", str(path), hint))


def _find_weights(folder: Path) -> tuple[list[Path], Path | None]:
    """The weights of a folder: an index with its shards, a well-known name, or the only file there is."""
    for kinds in ((".safetensors",), PICKLE_SUFFIXES):
        indexes = sorted(p for p in folder.glob("*.index.json") if p.name.removesuffix(".index.json").endswith(kinds))
        if len(indexes) == 1:
            return [], indexes[0]
        files = sorted(path for path in folder.iterdir() if path.suffix in kinds and path.is_file())
        known = [path for path in files if path.name in PREFERRED] if not indexes else []
        if len(files) == 1 or len(known) == 1:
            return known or files, None
        if files or indexes:
            names = ", ".join(path.name for path in indexes or files)
            raise ChoiceNeeded(
                Problem(
                    "E-AMBIGUOUS",
                    f"several weights files and no single index: {names}",
                    str(folder),
                    "give the path of one file",
                )
            )
    below = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    hint = f"adapters lie in its subfolders {', '.join(below)}: give one of them" if below else "check the path"
    raise InvalidFile(
        Problem("E-MISSING", "no weights (.safetensors, .bin, .pt, .pth) in this folder", str(folder), hint)
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InvalidFile(Problem("E-INDEX", "`weight_map` must be an object of file names", str(index)))
    problems = [
        Problem("E-INDEX", f"weight_map points outside its folder: {name!r}", str(index))
        for name in sorted(set(weight_map.values()))
        if not re.fullmatch(r"[^/\\:\x00]{1,255}", name)
        or name in (".", "..")
        or not name.endswith((".safetensors", *PICKLE_SUFFIXES))
    ]
    if problems:
        raise InvalidFile(problems)
    return weight_map


def _all_there(files: Iterable[Path], index: Path) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InvalidFile(
            Problem("E-INDEX", f"shards are missing: {', '.join(missing)}", str(index), "incomplete download?")
        )


def _check_index(index: Path, weight_map: Mapping[str, str], shards: Iterable[Shard]) -> None:
    """The index and its shards must agree on every tensor, or a merge would lose some."""
    found = {name: shard.path.name for shard in shards for name in shard.tensors}
    stored = [name for shard in shards for name in shard.tensors]
    problems = [
        Problem("E-INDEX", f"tensor {name!r} is in {found.get(name, 'no shard')}, the index says {file}", str(index))
        for name, file in weight_map.items()
        if found.get(name) != file
    ]
    problems += [
        Problem("E-INDEX", f"tensor {name!r} of {file} is not in the index", str(index))
        for name, file in found.items()
        if name not in weight_map
    ]
    if len(set(stored)) < len(stored):
        twice = next(name for name in stored if stored.count(name) > 1)
        problems.append(Problem("E-INDEX", f"tensor {twice!r} is in two shards", str(index)))
    if problems:
        raise InvalidFile(problems)


def _open_shard(path: Path) -> Shard:
    if path.suffix == ".safetensors":
        header = read_header(path)
        return Shard(path, header.tensors, header.metadata, header)
    return Shard(path, _state_dict(read_tree(path), path), {}, None)


def _state_dict(tree: Tree, path: Path) -> dict[str, TensorRef]:
    """The one dict of tensors in a checkpoint's tree: itself, or what trainers nest under a known key."""

    def tensors_of(value: Any) -> dict[str, TensorRef]:
        if not isinstance(value, dict):
            return {}
        return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, TensorRef)}

    choices = {"": tensors_of(tree)} | {key: tensors_of(tree.get(key)) for key in STATE_KEYS}
    filled = {key: tensors for key, tensors in choices.items() if tensors}
    if len(filled) > 1:
        names = ", ".join(key or "the top level" for key in filled)
        raise ChoiceNeeded(
            Problem(
                "E-AMBIGUOUS",
                f"tensors lie at several places: {names}",
                str(path),
                "save one state dict to a file of its own",
            )
        )
    if not filled:
        raise InvalidFile(Problem("E-EMPTY", f"no state dict in it; its keys are {[*map(str, tree)][:8]}", str(path)))
    return next(iter(filled.values()))


def _clean(stored: list[tuple[str, TensorRef]], path: Path) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
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

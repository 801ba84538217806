"""Checkpoints on disk: one file, shards with an index, or a diffusers pipeline of several such folders; safetensors or
pickles. Lazy, with no idea of LoRA."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from loratool import archives, distcp, places
from loratool.container import Header, read_header, strict_json
from loratool.errors import ChoiceNeeded, InvalidFile, Problem
from loratool.gguf import read_gguf
from loratool.npz import read_npz
from loratool.pickles import STATE_KEYS, Pickled, Tree, read_tree
from loratool.tensors import InMemory, TensorRef
from loratool.wrappers import cleaned

T = TypeVar("T")

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".lora")  # the last is litgpt's lit_model.pth.lora
OTHER_SUFFIXES = (".npz", ".gguf")  # adapters of mlx-lm before 2024-05, and of llama.cpp
# Weights in other formats beside the ones that are read: stale after a merge, so they are not companions.
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".tflite",
                   places.PIECES)  # fmt: skip
PREFERRED = (
    "model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors", "adapters.safetensors",
    "pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin", "adapters.npz",
)  # fmt: skip
PIPELINE_INDEX = "model_index.json"  # names the components of a diffusers pipeline, each a folder of its own
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # diffusers puts a variant's name inside: .index.fp16.json
SKIPPED_FOLDERS = {".git", ".cache", "__pycache__"}


@dataclass(frozen=True)
class Shard:
    """One weights file. `header` is safetensors' only; `tensors` goes by stored names, in stored order.

    Of a torch.distributed.checkpoint, it is what goes to one file of an output, whose name begins with `stem`; its
    tensors lie in `pieces`.
    """

    path: Path
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    header: Header | None
    stem: str = ""
    pieces: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of a checkpoint, none of them read yet.

    `tensors` goes by clean names: without the prefixes and segments that DDP, torch.compile, FSDP and activation
    checkpointing leave. `notes` says what was cleaned.

    A pipeline has `components`, checkpoints themselves, by name. Its own tensors are theirs, called COMPONENT.TENSOR by
    clean and by stored name; a shard and its tensors keep the names that the file has.
    """

    path: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorRef]
    index: Path | None = None
    notes: tuple[str, ...] = ()
    components: Mapping[str, Checkpoint] = field(default_factory=dict)

    @property
    def metadata(self) -> Mapping[str, str]:
        return {key: value for shard in self.shards for key, value in shard.metadata.items()}

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def files(self) -> list[Path]:
        """The weights files: those of the shards, with those that their pieces lie in."""
        return sorted({path for shard in self.shards for path in (shard.path, *shard.pieces)})

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors.values())

    def side_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file beside the weights, or None if there is none."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def companions(self, changed: Collection[str] = ()) -> list[Path]:
        """Files of the folder that are no weights of it, relative to it; a single file has none.

        Weights in other formats and precisions would be stale after a merge, so they are none. A pipeline's component
        that is not among the `changed` ones keeps them.
        """
        if not self.path.is_dir():
            return []
        return [path for path in self._files() if self._stays(path, changed)]

    def left_out(self, changed: Collection[str] = ()) -> list[Path]:
        """Weights of the folder that an output with those components changed does not have, relative to it."""
        if not self.path.is_dir():
            return []
        read = {path.relative_to(self.path) for path in self.files}
        stay = {*self.companions(changed), *read}
        return [path for path in self._files() if path not in stay and path.name.endswith(WEIGHT_SUFFIXES)]

    def _files(self) -> list[Path]:
        return sorted(
            path.relative_to(self.path)
            for path in self.path.rglob("*")
            if path.is_file()
            and not SKIPPED_FOLDERS & set(path.relative_to(self.path).parts)
            and ".partial-" not in path.as_posix()  # left by a killed run
        )

    def _stays(self, path: Path, changed: Collection[str]) -> bool:
        if path.name == places.METADATA and places.is_distributed((self.path / path).parent):
            return False
        if not path.name.endswith(WEIGHT_SUFFIXES) and not _INDEX.search(path.name):
            return True
        component = path.parts[0]
        if not self.components or len(path.parts) == 1 or component in changed:
            return False
        part = self.components.get(component)
        # The output's own files are written otherwise; those of a pickled component that does not change are not.
        written = [] if part is None or part.pickled else [part.index, *(shard.path for shard in part.shards)]
        return self.path / path not in written

    @property
    def pickled(self) -> bool:
        """Whether the weights are pickles, which an output has as safetensors."""
        return any(shard.header is None for shard in self.shards)

    @cached_property
    def ties(self) -> Mapping[str, str]:
        """Names that stand for another tensor of the checkpoint: absent ones recorded as dropped by safetensors'
        `save_model`, and the second and later names of one storage in a pickle."""
        if self.components:
            pairs = ((name, *tie) for name, part in self.components.items() for tie in part.ties.items())
            return {f"{name}.{other}": f"{name}.{kept}" for name, other, kept in pairs}
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
        raise places.not_here(path)
    if (path / PIPELINE_INDEX).is_file():
        return _open_pipeline(path)
    if path.name == places.METADATA and places.is_distributed(path.parent):
        return _open_distributed(path.parent, path)
    if places.is_distributed(path):
        _refuse_others(path)
        return _open_distributed(path, path)
    files, index = (_files_of(path), None) if path.is_file() else _find_weights(path)
    if index is not None:
        weight_map = _weight_map(index)
        files = [index.parent / name for name in sorted(set(weight_map.values()))]
        _all_there(files, index)
    shards = tuple(_readable(file, _open_shard) for file in files)
    if index is not None:
        _check_index(index, weight_map, shards)
    tensors, notes = cleaned([(name, tensor) for shard in shards for name, tensor in shard.tensors.items()], path)
    if not tensors:
        raise InvalidFile(Problem("E-EMPTY", "there is no tensor in it", str(path)))
    return Checkpoint(path, shards, tensors, index, notes)


def _open_distributed(folder: Path, given: Path) -> Checkpoint:
    """A folder of torch.distributed.checkpoint, given as such, or as its .metadata alone."""
    places.refuse_distributed(folder)
    found = distcp.read(folder)
    path = folder / places.METADATA
    shards = tuple(Shard(path, group, {}, None, stem, found.files) for stem, group in found.shards())
    tensors, notes = cleaned([*found.tensors.items()], folder)
    return Checkpoint(given, shards, tensors, None, (*found.notes, *notes))


def _refuse_others(folder: Path) -> None:
    """Raises ChoiceNeeded for a folder in which a checkpoint of another kind lies beside the distributed one."""
    others = [name for name in PREFERRED if (folder / name).is_file()] or [p.name for p in folder.glob("*.index.json")]
    if others:
        what = f"there are a torch.distributed.checkpoint and {others[0]} in this folder"
        hint = f"give one of them: {folder / places.METADATA} or {folder / others[0].removesuffix('.index.json')}"
        raise ChoiceNeeded(Problem("E-AMBIGUOUS", what, str(folder), hint))


def _open_pipeline(folder: Path) -> Checkpoint:
    """A diffusers pipeline: every component that has weights. Schedulers, tokenizers and the like have none."""
    parts = {}
    for name in _component_names(folder):
        if any(path.name.endswith((".safetensors", *PICKLE_SUFFIXES)) for path in (folder / name).iterdir()):
            if not (folder / name / "config.json").is_file():
                what = f"the component {name} has weights and no config.json: no pipeline can load it"
                raise InvalidFile(Problem("E-MISSING", what, str(folder), "incomplete download?"))
            parts[name] = open_checkpoint(folder / name)
    if not parts:
        raise InvalidFile(Problem("E-MISSING", "no component of this pipeline has weights", str(folder)))
    tensors = {
        f"{name}.{clean}": replace(ref, name=f"{name}.{ref.name}")
        for name, part in parts.items()
        for clean, ref in part.tensors.items()
    }
    notes = tuple(f"{name}: {note}" for name, part in parts.items() for note in part.notes)
    return Checkpoint(
        folder, tuple(shard for part in parts.values() for shard in part.shards), tensors, None, notes, parts
    )


def _component_names(folder: Path) -> list[str]:
    """The components that model_index.json lists as [library, class] and that have a folder."""
    listed = read_json(folder / PIPELINE_INDEX)
    names = [name for name, kind in listed.items() if isinstance(kind, list) and not name.startswith("_")]
    if wrong := [name for name in names if not re.fullmatch(r"\w{1,100}", name)]:
        what = f"{PIPELINE_INDEX} lists a component {wrong[0]!r:.80}, which names no folder"
        raise InvalidFile(Problem("E-INDEX", what, str(folder)))
    folders = [name for name in sorted(names) if (folder / name).is_dir()]
    if nested := [name for name in folders if (folder / name / PIPELINE_INDEX).is_file()]:
        raise InvalidFile(Problem("E-INDEX", f"the component {nested[0]} is itself a pipeline", str(folder)))
    return folders


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a side file (config, index), parsed strictly; a byte order mark before it is no part of it."""
    try:
        text = _readable(path, lambda file: file.read_text(encoding="utf-8").removeprefix("\ufeff"))
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
    if path.suffix in (".safetensors", *PICKLE_SUFFIXES, *OTHER_SUFFIXES):
        return [path]
    known = ", ".join((".safetensors", *PICKLE_SUFFIXES, *OTHER_SUFFIXES))
    hint = "give the folder itself" if path.name.endswith(".index.json") else f"{known} are read"
    hint = places.kind_of_suffix(path) or hint
    raise InvalidFile(Problem("E-SUFFIX", f"{path.name} is not a weights file", str(path), hint))


def _find_weights(folder: Path) -> tuple[list[Path], Path | None]:
    """The weights of a folder: an index with its shards, a well-known name, or the only file there is."""
    for kinds in ((".safetensors",), PICKLE_SUFFIXES, OTHER_SUFFIXES):
        indexes = sorted(p for p in folder.glob("*.index.json") if p.name.removesuffix(".index.json").endswith(kinds))
        if len(indexes) == 1:
            return [], indexes[0]
        files = sorted(path for path in folder.iterdir() if path.suffix in kinds and path.is_file())
        own = [path for path in files if places.is_trainers_own(path.name)]
        ranks = places.of_ranks(files, folder) if own == files else []
        if own == files and own and not ranks and places.weights_below(folder):
            continue  # a trainer's folder, whose checkpoints lie below it
        files = [path for path in files if path not in own] or ranks or files
        known = [path for path in files if path.name in PREFERRED] if not indexes else []
        if not (known or indexes) and any((folder / name).is_file() for name in PREFERRED):
            continue  # what lies beside a file of another kind
        if len(files) == 1 or len(known) == 1:
            return known or files, None
        if files or indexes:
            places.refuse_piece((indexes or files)[0])
            names = ", ".join(path.name for path in indexes or files)
            raise ChoiceNeeded(
                Problem(
                    "E-AMBIGUOUS",
                    f"several weights files and no single index: {names}",
                    str(folder),
                    "give the path of one file",
                )
            )
    raise places.nothing_in(folder)


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
    places.refuse_stand_in(path)
    places.refuse_piece(path)
    if path.suffix == ".safetensors" or _looks_like_safetensors(path):
        header = read_header(path)
        return Shard(path, header.tensors, header.metadata, header)
    if path.suffix == ".gguf":
        parsed = read_gguf(path)
        return Shard(path, parsed.tensors, parsed.metadata, None)
    if path.suffix == ".npz":
        return Shard(path, read_npz(path), {}, None)
    return Shard(path, _state_dict(read_tree(path), path), archives.metadata(path), None)


def _looks_like_safetensors(path: Path) -> bool:
    """Whether a file with another suffix is safetensors all the same: people call adapters `my.lora`.

    A header's length and its brace, where pickles and archives have a magic number that would be far too long.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") + 8 <= path.stat().st_size


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

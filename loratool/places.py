"""Where people point when they mean something near: folders above the weights, and files that stand for others."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from loratool.errors import InvalidFile, Problem, Unsupported
from loratool.pickles import GATHER

# Files that a trainer writes for itself, to go on with: names are shell-style.
TRAINERS_OWN = (
    "optimizer*", "*optim_states*", "*_optimizer.*", "scheduler*", "lr_scheduler*", "scaler*", "rng_state*",
    "random_states*", "training_args*", "trainer_state*", "training_state*", "train_state*", "recipe_state*",
    "dl_state_dict*", "sampler*", "pytorch_model_fsdp*", "*model_states.pt", "[0-9]*_adapters.safetensors",
    "extra_state_*", "*_rank_[0-9]*.pt", "*_rank[0-9]*.bin",
)  # fmt: skip
# And folders of its: checkpoints on the way, optimizers, logs.
TRAINERS_FOLDERS = (
    ".*", "__pycache__", "checkpoint-*", "checkpoint_*", "tmp-checkpoint-*", "global_step*", "optimizer*", "optim",
    "pytorch_model_fsdp*", "runs", "logs", "wandb",
)  # fmt: skip
DEPTH = 3  # folders down, in a search for what could be meant: snapshots/HASH/adapter
LOOKED = 2000  # entries at the most
SHOWN = 4
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_RANK = re.compile(r"(?:pytorch_)?model.*_rank_?\d+\.(?:pt|bin)")
_PIECE = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")
METADATA, PIECES = ".metadata", ".distcp"  # of a torch.distributed.checkpoint folder
_SUFFIXES = {
    ".nemo": "a NeMo archive (tar): unpack it, and give the weights file in it",
    ".onnx": "an ONNX graph, which holds no named weights of a model: give the checkpoint it was exported from",
    ".distcp": "a part of a torch.distributed.checkpoint folder: give the folder",
    ".msgpack": "Flax weights: save the model with PyTorch",
    ".h5": "TensorFlow or Keras weights: save the model with PyTorch",
}
_LFS, _ANNEX = b"version https://git-lfs.github.com/spec/", b"/annex/objects/"


def is_distributed(folder: Path) -> bool:
    """Whether a folder is one of torch.distributed.checkpoint."""
    return (folder / METADATA).is_file() and any(folder.glob(f"*{PIECES}"))


def refuse_distributed(folder: Path) -> None:
    """Raises Unsupported for such a folder whose tensors are not a model's own: they are named and cut otherwise."""
    if (folder / "common.pt").is_file():
        hint = "export it with the tool that wrote it (Megatron-Bridge, NeMo)"
        raise Unsupported(Problem("E-UNSUPPORTED", "a Megatron torch_dist checkpoint", str(folder), hint))


def is_trainers_own(name: str) -> bool:
    """Whether a file is one that a trainer keeps for itself."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in TRAINERS_OWN)


def files_below(folder: Path) -> list[Path]:
    """Weights in the folders below one, those of a trainer's folders excepted: files, and distributed checkpoints."""
    found: list[Path] = []
    level = [folder]
    for _ in range(DEPTH):
        level = [child for parent in level for child in _entries(parent) if child.is_dir() and not _is_own(child)]
        for place in level[:LOOKED]:
            files = [path for path in _entries(place) if path.suffix in WEIGHTS and not is_trainers_own(path.name)]
            found += [place] if is_distributed(place) else [path for path in files if path.is_file()]
    return found[:LOOKED]


def _is_own(folder: Path) -> bool:
    return any(fnmatch.fnmatchcase(folder.name, pattern) for pattern in TRAINERS_FOLDERS)


def of_ranks(files: Iterable[Path], folder: Path) -> list[Path]:
    """Those of a folder's files that hold the pieces which single ranks have of a model's tensors: one that may be
    read, if it is the only one.

    Raises Unsupported for several, and for one above other weights.
    """
    if zero := [path for path in files if path.name.endswith("_states.pt")]:
        what = f"a step of DeepSpeed ZeRO, in the pieces of {len(zero)} files, such as {zero[0].name}"
        hint = "python zero_to_fp32.py . OUT, in the folder above it, writes whole ones"
        hint += "; with ZeRO 1 and 2, mp_rank_00_model_states.pt has whole ones: give its path"
        raise Unsupported(Problem("E-UNSUPPORTED", what, str(folder), hint))
    found, below = [path for path in files if _RANK.fullmatch(path.name)], weights_below(folder)
    if len(found) < 2 and not (found and below):
        return found
    hint = f"weights lie below it: {_few(below)}; or {GATHER}" if below else GATHER
    what = f"files of {len(found)} rank{'s' * (len(found) > 1)}, with pieces of the tensors, as {found[0].name}"
    raise Unsupported(Problem("E-UNSUPPORTED", what, str(folder), hint))


def refuse_piece(path: Path) -> None:
    """Raises Unsupported for a safetensors file of one rank, by the name that HuggingFaceStorageWriter gives it."""
    if _PIECE.fullmatch(path.name):
        what = f"{path.name} has one rank's pieces of the tensors, under the names of the whole ones"
        hint = "save with HuggingFaceStorageWriter(..., save_distributed=True, enable_consolidation=True), and give the"
        hint += " folder above sharded/; torch's consolidate_safetensors_files makes whole ones of these"
        raise Unsupported(Problem("E-UNSUPPORTED", what, str(path.parent), hint))


def not_here(path: Path) -> InvalidFile:
    """The refusal of a path that leads nowhere; a link of git-annex without its content says so."""
    hint = "check the path"
    if path.is_symlink() and "annex/objects" in str(path.readlink()):
        hint = "a link of git-annex whose content is not here: `git annex get` it"
    elif path.is_symlink():
        hint = f"it is a link to {path.readlink()}, which is not there"
    return InvalidFile(Problem("E-MISSING", f"{path} does not exist", str(path), hint))


def refuse_stand_in(path: Path) -> None:
    """Raises for a small file that stands for another one: a pointer of Git LFS or of git-annex."""
    if path.stat().st_size > 1024:
        return
    with path.open("rb") as file:
        start = file.read(1024)
    if start.startswith(_LFS):
        what, hint = "it is a pointer of Git LFS, not the file", "`git lfs pull` fetches the files"
    elif start.startswith(_ANNEX):
        what, hint = "it is a pointer of git-annex, not the file", "`git annex get` fetches the files"
    else:
        return
    raise InvalidFile(Problem("E-READ", what, str(path), hint))


def kind_of_suffix(path: Path) -> str:
    """What a file that is no weights file is instead, and what to do; "" if it is nothing known."""
    return _SUFFIXES.get(path.suffix.lower(), "")


def nothing_in(folder: Path) -> InvalidFile | Unsupported:
    """The refusal of a folder without weights: what it is instead, and what may be meant."""
    for place in (folder, *_below(folder)):
        if (place / "zero_to_fp32.py").is_file():
            hint = "python zero_to_fp32.py . OUT, in that folder, writes one that loads"
            return Unsupported(Problem("E-UNSUPPORTED", "a checkpoint of DeepSpeed ZeRO, in pieces", str(place), hint))
        if any(place.glob(f"__*_0{PIECES}")) and not is_distributed(place):
            what = "a torch.distributed.checkpoint folder without its .metadata, which says what is where"
            hint = "incomplete download? a save without collectives has no common one: save with them"
            return Unsupported(Problem("E-UNSUPPORTED", what, str(place), hint))
    found = weights_below(folder)
    what = "no weights (.safetensors, .bin, .pt, .pth) in this folder"
    adapters = [place for place in found if (place / "adapter_config.json").is_file()]
    shown = adapters or found
    if not shown:
        inside = _few([place.name for place in _entries(folder) if place.is_dir()])
        hint = f"check the path; the folders in it, {inside}, hold none either" if inside else "check the path"
        return InvalidFile(Problem("E-MISSING", what, str(folder), hint))
    kind = "adapters lie" if adapters else "weights lie"
    return InvalidFile(Problem("E-MISSING", what, str(folder), f"{kind} below it, give one of them: {_few(shown)}"))


def _few(names: Sequence[str | Path]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more


def weights_below(folder: Path) -> list[Path]:
    """The folders below one that hold weights, the nearest first."""
    return [place for place in _below(folder) if _has_weights(place)]


def _has_weights(folder: Path) -> bool:
    if is_distributed(folder):
        return not folder.name.startswith("optimizer")
    return any(
        path.suffix in WEIGHTS and not is_trainers_own(path.name) and path.is_file() for path in _entries(folder)
    )


def _below(folder: Path) -> list[Path]:
    """The folders below one, the nearest first, as far as a search may go."""
    found, level = [], [folder]
    for _ in range(DEPTH):
        level = [child for parent in level for child in _entries(parent) if child.is_dir()][:LOOKED]
        found += level
        if len(found) > LOOKED:
            break
    return found[:LOOKED]


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())[:LOOKED]
    except OSError:
        return

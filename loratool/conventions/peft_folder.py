"""What the folders of PEFT's methods have in common, for writers: where whole tensors go, and half of the config."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.bundle import Bundle, Content, Safetensors, document
from loratool.checkpoint import Checkpoint
from loratool.conventions.peft_about import About
from loratool.conventions.peft_names import PREFIX
from loratool.conventions.writing import Misfit
from loratool.names import modules, natural, parent
from loratool.tensors import TensorRef

FILE_STEM = "adapter_model"

INSIDE = Misfit((), "it lies inside another module with LoRA")
PART_OF_A_TENSOR = Misfit((), "PEFT replaces whole tensors only, not one expert or a range of rows")


def folder(about: About, config: Mapping[str, Any], tensors: Mapping[str, TensorRef], notes: Sequence[str]) -> Bundle:
    """The two files of an adapter; `tensors` are named without the common prefix."""
    files: dict[str, Content] = {
        "adapter_config.json": document(dict(sorted({**config, **about.fields()}.items()))),
        f"{FILE_STEM}.safetensors": Safetensors({PREFIX + key: ref for key, ref in tensors.items()}, {"format": "pt"}),
    }
    return Bundle(files, (*notes, *about.notes()))


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def leaf(name: str) -> str:
    """``a.b.weight`` -> ``weight``."""
    return name.rpartition(".")[2]


# -- whole tensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Homes:
    """Where whole tensors go: `saved` modules, or straight into the base's own (`direct`), as PEFT's `bias=` does.

    PEFT loads a module of `modules_to_save` only with every tensor it has, which the base shows, or the adapter that
    this one was (`complete` are the modules it saved so). Without either, and where modules nest, tensors go in
    directly. They then change the base model that they are loaded into.
    """

    tensors: Mapping[str, TensorRef]
    saved: tuple[str, ...]
    direct: tuple[str, ...]

    @classmethod
    def of(
        cls,
        whole: Mapping[str, TensorRef],
        wrapped: Mapping[str, int],
        base: Checkpoint | None,
        complete: Sequence[str] = (),
    ) -> Homes:
        """`whole` are tensors by the base's names, `wrapped` says how many of PEFT's wrappers a module gets."""
        tensors: dict[str, TensorRef] = {}
        saved, direct = [], []
        by_module: dict[str, list[str]] = defaultdict(list)
        for name in sorted(whole, key=natural):
            by_module[parent(name)].append(name)
        for module, names in by_module.items():
            if base is not None and _can_be_saved(module, names, wrapped, base):
                saved.append(module)
                own = {name: ref for name, ref in base.tensors.items() if parent(name) == module}
                tensors |= {**own, **{name: whole[name] for name in names}}
            elif base is None and module and module not in wrapped and any(_ends(module, end) for end in complete):
                saved.append(module)
                tensors |= {name: whole[name] for name in names}
            else:
                direct += names
                tensors |= {_direct_key(name, wrapped): whole[name] for name in names}
        return cls(tensors, tuple(saved), tuple(direct))


def _can_be_saved(module: str, names: list[str], wrapped: Mapping[str, int], base: Checkpoint) -> bool:
    """Whether a module can be one of `modules_to_save`, which match the ends of names."""
    if not module or all(leaf(name) == "bias" for name in names):
        return False
    known = modules(base.tensors)
    near = [other for other in known | wrapped.keys() if other != module and other.endswith(module)]
    below = [other for other in known if other.startswith(module + ".")]
    around = [other for other in wrapped if (module + ".").startswith(other + ".")]
    return not (near or below or around)


def _direct_key(name: str, wrapped: Mapping[str, int]) -> str:
    """A tensor's own name, with the `base_layer` segments that wrapping puts into it."""
    path: list[str] = []
    own = ""
    for segment in parent(name).split("."):
        own = f"{own}.{segment}" if own else segment
        path += [segment, *["base_layer"] * wrapped.get(own, 0)]
    return ".".join([*filter(None, path), leaf(name)])

"""Writing kohya's file, and what LyCORIS's has in common with it: keys, alpha, metadata.

    <component>_<module>.lora_down.weight [rank, in, kernel...]   .lora_up.weight [out, rank, 1...]   .alpha []

Every module has a rank and an alpha of its own, so nothing has to be brought to one scale. Alpha is float32: consumers
load it as that, and some devices have no float64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from loratool import folding
from loratool.adapter import Adapter, Targeted
from loratool.bundle import Bundle, Safetensors
from loratool.checkpoint import Checkpoint
from loratool.conventions import flux_write
from loratool.conventions.flat_keys import Key, Keys
from loratool.conventions.flat_names import COMPONENTS, Component
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.names import natural
from loratool.tensors import Computed, TensorRef
from loratool.updates import Lora, Scaling, Update

if TYPE_CHECKING:
    import torch

_ATTENTION = ("_q_proj", "_k_proj", "_v_proj")
LARGEST = 3.4e38  # of float32's numbers, about
_U = TypeVar("_U", bound=Update)

FLAT = tuple(component for component in COMPONENTS if component.prefix.endswith("_"))
KNOWN = tuple(component for component in FLAT if component.name != "model")  # `lycoris_` is LyCORIS's own

STACKED = Misfit((), "its modules are Linear and convolution layers, not stacks of experts")
# What holds the kinds that kohya's file does not.
_ELSEWHERE = {
    "replace": "--to lycoris --base BASE holds it, as a difference",
    "replace_rows": "--to lycoris --base BASE --bake holds the whole tensor, as a difference",
}


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    flux = flux_write.parted(adapter, base, options)
    keys = Keys.of(flux.rest, base, options, KNOWN)
    refused = {**keys.misfits, **flux.misfits}
    return grouped((name, refused.get(name) or _misfit(items)) for name, items in adapter.targets().items())


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    flux, file = flux_write.parted(adapter, base, options), FlatFile()
    keys = Keys.of(flux.rest, base, options, KNOWN)
    rest = [part for name, items in flux.rest.targets().items() for part in keys.split(name, items)]
    parts = [*flux.joined(), *((key, file.one_lora(items)) for key, items in rest)]
    for key, item in file.uniform(parts, options):
        assert isinstance(item.update, Lora)
        file.add(key, item.update)
    return file.bundle("networks.lora", adapter, base, keys, flux)


def _misfit(items: list[Targeted]) -> Misfit | None:
    if foreign := [item.update.kind for item in items if item.update.kind != "lora"]:
        why = f"there is LoRA only in its files, no {foreign[0]} update"
        return Misfit((), why, _ELSEWHERE.get(foreign[0], "--to lycoris holds it"), bakeable=False)
    misfit = misfit_of_lora(items)
    return None if misfit is None else replace(misfit, bakeable=False)


def misfit_of_lora(items: list[Targeted]) -> Misfit | None:
    """Why factors of a module can not stand for updates that are no whole tensors."""
    target = items[0].target
    if any(item.target.stacked for item in items):
        return STACKED
    if target.layout:
        what = "embeddings" if target.layout == "embedding" else "matrices stored [in, out]"
        return Misfit((), f"its modules are Linear and convolution layers, not {what}")
    rank = sum(max(item.update.ranks(), default=1) for item in items)
    if any(abs(item.update.scaling.factor) * rank > LARGEST for item in items if item.update.scaling):
        return Misfit((), "its alpha, scale times rank, is more than float32 holds")
    return None


@dataclass
class FlatFile:
    """The tensors of a file that is being put together, and what the user should know of them."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    alphas: set[float] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    several: int = 0  # tensors with several LoRAs
    cores: int = 0  # contracted
    rounded: int = 0  # alphas

    def one_lora(self, items: list[Targeted]) -> Targeted:
        """The LoRAs of one module, of ranges of rows as well, as one without a core."""
        self.several += len(items) > 1
        self.cores += sum(isinstance(item.update, Lora) and item.update.mid is not None for item in items)
        return folding.merged_factors(items)

    def uniform(self, parts: list[tuple[Key, Targeted]], options: Options) -> list[tuple[Key, Targeted]]:
        """All at one rank and scale, if that is wanted."""
        if not options.uniform:
            return parts
        items = [item for _, item in parts]
        changed = folding.uniform(items)
        self.notes.append(folding.uniform_note(items, changed))
        return [(key, item) for (key, _), item in zip(parts, changed, strict=True)]

    def add(self, key: Key, update: Lora) -> None:
        """A LoRA of a whole module; with a Tucker core [rank, rank, kernel...], its factors are of size 1."""
        update, alpha = self.alpha(update, folding.rank_of(update))
        A, B, mid = update.A, update.B, update.mid  # [rank, in, kernel...], [out, rank], [rank, rank, kernel...]
        ones = (1,) * (len(A.shape) - 2 if mid is None else len(mid.shape) - 2)
        self.put(key, "lora_down.weight", A if mid is None else A.reshape(*A.shape, *ones))
        self.put(key, "lora_up.weight", B.reshape(*B.shape, *ones))
        if mid is not None:
            self.put(key, "lora_mid.weight", mid)
        self.put(key, "alpha", alpha)

    def put(self, key: Key, part: str, ref: TensorRef) -> None:
        self.tensors[f"{key.module}.{part}"] = ref

    def alpha(self, update: _U, rank: int) -> tuple[_U, TensorRef]:
        """The update under a scale whose alpha, at this rank, is a number that readers take, and that alpha.

        An alpha of 0 is read as the rank by some: the left factor is then zero, or as small as the scale was. On a
        negative one diffusers' conversion of Flux never ends: the left factor then has its sign.
        """
        scaling = update.scaling
        assert scaling is not None
        if scaling.rule != "alpha/rank" or scaling.rank != rank:
            scaling = folding.by_rank(scaling.factor, rank)
        known = scaling.alpha or 0.0
        if _float32(known) == 0:
            scaling = Scaling.by("alpha/rank", float(rank), rank)
            update, known = folding.rescaled(update, scaling), float(rank)
        elif known < 0:
            update, known = folding.rescaled(update, Scaling.by("alpha/rank", -known, rank)), -known
        self.rounded += _float32(known) != known
        self.ranks.add(rank)
        self.alphas.add(known)
        return update, number(known)

    def bundle(
        self, module: str, adapter: Adapter, base: Checkpoint | None, keys: Keys, flux: flux_write.Original
    ) -> Bundle:
        metadata = {"format": "pt", "ss_network_module": module}
        if self.ranks:
            metadata["ss_network_dim"] = str(*self.ranks) if len(self.ranks) == 1 else "Dynamic"
            metadata["ss_network_alpha"] = str(*self.alphas) if len(self.alphas) == 1 else "Dynamic"
        if adapter.base.name:
            metadata["ss_sd_model_name"] = adapter.base.name
        tensors = {name: self.tensors[name] for name in sorted(self.tensors, key=natural)}
        return Bundle(
            Safetensors(tensors, metadata),
            (*self.notes, *flux.notes(), *self._notes(keys)),
            None if base is not None else keys.targets | flux.targets,
        )

    def _notes(self, keys: Keys) -> Iterator[str]:
        for component in keys.components:
            count = len({key.module for group in keys.keys.values() for key in group if _is_of(key, component)})
            yield f"{component.name}: {count} modules, called {component.prefix}..."
        text = {key.module for group in keys.keys.values() for key in group if key.module.startswith("lora_te")}
        if any(name.endswith(_ATTENTION) for name in text) and not any(name.endswith("_out_proj") for name in text):
            yield "diffusers finds a text encoder's attention in such a file only where out_proj is in it: here not"
        if self.several:
            yield f"{self.several} tensors had several LoRAs: their factors are side by side, in one of a larger rank"
        if self.cores:
            yield f"{self.cores} Tucker cores are contracted into lora_down, rounded to float32"
        if self.rounded:
            yield f"{self.rounded} alphas, scale times rank, are rounded to float32"
        if len(self.alphas) > 1 and keys.components:
            yield "diffusers reads one alpha for UNets' attention and one for a text encoder: see --uniform"


def _is_of(key: Key, component: Component) -> bool:
    return key.module.startswith(component.prefix)


def _float32(value: float) -> float:
    """The nearest float32; 0 for what is no normal one."""
    near: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return near if abs(near) >= 2.0**-126 else 0.0


def number(value: float) -> TensorRef:
    """A tensor [] of float32."""

    def make() -> torch.Tensor:
        import torch

        return torch.tensor(value, dtype=torch.float32, device="cpu")

    return TensorRef("alpha", "F32", (), Computed(make), ())

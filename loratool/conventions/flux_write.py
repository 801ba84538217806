"""Flux in kohya's and LyCORIS's files: the original model's names, whatever the adapter's are.

sd-scripts, ComfyUI and diffusers read a file for Flux by the names of the original: query, key and value (and a single
block's MLP) are one module there, which gets the factors of diffusers' three or four side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from loratool import folding
from loratool.adapter import Adapter, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import flux_names
from loratool.conventions.flat_keys import Key
from loratool.conventions.flat_names import flattened
from loratool.conventions.model_class import class_of
from loratool.conventions.writing import Misfit, Options
from loratool.names import parent
from loratool.updates import Lora

PREFIX = "lora_unet_"  # of every denoiser in sd-scripts
CLASSES = ("FluxTransformer2DModel", "ChromaTransformer2DModel")
DOUBLE, SINGLE = 19, 38  # blocks
_MLP = "proj_mlp"
_MLP_RATIO = 4
_SIZE = 3072  # the only one that diffusers cuts a single block's module by
_BLOCK = re.compile(r"(?P<kind>single_)?transformer_blocks\.(?P<number>\d+)\.")

UNTOLD = Misfit(
    (),
    "Flux, SD 3 and others have such names, and the names in its files are another model's for each",
    "give the base, or its pipeline's folder, with --base BASE",
    bakeable=False,
)
JOINED = Misfit(
    (), "Flux's original has several of diffusers' modules in one, or another order of its rows, and only LoRAs "
    "can be joined so", "--to lycoris --as model has diffusers' names, for LyCORIS itself", bakeable=False,
)  # fmt: skip
ABSENT = Misfit((), "Flux's original has no module for it", bakeable=False)
SIZES = Misfit((), "the sizes of the modules that are one in Flux's original are not known", "give --base BASE", False)


@dataclass
class Original:
    """The updates of a Flux in diffusers' names by the original's modules; `rest` are those of other components."""

    rest: Adapter
    parts: list[tuple[Key, list[Targeted]]] = field(default_factory=list)
    misfits: dict[str, Misfit] = field(default_factory=dict)  # by tensor name
    guessed: bool = False  # by the names alone
    loose: list[str] = field(default_factory=list)  # modules outside the blocks
    size: int = 0  # of a single block

    @property
    def targets(self) -> frozenset[str]:
        return frozenset(key.target for key, _ in self.parts)

    def joined(self) -> Iterator[tuple[Key, Targeted]]:
        """One update for each key: LoRAs of several of diffusers' modules side by side."""
        for key, items in self.parts:
            plain = len(items) == 1 and not isinstance(items[0].update, Lora)
            yield key, items[0] if plain else folding.merged_factors(items)

    def notes(self) -> Iterator[str]:
        if not self.parts:
            return
        modules = len({key.module for key, _ in self.parts})
        yield f"Flux: {modules} modules by the original model's names, called {PREFIX}..."
        if self.guessed:
            yield "that it is Flux is told by its names alone: give --base BASE if it is another model"
        if self.loose:
            yield f"diffusers leaves {', '.join(self.loose)} of such a file out; ComfyUI has names for them"
        if self.size not in (0, _SIZE):
            yield f"diffusers reads a single block's linear1 of size {_SIZE} only, and this is {self.size}"


def parted(adapter: Adapter, base: Checkpoint | None, options: Options) -> Original:
    """The adapter, parted into a Flux by diffusers' names and the rest; all is rest where there is none."""
    prefix = _prefix(adapter, base)
    if options.component not in ("", "unet", "transformer") or not _is_diffusers(adapter, prefix):
        return Original(adapter)
    kind = _class(base)
    if kind and kind not in CLASSES:
        return Original(adapter)
    mine = [item for item in adapter.updates if item.target.name.startswith(prefix)]
    others = tuple(item for item in adapter.updates if not item.target.name.startswith(prefix))
    found = Original(replace(adapter, updates=others))
    if not kind:
        if not _like_flux(mine, prefix, base):
            found.misfits |= {item.target.name: UNTOLD for item in mine}
            return found
        found.guessed = True
    _translate(found, mine, prefix, base)
    return found


def _prefix(adapter: Adapter, base: Checkpoint | None) -> str:
    names = adapter.targets() if base is None or not base.components else base.components
    return "transformer." if any(name == "transformer" or name.startswith("transformer.") for name in names) else ""


def _is_diffusers(adapter: Adapter, prefix: str) -> bool:
    names = [name.removeprefix(prefix) for name in adapter.targets() if name.startswith(prefix)]
    return any(_BLOCK.match(name) for name in names)


def _class(base: Checkpoint | None) -> str:
    if base is None:
        return ""
    model = base.components.get("transformer") if base.components else base
    return "" if model is None else class_of(model)


def _like_flux(items: list[Targeted], prefix: str, base: Checkpoint | None) -> bool:
    """Whether names alone say Flux: single blocks as it has them, no more of either than it has, and all its own."""
    names = [item.target.name for item in items] if base is None else [*base.tensors]
    matches = [match for name in names if (match := _BLOCK.match(name.removeprefix(prefix)))]
    known = all(flux_names.original_module(parent(item.target.name.removeprefix(prefix))) for item in items)
    in_range = all(int(match["number"]) < (SINGLE if match["kind"] else DOUBLE) for match in matches)
    return known and in_range and any(match["kind"] for match in matches)


def _translate(found: Original, items: list[Targeted], prefix: str, base: Checkpoint | None) -> None:
    groups: dict[Key, list[Targeted]] = {}
    by_module: dict[str, list[Targeted]] = {}
    for item in items:
        module = flux_names.original_module(parent(item.target.name.removeprefix(prefix)))
        if not module:
            found.misfits[item.target.name] = ABSENT
        else:
            by_module.setdefault(module, []).append(item)
    for module, mine in by_module.items():
        names = flux_names.diffusers_modules(module)
        moved = len(names) > 1 or module == flux_names.SWAPPED
        if moved and any(not isinstance(item.update, Lora) for item in mine):
            found.misfits |= {item.target.name: JOINED for item in mine}
            continue
        rows = _rows(names, mine, prefix, base) if len(names) > 1 else {}
        if rows is None:
            found.misfits |= {item.target.name: SIZES for item in mine}
            continue
        for item in mine:
            parameter = item.target.name.rpartition(".")[2]
            key = Key(PREFIX + flattened(module), parameter)
            groups.setdefault(key, []).append(_placed(item, module, rows, prefix))
        if not _BLOCK.match(names[0]):
            found.loose.append(PREFIX + flattened(module))
        if rows and any(name.endswith(_MLP) for name in names):
            found.size = max(found.size, next(iter(rows.values()))[1])
    found.parts = list(groups.items())


def _placed(item: Targeted, module: str, rows: dict[str, tuple[int, int]], prefix: str) -> Targeted:
    """An update as one of the original module's: of the rows that diffusers' module is, or with its halves swapped."""
    target = item.target
    name = f"{prefix}{module}.{target.name.rpartition('.')[2]}"
    if module == flux_names.SWAPPED:
        whole = folding.of_all_rows(item)
        assert isinstance(whole.update, Lora)
        update = replace(folding.without_core(whole.update), B=flux_names.swapped(whole.update.B))
        return Targeted(replace(whole.target, name=name), update)
    if not rows:
        return replace(item, target=replace(target, name=name))
    start, _ = rows[parent(target.name).removeprefix(prefix)]
    first, last = target.rows or (0, target.shape[0])
    total = max(stop for _, stop in rows.values())
    return replace(item, target=Target(name, (total, *target.shape[1:]), (start + first, start + last)))


def _rows(
    names: tuple[str, ...], items: list[Targeted], prefix: str, base: Checkpoint | None
) -> dict[str, tuple[int, int]] | None:
    """Which rows of the original module each of diffusers' is. What the adapter lacks, the base says, or Flux."""
    known = {parent(item.target.name).removeprefix(prefix): item.target.shape[0] for item in items}
    width = items[0].target.shape[1]
    for name in names:
        stored = None if base is None else base.tensors.get(f"{prefix}{name}.weight")
        if stored is not None and stored.shape:
            known[name] = stored.shape[0]
        elif name not in known:
            known[name] = width * (_MLP_RATIO if name.endswith(_MLP) else 1)
    rows, start = {}, 0
    for name in names:
        rows[name] = (start, start + known[name])
        start += known[name]
    return rows if len({known[name] for name in names if not name.endswith(_MLP)}) == 1 else None

"""Writing LyCORIS's file: kohya's, with the parts of LoHa, LoKr, DoRA, differences and norms that `lycoris` reads.

The parts of a kind are those of `lycoris.py`, the other way round. A replacement is stored as its difference from the
base: so whatever is baked fits, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool import folding
from loratool.adapter import Adapter, Targeted
from loratool.bundle import Bundle
from loratool.checkpoint import Checkpoint
from loratool.conventions import flux_write
from loratool.conventions.flat_keys import Key, Keys
from loratool.conventions.kohya_write import FLAT, STACKED, FlatFile, misfit_of_lora, number
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.names import parent
from loratool.tensors import Computed, TensorRef, torch_dtype
from loratool.updates import Add, Dora, Loha, Lokr, Lora, Replace, Scale, Scaling, Update

if TYPE_CHECKING:
    import torch

ONE = Scaling("none", None, None, 1.0)
_CUT = ("lora", "loha", "add", "replace")  # kinds of which a range of rows can be taken, and stand for all


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    flux = flux_write.parted(adapter, base, options)
    keys = Keys.of(flux.rest, base, options, FLAT)
    refused = {**keys.misfits, **flux.misfits}
    return grouped(
        (name, refused.get(name) or _misfit(name, items, keys, base)) for name, items in adapter.targets().items()
    )


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    differences = replace(adapter, updates=tuple(_difference(item, base) for item in adapter.updates))
    flux, file = flux_write.parted(differences, base, options), _LycorisFile()
    targets = flux.rest.targets()
    keys, norms = Keys.of(flux.rest, base, options, FLAT), _norms(targets, base)
    rest = [(key, file.one(mine)) for name, items in targets.items() for key, mine in keys.split(name, items)]
    joined = [(key, file.one([item])) for key, item in flux.joined()]
    for key, item in file.uniform([*joined, *rest], options):
        file.add_any(key, item, norm=parent(item.target.name) in norms)
    bundle = file.bundle("lycoris.kohya", adapter, base, keys, flux)
    return replace(bundle, notes=(*bundle.notes, *_notes(adapter, file)))


# -- what does not fit ------------------------------------------------------------------------------------------------


def _misfit(name: str, items: list[Targeted], keys: Keys, base: Checkpoint | None) -> Misfit | None:
    kinds = {item.update.kind for item in items}
    if "replace_rows" in kinds:
        return Misfit((), "there are no single rows in its files")
    if any(item.target.stacked for item in items):
        return STACKED
    if "scale" in kinds and any(len(item.target.shape) < 2 for item in items):
        return Misfit((), "it has IA3 of weights only, not of biases")
    if not kinds <= {"add", "replace"} and (misfit := misfit_of_lora(items)) is not None:
        return misfit
    if not (keys.in_parts(name) and _apart(items)):  # otherwise each is an update of a module of its own
        if len(items) > 1 and kinds != {"lora"}:
            return Misfit((), "its modules have one algorithm each, or several LoRAs, which become one")
        update, rows = items[0].update, items[0].target.rows
        whole = rows is None and (not keys.in_parts(name) or _is_by_rows(update))
        if update.kind not in _CUT and not whole:
            return Misfit((), f"there is no {update.kind} update of a part of a module's rows")
    return _misfit_of_replacement(items, base)


def _misfit_of_replacement(items: list[Targeted], base: Checkpoint | None) -> Misfit | None:
    """Why a replacement can not be a difference."""
    replaced = [item.target for item in items if isinstance(item.update, Replace)]
    if replaced and base is None:
        why = "it has differences only, and of a replacement the base's tensor is a part"
        return Misfit((), why, "give it with --base BASE", bakeable=False)
    if any(base is not None and base.tensors[target.name].shape != target.shape for target in replaced):
        return Misfit((), "it has differences only, and this has another shape than the base's", bakeable=False)
    return None


def _apart(items: list[Targeted]) -> bool:
    """Whether each update is that of another third of the rows."""
    size = items[0].target.shape[0] // 3
    rows = {item.target.rows for item in items}
    return len(rows) == len(items) and rows <= {(part * size, (part + 1) * size) for part in range(3)}


def _is_by_rows(update: Update) -> bool:
    """Whether it can be cut into ranges of rows: factors, or a DoRA of one norm per row whose direction can be cut."""
    return isinstance(update, Scale) or (
        isinstance(update, Dora) and update.axis == 0 and isinstance(update.direction, Lora | Loha)
    )


# -- IA3 --------------------------------------------------------------------------------------------------------------


def _one_less(factor: TensorRef) -> TensorRef:
    """The w of W' = W (1 + w), of the factors' shape."""

    def make() -> torch.Tensor:
        return (factor.read(torch_dtype("F64")) - 1).to(torch_dtype("F32"))

    return TensorRef(factor.name, "F32", factor.shape, Computed(make), factor.shape)


def _flag(axis: int) -> TensorRef:
    """`on_input`, a tensor [] of int64."""

    def make() -> torch.Tensor:
        import torch

        return torch.tensor(axis, device="cpu")

    return TensorRef("on_input", "I64", (), Computed(make), ())


# -- whole tensors ----------------------------------------------------------------------------------------------------


def _difference(item: Targeted, base: Checkpoint | None) -> Targeted:
    """A replacement as what it adds to the base's tensor: in float32, or in float64 if one of them is that."""
    update, name, rows = item.update, item.target.name, item.target.rows
    if not isinstance(update, Replace) or base is None:
        return item
    value, stored = update.value, base.tensors[name]
    stored = stored if rows is None else stored.narrow(0, rows[0], rows[1] - rows[0])
    dtype = "F64" if "F64" in (stored.dtype, value.dtype) else "F32"

    def make() -> torch.Tensor:
        import torch

        return (value.read(torch.float64) - stored.read(torch.float64)).to(torch_dtype(dtype))

    return replace(item, update=Add(TensorRef(name, dtype, value.shape, Computed(make), value.shape), ONE))


def _norms(targets: Mapping[str, list[Targeted]], base: Checkpoint | None) -> set[str]:
    """Modules whose weight is a vector."""
    shapes = {name: items[0].target.shape for name, items in targets.items()}
    shapes |= {} if base is None else {name: ref.shape for name, ref in base.tensors.items()}
    return {parent(name) for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 1}


# -- parts ------------------------------------------------------------------------------------------------------------


@dataclass
class _LycorisFile(FlatFile):
    """A file with the parts of every kind."""

    def one(self, items: list[Targeted]) -> Targeted:
        """The updates of one parameter as one of all of it: LoRAs become one, other kinds are alone."""
        return folding.of_all_rows(items[0]) if len(items) == 1 else self.one_lora(items)

    def add_any(self, key: Key, item: Targeted, *, norm: bool) -> None:
        """An update of all of a module's parameter; `norm` says whether the weight of that is a vector."""
        update, region = item.update, item.target.region
        if isinstance(update, Add):
            part = f"{key.parameter[0]}_norm" if norm else "diff" if key.parameter == "weight" else "diff_b"
            self.put(key, part, folding.rescaled(update, ONE).value)
            return
        ones = (1,) * (len(region) - 2)
        if isinstance(update, Scale):
            shape = (1, region[update.axis], *ones) if ones else (region[update.axis],)
            self.put(key, "weight", _one_less(update.factor).reshape(*shape))
            self.put(key, "on_input", _flag(update.axis))
            return
        if isinstance(update, Dora):
            shape = (region[0], 1, *ones) if update.axis == 0 else (1, region[1], *ones)
            self.put(key, "dora_scale", update.magnitude.reshape(*shape))
            update = update.direction
        if isinstance(update, Lora):
            self.add(key, self._product(update.A, update.B, update.mid, update.factors))
        elif isinstance(update, Loha):
            self._add_loha(key, update)
        elif isinstance(update, Lokr):
            self._add_lokr(key, update)

    def _product(self, A: TensorRef, B: TensorRef, mid: TensorRef | None, scaling: Scaling = ONE) -> Lora:
        """Two factors, with a core only if that has a kernel: LyCORIS has none of linear layers."""
        lora = Lora(A, B, scaling, mid)
        if mid is None or len(mid.shape) > 2:
            return lora
        self.cores += 1
        return folding.without_core(lora)

    def _add_loha(self, key: Key, update: Loha) -> None:
        """Two products; with a core [rank, rank, kernel...], the left factors are [rank, out]."""
        update, alpha = self.alpha(update, update.ranks()[0])
        factors = ((update.A1, update.B1, update.mid1), (update.A2, update.B2, update.mid2))
        for order, (A, B, mid) in enumerate(factors, start=1):
            product = self._product(A, B, mid)
            self._put_product(key, f"hada_w{order}", f"hada_t{order}", product)
        self.put(key, "alpha", alpha)

    def _add_lokr(self, key: Key, update: Lokr) -> None:
        """Two factors, whole or of low rank. Of two whole ones the scale is 1, whatever alpha says."""
        if ranks := update.ranks():
            update, alpha = self.alpha(update, ranks[0])
        else:
            update, alpha = folding.rescaled(update, ONE), number(1.0)
        if update.w1 is not None:
            self.put(key, "lokr_w1", update.w1)
        elif update.A1 is not None and update.B1 is not None:
            self._put_product(key, "lokr_w1", "", self._product(update.A1, update.B1, None))
        if update.w2 is not None:
            self.put(key, "lokr_w2", update.w2)
        elif update.A2 is not None and update.B2 is not None:
            product = self._product(update.A2, update.B2, update.mid2)
            self._put_product(key, "lokr_w2", "lokr_t2", product)
        self.put(key, "alpha", alpha)

    def _put_product(self, key: Key, factor: str, core: str, product: Lora) -> None:
        A, B = product.A, product.B  # [rank, in, kernel...], [out, rank]
        if product.mid is not None:
            self.put(key, core, product.mid)
            B = B.T
        self.put(key, f"{factor}_a", B)
        self.put(key, f"{factor}_b", A.reshape(A.shape[0], math.prod(A.shape[1:])))


def _notes(adapter: Adapter, file: FlatFile) -> Iterator[str]:
    if count := sum(isinstance(item.update, Replace) for item in adapter.updates):
        yield f"{count} replaced tensors are stored as differences from this base's, rounded to float32"
    alone = [name for name in file.tensors if name.endswith((".diff_b", ".b_norm"))]
    beside = {name.replace(".b_norm", ".w_norm").replace(".diff_b", ".diff"): name for name in alone}
    if lost := len(beside.keys() - file.tensors.keys()):
        yield f"{lost} biases have no difference of their weight beside them: ComfyUI reads such, LyCORIS does not"
    if any(isinstance(item.update, Scale) for item in adapter.updates):
        yield "LyCORIS 4.1.3 saves IA3 so, and fails to load it again; loratool reads it"
    if any(isinstance(item.update, Dora) and item.update.axis == 1 for item in adapter.updates):
        yield "LyCORIS loads a magnitude of DoRA per output only; these are one per input"

"""Which layers of a base a family's rules fit, and the names that its tensors have in the family's other layouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.maps.family import EXPERTS, Family, Layout, Stored, Weight, solve
from loratool.tensors import Computed, TensorRef

if TYPE_CHECKING:
    import torch

Found = Mapping[tuple[Stored, int | None], TensorRef]


@dataclass(frozen=True)
class Block:
    """One layer of a base whose tensors are those of a layout, with the sizes of the named dimensions."""

    family: Family
    layout: Layout
    path: str  # what comes before the rules' names, with its dot
    dims: Mapping[str, int]
    tensors: Found

    @property
    def experts(self) -> int | None:
        return self.dims.get(EXPERTS)

    def names(self, stored: Stored) -> Iterator[tuple[str, int | None]]:
        """The full names of a tensor of any layout of the family, with the expert whose they are."""
        numbers = range(self.dims[EXPERTS]) if stored.of_one_expert else [None]
        return ((stored.name(self.path, number), number) for number in numbers)

    def matrix(self, weight: Weight, expert: int | None) -> torch.Tensor:
        """The numbers of a weight, [out, in] or [out]; of all experts, [experts, ...], if none is named."""
        import torch

        stored = self.layout.home(weight)
        if stored.of_one_expert and expert is None:
            return torch.stack([self.matrix(weight, number) for number in range(self.dims[EXPERTS])])
        ref = self.tensors[stored, expert if stored.of_one_expert else None]
        values = (ref.select(expert) if stored.stacked and expert is not None else ref).read()
        lead = int(stored.stacked and expert is None)
        values = values.transpose(lead, lead + 1) if stored.flipped else values  # [experts?, out, in]
        if stored.in_turn:
            step = len(stored.weights)
            index = torch.arange(stored.weights.index(weight), values.shape[lead], step, device="cpu")
            return values.index_select(lead, index)
        return values.narrow(lead, stored.offset(weight, self.dims), self.dims[weight.dims[0]])

    def packed(self, stored: Stored, expert: int | None) -> torch.Tensor:
        """The numbers of a tensor of another layout, as it would be stored."""
        import torch

        values = [self.matrix(weight, expert) for weight in stored.weights]
        lead = int(stored.stacked)
        whole = torch.stack(values, lead + 1).flatten(lead, lead + 1) if stored.in_turn else torch.cat(values, lead)
        return (whole.transpose(lead, lead + 1) if stored.flipped else whole).contiguous()


@dataclass(frozen=True)
class Place:
    """What a name that the base does not have stands for: a tensor of another layout of one of its blocks."""

    block: Block
    layout: Layout
    stored: Stored
    expert: int | None

    @property
    def rules(self) -> tuple[str, str, str]:
        """Which rules lead there: the family, the name's layout, the base's layout."""
        return self.block.family.name, self.layout.name, self.block.layout.name

    def ref(self, name: str) -> TensorRef:
        """The tensor as it would be stored under that name, put together when it is read."""
        shape = self.stored.shape(self.block.dims)
        held = self.block.tensors[next(key for key in self.block.tensors if self.stored.weights[0] in key[0].weights)]
        return TensorRef(name, held.dtype, shape, Computed(lambda: self.block.packed(self.stored, self.expert)), shape)


@dataclass(frozen=True)
class View:
    """A base seen through the rules of families: names of other layouts, beside the base's own."""

    base: Mapping[str, TensorRef]
    families: Sequence[Family]
    broken: dict[tuple[str, str], str] = field(default_factory=dict)  # family and path: why its rules do not fit there
    used: set[str] = field(default_factory=set)  # families that led a target

    @cached_property
    def blocks(self) -> list[Block]:
        return [block for family in self.families for block in self._of(family)]

    @cached_property
    def places(self) -> Mapping[str, list[Place]]:
        """Names that the base does not have, with what they may stand for."""
        found: dict[str, list[Place]] = defaultdict(list)
        for block in self.blocks:
            for layout in block.family.layouts:
                for stored in layout.tensors if layout is not block.layout else ():
                    for name, expert in block.names(stored):
                        if name not in self.base:
                            found[name].append(Place(block, layout, stored, expert))
        return dict(found)

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """The base's tensors, and those that its blocks would have in other layouts; not where their shape is open."""
        others = {}
        for name, places in self.places.items():
            if len({place.stored.shape(place.block.dims) for place in places}) == 1:
                others[name] = places[0].ref(name)
        return {**self.base, **others}

    def why_not(self, name: str) -> str | None:
        """Why rules that know a name do not lead anywhere."""
        for (family_name, path), why in self.broken.items():
            family = next(family for family in self.families if family.name == family_name)
            for stored in (stored for layout in family.layouts for stored in layout.tensors):
                match = stored.pattern.match(name)
                if match is not None and match["path"] == path:
                    return f"the map {family_name!r} knows it, but {why}"
        return None

    def _of(self, family: Family) -> Iterator[Block]:
        for layout in family.layouts:
            found: dict[str, dict[tuple[Stored, int | None], TensorRef]] = defaultdict(dict)
            for stored in layout.tensors:
                for name, ref in self.base.items():
                    if stored.literal in name and (match := stored.pattern.match(name)) is not None:
                        number = int(match["expert"]) if stored.of_one_expert else None
                        found[match["path"]][stored, number] = ref
            for path, tensors in found.items():
                dims = _dims(layout, path, tensors)
                if isinstance(dims, str):
                    self.broken.setdefault((family.name, path), dims)
                else:
                    yield Block(family, layout, path, dims, tensors)


def _dims(layout: Layout, path: str, tensors: Found) -> dict[str, int] | str:
    """The sizes of the named dimensions, if all tensors of the layout are there and agree; else what is wrong."""
    there = {stored for stored, _ in tensors}
    if lost := [stored for stored in layout.tensors if stored not in there]:
        return f"the base has no {lost[0].name(path, 0)}"
    numbers = {number for _, number in tensors if number is not None}
    counted = [*range(max(numbers) + 1)] if numbers else []
    single = [stored for stored in layout.tensors if stored.of_one_expert]
    gone = [stored.name(path, n) for n in counted for stored in single if (stored, n) not in tensors]
    if gone:
        return f"the base lacks {len(gone)} tensors of its experts, such as {gone[0]}"
    pairs = [(ref, tensors[stored, 0]) for (stored, number), ref in tensors.items() if number]
    for ref, first in pairs:
        if ref.shape != first.shape:
            return f"{ref.name} is {list(ref.shape)}, and {first.name} is {list(first.shape)}"
    if len({ref.dtype for (stored, _), ref in tensors.items() if stored.stacked or stored.of_one_expert}) > 1:
        return "its experts are of different dtypes"
    shapes = {stored: ref.shape for (stored, n), ref in tensors.items() if not n}
    dims = solve(layout, shapes, len(counted) or None)
    return f"shapes do not agree: {path}{dims}" if isinstance(dims, str) else dims

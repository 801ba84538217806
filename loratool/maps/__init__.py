"""Adapters and bases that name or pack the same weights differently: rules lead an adapter's targets to a base's.

Rules are data, one JSON file per family of models (`family`). They are used only for targets that the base does not
have, only if one family's rules lead all of them to tensors of the base, and only where the shapes of a whole layer
agree (`blocks`). Updates are then taken apart and put where their weights lie (`cutting`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace

from loratool.adapter import Adapter, Target, Targeted
from loratool.errors import ChoiceNeeded, Mismatch, Problem
from loratool.maps import cutting
from loratool.maps.blocks import Block, Place, View
from loratool.maps.cutting import Keeper, Uncuttable
from loratool.maps.family import EXPERTS, Family, Stored, Weight, read, shipped
from loratool.updates import Add, Replace, ReplaceRows, Update

__all__ = ["Family", "View", "absent", "led", "read", "shipped", "unused"]


def absent(adapter: Adapter, known: Container[str]) -> list[str]:
    """The targets that a base does not have."""
    return [name for name in adapter.targets() if name not in known]


def unused(view: View) -> Iterator[Problem]:
    """Families of a user's that led nothing: a map that does nothing is a mistake."""
    for family in view.families:
        if family.name in view.used:
            continue
        reasons = [why for (name, _), why in view.broken.items() if name == family.name]
        if any(block.family is family for block in view.blocks):
            why = "it knows none of the targets that the base does not have"
        else:
            why = reasons[0] if reasons else "none of its layouts is in the base"
        yield Problem("E-MAP", f"the map {family.name!r} matches nothing: {why}", hint="leave out --map, or correct it")


def led(adapter: Adapter, view: View, where: str, ties: Container[str] = ()) -> Adapter:
    """The adapter with the base's targets where rules lead there; as it is where no rule knows the others.

    Raises ChoiceNeeded where rules lead to more than one place, Mismatch for updates that can not be taken apart.
    """
    lost = [name for name in absent(adapter, view.base) if name not in ties and name in view.places]
    if not lost:
        return adapter
    rules = _one_set_of_rules(lost, view, where)
    places = {name: next(place for place in view.places[name] if place.rules == rules) for name in lost}
    mover, problems = Mover(), []
    updates: list[Targeted] = []
    for item in adapter.updates:
        try:
            place = places.get(item.target.name)
            updates += [item] if place is None else mover.moved(item, place)
        except Uncuttable as error:
            family, of, to = rules
            what = f"{item.target.name}: the map {family!r} can not lead it from {of} to {to}: {error}"
            problems.append(Problem("E-MAP", what, where, "merge into a base of the layout that it was trained on"))
    if problems:
        raise Mismatch(problems)
    family, of, to = rules
    view.used.add(family)
    count = f"{len(lost)} target" + "s" * (len(lost) > 1)
    note = f"the map {family!r} led {count} from the layout {of!r} to the base's {to!r}, such as {lost[0]}"
    return replace(adapter, updates=tuple(updates), notes=(*adapter.notes, note))


def _one_set_of_rules(lost: list[str], view: View, where: str) -> tuple[str, str, str]:
    """The one pair of layouts that leads all targets. Raises ChoiceNeeded if there is none, or more than one."""
    led_by: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name in lost:
        for rules in {place.rules for place in view.places[name]}:
            led_by[rules].append(name)
    full = sorted(rules for rules, names in led_by.items() if len(names) == len(lost))
    # Layouts of a family may share some names: these are then the same tensors of the base.
    if len({tuple(_outcome(view, name, rules) for name in lost) for rules in full}) == 1:
        return full[0]
    count = Counter(name for names in led_by.values() for name in names)
    name = next((name for name in lost if count[name] > 1), lost[0])
    candidates = "; ".join(_candidate(place) for place in view.places[name])
    if full:
        what = f"{name} could be led to more than one place of the base: {candidates}"
    else:
        found = ", ".join(f"{family} ({of} to {to}: {len(names)})" for (family, of, to), names in led_by.items())
        what = f"no one map leads all {len(lost)} targets that the base does not have: {found}"
    hint = "give the one to use with --map FILE; the maps that come with loratool are loratool/maps/*.json"
    raise ChoiceNeeded(Problem("E-AMBIGUOUS", what, where, hint))


def _outcome(view: View, name: str, rules: tuple[str, str, str]) -> tuple[int, Stored]:
    place = next(place for place in view.places[name] if place.rules == rules)
    return id(place.block), place.stored


def _candidate(place: Place) -> str:
    block = place.block
    homes = {block.layout.home(weight) for weight in place.stored.weights}
    names = sorted(home.name(block.path, 0 if place.expert is None else place.expert) for home in homes)
    return f"{', '.join(names)} (map {block.family.name!r}, {place.layout.name} to {block.layout.name})"


@dataclass(frozen=True)
class _Piece:
    """An update of one weight as [out, in], of all experts (`lead` 1) or of one; `start` is its first row."""

    weight: Weight
    update: Update
    lead: int
    expert: int | None
    start: int
    stop: int


@dataclass
class Mover:
    """Moves updates from where another layout has their weights to where the base has them."""

    keeper: Keeper = field(default_factory=Keeper)

    def moved(self, item: Targeted, place: Place) -> list[Targeted]:
        """The updates that do to the base's tensors what `item` does to the tensor of the other layout."""
        block, stored = place.block, place.stored
        shape = stored.shape(block.dims)
        if item.target.shape != shape:
            raise Uncuttable(f"it is of {list(item.target.shape)}, the base's weights would make {list(shape)}")
        home = block.layout.home(stored.weights[0])
        if _same_packing(stored, home):  # only the name differs
            return [replace(item, target=replace(item.target, name=home.name(block.path, None)))]
        return [self._placed(piece, block) for piece in self._pieces(item, place)]

    # -- out of the layout of the adapter ---------------------------------------------------------------------------

    def _pieces(self, item: Targeted, place: Place) -> Iterator[_Piece]:
        """The update of each weight that a tensor holds, of each expert where the base has them apart."""
        stored, block, target = place.stored, place.block, item.target
        lead = _lead(item, stored)
        if target.rows is not None and (stored.flipped or stored.in_turn):
            raise Uncuttable("it changes some rows of it, which are not rows of one weight")
        rows = target.rows or (0, stored.size(block.dims))
        if lead and any(block.layout.home(weight).of_one_expert for weight in stored.weights):
            # Experts first: one's rows lie in one piece of the file, the rows of all do not.
            for number in range(block.dims[EXPERTS]):
                part = cutting.of_expert(item.update, number, self.keeper)
                yield from self._weights(part, place, rows, 0, number)
        else:
            yield from self._weights(item.update, place, rows, lead, target.expert if stored.stacked else place.expert)

    def _weights(
        self, update: Update, place: Place, rows: tuple[int, int], lead: int, expert: int | None
    ) -> Iterator[_Piece]:
        """Each weight's part of an update of some rows of the tensor that holds them."""
        stored, dims = place.stored, place.block.dims
        update = cutting.turned(update, lead) if stored.flipped else update
        first, last = rows
        for number, weight in enumerate(stored.weights):
            size = dims[weight.dims[0]]
            if stored.in_turn:
                yield _Piece(weight, cutting.every(update, lead, number, len(stored.weights)), lead, expert, 0, size)
                continue
            offset = stored.offset(weight, dims)
            start, stop = max(first, offset), min(last, offset + size)
            if (start, stop) == (first, last):
                yield _Piece(weight, update, lead, expert, start - offset, stop - offset)
            elif start < stop:
                part = cutting.rows(update, lead, start - first, stop - first)
                yield _Piece(weight, part, lead, expert, start - offset, stop - offset)

    # -- into the layout of the base ---------------------------------------------------------------------------------

    def _placed(self, piece: _Piece, block: Block) -> Targeted:
        """The update of the base's tensor that a weight's update comes to."""
        home = block.layout.home(piece.weight)
        update, rows = self._packed(piece, home, block)
        shape = home.shape(block.dims)
        layout = "in_out" if home.flipped else ""
        name = home.name(block.path, piece.expert)
        if home.of_one_expert:
            return Targeted(Target(name, shape, rows, layout=layout), update)
        experts = block.dims[EXPERTS] if piece.lead else None
        return Targeted(Target(name, shape, rows, piece.expert, experts, layout), update)

    def _packed(self, piece: _Piece, home: Stored, block: Block) -> tuple[Update, tuple[int, int] | None]:
        """The update as the tensor stores its weights, and the rows of it that change."""
        size, step = home.size(block.dims), len(home.weights) if home.in_turn else 1
        number = home.weights.index(piece.weight)
        first = number + step * piece.start if home.in_turn else home.offset(piece.weight, block.dims) + piece.start
        stop = first + piece.stop - piece.start
        update, whole = piece.update, piece.stop - piece.start == size
        if not whole and (home.flipped or home.in_turn):
            update = cutting.spread(update, piece.lead, size, first, step)
            whole = True
        return cutting.turned(update, piece.lead) if home.flipped else update, None if whole else (first, stop)


def _same_packing(stored: Stored, home: Stored) -> bool:
    return not stored.of_one_expert and replace(home, ending=stored.ending) == stored


def _lead(item: Targeted, stored: Stored) -> int:
    """How many dimensions of experts the components have in front. Raises Uncuttable for what has no such parts."""
    if isinstance(item.update, ReplaceRows):
        raise Uncuttable("it replaces rows of a tensor that the base has in another form")
    if not stored.stacked and item.target.stacked:
        raise Uncuttable("it is one expert's, and the update is of experts in it")
    if not stored.stacked:
        return 0
    if item.target.expert is not None:
        return 0
    if item.target.experts is None and not isinstance(item.update, Add | Replace):
        raise Uncuttable("it changes the tensor of all experts as one")
    if item.target.experts is None and item.target.rows is not None:
        raise Uncuttable("its rows are experts")
    return 1

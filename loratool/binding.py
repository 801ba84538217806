"""Do these adapters fit this base? Every update gets its tensor, and every reason why one can not is collected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from loratool import maps
from loratool.adapter import Adapter, Target, Targeted, is_part, overlaps
from loratool.checkpoint import Checkpoint, open_checkpoint
from loratool.conventions import CONVENTIONS, of_base
from loratool.conventions.choices import Choices
from loratool.conventions.load import load_part
from loratool.errors import LoratoolError, Problem
from loratool.format import check_index, unknown_alpha
from loratool.ground import EMBEDDINGS, TIED_HEADS, is_tied, under
from loratool.identity import difference
from loratool.layout import Weighted
from loratool.maps import View, shipped
from loratool.names import listed, missing
from loratool.pinning import doubts
from loratool.quantised import Foreign
from loratool.strangers import HEADS, UNTIE, not_in_the_base
from loratool.tensors import FLOATS, MERGEABLE, TensorRef, extremes
from loratool.updates import Replace, ReplaceRows, Scale

PRODUCTS = ("lora", "loha", "lokr", "add")  # nothing, as soon as one of their components is all zero


class Part(NamedTuple):
    """One adapter of a merge, with its weight and the name it was given by."""

    adapter: Adapter
    weight: float
    name: str
    sound: bool = True  # whether its values are worth looking at
    given: Adapter | None = None  # the adapter before a map led its targets to those of the base
    beside: Mapping[str, str] = {}  # the file of each target that lies beside the adapter's own

    @property
    def original(self) -> Adapter:
        return self.given or self.adapter


@dataclass
class Binding:
    """Adapters bound to a base, one after the other; `problems` and `notes` grow on the way."""

    base: Checkpoint
    allow_new: bool = False
    parts: list[Part] = field(default_factory=list)
    wanted: dict[str, list[Weighted]] = field(default_factory=dict)  # by the base's clean names
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    idle: list[Problem] = field(default_factory=list)  # why adapters change nothing
    paired: set[str] = field(default_factory=set)  # tensors whose tied copy the adapter holds as well
    view: View = field(init=False)

    def __post_init__(self) -> None:
        self.view = View(self.base.tensors, shipped())

    def read(self, adapters: Sequence[tuple[Path | Adapter, float]], choices: Choices) -> None:
        """Read every adapter against the base; what is wrong with one does not hide what is wrong with the next."""
        self.view = View(self.base.tensors, choices.maps or shipped())
        used: set[str] = set()
        for adapter, weight in adapters:
            try:
                part = self._part(adapter, weight, choices, used)
            except LoratoolError as error:
                self.problems += error.problems
                continue
            found = list(self._incomplete(part, choices))
            self.parts.append(part._replace(sound=not found))
            self.notes += [f"{part.name}: {note}" for note in part.adapter.notes]
            self.problems += found
            self.notes += [f"{part.name}: {doubt}" for doubt in doubts(part.original, self.base)]
        if choices.maps:
            self.problems += maps.unused(self.view)
        if len(self.parts) == len(adapters):  # an adapter that can not be read might have what a pattern names
            self.problems += choices.selection.unused(used, "")

    def bind(self) -> None:
        """Give every update of the adapters its tensor of the base, and check that it fits."""
        for part in self.parts:
            targets, lost = part.adapter.targets(), []
            for name, items in targets.items():
                target = self._untied(name, targets, part)
                if target is None:
                    continue
                ground = under(self.base, target, items)
                if not ground and self._lacks(target, items):
                    lost.append(target)
                else:
                    self.problems += self._unfit(
                        target, [*ground, *items], part._replace(weight=1.0) if ground else part
                    )
                # A weight of 0 is the identity: not even a zero changes its sign.
                if part.weight != 0:
                    weighted = [Weighted(item, part.weight) for item in items]
                    self.wanted.setdefault(target, []).extend([*(Weighted(item, 1.0) for item in ground), *weighted])
            self.problems += not_in_the_base(lost, len(targets), self.base, self.view, part.name)
            self.problems += self._other_base(part)
            if part.sound:
                self.problems += self._bad_values(part)
        self.problems += self._conflicts()
        self._spread_ties()
        self.problems += self._tied_head()

    # -- one adapter --------------------------------------------------------------------------------------------------

    def _part(self, adapter: Path | Adapter, weight: float, choices: Choices, used: set[str]) -> Part:
        files: Mapping[str, str] = {}
        if isinstance(adapter, Adapter):
            # Read earlier, perhaps against another base than this one.
            choices.refuse_others((), "adapter in memory", "")
            given, name = of_base.bound(adapter), adapter.provenance.get("convention", "adapter in memory")
        else:
            loaded = load_part(open_checkpoint(adapter), choices, self.view)
            self.problems += loaded.problems
            used |= loaded.used
            given, name, files = loaded.adapter, adapter.name, loaded.beside
        return Part(led(given, self.base, self.view, name), weight, name, given=given, beside=files)

    def _incomplete(self, part: Part, choices: Choices) -> Iterator[Problem]:
        """What an adapter leaves open, or contradicts itself in."""
        if part.adapter.when:
            what = f"it acts {part.adapter.condition()}: merged, it would always act"
            hint = (
                "load it beside the base in a program that knows such adapters; convert and inspect keep the condition"
            )
            yield Problem("E-CONDITIONAL", what, part.name, hint, "R-047")
        if unknown := part.adapter.unknown_scales():
            rule = min(item.update.scaling.rule for item in unknown if item.update.scaling)
            name = part.original.provenance.get("convention")
            asked = next((convention.ASKS for convention in CONVENTIONS if name == convention.NAME), ())
            yield replace(unknown_alpha(unknown), where=part.name, hint=choices.unknown_scale_hint(rule, asked))
        for doubt in part.adapter.doubts:
            yield Problem("E-LAYOUT", doubt, part.name, "read it with its base")
        for problem in part.original.check():
            yield replace(problem, where=f"{part.name}: {problem.where}" if problem.where else part.name)

    def _unfit(self, name: str, items: list[Targeted], part: Part) -> Iterator[Problem]:
        """Why the updates of a tensor can not be applied to the base."""
        stored = self.base.tensors.get(name)
        if stored is not None and isinstance(stored.data, Foreign):
            yield stored.data.problem(name, part.name)
            return
        shape = items[0].target.shape
        whole = _whole(items)
        if stored is None or (whole and stored.shape != shape):
            yield from self._new(name, stored, items, part)
        elif stored.shape != shape:
            what = f"{name} is {list(stored.shape)} in the base, {list(shape)} for the adapter"
            yield Problem("E-SHAPE", what, part.name, "is this the adapter's base?")
        if stored is not None and stored.dtype not in MERGEABLE:
            what = f"{name} is stored as {stored.dtype}: a quantised tensor can not be merged into"
            yield Problem("E-QUANTISED", what, part.name, "merge into the 16-bit base that it was made from")

    def _lacks(self, name: str, items: list[Targeted]) -> bool:
        """Whether the base lacks the target of updates that only change what is there."""
        return name not in self.base.tensors and not _whole(items)

    def _new(self, name: str, stored: TensorRef | None, items: list[Targeted], part: Part) -> Iterator[Problem]:
        """A tensor that the base lacks, or has in another size: only with consent."""
        shape = list(items[0].target.shape)
        what = (
            f"the base has no {name}" if stored is None else f"{name} is {list(stored.shape)} in the base, not {shape}"
        )
        file = part.beside.get(name)
        where = f"{part.name}: {file}" if file else part.name
        leave = f"--skip '{file or name}' leaves it out"
        if part.weight != 1:
            yield Problem("E-TARGET", f"{what}: adding it needs weight 1, not {part.weight:g}", where, leave)
        elif not self.allow_new:
            near = f"; {missing(name, self.base.tensors, '').hint}" if stored is None else ""
            if name.endswith(HEADS) and is_tied(self.base):
                near = "; the base has its embedding as its head, and gets one of its own"
            yield Problem("E-TARGET", what, where, f"merge with --allow-new adds or resizes it, {leave}{near}")
        else:
            self.notes.append(f"{where}: {what}: it is written as {shape}")

    def _other_base(self, part: Part) -> Iterator[Problem]:
        """Tensors that are not those the adapter was trained on (R-041)."""
        targets = part.adapter.targets() if part.adapter.base.tensors else {}
        for name, known in part.adapter.base.tensors.items():
            stored = self.base.tensors.get(self.base.ties.get(name, name))
            if stored is None and name in self.view.places:
                stored = self.view.tensors.get(name)  # what a map puts together has the bytes that were digested
            if stored is not None and isinstance(stored.data, Foreign):
                continue  # refused as such
            if stored is None and not (self.allow_new and _whole(targets.get(name, []))):
                continue  # a missing target is reported as such
            found = "not in it" if stored is None else difference(stored, known)
            if not found:
                continue
            what = f"this is not the base that the adapter was trained on: {name} is {found}"
            yield Problem("E-BASE-MISMATCH", what, part.name, "merge into the base it was trained on", "R-041")

    def _bad_values(self, part: Part) -> Iterator[Problem]:
        """Non-finite numbers and impossible row numbers; updates that change nothing are noted."""
        idle = []
        for item in part.original.updates:
            if item.update.role == "add" and item.update.scaling is not None and item.update.scaling.scale == 0:
                idle.append(item.target.name)
                continue
            for name, ref in item.update.components().items():
                if ref.dtype in FLOATS:
                    values = ref.read()
                    low, high = extremes(values)
                    if not (math.isfinite(low) and math.isfinite(high)):
                        what = f"{name} of {item.target.name} has NaN or infinity"
                        yield Problem("E-NONFINITE", what, part.name, "train or download the adapter again", "R-033")
                    elif item.update.kind in PRODUCTS and low == high == 0:
                        idle.append(item.target.name)
                elif name in item.update.index_components and (problem := check_index(item, ref)) is not None:
                    yield replace(problem, where=f"{part.name}: {problem.where}")
        self._say_idle(part, [*dict.fromkeys(idle)])

    def _say_idle(self, part: Part, idle: list[str]) -> None:
        """Targets that stay as they are: their scale or a factor is zero."""
        if part.weight == 0:
            what, hint = f"{part.name} has the weight 0: it changes nothing", "leave it out, or give it another weight"
            if len(self.parts) > 1:
                self.notes.append(what)  # beside others it may be meant, as one end of a range of weights
                return
        elif len(idle) == len(part.original.targets()):
            what = f"{part.name} changes nothing: of each of its updates the scale or a factor is zero"
            hint = "some trainers write alpha 0 where they do not know it, and factors before training are zero"
        else:
            if idle:
                self.notes.append(f"{part.name}: {listed(idle)} stay as they are: the scale or a factor is zero")
            return
        self.idle.append(Problem("E-NO-CHANGE", what, part.name, f"{hint}; merge --allow-unchanged takes it as it is"))

    # -- ties ---------------------------------------------------------------------------------------------------------

    def _untied(self, name: str, targets: Mapping[str, list[Targeted]], part: Part) -> str | None:
        """The tensor that a name stands for; None where its updates are a copy of those of a tensor it is tied to."""
        kept = self.base.ties.get(name)
        if kept is None and name in self.base.tensors:
            return name
        # A tied head is often saved with its embedding: one update under two names is one update.
        for other in [kept] if kept is not None else self._embeddings_for(name):
            theirs = targets.get(other)
            if theirs is None:
                continue
            if _same(targets[name], theirs):
                self.notes.append(f"{part.name}: {name} is tied to {other}; their one update is applied once")
                self.paired.add(other)
                return None
            if kept is not None:
                what = f"{name} and {other} are one tensor in the base, and their updates differ"
                self.problems.append(Problem("E-TIED", what, part.name, UNTIE))
                return None
        if kept is not None and name not in self.base.tensors:
            self.notes.append(f"{part.name}: {name} is stored as {kept} in the base")
        return kept or name

    def _embeddings_for(self, name: str) -> list[str]:
        """The embeddings that a head is tied to, where the base stores none: there is no other place for it."""
        if not name.endswith(HEADS) or any(other.endswith(HEADS) for other in self.base.tensors):
            return []
        return [other for other in self.base.tensors if other.endswith(EMBEDDINGS)]

    def _spread_ties(self) -> None:
        """Names of one storage in a pickle are one tensor: all of them get its updates."""
        for name, kept in self.base.ties.items():
            if name in self.base.tensors and self.wanted.get(kept):
                self.wanted[name] = self.wanted[kept]
                self.notes.append(f"{name} and {kept} are one tensor in the base: both change")

    def _tied_head(self) -> Iterator[Problem]:
        """An embedding that is also the output head, where not both of them change alike."""
        if not is_tied(self.base):
            return
        heads = any(name.endswith(HEADS) and updates for name, updates in self.wanted.items())
        embeddings = [name for name in self.wanted if name.endswith(EMBEDDINGS) and name not in self.paired]
        for name in embeddings if not heads else []:  # a head of its own is what the adapter says it is
            if any(self._replaces(item, name) for item, _ in self.wanted[name]):
                yield from self._kept_head(name)
            else:
                self.notes.append(f"{name} is also the output head (tie_word_embeddings): the head changes with it")

    def _kept_head(self, name: str) -> Iterator[Problem]:
        """The head that an embedding leaves behind which was trained alone, as PEFT's `modules_to_save` does it.

        The adapter was trained with the base's embedding as its head, so that becomes a tensor.
        """
        stored, head = self.base.tensors[name], TIED_HEADS.get(name)
        what = f"{name} is also the output head, and only the embedding was trained"
        if head is None:
            yield Problem("E-TIED", what, hint=UNTIE)
        elif stored.shape != self.wanted[name][0].item.target.shape:
            what += ", and resized: the head's rows for the new tokens are in no file"
            yield Problem("E-TIED", what, hint="train with modules_to_save=['embed_tokens', 'lm_head']: both are saved")
        elif not self.allow_new:
            hint = f"merge with --allow-new keeps the head as it was in training, as {head}, a tensor of its own"
            yield Problem("E-TIED", what, hint=hint)
        else:
            self.wanted[head] = [Weighted(Targeted(Target(head, stored.shape), Replace(stored)), 1.0)]
            self.notes.append(f"{what}: the base's embedding is written as {head}, the head it was trained with")

    def _replaces(self, item: Targeted, name: str) -> bool:
        """Whether a whole tensor is replaced by another one (PEFT also saves untouched copies)."""
        stored, update = self.base.tensors.get(name), item.update
        return isinstance(update, Replace) and (stored is None or stored.digest() != update.value.digest())

    # -- all adapters -------------------------------------------------------------------------------------------------

    def _conflicts(self) -> Iterator[Problem]:
        """Updates of different adapters whose sum is not defined; within one adapter, its own check has found them."""
        own = [part.adapter.targets() for part in self.parts]
        for name, weighted in self.wanted.items():
            items = [item for item, _ in weighted]
            if not any(list(overlaps(targets.get(name, []))) for targets in own):
                rows = [item for item in items if item.update.kind == ReplaceRows.kind]
                exclusive = [item for item in items if item not in rows[1:]] if _disjoint(rows) else items
                hint = "merge only one of the adapters"
                if any(item.update.kind == Scale.kind for item in exclusive):
                    hint += ", or one after the other: merge --onto-merged puts the second on top of the first"
                yield from (replace(problem, hint=hint) for problem in overlaps(exclusive))
            if len(shapes := {item.target.shape for item in items}) > 1:
                what = f"{name} has different shapes for the adapters: {' and '.join(map(str, sorted(shapes)))}"
                yield Problem("E-SHAPE", what, hint="merge only adapters of one size")
            if len({item.target.stacked for item in items}) > 1:
                yield Problem("E-OVERLAP", "some updates see experts in it, others one tensor", name, rule="R-029")


def led(adapter: Adapter, base: Checkpoint, view: View, where: str) -> Adapter:
    """The adapter with the base's targets, where maps know them under the adapter's names."""
    if adapter.check():
        return adapter  # its contradictions are reported as they are
    found = maps.led(adapter, view, where, base.ties)
    if not base.components:
        return found
    return replace(found, updates=tuple(_in_part(item, base) for item in found.updates))


def _in_part(item: Targeted, base: Checkpoint) -> Targeted:
    """An update of a pipeline's tensor, with the component that it lies in."""
    part = item.target.name.partition(".")[0]
    return replace(item, target=replace(item.target, part=part)) if part in base.components and is_part(part) else item


def _whole(items: Sequence[Targeted]) -> bool:
    """Whether a tensor is replaced as a whole, so that the base need not have it."""
    return any(item.update.kind == Replace.kind and item.target.covers_all for item in items)


def _disjoint(items: list[Targeted]) -> bool:
    """Whether updates of single rows, of several adapters, name different rows."""
    rows = [row for item in items for row in item.update.components()["index"].read().tolist()]
    return len(set(rows)) == len(rows)


def _same(items: list[Targeted], others: list[Targeted]) -> bool:
    """Whether two lists of updates do the same, byte for byte, to tensors of one shape."""

    def header(item: Targeted) -> tuple[object, ...]:
        shapes = {part: ref.shape for part, ref in item.update.components().items()}
        return item.target.shape, item.update.kind, item.update.scaling, shapes

    if [header(item) for item in items] != [header(item) for item in others]:
        return False
    return all(
        ref.digest() == two.update.components()[part].digest()
        for one, two in zip(items, others, strict=True)
        for part, ref in one.update.components().items()
    )

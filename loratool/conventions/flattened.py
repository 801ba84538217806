"""What kohya's and LyCORIS's files have in common: module names flattened to one word, and a component before it.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight

"_" may have been "." or "_", so nothing but the base's own names, flattened the same way, can say which module is
meant. The component (UNet, a text encoder) lies somewhere in the base: at its root, or under a prefix that most of
its modules share. ComfyUI's files keep the dots: ``diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight``.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from loratool.adapter import Adapter, BaseIdentity, Target, Targeted, is_name
from loratool.checkpoint import Checkpoint
from loratool.conventions import flux_names, two_layouts, unknown_keys
from loratool.conventions.choices import Choices
from loratool.conventions.flat_names import HEADS, Component, Index, Site, Stored, component_of, indexed, places, sites
from loratool.conventions.headers import Said
from loratool.conventions.scales import Scales
from loratool.errors import ChoiceNeeded, InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.format import is_native
from loratool.names import listed, natural, nearest, takes_more_inputs
from loratool.tensors import Shape, TensorRef
from loratool.updates import Scaling, Update

# Parts that change a parameter of their module which is no weight, and what it is called.
PARAMETERS = {"diff_m": "modulation"}
NEAR_NAMES = 3  # refused modules that get a suggestion; comparing names is slow


def parts_pattern(parts: Iterable[str]) -> re.Pattern[str]:
    """A key is a module and one of these parts; the module of a flattened key ends at the first dot."""
    return re.compile(rf"(?P<module>.+?)\.(?P<part>{'|'.join(map(re.escape, parts))})")


def may_be_flattened(source: Checkpoint) -> bool:
    """Whether a file may be of these conventions at all: not a native one, not PEFT's."""
    return not is_native(source.metadata) and not any(name.startswith("base_model.") for name in source.tensors)


_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


def number(ref: TensorRef) -> float:
    """The value of a tensor with one element; read without torch, so that `inspect` needs none.

    Raises InvalidFile if it is no number.
    """
    if ref.numel != 1 or ref.dtype not in (*_NUMBERS, "BF16"):
        what = f"{ref.name} is {ref.dtype} {list(ref.shape)}: it must be one number"
        raise InvalidFile(Problem("E-SHAPE", what))
    raw = b"".join(bytes(chunk) for chunk in ref.chunks())
    if ref.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])  # the upper half of a float32
    return float(struct.unpack(_NUMBERS[ref.dtype], raw)[0])


@dataclass
class Module:
    """The parts that a file holds for one module of the base."""

    key: str  # as in the file
    component: Component
    scales: Scales
    parts: dict[str, TensorRef] = field(default_factory=dict)
    stored: Stored | None = None  # its weight in the base, where that is known
    notes: set[str] = field(default_factory=set)
    doubts: set[str] = field(default_factory=set)  # what only the base could have settled

    parameter: bool = False  # the key names a parameter itself, not the module that owns a weight

    @property
    def path(self) -> str:
        return self.key.removeprefix(self.component.prefix)

    def named(self, parameter: str) -> str:
        """What its weight or bias is called where there is no base."""
        return self.key if self.parameter and parameter == "weight" else f"{self.key}.{parameter}"

    @property
    def flat(self) -> str:
        return self.path.replace(".", "_")

    def scaling(self, rank: int) -> Scaling:
        """alpha / rank. Without alpha the scale is 1: every loader of these files agrees on that."""
        ref, one = self.parts.get("alpha"), Scaling.by("alpha/rank", float(rank), rank)
        if ref is None:
            scaling = self.scales.of(self.path, rank, component=self.component.name, label=self.key, absent=one)
            if scaling is one:
                self.notes.add("no alpha in the file, which means a scale of 1 here")
            return scaling
        alpha = number(ref)
        if alpha == 0:
            what = f"{self.key}: alpha is 0, which sd-scripts reads as the rank and others as a scale of 0"
            raise InvalidFile(Problem("E-SCALE", what, hint="write the alpha that was meant into the file"))
        said = Said(alpha, ref.name)
        return self.scales.of(self.path, rank, said, component=self.component.name, label=self.key)

    def fit(self, made: Shape, region: Shape | None, *, flat: bool = False) -> Shape:
        """The region that factors making `made` update; 1x1 kernels and, if `flat`, larger ones may be flattened."""
        if region is None:
            return made
        if takes_more_inputs(self.path, region, made):
            return made  # the plan asks whether the base is to be padded
        flattened = flat and len(made) == 2 and made[0] == region[0] and made[1] == math.prod(region[1:])
        if bare(made) != bare(region) and not flattened:
            what = f"{self.key}: its tensors make {list(made)}, the base has {list(region)}"
            raise Mismatch(Problem("E-SHAPE", what, hint="is this the adapter's base?"))
        return region


class Foreign(NamedTuple):
    """A method that is refused by name: why a merge can not have it, and what helps."""

    method: str
    why: str
    help: str = "let the trainer merge it into the base"


Name = Callable[[str, TensorRef], Foreign]  # of a part in the file, and its tensor


def bare(shape: Shape) -> Shape:
    """A shape without trailing kernel dimensions of 1: a 1x1 convolution is a linear layer."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class Piece(NamedTuple):
    """What a module's parts do to one tensor of the base's module: its `weight` or its `bias`."""

    parameter: str
    region: Shape
    update: Update


Make = Callable[
    [Module, Shape | None], Iterable[Piece]
]  # the updates of a module whose weight has that shape, if known


def _counted(sentences: Iterable[str]) -> list[str]:
    """What was said of modules, each sentence once, and of how many."""
    return [f"{sentence} ({count} modules)" for sentence, count in sorted(Counter(sentences).items())]


@dataclass
class FlatReader:
    """Turns a file's keys into updates; what the parts of a module mean is the convention's `make`."""

    source: Checkpoint
    choices: Choices
    base: Mapping[str, TensorRef] | None
    parts: Mapping[str, str]  # spelling in the file -> name for `make`
    foreign: Iterable[str]  # parts of methods that are refused
    method: Name  # which method that is
    make: Make
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return str(self.source.path)

    def adapter(self, convention: str) -> Adapter:
        self.scales = Scales(self.source, self.choices, "alpha/rank")
        modules = [part for module in self._headless(self._sort()) for part in self._in_diffusers(module)]
        sites = {} if self.base is None else self._sites(modules)
        updates = [item for module in modules for item in self._updates(module, sites)]
        self.problems += self.scales.contradictions()
        if self.problems:
            raise Mismatch(self.problems)
        self.scales.check()
        counts = Counter(module.component.name for module in modules)
        self.notes += [f"{name}: {count} modules" for name, count in counts.items()]
        self.notes += _counted(note for module in modules for note in module.notes)
        self.notes += self.scales.notes()
        updates.sort(key=lambda item: natural(item.target.name))
        doubts = (
            [] if self.base is not None else ["names in it are flattened: which '_' is a '.', only the base can tell"]
        )
        doubts += _counted(doubt for module in modules for doubt in module.doubts)
        notes = (*self.source.notes, *self.notes)
        return Adapter(tuple(updates), self._identity(), {"convention": convention}, notes, tuple(doubts))

    def _identity(self) -> BaseIdentity:
        name = self.source.metadata.get("ss_sd_model_name", "")
        return BaseIdentity(name if is_name(name) and name != "None" else "")

    # -- keys ---------------------------------------------------------------------------------------------------------

    def _sort(self) -> list[Module]:
        known, foreign = parts_pattern(self.parts), parts_pattern(self.foreign)
        alien = [(match, ref) for key, ref in self.source.tensors.items() if (match := foreign.fullmatch(key))]
        methods = {match["module"]: self.method(match["part"], ref) for match, ref in alien}
        found: dict[str, Module] = {}
        refused: dict[Foreign, list[str]] = defaultdict(list)
        for owner, method in methods.items():
            refused[method].append(owner)
        strange: list[str] = []
        flat_keys: dict[tuple[Component, str], str] = {}  # one name for all spellings of a flattened one
        for key, ref in self.source.tensors.items():
            match = known.fullmatch(key) or foreign.fullmatch(key)
            if (match["module"] if match else key.rpartition(".")[0]) in methods:
                continue
            if match is None:
                strange.append(key)
                continue
            name, part = match["module"], self.parts[match["part"]]
            component = component_of(key)
            if (parameter := PARAMETERS.get(part)) is not None:
                name, part = f"{name}{'_' if component.prefix.endswith('_') else '.'}{parameter}", "diff"
            if component.prefix.endswith("_"):
                name = flat_keys.setdefault((component, name.replace(".", "_")), name)
            module = found.setdefault(name, Module(name, component, self.scales, parameter=parameter is not None))
            if part in module.parts:
                what = f"{key} and {module.parts[part].name} are the same part of one module"
                self.problems.append(Problem("E-DUPLICATE", what, self.where))
            module.parts[part] = ref
        if refused or strange:
            raise Unsupported([*self._refusals(refused), *unknown_keys.refusals(strange, self.where)])
        return list(found.values())

    def _headless(self, modules: list[Module]) -> list[Module]:
        """The chosen modules, without the heads that no module of the base has."""
        chosen = self._chosen(modules)
        for component in {module.component for module in chosen if module.component.prefix.endswith("_")}:
            group = [module for module in chosen if module.component == component]
            head = next((head for head in HEADS if all(module.flat.startswith(head) for module in group)), None)
            if head and self.base is not None and not indexed(self.base, {module.flat for module in group}):
                for module in group:
                    module.component = component._replace(prefix=component.prefix + head)
        return chosen

    def _in_diffusers(self, module: Module) -> list[Module]:
        """The modules that diffusers' Flux has for one of the original, if the base is that; else the module."""
        try:
            parts = flux_names.split_flat(module.flat, module.parts, self.base or {}, self.where)
        except LoratoolError as error:
            self.problems += error.problems
            return []
        prefix, component = module.component.prefix, module.component
        return [Module(f"{prefix}{name}", component, self.scales, own) for name, own in parts] or [module]

    def _refusals(self, refused: Mapping[Foreign, list[str]]) -> Iterator[Problem]:
        for foreign, modules in sorted(refused.items()):
            count = f"{len(modules)} modules are" if len(modules) > 1 else "1 module is"
            what = f"{count} of {foreign.method}, which is not supported: {foreign.why}; {listed(modules)}"
            yield Problem("E-UNSUPPORTED", what, self.where, foreign.help)

    def _chosen(self, modules: list[Module]) -> list[Module]:
        """The modules of the components that the user wants; all, if nothing was said."""
        known = list(dict.fromkeys(module.component.name for module in modules))
        wanted = self.choices.components
        if unknown := [name for name in wanted if name not in known]:
            what = f"it has no component {unknown[0]!r}, only {', '.join(known)}"
            raise ChoiceNeeded(Problem("E-OPTION", what, self.where))
        if left_out := [name for name in known if wanted and name not in wanted]:
            self.notes.append(f"left out, as asked for: {', '.join(left_out)}")
        return [module for module in modules if not wanted or module.component.name in wanted]

    def _updates(self, module: Module, sites: Mapping[str, Site]) -> Iterator[Targeted]:
        """The updates of a module; its problem joins the others instead of ending the reading."""
        site = sites.get(module.key)
        if site is None and self.base is not None:
            return  # reported already
        try:
            module.stored = None if site is None or self.base is None else site.stored(self.base)
            for piece in self.make(module, None if module.stored is None else module.stored.part.shape):
                if site is None or self.base is None:
                    yield Targeted(Target(module.named(piece.parameter), piece.region), piece.update)
                else:
                    yield Targeted(site.target(piece.parameter, piece.region, self.base), piece.update)
        except LoratoolError as error:
            self.problems += [Problem(p.code, p.message, p.where or self.where, p.hint, p.rule) for p in error.problems]

    # -- the base's names ---------------------------------------------------------------------------------------------

    def _sites(self, modules: list[Module]) -> dict[str, Site]:
        """Which of the base's modules each key means. What is not there, or not alone there, is a problem."""
        assert self.base is not None
        index = indexed(self.base, {module.flat for module in modules})
        groups: dict[str, list[Module]] = defaultdict(list)
        for module in modules:
            groups[module.component.name].append(module)
        found: dict[str, Site] = {}
        absent: dict[str, int] = {}
        placed: dict[Site, str] = {}
        for name, group in groups.items():
            place = self._place(group, index)
            if place is None:
                absent[name] = len(group)
                continue
            if place:
                self.notes.append(f"{name} lies under {place!r} in the base")
            mine = dict(self._found(group, index, place))
            if rivals := {placed[site] for site in mine.values() if site in placed}:
                self._rivals([name, *rivals])
            placed |= dict.fromkeys(mine.values(), name)
            found |= mine
        if absent:
            self._absent(absent, groups)
        return found

    def _place(self, group: list[Module], index: Index) -> str | None:
        """The prefix under which the base has most of a component's modules; None if it has none of them."""
        best = places(group[0].component, [module.flat for module in group], index)
        if len(best) > 1:
            what = f"{group[0].component.name} fits the base at several places: {', '.join(map(repr, sorted(best)))}"
            raise ChoiceNeeded(
                Problem("E-AMBIGUOUS", what, self.where, "give the component that was trained as the base")
            )
        return best[0] if best else None

    def _found(self, group: list[Module], index: Index, place: str) -> Iterator[tuple[str, Site]]:
        lost: dict[str, list[Module]] = defaultdict(list)  # by the pattern that leaves them out
        for module in group:
            hits = sites(module.flat, place, index)
            if "." in module.path and module.path in hits:
                hits = {module.path: hits[module.path]}
            if len(set(hits.values())) == 1:
                yield module.key, next(iter(hits.values()))
            elif hits:
                what = f"{module.key} could be any of {', '.join(sorted(place + tail for tail in hits))} of the base"
                hint = "both flatten to one name: rename one of the base's modules"
                self.problems.append(Problem("E-AMBIGUOUS", what, self.where, hint))
            else:
                lost[unknown_keys.alike(module.key)].append(module)
        for number, (pattern, modules) in enumerate(lost.items()):
            near = self._nearest(modules[0], place) if number < NEAR_NAMES else []
            hint = f"near names in the base: {', '.join(near)}" if near else "is this the adapter's base?"
            others = f" ({len(modules)} like it)" if len(modules) > 1 else ""
            what = f"the base has no module that {modules[0].key}{others} could mean"
            skip = f"; --skip '{pattern}' merges without" if len(lost) < len(group) else ""
            self.problems.append(Problem("E-TARGET", what, self.where, hint + skip))

    def _nearest(self, module: Module, place: str) -> list[str]:
        known = {name.removeprefix(place).removesuffix(".weight").replace(".", "_"): name for name in self.base or ()}
        return [known[flat] for flat in nearest(module.flat, known)]

    def _rivals(self, names: list[str]) -> None:
        what = f"the base is one component, and {' and '.join(sorted(names))} both fit it"
        hint = f"say which one it is: --component {sorted(names)[0]}"
        self.problems.append(Problem("E-AMBIGUOUS", what, self.where, hint))

    def _absent(self, absent: Mapping[str, int], groups: Mapping[str, list[Module]]) -> None:
        """Components that the base does not have: never half of an adapter without being told so."""
        there = {name: len(group) for name, group in groups.items() if name not in absent}
        for name, count in absent.items():
            what = f"the base has none of the {count} modules of component {name}"
            fits = ", ".join(f"{other} ({count} modules)" for other, count in there.items())
            options = " ".join(f"--component {other}" for other in there)
            if fits:
                what += f"; it has those of {fits}"
            other = two_layouts.hint((module.path for module in groups[name]), self.base or ())
            hint = other or (f"{options} merges that alone" if fits else "is this the adapter's base?")
            self.problems.append(Problem("E-TARGET", what, self.where, hint))

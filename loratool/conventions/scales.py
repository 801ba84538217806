"""How strong each update is: every place that says so, compared.

A reader hands in what its convention has of a layer (an ``.alpha`` tensor, a config); the header of the file is read
here, and the user's --alpha is for what none of them says. Sources that contradict each other are an error with both
values and their places. The user may settle that with one of the two values; any other answer to a question that is not
open is a mistake.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from loratool.checkpoint import Checkpoint
from loratool.conventions.choices import Choices
from loratool.conventions.headers import Header, Said, SaidRank, role_of
from loratool.errors import ChoiceNeeded, Mismatch, Problem
from loratool.names import listed
from loratool.updates import RULES, Scaling

# Alpha as a tensor has been rounded to the adapter's dtype, at worst bfloat16.
_ROUNDED = 2**-8


class _Clash(NamedTuple):
    """Two statements of one layer's alpha that do not agree."""

    name: str
    one: Said
    other: Said


@dataclass
class Scales:
    """The scales of one file's layers. `rule` is what an alpha means where the convention has a single rule.

    `asks_rule` is for a convention in which only the user knows what an alpha in the header means.
    """

    source: Checkpoint
    choices: Choices
    rule: str | None = None
    asks_rule: bool = False
    header: Header = field(init=False)
    _ranks: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # of the factors, by role
    _agreed: Counter[str] = field(default_factory=Counter)  # layers for which a broad statement holds, by its place
    _clashes: dict[tuple[str, str], list[_Clash]] = field(default_factory=lambda: defaultdict(list))  # by places
    _wrong_ranks: dict[SaidRank, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    _from_header: dict[str, Said] = field(default_factory=dict)
    _assumed: dict[str, Said] = field(default_factory=dict)
    _known: list[Said] = field(default_factory=list)  # one statement that an answer was superfluous beside
    _used: set[str] = field(default_factory=set)  # patterns of --alpha
    _rule_used: bool = False

    def __post_init__(self) -> None:
        self.header = Header.of(self.source)

    @property
    def where(self) -> str:
        return str(self.source.path)

    def of(
        self, module: str, rank: int, *own: Said, component: str = "", label: str = "", absent: Scaling | None = None
    ) -> Scaling:
        """The scale of a component's module. `own` is what the convention's places say, the most precise first.

        `absent` is what the consumers of the convention take where nothing is said; without it, such a scale is
        unknown. `label` is the name that patterns of --alpha match, where it is not the module's.
        """
        self._ranks[role_of(component)].add(rank)
        name = label or module
        self.check_rank(name, rank, *self.header.ranks_said_of(component, module))
        stated = [*own, *self._stated(component, module)]
        firm = [said for said in stated if not said.assumed]
        given = next(((pattern, alpha) for pattern, alpha in self.choices.alphas_of(name)), None)
        if firm:
            return self._firm(name, rank, firm, given)
        if given is not None:
            self._used.add(given[0])
            self._rule_used = True
            return self.choices.scaling_of(name, rank, self.rule)
        if stated:
            self._assumed.setdefault(stated[0].where, stated[0])
            return Scaling.by(stated[0].rule or "alpha/rank", stated[0].alpha, rank)
        if absent is not None and not self.unsettled:
            return absent
        self._rule_used = True  # it is half of the answer
        return self.choices.scaling_of(name, rank, self.rule)

    @property
    def unsettled(self) -> bool:
        """Whether the header has an alpha, and others for some of the layers: then a lack of it means nothing."""
        return self.header.uneven and bool(self.header.alphas)

    def check_rank(self, module: str, rank: int, *stated: SaidRank) -> None:
        """The rank of factors against what a config says of it; one of several statements has to be right."""
        if stated and all(said.rank != rank for said in stated):
            self._wrong_ranks[stated[0]].append((module, rank))

    def notes(self) -> list[str]:
        """What a user should know of where the scales are from."""
        notes = [f"alpha is {said.alpha:g}, from {place}" for place, said in self._from_header.items()]
        for place, said in self._assumed.items():
            field_name, _, rest = place.partition(" ")
            notes.append(f"there is no {field_name} {rest}: PEFT's default is taken, {said.alpha:g}")
        return notes

    def check(self) -> None:
        """Raises Mismatch for contradictions, ChoiceNeeded for answers to questions that were not open."""
        if problems := self.contradictions():
            raise Mismatch(problems)
        if problems := [*self._superfluous()]:
            raise ChoiceNeeded(problems)

    def contradictions(self) -> list[Problem]:
        """Sources that do not agree, each pair of them once."""
        return [*self._alphas(), *self._stated_ranks()]

    # -- one layer ----------------------------------------------------------------------------------------------------

    def _stated(self, component: str, module: str) -> list[Said]:
        found = self.header.said_of(component, module)
        if self.header.uneven:  # what it says of the whole is not what it says of every layer
            found = [said for said in found if not said.broad]
        return [said._replace(rule=None) for said in found] if self.asks_rule else found

    def _firm(self, name: str, rank: int, firm: list[Said], given: tuple[str, float] | None) -> Scaling:
        """What sources say, where they agree; the user's choice between them, where they do not."""
        chosen, *others = firm
        rivals = [said for said in others if not _same(said, chosen, rank)]
        open_rule = chosen.rule is None
        if given is not None and (rivals or open_rule):
            fitting = [said for said in (chosen, *rivals) if math.isclose(said.alpha, given[1], rel_tol=_ROUNDED)]
            if not fitting and not rivals:
                self._known.append(chosen)
            if fitting:
                self._used.add(given[0])
                self._rule_used = True
                chosen, rivals = fitting[0], []
        elif given is not None:
            self._known.append(chosen)
        for said in others:
            if said not in rivals:
                self._agreed[said.where] += 1
        for said in rivals:
            self._clashes[chosen.where if chosen.broad else "", said.where].append(_Clash(name, chosen, said))
        if chosen.broad:
            self._from_header.setdefault(chosen.where, chosen)
        if open_rule:
            self._rule_used = True
            if self.choices.scaling is None:
                return Scaling("none", rank, None, None)
        return Scaling.by(chosen.rule or self.choices.scaling or "", chosen.alpha, rank)

    # -- all of them --------------------------------------------------------------------------------------------------

    def _alphas(self) -> Iterator[Problem]:
        for (_, place), found in self._clashes.items():
            name, one, other = found[0]
            if other.broad and self._agreed[place]:
                continue  # a few layers of their own
            rules = "" if one.rule == other.rule else f" by {one.rule}, and by {other.rule}"
            more = f" ({len(found)} layers)" if len(found) > 1 else ""
            what = f"{name}: alpha is {one.alpha:g} ({one.where}) and {other.alpha:g} ({other.where}){rules}{more}"
            scaling = "" if self.rule else " with --scaling"
            hint = f"say which of the two is right: --alpha {one.alpha:g} or --alpha {other.alpha:g}{scaling}"
            yield Problem("E-SCALE", what, self.where, hint)

    def _stated_ranks(self) -> Iterator[Problem]:
        everything = {rank for ranks in self._ranks.values() for rank in ranks}
        for component, stated in self.header.ranks.items() if not self.header.uneven else ():
            ranks = self._ranks.get(role_of(component), set()) if component else everything
            for said in stated:
                if ranks and said.rank not in ranks:
                    named = ", ".join(map(str, sorted(ranks)[:3]))
                    what = f"the rank is {said.rank:g} ({said.where}), and {named} in the factors"
                    yield Problem("E-RANK", what, self.where, "take the file that the trainer wrote")
        for said, found in self._wrong_ranks.items():
            modules, rank = listed(module for module, _ in found), found[0][1]
            what = f"the rank is {said.rank:g} ({said.where}), and {rank} in the factors of {modules}"
            yield Problem("E-RANK", what, self.where, "take the config that the trainer wrote for this adapter")

    def _superfluous(self) -> Iterator[Problem]:
        """Options for what the files say themselves."""
        unused = [alpha for pattern, alpha in self.choices.alpha.items() if pattern not in self._used]
        said = f"the file says alpha itself: {self._known[0].alpha:g} ({self._known[0].where})" if self._known else ""
        for alpha in unused[:1]:
            what = f"--alpha {alpha:g} is given, and {said or 'no scale is open that it is for'}"
            yield Problem(
                "E-OPTION",
                what,
                self.where,
                "leave --alpha out; if it is for another of several adapters, `loratool convert` that one first",
            )
        if self.choices.scaling is not None and not self._rule_used and not unused:
            what = "--scaling is given, and no alpha is open that it is for"
            yield Problem("E-OPTION", what, self.where, "leave --scaling out")


def _same(one: Said, other: Said, rank: int) -> bool:
    """Whether two statements mean one scale, up to what rounding to the adapter's dtype makes of it."""
    if one.rule is None or other.rule is None:
        return math.isclose(one.alpha, other.alpha, rel_tol=_ROUNDED)
    return math.isclose(RULES[one.rule](one.alpha, rank), RULES[other.rule](other.alpha, rank), rel_tol=_ROUNDED)

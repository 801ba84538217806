"""A family of models whose weights are named and packed in several ways: the rules of one JSON file, read strictly.

    {
      "format": "loratool.map/1",
      "family": "a name for notes and messages",
      "about": "free text", "models": ["model_type of config.json", ...],          both may be left out
      "weights": {"gate": ["inner", "hidden"], ...},    each one's [out, in], or [out] for a bias, in named dimensions
      "layouts": {"transformers": {"mlp.experts.gate_up_proj": ["experts", "gate + up", "hidden"], ...}, ...}
    }

A layout says where each weight lies: the end of a tensor's name, from a dot on, and the tensor's axes. "experts" in
front counts experts; a tensor of one expert has ``{expert}`` in its name instead. One axis names the weights: ``a + b``
one after the other, ``a / b`` in turn, row by row. The other is their input; it may come first, where the tensor is
stored as [in, out]. Every layout holds every weight once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from loratool.errors import InvalidFile, Problem
from loratool.tensors import Shape, reading

FORMAT = "loratool.map/1"
EXPERTS = "experts"
EXPERT = "{expert}"
_KEYS = {"format", "family", "about", "models", "weights", "layouts"}
_NUMBER = r"(?P<expert>0|[1-9][0-9]{0,5})"
MAX_BYTES = 1 << 20

Dims = Mapping[str, int]


@dataclass(frozen=True)
class Weight:
    """One matrix (or bias) of a layer, of every expert if it is theirs; its dimensions by name, [out, in] or [out]."""

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """Where a layout has some weights: a tensor, with its weights along one axis.

    `stacked` is whether the first axis counts experts; `flipped` whether the input comes before the output, [in, out];
    `in_turn` whether rows of the weights alternate.
    """

    ending: str
    weights: tuple[Weight, ...]
    stacked: bool = False
    flipped: bool = False
    in_turn: bool = False

    @property
    def of_one_expert(self) -> bool:
        return EXPERT in self.ending

    def name(self, path: str, expert: int | None) -> str:
        return path + self.ending.replace(EXPERT, str(expert))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches full names of such a tensor: their `path`, and their `expert` where it is of one."""
        return re.compile(r"^(?P<path>(?:.*\.)?)" + re.escape(self.ending).replace(re.escape(EXPERT), _NUMBER) + "$")

    @property
    def literal(self) -> str:
        """A part of every such name, to look at before the pattern."""
        return max(self.ending.split(EXPERT), key=len)

    def size(self, dims: Dims) -> int:
        """The length of the axis of the weights."""
        return sum(dims[weight.dims[0]] for weight in self.weights)

    def offset(self, weight: Weight, dims: Dims) -> int:
        """The first row of a weight, where they lie one after the other."""
        return sum(dims[before.dims[0]] for before in self.weights[: self.weights.index(weight)])

    def matrix(self, dims: Dims) -> Shape:
        """The shape of one expert's part, or of the whole tensor if it has no experts."""
        shape = (self.size(dims), *(dims[dim] for dim in self.weights[0].dims[1:]))
        return shape[::-1] if self.flipped else shape

    def shape(self, dims: Dims) -> Shape:
        return (dims[EXPERTS], *self.matrix(dims)) if self.stacked else self.matrix(dims)


@dataclass(frozen=True)
class Layout:
    """One way to name and pack all the weights."""

    name: str
    tensors: tuple[Stored, ...]

    def home(self, weight: Weight) -> Stored:
        return next(stored for stored in self.tensors if weight in stored.weights)


@dataclass(frozen=True)
class Family:
    """Weights, and the layouts that models of a family have them in."""

    name: str
    models: tuple[str, ...]
    layouts: tuple[Layout, ...]


@cache
def shipped() -> tuple[Family, ...]:
    """The families that come with the library, one file each beside this module."""
    return tuple(read(path) for path in sorted(Path(__file__).parent.glob("*.json")))


def read(path: Path) -> Family:
    """A family's rules. Raises InvalidFile with everything that is wrong with the file."""
    with reading(path):
        raw = path.read_bytes()[: MAX_BYTES + 1]
    try:
        if len(raw) > MAX_BYTES:
            raise ValueError(f"it is longer than {MAX_BYTES} bytes")
        rules = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InvalidFile(_bad(f"it is not JSON of a map: {error}", path)) from None
    if not isinstance(rules, dict):
        raise InvalidFile(_bad("it is not a JSON object", path))
    problems = [_bad(what, path) for what in _wrong_frame(rules)]
    if not problems:
        weights = {name: Weight(name, tuple(dims)) for name, dims in rules["weights"].items()}
        layouts = []
        for name, tensors in rules["layouts"].items():
            stored, wrong = _layout(tensors, weights)
            layouts.append(Layout(name, tuple(stored)))
            problems += [_bad(f"layout {name!r}: {what}", path) for what in wrong]
        if not problems:
            problems += [_bad(what, path) for what in _contradictions(weights, layouts)]
    if problems:
        raise InvalidFile(problems)
    return Family(rules["family"], tuple(rules.get("models", ())), tuple(layouts))


def _bad(what: str, path: Path) -> Problem:
    return Problem("E-MAP", what, str(path), "loratool/maps/mixtral.json is an example")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"{twice!r} is in it twice")
    return found


def _wrong_frame(rules: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong around the layouts."""
    if rules.get("format") != FORMAT:
        yield f"format is {rules.get('format')!r:.80}, not {FORMAT!r}"
    if unknown := sorted(rules.keys() - _KEYS):
        yield f"unknown key {', '.join(map(repr, unknown))}; known are {', '.join(sorted(_KEYS))}"
    if not isinstance(rules.get("family"), str) or not rules["family"]:
        yield "family is not a name"
    if not isinstance(rules.get("about", ""), str):
        yield "about is not text"
    if not _is_names(rules.get("models", [])):
        yield "models is not a list of names"
    weights = rules.get("weights")
    if not isinstance(weights, dict) or not weights:
        yield "weights is not an object of weights"
    else:
        for name, dims in weights.items():
            if not name.strip() or any(sign in name for sign in "+/"):
                yield f"weight {name!r} needs a name without + and /"
            if not _is_names(dims) or len(dims) not in (1, 2):
                yield f"weight {name!r} is {dims!r:.80}, not [out, in] or [out] in named dimensions"
    layouts = rules.get("layouts")
    if not isinstance(layouts, dict) or len(layouts) < 2:
        yield "layouts is not an object of two layouts or more"
    else:
        for name, tensors in layouts.items():
            if not isinstance(tensors, dict) or not tensors:
                yield f"layout {name!r} is not an object of tensors"


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _layout(tensors: Mapping[str, object], weights: Mapping[str, Weight]) -> tuple[list[Stored], list[str]]:
    """The tensors of a layout, and what is wrong with them."""
    found, wrong = [], []
    for ending, axes in tensors.items():
        stored = _stored(ending, axes, weights)
        if isinstance(stored, str):
            wrong.append(f"{ending!r}: {stored}")
        else:
            found.append(stored)
    held = [weight.name for stored in found for weight in stored.weights]
    if not wrong:
        wrong += [f"weight {name!r} is in no tensor" for name in weights if name not in held]
        wrong += [f"weight {name!r} is in more than one place" for name in weights if held.count(name) > 1]
    return found, wrong


def _stored(ending: str, axes: object, weights: Mapping[str, Weight]) -> Stored | str:
    """One tensor of a layout, or what is wrong with it."""
    if not _is_names(axes) or not isinstance(axes, list):
        return f"its axes are {axes!r:.80}, not a list of names"
    if ending.count(EXPERT) > 1 or re.search(r"[{}]", ending.replace(EXPERT, "")) or not ending.strip("."):
        return f"a name has {EXPERT} once or not at all, and no other braces"
    if EXPERT in ending and EXPERT not in ending.split("."):
        return f"{EXPERT} is a segment of its own, between dots"
    stacked = len(axes) > 1 and axes[0] == EXPERTS
    matrix = axes[1:] if stacked else axes
    if stacked and EXPERT in ending:
        return f"it has {EXPERT} in its name and an axis of experts"
    places = [n for n, axis in enumerate(matrix) if axis not in {d for w in weights.values() for d in w.dims[1:]}]
    if len(places) != 1 or len(matrix) > 2:
        return f"its axes are {axes}: one names its weights, at most one other their input"
    sign = "/" if "/" in matrix[places[0]] else "+"
    names = [name.strip() for name in matrix[places[0]].split(sign)]
    if unknown := [name for name in names if name not in weights]:
        return f"{unknown[0]!r} is not among the weights"
    inside = tuple(weights[name] for name in names)
    inputs = [axis for n, axis in enumerate(matrix) if n != places[0]]
    if any([*weight.dims[1:]] != inputs for weight in inside):
        return f"its axes are {axes}, the input of {names[0]} is {[*inside[0].dims[1:]]}"
    if sign == "/" and len({weight.dims[0] for weight in inside}) > 1:
        return "weights in turn are of one length"
    return Stored(ending, inside, stacked, flipped=len(matrix) == 2 and places[0] == 1, in_turn=sign == "/")


def _contradictions(weights: Mapping[str, Weight], layouts: list[Layout]) -> Iterator[str]:
    """What the layouts do not agree about."""
    for weight in weights.values():
        homes = [layout.home(weight) for layout in layouts]
        if len({home.stacked or home.of_one_expert for home in homes}) > 1:
            yield f"weight {weight.name!r} is an expert's in one layout and not in another"
    for n, layout in enumerate(layouts):
        for other in layouts[:n]:
            if {*layout.tensors} == {*other.tensors}:
                yield f"layouts {other.name!r} and {layout.name!r} are the same"


def solve(layout: Layout, shapes: Mapping[Stored, Shape], experts: int | None) -> dict[str, int] | str:
    """The named dimensions that make a layout's tensors have these shapes; else the first one that does not fit."""
    dims: dict[str, int] = {} if experts is None else {EXPERTS: experts}
    for stored, shape in shapes.items():
        if len(shape) != stored.stacked + len(stored.weights[0].dims):
            return f"{stored.ending} is {list(shape)}"
        matrix = shape[stored.stacked :][:: -1 if stored.flipped else 1]
        if stored.stacked:
            dims.setdefault(EXPERTS, shape[0])
        for name, size in zip(stored.weights[0].dims[1:], matrix[1:], strict=True):
            dims.setdefault(name, size)
        if len(outs := {weight.dims[0] for weight in stored.weights}) == 1:
            dims.setdefault(outs.pop(), matrix[0] // len(stored.weights))
    for stored, shape in shapes.items():
        if any(dim not in dims for weight in stored.weights for dim in weight.dims):
            return f"nothing shows how the rows of {stored.ending} divide"
        if stored.shape(dims) != shape or not math.prod(shape):
            sizes = ", ".join(f"{name} {size}" for name, size in sorted(dims.items()))
            return f"{stored.ending} is {list(shape)}, and with {sizes} it would be {list(stored.shape(dims))}"
    return dims

"""What an adapter is: an ordered list of updates to named tensors, the base it belongs to, and where it came from."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratool.errors import Problem
from loratool.tensors import Shape
from loratool.updates import Update

MAX_NAME = 1024  # UTF-8 bytes of a target
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
LAYOUTS = ("", "in_out", "embedding")


def is_name(text: str) -> bool:
    """Whether a tensor can be called so in a native file (rule R-016)."""
    return 1 <= len(text.encode("utf-8", "surrogatepass")) <= MAX_NAME and not _CONTROL.search(text)


@dataclass(frozen=True)
class Target:
    """Which part of the base an update changes.

    `name` and `shape` are those of the whole stored tensor. `rows` [start, stop) is a range along the first
    dimension of the matrix (one part of a fused projection). A tensor [experts, ...] is updated for all experts at
    once (`experts` is their number, and the update's components have that leading dimension) or for one (`expert`).
    `layout` is "in_out" where the stored matrix is [in, out] (GPT-2's Conv1D), "embedding" for a table
    [tokens, dim], "" for PyTorch's [out, in].
    """

    name: str
    shape: Shape
    rows: tuple[int, int] | None = None
    expert: int | None = None
    experts: int | None = None
    layout: str = ""

    @property
    def stacked(self) -> bool:
        """Whether the first dimension counts experts."""
        return self.expert is not None or self.experts is not None

    @property
    def matrix(self) -> Shape:
        """The shape of the tensor, or of one expert's part of it."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def region(self) -> Shape:
        """The shape of what changes, without the experts' dimension."""
        if self.rows is None:
            return self.matrix
        return (self.rows[1] - self.rows[0], *self.matrix[1:])

    @property
    def covers_all(self) -> bool:
        return self.rows is None and not self.stacked

    def check(self) -> Iterator[Problem]:
        """Rules R-022 and R-023 of the spec: shape, rows and expert index are possible."""
        if not is_name(self.name):
            what = f"the name {self.name!r:.80} is empty, over {MAX_NAME} bytes, or has control characters"
            yield Problem("E-LIMIT", what, rule="R-016")
        if any(dim < 1 for dim in self.shape):
            yield Problem("E-SHAPE", f"shape {list(self.shape)} has an empty dimension", self.name, rule="R-022")
        if len(self.shape) > 8 or math.prod(self.shape) > 2**53:
            yield Problem(
                "E-LIMIT", f"shape {list(self.shape)} is over 8 dimensions or 2^53 elements", self.name, rule="R-016"
            )
        if self.expert is not None and self.experts is not None:
            yield Problem("E-RANGE", "expert and experts exclude each other", self.name, rule="R-023")
        elif self.stacked and len(self.shape) < 2:
            yield Problem("E-RANGE", f"shape {list(self.shape)} has no experts' dimension", self.name, rule="R-023")
        elif self.experts is not None and self.experts != self.shape[0]:
            yield Problem(
                "E-RANGE", f"experts is {self.experts}, the tensor has {self.shape[0]}", self.name, rule="R-023"
            )
        elif self.expert is not None and not 0 <= self.expert < self.shape[0]:
            yield Problem("E-RANGE", f"expert {self.expert} is not among {self.shape[0]}", self.name, rule="R-023")
        elif self.rows is not None:
            size = self.matrix[0] if self.matrix else 0
            if not 0 <= self.rows[0] < self.rows[1] <= size:
                yield Problem(
                    "E-RANGE", f"rows {list(self.rows)} are not a range within {size}", self.name, rule="R-023"
                )


@dataclass(frozen=True)
class Targeted:
    """One entry of an adapter: what changes, and how."""

    target: Target
    update: Update

    def check(self) -> Iterator[Problem]:
        problems = list(self.target.check())
        if not problems and self.update.dims == 2 and self.target.stacked and len(self.target.shape) < 3:
            problems.append(
                Problem("E-RANGE", f"shape {list(self.target.shape)} has no matrix per expert", rule="R-023")
            )
        if not problems and self.update.kind == "replace_rows" and (self.target.stacked or self.target.rows):
            problems.append(Problem("E-RANGE", "replace_rows names rows of the whole tensor", rule="R-023"))
        if not problems:
            problems.extend(self.update.check(self.target.region, self.target.experts))
        for problem in problems:
            yield Problem(problem.code, problem.message, self.target.name, problem.hint, problem.rule)


@dataclass(frozen=True)
class TensorIdentity:
    """What a base tensor is: BLAKE3 of its raw bytes, dtype and shape. Independent of files and shards."""

    digest: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class BaseIdentity:
    """The base an adapter was trained on: a name for people, and digests of the tensors it changes for the tool."""

    name: str = ""
    tensors: Mapping[str, TensorIdentity] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """Updates in order, the base they belong to, provenance (free text pairs), and notes from reading it.

    `info` is what people and other programs want to know of it (JSON: title, description, triggers, license, authors,
    source, weight, training, config; spec, section 9), `metadata` the members of a safetensors header that other tools
    look for under their own names (``modelspec.title``, ``ss_network_dim``). No merge looks at either.

    `doubts` are what only the base could have settled, where it was not at hand: such an adapter can be inspected, not
    saved or merged.
    """

    updates: tuple[Targeted, ...]
    base: BaseIdentity = BaseIdentity()
    provenance: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def targets(self) -> dict[str, list[Targeted]]:
        """The updates by the tensor they change, in order."""
        found: dict[str, list[Targeted]] = defaultdict(list)
        for item in self.updates:
            found[item.target.name].append(item)
        return dict(found)

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for item in self.updates for tensor in item.update.components().values())

    def check(self) -> list[Problem]:
        """Every way in which the adapter contradicts itself."""
        problems = [problem for item in self.updates for problem in item.check()]
        if not self.updates:
            problems.append(Problem("E-LIMIT", "the adapter has no updates", rule="R-016"))
        for name, items in self.targets().items():
            if len(items) == 1:
                continue  # an update does not contradict itself
            if len({item.target.shape for item in items}) > 1:
                problems.append(
                    Problem("E-SHAPE", "updates of one tensor give it different shapes", name, rule="R-022")
                )
            problems.extend(overlaps(items))
        return problems

    def unknown_scales(self) -> list[Targeted]:
        """Updates whose alpha nobody has said yet."""
        return [item for item in self.updates if item.update.scaling and item.update.scaling.scale is None]


def overlaps(items: Sequence[Targeted]) -> Iterator[Problem]:
    """Updates of one tensor whose sum is not defined (rule R-029): at most one finding per expert."""
    experts = {item.target.expert for item in items} - {None} or {None}
    mixed = len({item.target.stacked for item in items}) > 1
    for expert in experts:
        touching = [item for item in items if item.target.expert in (None, expert)]
        touching.sort(key=lambda item: item.target.rows[0] if item.target.rows else 0)
        # Swept by first row, it is enough to remember per role the update that reaches furthest.
        furthest: dict[str, tuple[float, Targeted]] = {}
        for item in touching:
            # Rows of all experts at once are counted along another axis than rows within an expert.
            rows = None if mixed and not item.target.stacked else item.target.rows
            start, stop = rows or (0, math.inf)
            role = item.update.role
            clashes = [other for r, (reach, other) in furthest.items() if reach > start and not _may_overlap(role, r)]
            if clashes:
                kinds = f"a {clashes[0].update.kind} and a {item.update.kind} update"
                what = f"{kinds} change the same elements: their combination is not defined"
                yield Problem("E-OVERLAP", what, item.target.name, rule="R-029")
                break
            if role not in furthest or stop > furthest[role][0]:
                furthest[role] = (stop, item)


def _may_overlap(role: str, other: str) -> bool:
    """Deltas add up, and anything goes on top of one replacement."""
    return role == other == "add" or (role == "replace") != (other == "replace")

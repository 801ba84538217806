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
_PART = re.compile(r"[A-Za-z0-9_-]{1,100}")
LAYOUTS = ("", "in_out", "embedding")


def is_name(text: str) -> bool:
    """Whether a tensor can be called so in a native file (rule R-016)."""
    return 1 <= len(text.encode("utf-8", "surrogatepass")) <= MAX_NAME and not _CONTROL.search(text)


def is_part(text: object) -> bool:
    """Whether a component of a pipeline can be called so (rule R-048)."""
    return isinstance(text, str) and _PART.fullmatch(text) is not None


@dataclass(frozen=True)
class Target:
    """Which part of the base an update changes.

    `name` and `shape` are those of the whole stored tensor. `rows` [start, stop) is a range along the first
    dimension of the matrix (one part of a fused projection). A tensor [experts, ...] is updated for all experts at
    once (`experts` is their number, and the update's components have that leading dimension) or for one (`expert`).
    `layout` is "in_out" where the stored matrix is [in, out] (GPT-2's Conv1D), "embedding" for a table
    [tokens, dim], "" for PyTorch's [out, in]. `part` is the component of a pipeline that the tensor lies in ("unet"),
    where that is known: then `name` is PART.TENSOR, as a pipeline has it.
    """

    name: str
    shape: Shape
    rows: tuple[int, int] | None = None
    expert: int | None = None
    experts: int | None = None
    layout: str = ""
    part: str = ""

    @property
    def stored(self) -> str:
        """The name of the tensor within its part."""
        return self.name.removeprefix(f"{self.part}.") if self.part else self.name

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
        if self.part and not (is_part(self.part) and self.name.startswith(f"{self.part}.") and self.stored):
            what = f"part {self.part!r:.80} has other signs than letters, digits, _ and -, or does not begin the name"
            yield Problem("E-MANIFEST", what, self.name, rule="R-048")
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
    """What a base tensor is: a digest of its raw bytes (``blake3:HEX`` or ``sha256:HEX``), dtype and shape.

    Independent of files and shards. A quantised weight is its codes, and `parts` are by name the other stored tensors
    that its numbers come from: scales, offsets, tables.
    """

    digest: str
    dtype: str
    shape: Shape
    parts: Mapping[str, TensorIdentity] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class BaseIdentity:
    """The base an adapter was trained on: its name, and digests of the tensors that the adapter changes.

    `name` is the model's id where it is published (``org/model``), else a name for people; `revision` is that of the
    id, `architecture` the class or family. `tokenizer` is the digest of the base's tokenizer.json, `added_tokens` the
    numbers of the tokens that the adapter added to it. Only the digests of `tensors` are compared.
    """

    name: str = ""
    tensors: Mapping[str, TensorIdentity] = field(default_factory=dict)
    revision: str = ""
    architecture: str = ""
    tokenizer: str = ""
    added_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """Updates in order, the base they belong to, provenance (free text pairs), and notes from reading it.

    `info` is what people and other programs want to know of it (JSON: title, description, triggers, license, authors,
    source, weight, training, config; spec, section 9), `metadata` the members of a safetensors header that other tools
    look for under their own names (``modelspec.title``, ``ss_network_dim``). No merge looks at either.

    `when` says that it acts on some inputs only: {"tokens": [token numbers]} from where these stand in the input on (an
    activated LoRA), {"prompts": [texts]}, or {"routing": what chooses}. Such an adapter can not be merged.

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
    when: Mapping[str, Any] = field(default_factory=dict)

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

    def condition(self) -> str:
        """When it acts, in words; "" for an adapter that always does."""
        if "tokens" in self.when:
            return f"only after the tokens {', '.join(map(str, self.when['tokens']))}"
        if "prompts" in self.when:
            return f"only on prompts with {' or '.join(map(repr, self.when['prompts']))}"
        return f"only where it is chosen: {self.when.get('routing', 'by what is not known')}" if self.when else ""

    def unknown_scales(self) -> list[Targeted]:
        """Updates whose alpha nobody has said yet."""
        return [item for item in self.updates if item.update.scaling and item.update.scaling.scale is None]


def overlaps(items: Sequence[Targeted]) -> Iterator[Problem]:
    """Updates of one tensor whose sum is not defined (rule R-029): at most one finding per expert."""
    mixed = len({item.target.stacked for item in items}) > 1
    # Rows of all experts at once are counted along another axis than rows within an expert.
    spans = [(None if mixed and not item.target.stacked else item.target.rows) or (0, math.inf) for item in items]
    # Swept by first row, it is enough to remember per role the update that reaches furthest: of each expert, of those
    # of all experts (None), and among all of them.
    furthest: dict[int | None, _Reach] = defaultdict(dict)
    anywhere: _Reach = {}
    told: set[int | None] = set()
    for (start, stop), item in sorted(zip(spans, items, strict=True), key=lambda pair: pair[0][0]):
        expert, role = item.target.expert, item.update.role
        met = [anywhere] if expert is None else [furthest[expert], furthest[None]]
        clashes = [
            other
            for reached in met
            for r, (reach, other) in reached.items()
            if reach > start and not _may_overlap(role, r)
        ]
        if clashes and expert not in told:
            told.add(expert)
            kinds = f"a {clashes[0].update.kind} and a {item.update.kind} update"
            what = f"{kinds} change the same elements: their combination is not defined"
            yield Problem("E-OVERLAP", what, item.target.name, rule="R-029")
        for reached in (furthest[expert], anywhere):
            if role not in reached or stop > reached[role][0]:
                reached[role] = (stop, item)


_Reach = dict[str, tuple[float, Targeted]]  # by role: the row after the last, and the update


def _may_overlap(role: str, other: str) -> bool:
    """Deltas add up, and anything goes on top of one replacement."""
    return role == other == "add" or (role == "replace") != (other == "replace")

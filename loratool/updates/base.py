"""What every kind of update has in common: the scale, a few verbs, and the block of rows they work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from loratool.errors import Problem
from loratool.tensors import FLOATS, Shape, TensorRef

if TYPE_CHECKING:
    import torch

# The scaling rules of the field, by name. `alpha` is the first edition of LLMs from scratch, `alpha/rank` the LoRA
# paper (arXiv:2106.09685), `alpha/sqrt(rank)` rsLoRA (arXiv:2312.03732).
RULES: dict[str, Callable[[float, int], float]] = {
    "alpha": lambda alpha, rank: alpha,
    "alpha/rank": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / math.sqrt(rank),
}


@dataclass(frozen=True)
class Scaling:
    """How strong an update is.

    `scale` is what counts: the factor in front of the delta. `rule`, `alpha` and `rank` say where it comes from;
    rule "none" is a bare scale. A scale of None means that the files do not hold alpha and nobody has said it yet:
    such an update can be inspected, not merged or saved.
    """

    rule: str = "none"
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = 1.0

    def check(self) -> Iterator[Problem]:
        """A scale must be a number to multiply with (rule R-025)."""
        if self.scale is not None and not math.isfinite(self.scale):
            yield Problem("E-SCALE", f"scale {self.scale} of alpha {self.alpha} is not finite", rule="R-025")

    @classmethod
    def by(cls, rule: str, alpha: float | None, rank: int) -> Scaling:
        """The scale that `rule` gives: ``Scaling.by("alpha/rank", 32, 16).scale == 2.0``."""
        return cls(rule, rank, alpha, None if alpha is None else RULES[rule](alpha, rank))

    @property
    def factor(self) -> float:
        assert self.scale is not None, "an unknown scale is refused before any arithmetic"
        return self.scale


class Block(Protocol):
    """An update with its factors in memory, in the compute dtype, ready for blocks of rows."""

    # How often `apply` rounds an element in place, and the longest sum in between: its error is at most
    # u * ((length + 2 + steps) * magnitude + steps * largest result), for a unit roundoff u.
    steps: int
    length: int
    scale: float

    def apply(self, W: torch.Tensor, start: int, weight: float) -> None:
        """Change W in place: rows start.. of the update's region, flattened to [rows, columns]."""

    def apply_at(self, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, weight: float) -> None:
        """`apply` for single elements [n] of a block, in float64; only of updates that are `elementwise`."""

    def revert(self, W: torch.Tensor, terms: torch.Tensor, start: int, weight: float) -> None:
        """The opposite of `apply`, up to rounding: changes merged rows W in place into a prediction of the base's.

        Adds to `terms` [rows, 1] the magnitude of what was subtracted: the rounding error is a multiple of it.
        """

    def magnitude(self, start: int, stop: int) -> torch.Tensor:
        """[rows, 1]: no element of a row's scaled delta is larger, nor is the sum of its terms' magnitudes."""

    def observe(self, W: torch.Tensor, start: int) -> None:
        """Called on every block of rows before the first `apply`, if the update's `first_pass` is true."""


@dataclass(frozen=True)
class Update:
    """A change of one region (a whole tensor, a range of its rows, or one expert's matrix) of a base checkpoint.

    Tensors are references (`TensorRef`), canonical in orientation: the first dimension is that of the stored base
    tensor. With `experts`, every component has one more leading dimension.
    """

    kind: ClassVar[str]
    role: ClassVar[str] = "add"  # or "replace", or "renormalise"
    dims: ClassVar[int] = 2  # how many dimensions the region must have at least
    index_components: ClassVar[tuple[str, ...]] = ()  # int64 instead of floating point

    @property
    def scaling(self) -> Scaling | None:
        """None for updates that are not scaled (replacements)."""
        return None

    def elementwise(self, weight: float) -> bool:
        """Whether a single element can be computed on its own, so that float32 is enough for most of a block."""
        return False

    @property
    def first_pass(self) -> bool:
        """Whether all rows of the base must be seen before any can be written."""
        return False

    def components(self) -> dict[str, TensorRef]:
        """The update's tensors by the component names of the spec; absent optional ones are left out."""
        return {name: value for name, value in vars(self).items() if isinstance(value, TensorRef)}

    def expected(self, region: Shape) -> Mapping[str, Shape]:
        """The shape each component must have for a region of this shape, apart from a leading expert dimension."""
        raise NotImplementedError

    def ranks(self) -> list[int]:
        """The inner dimension of each low-rank product, to compare with the declared rank."""
        return []

    def open(self, dtype: torch.dtype, expert: int | None, device: str = "cpu") -> Block:
        """Read the factors in the compute dtype; of one expert, where the update has an expert dimension."""
        raise NotImplementedError

    def held(self) -> Update:
        """The same with its viewed components in memory: a slice of a view reads the whole tensor, each time."""
        changed: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, TensorRef) and value.views:
                changed[part.name] = TensorRef.of(value.read().contiguous(), value.name)
            elif isinstance(value, Update):
                changed[part.name] = value.held()
        return replace(self, **changed)

    def check(self, region: Shape, experts: int | None) -> Iterator[Problem]:
        """Every way in which the components do not fit `region` (rules R-026, R-031, R-032 of the spec)."""
        if self.scaling is not None:
            yield from self.scaling.check()
        lead = () if experts is None else (experts,)
        components = self.components()
        for name, tensor in components.items():
            wanted = ("I64",) if name in self.index_components else FLOATS
            if tensor.dtype not in wanted:
                yield Problem("E-DTYPE", f"component {name} is {tensor.dtype}, not {' or '.join(wanted)}", rule="R-032")
        if len(region) < self.dims:
            what = f"a {self.kind} update needs {self.dims} dimensions, its region is {list(region)}"
            yield Problem("E-SHAPE", what, rule="R-022")
            return
        declared = self.scaling.rank if self.scaling else None
        if found := sorted({rank for rank in self.ranks() if rank != declared}):
            yield Problem("E-RANK", f"rank says {declared}, the factors have {found[0]}", rule="R-026")
            return
        for name, shape in self.expected(region).items():
            if name in components and components[name].shape != (*lead, *shape):
                yield Problem(
                    "E-SHAPE",
                    f"component {name} is {list(components[name].shape)}, a region {list(region)} needs"
                    f" {[*lead, *shape]}",
                    rule="R-031",
                )

    def read(self, name: str, dtype: torch.dtype | None, expert: int | None, device: str) -> torch.Tensor:
        """One component as a contiguous tensor, without the expert dimension."""
        return self.part(name, expert).read(dtype).contiguous().to(device)

    def part(self, name: str, expert: int | None) -> TensorRef:
        tensor: TensorRef = getattr(self, name)
        return tensor if expert is None else tensor.select(expert)


SLACK = 1 + 2.0**-16  # for the rounding of the bounds themselves


def inner(B: TensorRef) -> int:
    """The rank that a left factor [..., rows, rank] shows; 0 for a scalar, which fits nothing."""
    return B.shape[-1] if B.shape else 0


class Fixed:
    """What most blocks need not do: learn from the base before, or bound a delta."""

    steps = 0
    length = 0
    scale: float  # of those with steps

    def apply_at(self, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, weight: float) -> None:
        raise NotImplementedError("only of updates that are elementwise")

    def observe(self, W: torch.Tensor, start: int) -> None:
        """Nothing to learn from the base."""

    def revert(self, W: torch.Tensor, terms: torch.Tensor, start: int, weight: float) -> None:
        """What was replaced can not be predicted; W stays."""

    def magnitude(self, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.zeros(stop - start, 1, device="cpu")


class Additive(Fixed):
    """A block whose update is `W + weight * scale * delta`: subclasses only say what their delta is."""

    def delta(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop of the unscaled delta, [rows, columns]."""
        raise NotImplementedError

    def size(self, start: int, stop: int) -> torch.Tensor:
        """[rows]: no element of the delta of the components' magnitudes is larger."""
        raise NotImplementedError

    def revert(self, W: torch.Tensor, terms: torch.Tensor, start: int, weight: float) -> None:
        self.apply(W, start, -weight)
        terms.add_(self.magnitude(start, start + len(W)), alpha=abs(weight))

    def magnitude(self, start: int, stop: int) -> torch.Tensor:
        return self.size(start, stop).unsqueeze(1) * (abs(self.scale) * SLACK)

    def apply(self, W: torch.Tensor, start: int, weight: float) -> None:
        W.add_(self.delta(start, start + W.shape[0]), alpha=weight * self.scale)

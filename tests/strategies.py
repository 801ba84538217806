"""Adapters of every kind, bases that fit them, and the Hypothesis strategies that draw both.

Numbers come from a seeded generator, not from Hypothesis: what shrinks is the structure (kinds, shapes, rows, experts,
rules, dtypes), which is where mistakes are.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratool import Adapter, Target, Targeted, TensorRef
from loratool.updates import Add, Dora, Loha, Lokr, Lora, Replace, ReplaceRows, Scale, Scaling, Update

# The same examples in every run; HYPOTHESIS_PROFILE=explore looks further, with new ones each time.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("explore", max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

State = dict[str, Tensor]
Shape = tuple[int, ...]
Array = np.ndarray[Any, np.dtype[np.float64]]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RULES = ("none", "alpha", "alpha/rank", "alpha/sqrt(rank)")

DIRECTIONS = (
    "lora",
    "lora-mid",
    "loha",
    "loha-mid",
    "lokr",  # both factors whole
    "lokr-left",  # the first of low rank
    "lokr-right",
    "lokr-both",
    "lokr-mid",
    "lokr-both-mid",
)
DORAS = tuple(f"dora{axis}-{direction}" for axis in (0, 1) for direction in DIRECTIONS)
SCALES = ("scale0", "scale1")
MATRIX_FORMS = (*DIRECTIONS, *DORAS, *SCALES)
ADDITIVE = (*DIRECTIONS, "add")
FULL_FORMS = ("replace", "add", "replace_rows")
FORMS = (*MATRIX_FORMS, *FULL_FORMS)


# --- updates --------------------------------------------------------------------------------------------------------


class Maker:
    """Makes component tensors from a seed; with `experts`, each has one more leading dimension."""

    def __init__(self, seed: int, dtype: str = "F32", experts: int | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = DTYPES[dtype]
        self.lead: Shape = () if experts is None else (experts,)

    def values(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * 0.5).to(dtype)

    def __call__(self, *shape: int, positive: bool = False) -> TensorRef:
        made = self.values(*self.lead, *shape, dtype=self.dtype)
        return TensorRef.of(made.abs() + 0.25 if positive else made)

    def divisor(self, number: int) -> int:
        divisors = [n for n in range(1, number + 1) if number % n == 0]
        return divisors[int(torch.randint(len(divisors), (), generator=self.generator))]


def scaling(rule: str, alpha: float, rank: int) -> Scaling:
    return Scaling("none", rank, None, alpha) if rule == "none" else Scaling.by(rule, alpha, rank)


def make_update(
    form: str, region: Shape, make: Maker, rank: int = 2, rule: str = "alpha/rank", alpha: float = 3.0
) -> Any:
    """An update of the given form that fits a region."""
    scale = scaling(rule, alpha, rank)
    if form == "replace":
        return Replace(make(*region))
    if form == "add":
        return Add(make(*region), Scaling(scale=alpha))
    if form == "replace_rows":
        count = int(torch.randint(1, region[0] + 1, (), generator=make.generator))
        index = torch.randperm(region[0], generator=make.generator)[:count].sort().values
        return ReplaceRows(TensorRef.of(index), make(count, *region[1:]))
    if form in SCALES:
        axis = int(form[-1])
        return Scale(make(region[axis]), axis)
    if form.startswith("dora"):
        axis = int(form[4])
        direction = make_update(form[6:], region, make, rank, rule, alpha)
        return Dora(direction, make(region[axis], positive=True), axis)
    rows, columns, *kernel = region
    if form == "lora":
        return Lora(make(rank, columns, *kernel), make(rows, rank), scale)
    if form == "lora-mid":
        return Lora(make(rank, columns), make(rows, rank), scale, make(rank, rank, *kernel))
    if form == "loha":
        right = (rank, columns, *kernel)
        return Loha(make(*right), make(rows, rank), make(*right), make(rows, rank), scale)
    if form == "loha-mid":
        core = (rank, rank, *kernel)
        factors = [make(rank, columns), make(rows, rank), make(rank, columns), make(rows, rank)]
        return Loha(*factors, scale, make(*core), make(*core))
    assert form.startswith("lokr"), form
    a, c = make.divisor(rows), make.divisor(columns)
    b, d = rows // a, columns // c
    parts: dict[str, TensorRef] = {}
    if form in ("lokr-left", "lokr-both", "lokr-both-mid"):
        parts |= {"B1": make(a, rank), "A1": make(rank, c)}
    else:
        parts["w1"] = make(a, c)
    if form in ("lokr-right", "lokr-both"):
        parts |= {"B2": make(b, rank), "A2": make(rank, d, *kernel)}
    elif form in ("lokr-mid", "lokr-both-mid"):
        parts |= {"B2": make(b, rank), "A2": make(rank, d), "mid2": make(rank, rank, *kernel)}
    else:
        parts["w2"] = make(b, d, *kernel)
    if form == "lokr":  # no factor has a rank, so no rule can divide by one
        scale = Scaling("alpha", None, alpha, alpha) if rule == "alpha" else Scaling(scale=alpha)
    return Lokr(scale, **parts)


def one(
    form: str, shape: Shape, *, seed: int = 0, dtype: str = "F32", name: str = "layer.weight", **options: Any
) -> Adapter:
    """An adapter of one update of a whole tensor."""
    return Adapter((Targeted(Target(name, shape), make_update(form, shape, Maker(seed, dtype), **options)),))


# --- files ----------------------------------------------------------------------------------------------------------


def save_sharded(state: Mapping[str, Tensor], folder: Path, shards: int = 1) -> Path:
    """A checkpoint folder as transformers writes it: one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: value for n, (name, value) in enumerate(state.items()) if n % shards == number}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def tensors_of(path: Path) -> State:
    """All tensors of a checkpoint, a file or a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def raw(value: Tensor) -> bytes:
    """The bits of a tensor: -0.0 is not 0.0 here."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        (one[n].dtype, one[n].shape, raw(one[n])) == (two[n].dtype, two[n].shape, raw(two[n])) for n in one
    )


# --- numbers and the engine ----------------------------------------------------------------------------------------

# dtype: bits of the significand, exponent of the smallest normal number
LAYOUT = {"F32": (24, -126), "F16": (11, -14), "BF16": (8, -126), "F8_E4M3": (4, -6), "F8_E5M2": (3, -14)}


def rounded(x: Array, dtype: str) -> Array:
    """Round once, to nearest, ties to even; by hand, so that nothing rounds twice on the way."""
    if dtype == "F64":
        return x
    precision, smallest = LAYOUT[dtype]
    _, exponent = np.frexp(x)
    step = np.exp2(np.maximum(exponent - 1, smallest) - (precision - 1))
    return np.rint(x / step) * step


@contextmanager
def small_blocks(nbytes: int) -> Iterator[None]:
    """Row blocks of `nbytes` stored bytes. `loratool.plan` is a function: hence the detour."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("loratool.matrices", "loratool.plan"):
            patch.setattr(importlib.import_module(name), "BLOCK_BYTES", nbytes)
        yield


# --- strategies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An adapter and a base that it fits."""

    adapter: Adapter
    base: State

    @property
    def touched(self) -> set[str]:
        return {item.target.name for item in self.adapter.updates}


seeds = st.integers(0, 2**20)
dtypes = st.sampled_from(tuple(DTYPES))
narrow = st.sampled_from(("F16", "BF16"))
ranks = st.integers(1, 3)
rules = st.sampled_from(RULES)
alphas = st.sampled_from((0.5, 1.0, 3.0, -2.0, 0.1))
weights = st.sampled_from((1.0, 0.5, -1.0, 0.3, 2.0))
layouts = st.sampled_from(("", "", "in_out", "embedding"))
matrices = st.tuples(st.integers(1, 6), st.integers(1, 6))
regions = st.one_of(
    matrices,
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
)
small = st.one_of(st.just(()), st.tuples(st.integers(1, 6)), matrices)


def pick(forms: Sequence[str]) -> st.SearchStrategy[str]:
    """A form, each family (lora, loha, lokr, dora, ...) as likely as the others."""
    families: dict[str, list[str]] = {}
    for form in forms:
        families.setdefault(form[:4], []).append(form)
    return st.sampled_from([*families.values()]).flatmap(st.sampled_from)


@st.composite
def updates(draw: st.DrawFn, form: str, region: Shape, experts: int | None = None) -> Update:
    make = Maker(draw(seeds), draw(dtypes), experts)
    return make_update(form, region, make, draw(ranks), draw(rules), draw(alphas))


@st.composite
def whole_tensor(draw: st.DrawFn, name: str, forms: Sequence[str]) -> list[Targeted]:
    """Updates of a whole tensor that may be combined: deltas, or a replacement with a delta, a DoRA or factors."""
    first = draw(pick(forms))
    shape = draw(small.filter(len) if first == "replace_rows" else small if first in FULL_FORMS else regions)
    target = Target(name, shape, layout=draw(layouts) if len(shape) == 2 else "")
    items = [Targeted(target, draw(updates(first, shape)))]
    if len(shape) > 1 and draw(st.booleans()):
        more = [f for f in forms if (f in ADDITIVE if first in ADDITIVE or first.startswith("replace") else False)]
        more += [f for f in forms if f.startswith(("dora", "scale"))] if first.startswith("replace") else []
        if more:
            items.insert(draw(st.integers(0, 1)), Targeted(target, draw(updates(draw(pick(more)), shape))))
    return items


@st.composite
def fused_rows(draw: st.DrawFn, name: str, forms: Sequence[str]) -> list[Targeted]:
    """A fused projection: one update for each of some disjoint ranges of rows."""
    heights = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    columns = draw(regions)[1:]
    shape = (sum(heights), *columns)
    possible = [form for form in forms if form != "replace_rows"]
    items, start = [], 0
    for height in heights:
        if draw(st.booleans()) or (not items and start + height == shape[0]):
            form = draw(pick(possible))
            items.append(
                Targeted(Target(name, shape, (start, start + height)), draw(updates(form, (height, *columns))))
            )
        start += height
    return draw(st.permutations(items))


@st.composite
def stacked_experts(draw: st.DrawFn, name: str, forms: Sequence[str]) -> list[Targeted]:
    """A tensor of experts: one update for all of them, or one for each of some; perhaps of a range of rows."""
    count, matrix = draw(st.integers(1, 3)), draw(regions)
    rows = draw(st.sampled_from((None, (0, 1), (matrix[0] - 1, matrix[0]))))
    region = matrix if rows is None else (1, *matrix[1:])
    possible = [form for form in forms if form != "replace_rows"]
    if draw(st.booleans()):
        target = Target(name, (count, *matrix), rows, experts=count)
        return [Targeted(target, draw(updates(draw(pick(possible)), region, count)))]
    chosen = draw(st.sets(st.integers(0, count - 1), min_size=1))
    return [
        Targeted(Target(name, (count, *matrix), rows, expert=n), draw(updates(draw(pick(possible)), region)))
        for n in sorted(chosen)
    ]


@st.composite
def adapters(draw: st.DrawFn, forms: Sequence[str] = FORMS, most: int = 3, whole: bool = False) -> Adapter:
    """An adapter of 1 to `most` targets, of the given forms; `whole` leaves out rows and experts."""
    kinds: list[Callable[[str, Sequence[str]], st.SearchStrategy[list[Targeted]]]] = [whole_tensor]
    if not whole:
        kinds += [fused_rows, stacked_experts]
    items: list[Targeted] = []
    for number in range(draw(st.integers(1, most))):
        items += draw(draw(st.sampled_from(kinds))(f"layers.{number}.weight", forms))
    return Adapter(tuple(items), provenance=draw(st.sampled_from(({}, {"tool": "test é"}))))


def base_for(adapter: Adapter, seed: int, dtypes: Sequence[str], zeros: bool = True) -> State:
    """A base that an adapter fits, with tensors it does not touch, an integer one and an empty one among them."""
    make = Maker(seed)
    state: State = {"a.first": torch.arange(5, dtype=torch.int64)}
    for number, (name, items) in enumerate(adapter.targets().items()):
        value = make.values(*items[0].target.shape, dtype=DTYPES[dtypes[number % len(dtypes)]])
        flat = value.view(-1)
        if zeros and len(flat) > 1:
            flat[0], flat[-1] = -0.0, 0.0
        state[name] = value
    state["z.empty"] = torch.zeros(0, 3)
    state["z.last"] = make.values(3, dtype=torch.bfloat16)
    return state


@st.composite
def cases(
    draw: st.DrawFn,
    forms: Sequence[str] = FORMS,
    base_dtypes: Sequence[str] = tuple(DTYPES),
    most: int = 3,
    whole: bool = False,
) -> Case:
    adapter = draw(adapters(forms, most, whole))
    stored = draw(st.lists(st.sampled_from(tuple(base_dtypes)), min_size=1, max_size=3))
    return Case(adapter, base_for(adapter, draw(seeds), stored))

"""A corpus of merges for `verify`: right ones and wrong ones, each in three dtypes, and what each is to be called.

python -m tests.verify_corpus          # the table: every fault, and the word that verify has for it
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.updates import Lora, Scaling

State = dict[str, Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANK, SCALE, EXPERTS, STD = 8, 1.5, 4, 0.05
SHAPES = {
    **{f"layers.{n}.{part}.weight": (64, 64) for n in range(4) for part in "qo"},
    **{f"layers.{n}.up.weight": (96, 64) for n in range(4)},
    "experts.weight": (EXPERTS, 48, 64),
    "embed.weight": (80, 64),
    "norm.weight": (64,),
    "head.weight": (80, 64),
}
UNTOUCHED = ("layers.3.o.weight", "norm.weight", "head.weight")
TARGETS = tuple(name for name in SHAPES if name not in UNTOUCHED)
SQUARE = tuple(name for name in TARGETS if ".q." in name or ".o." in name)
UP = tuple(name for name in TARGETS if ".up." in name)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_of(dtype: torch.dtype, seed: int = 1) -> State:
    made = {name: numbers(seed * 100 + n, *shape) * STD for n, (name, shape) in enumerate(SHAPES.items())}
    made["norm.weight"] = 1 + made["norm.weight"]
    return {name: value.to(dtype) for name, value in made.items()}


def adapter_of(seed: int, size: float) -> Adapter:
    """LoRA on every target, the experts' with a leading dimension; its changes are `size` times the base's numbers."""
    factor = size * STD / SCALE / RANK**0.5
    updates = []
    for n, name in enumerate(TARGETS):
        shape = SHAPES[name]
        lead = shape[:1] if len(shape) == 3 else ()
        A, B = numbers(seed * 500 + n, *lead, RANK, shape[-1]), numbers(seed * 700 + n, *lead, shape[-2], RANK)
        target = Target(name, shape, experts=EXPERTS) if lead else Target(name, shape)
        scaling = Scaling.by("alpha/rank", SCALE * RANK, RANK)
        updates.append(Targeted(target, Lora(TensorRef.of(A), TensorRef.of(B * factor), scaling)))
    return Adapter(tuple(updates))


def factors(adapter: Adapter, name: str) -> tuple[Tensor, Tensor]:
    """B and A of a target, in float64."""
    (update,) = (item.update for item in adapter.updates if item.target.name == name)
    assert isinstance(update, Lora)
    return update.B.read().double(), update.A.read().double()


def delta(adapter: Adapter, name: str) -> Tensor:
    B, A = factors(adapter, name)
    return SCALE * (B @ A)


@dataclass
class World:
    """A base and two adapters; what a merge makes of them, in one dtype."""

    dtype: torch.dtype
    size: float = 0.2
    one: Adapter = field(init=False)
    two: Adapter = field(init=False)
    base: State = field(init=False)

    def __post_init__(self) -> None:
        self.one, self.two = adapter_of(1, self.size), adapter_of(2, self.size)
        self.base = base_of(self.dtype)

    def each(self, rule: Callable[[str, Tensor, Tensor], Tensor], names: Sequence[str] = TARGETS) -> State:
        """A merge by a rule (name, W, scaled delta) -> W'; where the rule is not for a target, the right one."""
        out = dict(self.base)
        for name in TARGETS:
            W, D = self.base[name].double(), delta(self.one, name)
            out[name] = (rule(name, W, D) if name in names else W + D).to(self.dtype)
        return out

    def right(self) -> State:
        return self.each(lambda name, W, D: W + D)

    def both(self, one: float, two: float) -> State:
        return self.each(lambda name, W, D: W + one * D + two * delta(self.two, name))

    def rounded(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).double()


@dataclass(frozen=True)
class Made:
    """One merged checkpoint, and what is asked about it."""

    state: Mapping[str, Tensor]
    asked: tuple[tuple[Adapter, float], ...] = ()  # the first adapter, if none
    base: State | None = None  # that it is compared with, if not the world's
    options: Mapping[str, bool] = field(default_factory=dict)


Maker = Callable[[World], State | Made]


@dataclass(frozen=True)
class Fault:
    """A mistake, the words that name it, and what the text about it has to say."""

    name: str
    words: frozenset[str]
    text: str
    make: Maker


def fault(name: str, words: str, make: Maker, text: str = "") -> Fault:
    return Fault(name, frozenset(words.split()), text, make)


def scaled(factor: float) -> Maker:
    return lambda world: world.each(lambda name, W, D: W + factor * D)


def passes(world: World) -> State:
    return world.each(lambda name, W, D: world.rounded(W + D) + D)


def passes_of_two(world: World) -> Made:
    def rule(name: str, W: Tensor, D: Tensor) -> Tensor:
        other = delta(world.two, name)
        for each in (D, other, D, other):
            W = world.rounded(W + each)
        return W

    return Made(world.each(rule), ((world.one, 1.0), (world.two, 1.0)))


def swapped_deltas(names: Sequence[str]) -> Maker:
    follows = dict(zip(names, [*names[1:], names[0]], strict=True))
    return lambda world: world.each(lambda name, W, D: W + delta(world.one, follows[name]), names)


def swapped_tensors(names: Sequence[str]) -> Maker:
    follows = dict(zip(names, [*names[1:], names[0]], strict=True))

    def make(world: World) -> State:
        right = world.right()
        return right | {name: right[other] for name, other in follows.items()}

    return make


def mixed(world: World) -> State:
    def rule(name: str, W: Tensor, D: Tensor) -> Tensor:
        other = UP[(UP.index(name) + 1) % len(UP)]
        return W + SCALE * (factors(world.one, name)[0] @ factors(world.one, other)[1])

    return world.each(rule, UP)


def half(name: str, W: Tensor, D: Tensor) -> Tensor:
    D = D.clone()
    D[: len(D) // 2] = 0
    return W + D


def permuted(of: str, dim: int) -> Maker:
    """Rows in the order that a rotary embedding of the other kind wants."""

    def rule(name: str, W: Tensor, D: Tensor) -> Tensor:
        order = torch.arange(W.shape[dim]).view(2, -1).T.flatten()
        return W + D.index_select(dim, order) if of == "change" else (W + D).index_select(dim, order)

    return lambda world: world.each(rule, SQUARE)


def quantised(levels: int, block: int) -> Maker:
    """To so many levels and back, a block of a row with one scale; all matrices, also those without an adapter."""

    def make(world: World) -> State:
        out = world.right()
        for name in [name for name in out if name != "norm.weight"]:
            blocks = out[name].double().reshape(-1, block)
            step = blocks.abs().amax(dim=1, keepdim=True) / levels
            out[name] = ((blocks / step).round() * step).view(out[name].shape).to(world.dtype)
        return out

    return make


def narrowed(world: World) -> State:
    """Through a dtype with fewer digits, and back."""
    through = torch.bfloat16 if world.dtype != torch.bfloat16 else torch.float8_e5m2
    return {name: value.to(through).to(world.dtype) for name, value in world.right().items()}


def rounded_delta(world: World) -> State:
    """To fewer digits than the output has; for bfloat16, to as many."""
    return world.each(lambda name, W, D: W + D.bfloat16().double())


def flipped(name: str, bit: int) -> Maker:
    def make(world: World) -> State:
        out = world.right()
        out[name] = out[name].clone()
        codes = out[name].view(torch.int32 if world.dtype == torch.float32 else torch.int16).view(-1)
        codes[out[name].abs().argmax()] ^= 1 << bit
        return out

    return make


def changed(change: Callable[[World, State], object]) -> Maker:
    def make(world: World) -> State:
        out = {name: value.clone() for name, value in world.right().items()}
        change(world, out)
        return out

    return make


def wrapped(world: World) -> State:
    """As PEFT wraps a model: base weights under other names, the factors beside them."""
    out = {}
    for name, value in world.base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if name not in TARGETS or name == "experts.weight" or name == "embed.weight":
            out[f"{module}.weight"] = value
            continue
        B, A = factors(world.one, name)
        out[f"{module}.base_layer.weight"] = value
        out[f"{module}.lora_A.default.weight"] = A.to(world.dtype)
        out[f"{module}.lora_B.default.weight"] = B.to(world.dtype)
    return out


def peft_adapter(world: World) -> State:
    return {name: value for name, value in wrapped(world).items() if "lora_" in name}


def other_base(world: World) -> State:
    base = base_of(world.dtype, seed=2)
    return base | {name: (base[name].double() + delta(world.one, name)).to(world.dtype) for name in TARGETS}


def later_base(world: World) -> State:
    """The same model, trained a little further."""
    later = {
        name: value.double() * (1 + 0.01 * numbers(n, *value.shape))
        for n, (name, value) in enumerate(world.base.items())
    }
    return {n: (v + delta(world.one, n) if n in TARGETS else v).to(world.dtype) for n, v in later.items()}


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[World, State], object]:
    return lambda world, out: out.update({name: value(out[name]).to(world.dtype)})


def nan(world: World, out: State) -> None:
    out[UP[0]][3, 3] = float("nan")


def asked(make: Maker, *weights: float) -> Maker:
    def made(world: World) -> Made:
        state = make(world)
        assert not isinstance(state, Made)
        return Made(state, tuple(zip((world.one, world.two), weights, strict=False)))

    return made


FAULTS = (
    fault("scale 0.5", "scale", scaled(0.5), "weight 0.5 instead of 1"),
    fault("scale 0.999", "scale", scaled(0.999), "weight 0.999 instead of 1"),
    fault("scale 1.001", "scale", scaled(1.001), "weight 1.001 instead of 1"),
    fault("scale 1.01", "scale", scaled(1.01), "weight 1.01 instead of 1"),
    fault("scale 3.7", "scale", scaled(3.7), "weight 3.7 instead of 1"),
    fault("merged twice, in one pass", "twice", scaled(2), "merged twice"),
    fault("merged twice, in two passes", "twice", passes, "merged twice, in two passes"),
    fault("two adapters twice, in four steps", "twice", passes_of_two, "merged twice, in two passes"),
    fault("alpha for alpha/rank", "scale", scaled(RANK), "(as if the scale was taken as alpha)"),
    fault("alpha/sqrt(rank)", "scale", scaled(RANK**0.5), "taken as alpha/sqrt(rank)"),
    fault("divided by the rank again", "scale", scaled(1 / RANK), "divided by the rank again"),
    fault("scale left out", "scale", scaled(1 / SCALE), "the scale was left out"),
    fault("scale applied twice", "scale", scaled(SCALE), "the scale was applied twice"),
    fault("subtracted", "scale", scaled(-1), "subtracted"),
    fault("weight 0.5, asked as 1", "scale", asked(scaled(0.5), 1.0), "weight 0.5 instead of 1"),
    fault("weight 1, asked as 0.5", "scale", asked(scaled(1), 0.5), "weight 1 instead of 0.5"),
    fault("two weights swapped", "weights-swapped", asked(lambda w: w.both(0.5, 1), 1.0, 0.5), "swapped"),
    fault("one of two weights wrong", "scale", asked(lambda w: w.both(1, 0.7), 1.0, 1.0), "weight 0.7 instead of 1"),
    fault("second adapter forgotten", "missing", asked(scaled(1), 1.0, 1.0), "not merged at all"),
    fault("one adapter too many", "other-adapter", asked(lambda w: w.both(1, 1), 1.0), "one more adapter"),
    fault("another adapter", "other-adapter", asked(lambda w: w.both(0, 1), 1.0), "another adapter"),
    fault("nothing merged", "missing", lambda w: w.base, "not merged at all"),
    fault("one layer left out", "missing", lambda w: w.each(lambda n, W, D: W, UP[1:2]), "not merged here"),
    fault("embedding left out", "missing", lambda w: w.each(lambda n, W, D: W, ["embed.weight"]), "not merged here"),
    fault("half of the rows", "part", lambda w: w.each(half, UP[:1]), "others (like"),
    fault("transposed", "transposed", lambda w: w.each(lambda n, W, D: W + D.T, SQUARE), "added transposed"),
    fault("tensor transposed", "transposed", lambda w: w.each(lambda n, W, D: (W + D).T, SQUARE), "whole tensor"),
    fault("rows of the change permuted", "permuted", permuted("change", 0), "rows of the change"),
    fault("rows of the tensor permuted", "permuted", permuted("tensor", 0), "rows of the tensor"),
    fault("columns of the change permuted", "permuted", permuted("change", 1), "columns of the change"),
    fault("experts swapped", "experts-swapped", lambda w: w.each(lambda n, W, D: W + D.roll(1, 0), ["experts.weight"])),
    fault(
        "experts with their weights swapped",
        "experts-swapped",
        lambda w: w.each(lambda n, W, D: (W + D).flip(0), ["experts.weight"]),
    ),
    fault("changes of layers swapped", "swapped", swapped_deltas(UP), "has the change of layers."),
    fault("layers swapped", "swapped", swapped_tensors(UP), "was to be"),
    fault("A of the next layer", "mixed-factors", mixed, "and the A of layers."),
    fault("another base", "other-base", other_base, "another base"),
    fault("a base trained further", "other-base", later_base, "another base"),
    fault("rounded delta", "rounded-delta", rounded_delta, "rounded to BF16 before it was added"),
    fault("8 bits and back", "quantised", quantised(127, 64), "quantised"),
    fault("4 bits and back", "quantised", quantised(7, 32), "quantised"),
    fault("through a narrower dtype", "narrowed", narrowed, "was rounded to"),
    fault("a flipped bit", "damaged", flipped(UP[2], 6), "one element is another number"),
    fault("a flipped bit beside", "untouched", flipped("head.weight", 6)),
    fault("NaN", "nonfinite", changed(nan), "NaN"),
    fault("one more tensor changed", "untouched", changed(put("norm.weight", lambda v: v + 0.01))),
    fault(
        "a row of a tensor is zero", "damaged part", changed(put(UP[0], lambda v: v * (torch.arange(96) != 5)[:, None]))
    ),
    fault("a tensor of zeros", "other-change", changed(put(UP[0], lambda v: v * 0))),
    fault("another shape", "shape", changed(put(UP[0], lambda v: v[:-1]))),
    fault("a tensor too few", "absent", changed(lambda w, out: out.pop("head.weight"))),
    fault("a tensor too many", "extra", changed(lambda w, out: out.update(more=torch.ones(3)))),
    fault("still wrapped", "wrapped", wrapped, "not merged"),
    fault("an adapter, no checkpoint", "adapter", peft_adapter, "and no checkpoint"),
)
assert len({each.name for each in FAULTS}) == len(FAULTS)


# -- right ones -------------------------------------------------------------------------------------------------------


def in_float32(world: World) -> State:
    """As axolotl merges its shards, a tensor at a time: the delta and the sum in float32, then rounded."""

    def rule(name: str, W: Tensor, D: Tensor) -> Tensor:
        B, A = factors(world.one, name)
        return (W.float() + SCALE * (B.float() @ A.float())).double()

    return world.each(rule)


def in_dtype(world: World) -> State:
    """Everything in the dtype of the checkpoint: factors, product, scale, sum."""

    def rule(name: str, W: Tensor, D: Tensor) -> Tensor:
        B, A = (factor.to(world.dtype) for factor in factors(world.one, name))
        return (W.to(world.dtype) + SCALE * (B @ A)).double()

    return world.each(rule)


def in_turn(order: str, *weights: float, narrow: bool = False) -> Maker:
    """One adapter after the other, with a rounding after each."""

    def make(world: World) -> Made:
        adapters = {"1": (world.one, weights[0]), "2": (world.two, weights[1])}

        def rule(name: str, W: Tensor, D: Tensor) -> Tensor:
            for adapter, weight in (adapters[which] for which in order):
                change = weight * delta(adapter, name)
                W = world.rounded(W + (world.rounded(change) if narrow else change))
            return W

        return Made(world.each(rule), (*adapters.values(),))

    return make


def stored_wider(world: World) -> State:
    wide = {name: value.float() for name, value in world.base.items()}
    return wide | {name: (wide[name].double() + delta(world.one, name)).float() for name in TARGETS}


@dataclass(frozen=True)
class Right:
    """A right merge; `remark` is what it may be told all the same."""

    name: str
    remark: str
    make: Maker
    verdict: str = "yes"


RIGHT = (
    Right("rounded once", "", lambda world: world.right()),
    Right("in float32 (axolotl)", "", in_float32),
    Right("two at once", "", asked(lambda world: world.both(0.7, -1.3), 0.7, -1.3)),
    Right("two, one after the other", "sequential", in_turn("12", 1.0, 1.0)),
    Right("two, the other way round", "sequential", in_turn("21", 1.0, 1.0)),
    Right("two in turn, with weights", "sequential", in_turn("12", 0.8, -0.4)),
    Right("two in turn, deltas rounded", "sequential rounded-delta", in_turn("12", 1.0, 0.5, narrow=True)),
    Right("delta in the dtype", "rounded-delta rounding", lambda w: w.each(lambda n, W, D: W + w.rounded(D))),
    Right("stored in float32", "dtype", stored_wider),
)


def weak(factor: float) -> Maker:
    """An adapter so small that it moves nothing, but in float32."""
    tiny = adapter_of(3, 1e-10)
    return lambda w: Made(w.each(lambda n, W, D: W + factor * delta(tiny, n)), ((tiny, 1.0),))


UNTOLD = tuple(
    Right(f"too weak to tell, times {factor}", "dtype", weak(factor), "can-not-tell") for factor in (0, 1, 2, -1)
)


# -- asking -----------------------------------------------------------------------------------------------------------


def ask(world: World, made: State | Made, folder: Path, **options: object) -> loratool.VerifyReport:
    if not isinstance(made, Made):
        made = Made(made)
    save_file(
        {name: value.contiguous() for name, value in (made.base or world.base).items()}, folder / "base.safetensors"
    )
    save_file({name: value.clone().contiguous() for name, value in made.state.items()}, folder / "merged.safetensors")
    names = {id(world.one): "one", id(world.two): "two"}
    given = []
    for adapter, weight in made.asked or ((world.one, 1.0),):
        path = folder / f"{names.get(id(adapter), 'other')}.safetensors"
        loratool.save(adapter, path)
        given.append((path, weight))
    return loratool.verify(folder / "merged.safetensors", folder / "base.safetensors", given, **options)  # type: ignore[arg-type]


def judged(fault: Fault, report: loratool.VerifyReport) -> str:
    """Why a fault is not named rightly; "" if it is."""
    told = [*report.findings, *(remark for remark in report.remarks if remark.word == "rounded-delta")]
    words = {finding.word for finding in told}
    if report.verdict == "can-not-tell" or not words or not words <= fault.words:
        return f"{report.verdict}: {', '.join(sorted(words)) or 'nothing'}"
    text = "; ".join(finding.text for finding in told)
    return "" if fault.text in text else text


class Told(NamedTuple):
    """One cell of the table: the word for it, and why it is not the right one."""

    word: str
    why: str = ""


def told(world: World, case: Fault | Right) -> Told:
    with tempfile.TemporaryDirectory() as folder:
        report = ask(world, case.make(world), Path(folder))
    if isinstance(case, Fault):
        word = next((finding.word for finding in [*report.findings, *report.remarks]), report.verdict)
        return Told(word, judged(case, report))
    shows = case.verdict == "can-not-tell" and world.dtype == torch.float32
    wanted = ("yes" if case.name.endswith(" 1") else "no") if shows else case.verdict
    return Told(report.verdict, "" if report.verdict == wanted else str(report.findings))


def main(size: float) -> int:
    """Print the table; exit code 1 where less than 95 of 100 are named, or a right one is not."""
    failures: dict[type, list[str]] = {Fault: [], Right: []}
    for title, cases in (("fault", FAULTS), ("right", (*RIGHT, *UNTOLD))):
        print(f"{title:40}" + "".join(f"{name:>18}" for name in DTYPES))  # noqa: T201
        for case in cases:
            cells = {name: told(World(dtype, size), case) for name, dtype in DTYPES.items()}
            print(f"{case.name:40}" + "".join(f"{'! ' * bool(c.why) + c.word:>18}" for c in cells.values()), flush=True)  # noqa: T201
            failures[type(case)] += [f"{case.name}, {name}: {cell.why}" for name, cell in cells.items() if cell.why]
        print()  # noqa: T201
    for line in [*failures[Fault], *failures[Right]]:
        print(f"! {line[:200]}")  # noqa: T201
    count = len(FAULTS) * len(DTYPES)
    named = count - len(failures[Fault])
    print(f"{named} of {count} faults named rightly ({named / count:.1%}), {len(failures[Right])} false answers")  # noqa: T201
    return int(bool(failures[Right]) or named < 0.95 * count)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 0.2))

"""litgpt: the base under ``.linear.``, query, key and value packed in one matrix, numbers in YAML files beside it.

    X.linear.weight [out, in]        X.lora_A [rank, in]       X.lora_B [out, rank]            attn.proj, mlp, lm_head
    X.linear.weight [q + 2 kv, in]   X.lora_A [n * rank, in]   X.lora_B [trained rows, rank]   attn.qkv

q = n_head * head_size rows, then n_query_groups * head_size for the keys, and as many for the values; n of the three
are trained. ``lit_model.pth.lora`` holds only the factors; hyperparameters.yaml beside it says alpha and what was
trained, model_config.yaml the numbers of heads. The scale is alpha/rank. Against a base with transformers' names the
updates go where litgpt has its weights from (`litgpt_names`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loratool.adapter import Adapter, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import litgpt_write
from loratool.conventions.choices import Choices
from loratool.conventions.flat_yaml import FlatYaml, read_flat_yaml
from loratool.conventions.headers import Said
from loratool.conventions.litgpt_names import (
    HYPERPARAMETERS,
    LAYER,
    MODEL_CONFIG,
    OLD_QKV,
    PARTS,
    QKV,
    Place,
    homes,
    qkv_rows,
)
from loratool.conventions.packed import RULE, Pair, factor_modules, key, owner, pairs
from loratool.conventions.scales import Scales
from loratool.errors import InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.names import prefix_rule
from loratool.tensors import TensorRef
from loratool.updates import Lora

NAME = "litgpt"
TITLE = "litgpt LoRA checkpoint"
KINDS = ("lora",)
TESTED = "litgpt 0.5.13"
OPTIONS = ()
SUFFIXES: tuple[str, ...] = ()
ASKS = ("alpha", "scaling", "enable_lora")
CONDITIONS: tuple[str, ...] = ()
misfits, write = litgpt_write.misfits, litgpt_write.write


def detect(source: Checkpoint) -> bool:
    modules = factor_modules(source.tensors)
    if not modules or not all(LAYER.match(module) for module in modules):
        return False
    if any(module.endswith((QKV, OLD_QKV)) or key(module, "linear.weight") in source.tensors for module in modules):
        return True
    return (source.folder / HYPERPARAMETERS).is_file() or source.shards[0].path.suffix == ".lora"


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    where = str(source.path)
    found = pairs(source)
    choices.check_used([pair.module for pair in found], where)
    _refuse_old([pair.module for pair in found], where)
    names = [key(pair.module, "weight") for pair in found]
    inside = unwrap(source, choices)
    stored = (inside or None) if base is None else base
    rename, notes = prefix_rule(names, names if stored is None else stored, where)
    facts = _Facts.beside(source, choices, found, {} if base is None else base)
    updates: list[Targeted] = []
    errors: list[LoratoolError] = []
    doubts: list[str] = []
    for pair, name in zip(found, names, strict=True):
        try:
            weight = None if stored is None else stored.get(rename(name))
            if stored is not None and weight is None:
                _refuse_old_base(rename(name), stored, where)
            updates += _updates(pair, rename(name), weight, facts, doubts)
        except LoratoolError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])([problem for error in errors for problem in error.problems])
    facts.scales.check()
    notes = [*notes, *facts.scales.notes()]
    if {item.target.name for item in updates} - {*map(rename, names)}:
        notes = [*notes, "litgpt's names mapped to those of transformers: attn.qkv to q_proj, k_proj and v_proj, ..."]
    return Adapter(tuple(updates), provenance={"convention": NAME}, notes=(*source.notes, *notes), doubts=tuple(doubts))


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    """Every linear layer lies one `linear` segment down, trained or not. litgpt's merge drops that word anywhere in a
    name; here it goes only where litgpt put it."""
    rest = {name: ref for name, ref in source.tensors.items() if owner(name) is None}
    base = {_unwrapped(name): ref for name, ref in rest.items()}
    modules = factor_modules(source.tensors)
    missing = sorted(module for module in modules if key(module, "weight") not in base)
    if len(base) < len(rest):
        what = "tensors differ only in a `linear` segment: one is the wrapped layer's, one the base's"
        raise InvalidFile(Problem("E-NAMES", what, str(source.path)))
    if rest and missing:
        what = f"the file holds weights ({next(iter(rest))} ...), but not that of"
        raise InvalidFile([Problem("E-COMPONENTS", f"{what} {module}", str(source.path)) for module in missing])
    return base


def _unwrapped(name: str) -> str:
    """``X.linear.weight`` -> ``X.weight`` for a linear layer X of litgpt's."""
    above, _, leaf = name.rpartition(".")
    module = above.removesuffix(".linear")
    return key(module, leaf) if module != above and LAYER.match(module) else name


def _refuse_old(modules: list[str], where: str) -> None:
    """Until the end of 2024 the rows of query, key and value were mixed, one query group after the other."""
    if old := [module for module in modules if module.endswith(OLD_QKV)]:
        what = f"{old[0]} is from an old litgpt, whose attn.attn interleaves query, key and value by query group"
        raise Unsupported(
            Problem("E-UNSUPPORTED", what, where, "merge it with the litgpt it was trained with: `litgpt merge_lora`")
        )


def _refuse_old_base(name: str, base: Mapping[str, TensorRef], where: str) -> None:
    old = name.replace(f"{QKV}.", f"{OLD_QKV}.")
    if old != name and old in base:
        what = f"the base has {old}, the interleaved layout of an old litgpt, where the adapter has {name}"
        raise Unsupported(
            Problem("E-UNSUPPORTED", what, where, "convert the base again with the litgpt of the adapter")
        )


# -- the files beside it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What the side files, the user and the base say; None where nobody does."""

    scales: Scales
    alpha: Said | None  # what hyperparameters.yaml says
    where: str
    sizes: tuple[int, int, int] | None  # rows of query, key, value
    trained: str | None  # "101": which of them
    base: Mapping[str, TensorRef]
    homes: Mapping[Place, str]  # the base's names for litgpt's layers

    @classmethod
    def beside(cls, source: Checkpoint, choices: Choices, found: list[Pair], base: Mapping[str, TensorRef]) -> _Facts:
        """Raises InvalidFile for side files that are broken or belong to another adapter."""
        hyper = read_flat_yaml(source.folder / HYPERPARAMETERS)
        model = read_flat_yaml(source.folder / MODEL_CONFIG)
        sizes = trained = alpha = None
        if model is not None:
            sizes = qkv_rows(model)
        if hyper is not None and hyper.has("lora_r"):
            alpha = _alpha(hyper, found, str(source.path))
            trained = "".join(str(int(hyper.flag(f"lora_{part}"))) for part in PARTS)
        return cls(Scales(source, choices, RULE), alpha, str(source.path), sizes, trained, base, homes(base))

    def sizes_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of a layer's query, key and value: those of the base's three matrices, if no file says it."""
        names = [self.homes.get(Place(module, part)) for part in range(len(PARTS))]
        return self.sizes or (None if None in names else tuple(self.base[name].shape[0] for name in names if name))


def _alpha(hyper: FlatYaml, found: list[Pair], where: str) -> Said:
    """The file's alpha. Raises InvalidFile where its rank is not that of the factors."""
    rank, name = hyper.whole("lora_r"), hyper.path.name
    if other := sorted({pair.rank for pair in found} - {rank}):
        what = f"{name} says lora_r is {rank}, the factors have rank {other[0]}: it is another adapter's"
        raise InvalidFile(Problem("E-RANK", what, where, f"move {name} away and give --alpha"))
    return Said(hyper.number("lora_alpha"), f"lora_alpha of {name}")


# -- factors to updates ---------------------------------------------------------------------------------------------


def _updates(pair: Pair, name: str, weight: TensorRef | None, facts: _Facts, doubts: list[str]) -> Iterator[Targeted]:
    scaling = facts.scales.of(pair.module, pair.rank, *([facts.alpha] if facts.alpha else []))
    rows, columns = pair.B.shape[0], pair.A.shape[1]
    if not pair.module.endswith(QKV):
        if pair.blocks != 1:
            what = f"lora_A is {list(pair.A.shape)}, lora_B {list(pair.B.shape)}: only {QKV[1:]} is packed"
            raise InvalidFile(Problem("E-SHAPE", what, pair.module))
        name = facts.homes.get(Place(pair.module), name)
        yield Targeted(Target(name, (rows, columns)), Lora(pair.A, pair.B, scaling))
        return
    sizes = facts.sizes_of(pair.module)
    if sizes is None:
        doubts.append(
            f"{pair.module}: how many rows are query, key and value: put {MODEL_CONFIG} of the base beside the file"
        )
        shape = (rows, columns) if weight is None else weight.shape
        yield Targeted(Target(name, shape, (0, rows)), Lora(pair.A, pair.B, scaling))
        return
    total = sum(sizes)
    if weight is not None and weight.shape != (total, columns):
        what = f"{name} is {list(weight.shape)}, {MODEL_CONFIG} and the factors make it {[total, columns]}"
        raise Mismatch(Problem("E-SHAPE", what, facts.where, "is this the adapter's base, and its model_config.yaml?"))
    trained = _trained(pair, sizes, facts, doubts)
    starts = [0, *itertools.accumulate(sizes)]
    blocks = pair.split(sizes[part] for part in trained)
    for part, (A, B) in zip(trained, blocks, strict=True):
        target = Target(name, (total, columns), (starts[part], starts[part] + sizes[part]))
        if (home := facts.homes.get(Place(pair.module, part))) is not None:
            target = Target(home, (sizes[part], columns))
        yield Targeted(target, Lora(A, B, scaling))


def _trained(pair: Pair, sizes: tuple[int, ...], facts: _Facts, doubts: list[str]) -> tuple[int, ...]:
    """Which of query, key and value the blocks are: what is said must fit the shapes, and the shapes may be enough."""
    fitting = [
        parts
        for parts in itertools.combinations(range(3), min(pair.blocks, 3))
        if len(parts) == pair.blocks and sum(sizes[part] for part in parts) == pair.B.shape[0]
    ]
    given = facts.scales.choices.enabled_of(pair.module)
    for said, who in ((facts.trained, HYPERPARAMETERS), (given, "--enable-lora")):
        if said is None:
            continue
        parts = tuple(number for number, digit in enumerate(said) if digit == "1")
        if len(said) != 3 or parts not in fitting:
            what = f"{who} says {said} of query, key, value; factors {list(pair.A.shape)}, {list(pair.B.shape)} do not"
            raise InvalidFile(
                Problem("E-SHAPE", what, pair.module, f"are {HYPERPARAMETERS} and {MODEL_CONFIG} its own?")
            )
        fitting = [parts]
    if not fitting:
        what = f"lora_A {list(pair.A.shape)}, lora_B {list(pair.B.shape)} fit no choice of {list(sizes)} rows"
        raise InvalidFile(Problem("E-SHAPE", what, pair.module, f"is {MODEL_CONFIG} its own?"))
    if len(fitting) > 1:
        could = " or ".join("".join("01"[part in parts] for part in range(3)) for parts in fitting)
        doubts.append(f"{pair.module}: which of query, key and value were trained: give --enable-lora {could}")
    return fitting[0]

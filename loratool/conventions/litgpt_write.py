"""Writing litgpt's folder: what its fine-tuning leaves, and its `merge_lora`, `generate` and `chat` take.

litgpt makes a model out of model_config.yaml and the flags of hyperparameters.yaml, and loads strictly: where a flag is
set, every layer of that kind has factors. So only a base, whose folder has that file, shows what is to be written;
layers that the adapter does not change get zeros. There is one rank and one alpha.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from loratool import folding
from loratool.adapter import Adapter, Target, Targeted
from loratool.bundle import Bundle, Content, Copied, Pickle, Plain
from loratool.checkpoint import Checkpoint
from loratool.conventions.flat_yaml import FlatYaml, read_flat_yaml
from loratool.conventions.litgpt_names import (
    HYPERPARAMETERS,
    MODEL_CONFIG,
    OLD_QKV,
    PARTS,
    QKV,
    Place,
    homes,
    place_of,
    qkv_rows,
)
from loratool.conventions.writing import Misfit, Options, grouped
from loratool.errors import Mismatch, Problem, Unsupported
from loratool.names import natural
from loratool.tensors import FLOATS, Shape, TensorRef
from loratool.updates import Lora

WEIGHTS, BASE_WEIGHTS = "lit_model.pth.lora", "lit_model.pth"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# What litgpt copies from the base's folder to that of an adapter (litgpt/utils.py); its merge looks for most of it.
COMPANIONS = (MODEL_CONFIG, "config.json", "generation_config.json", *TOKENIZER)
FLAGS = (*PARTS, "projection", "mlp", "head")
_MLP = {
    "GptNeoxMLP": ("fc", "proj"),
    "LLaMAMLP": ("fc_1", "fc_2", "proj"),
    "GemmaMLP": ("fc_1", "fc_2", "proj"),
    "LLaMAMoE": ("gate", "experts.N.fc_1", "experts.N.fc_2", "experts.N.proj"),
}

CONVERT_BASE = (
    f"--base takes the folder of litgpt's base checkpoint, with the {MODEL_CONFIG} that `litgpt download` made"
)
NO_BASE = Misfit(
    (), "litgpt wants factors for every layer of its model, which only the base shows", CONVERT_BASE, False
)
NO_CONFIG = Misfit((), f"litgpt makes its model of {MODEL_CONFIG}, which the base's folder lacks", CONVERT_BASE, False)
NO_LAYER = Misfit((), "litgpt trains linear layers, and its model has none of that name", "", False)
INTERLEAVED = Misfit(
    (), "attn.attn is the interleaved layout of an old litgpt", "convert the base with a new one", False
)


def misfits(adapter: Adapter, base: Checkpoint | None, options: Options) -> list[Misfit]:
    if base is None:
        return [replace(NO_BASE, names=tuple(adapter.targets()))]
    config = read_flat_yaml(base.folder / MODEL_CONFIG)
    if config is None:
        return [replace(NO_CONFIG, names=tuple(adapter.targets()))]
    model = _Model.of(config, base)
    return grouped((name, _misfit(name, items, model)) for name, items in adapter.targets().items())


def write(adapter: Adapter, base: Checkpoint | None, options: Options) -> Bundle:
    assert base is not None, "misfits asked for it"
    config = read_flat_yaml(base.folder / MODEL_CONFIG)
    assert config is not None, "misfits asked for it"
    model = _Model.of(config, base)
    given = _by_place(adapter, model)
    layers = dict(zip(given, folding.uniform(given.values()), strict=True))
    factors = _Factors.of(layers, model)
    files: dict[str, Content] = {
        WEIGHTS: Pickle({"model": factors.tensors()}),
        HYPERPARAMETERS: Plain(_hyperparameters(factors, base).encode()),
    }
    files |= {name: Copied(base.folder / name) for name in COMPANIONS if (base.folder / name).is_file()}
    return Bundle(files, tuple(_notes(given, factors, base, files)))


# -- what litgpt has a place for --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """litgpt's model of a base: the layers of every flag, and the shapes of those that the base shows.

    `shapes` are [out, in], of the parts of attn.qkv as well; `sizes` are the rows of query, key and value.
    """

    layers: Mapping[str, Sequence[str]]
    shapes: Mapping[Place, Shape]
    sizes: tuple[int, int, int]
    vocabulary: int  # rows of its head

    @classmethod
    def of(cls, config: FlatYaml, base: Checkpoint) -> _Model:
        """Raises InvalidFile for a config that does not say what is needed, Mismatch for that of another base."""
        sizes, layers = qkv_rows(config), _layers(config, base)
        shapes = {place: base.tensors[name].shape for place, name in homes(base.tensors).items()}
        shapes = {place: shape for place, shape in shapes.items() if len(shape) == 2}
        for place, shape in [*shapes.items()]:
            if len(place.parts) > 1:  # litgpt's own: all three in one
                shapes |= {part: (size, shape[1]) for part, size in zip(place.parts, sizes, strict=True)}
        rows = {Place(module): sum(sizes) for module in layers["query"]}
        rows |= {part: size for whole in rows for part, size in zip(whole.parts, sizes, strict=True)}
        problems = [
            Problem("E-SHAPE", f"{place.module} has {shapes[place][0]} rows, {MODEL_CONFIG} makes it {wanted}")
            for place, wanted in rows.items()
            if place in shapes and shapes[place][0] != wanted
        ]
        if problems:
            hint = f"is this the base's own {MODEL_CONFIG}?"
            raise Mismatch([replace(problem, where=str(config.path), hint=hint) for problem in problems])
        return cls(layers, shapes, sizes, config.whole("padded_vocab_size"))

    @cached_property
    def flags(self) -> Mapping[Place, str]:
        """The flag of everything that can have factors."""
        return {place: flag for flag in FLAGS for place in self.places(flag)}

    @cached_property
    def lost(self) -> Mapping[str, str]:
        """Of every flag the first layer that the base does not show, where there is one."""
        lost: dict[str, str] = {}
        for place, flag in self.flags.items():
            if place not in self.shapes:
                lost.setdefault(flag, place.module)
        return lost

    def places(self, flag: str) -> list[Place]:
        """Everything that gets factors with a flag."""
        part = PARTS.index(flag) if flag in PARTS else None
        return [Place(module, part) for module in self.layers[flag]]


def _layers(config: FlatYaml, base: Checkpoint) -> dict[str, list[str]]:
    """The modules that get factors with each flag, as litgpt builds them.

    Raises InvalidFile for a config that does not say it, Unsupported for an MLP without factors, Mismatch for one that
    says more than the base can be.
    """
    kind = config.lines.get("mlp_class_name", "")
    if kind not in _MLP:
        what = f"mlp_class_name is {kind!r:.80}; litgpt trains factors of {', '.join(_MLP)}"
        raise Unsupported(Problem("E-UNSUPPORTED", what, str(config.path), f"is this a {MODEL_CONFIG} of litgpt's?"))
    layers, experts = config.whole("n_layer"), config.whole("n_expert") if kind == "LLaMAMoE" else 0
    if layers * max(experts, 1) > len(base.tensors):  # before lists of that length are made
        what = f"n_layer {layers}, with {experts} experts, is more than the {len(base.tensors)} tensors of the base"
        raise Mismatch(Problem("E-SHAPE", what, str(config.path), f"is this the base's own {MODEL_CONFIG}?"))
    blocks = [f"transformer.h.{number}" for number in range(layers)]
    mlp = [name for name in _MLP[kind] if "N" not in name]
    mlp += [name.replace("N", str(expert)) for expert in range(experts) for name in _MLP[kind] if "N" in name]
    return {
        **{part: [block + QKV for block in blocks] for part in PARTS},
        "projection": [f"{block}.attn.proj" for block in blocks],
        "mlp": [f"{block}.mlp.{name}" for block in blocks for name in mlp],
        "head": ["lm_head"],
    }


def _misfit(name: str, items: Sequence[Targeted], model: _Model) -> Misfit | None:
    """Why litgpt can not hold the updates of one tensor."""
    if name.endswith(f"{OLD_QKV}.weight"):
        return INTERLEAVED
    place = place_of(name)
    flags = [model.flags[part] for part in place.parts if part in model.flags] if place is not None else []
    if not flags:
        return NO_LAYER
    if any(not isinstance(item.update, Lora) for item in items):
        return Misfit((), "its layers have LoRA and nothing else", "merge them: `loratool merge`", False)
    if flags == ["head"] and items[0].target.shape[0] != model.vocabulary:  # litgpt cuts rows off some
        why = f"the head of litgpt's model has {model.vocabulary} rows, this one {items[0].target.shape[0]}"
        return Misfit((), why, "", False)
    if absent := [model.lost[flag] for flag in flags if flag in model.lost]:
        why = f"litgpt wants factors in every layer of a kind, and the base has no {absent[0]}"
        return Misfit((), why, f"is this the whole base, and its own {MODEL_CONFIG}?", False)
    return None


# -- updates to factors -----------------------------------------------------------------------------------------------


def _by_place(adapter: Adapter, model: _Model) -> dict[Place, Targeted]:
    """One LoRA for each of litgpt's layers that changes, and for each part of attn.qkv."""
    found: dict[Place, list[Targeted]] = defaultdict(list)
    for item in adapter.updates:
        place = place_of(item.target.name)
        assert place is not None, "misfits has looked"
        if len(place.parts) > 1:
            for part, cut in _parts(item, model.sizes):
                found[Place(place.module, part)].append(cut)
        else:
            found[place].append(item)
    return {place: folding.merged_factors(items) for place, items in found.items()}


def _parts(item: Targeted, sizes: tuple[int, int, int]) -> Iterator[tuple[int, Targeted]]:
    """An update of rows of attn.qkv as those of its parts: their rows of B [rows, rank], all of A [rank, in]. Exact."""
    update, target = item.update, item.target
    assert isinstance(update, Lora), "misfits has looked"
    first, last = target.rows or (0, target.shape[0])
    start = 0
    for part, size in enumerate(sizes):
        low, high = max(first, start), min(last, start + size)
        if low < high:
            cut = replace(update, B=update.B.narrow(0, low - first, high - low))
            yield part, Targeted(Target(target.name, (size, target.shape[1]), (low - start, high - start)), cut)
        start += size


@dataclass(frozen=True)
class _Factors:
    """All factors of a file: what the adapter has, at one rank, scale and dtype, and zeros."""

    layers: Mapping[Place, Targeted]
    model: _Model
    flags: Sequence[str]
    dtype: str

    @classmethod
    def of(cls, layers: Mapping[Place, Targeted], model: _Model) -> _Factors:
        flags = {model.flags[place] for place in layers}
        dtypes = {ref.dtype for item in layers.values() for ref in item.update.components().values()}
        # litgpt's merge gives the whole model the dtype of the first factor
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
        return cls(layers, model, [flag for flag in FLAGS if flag in flags], dtype if dtype in FLOATS else "F32")

    @property
    def lora(self) -> Lora:
        """One of them, for what they share: the rank and the scale."""
        update = next(iter(self.layers.values())).update
        assert isinstance(update, Lora), "misfits has looked"
        return update

    @property
    def places(self) -> list[Place]:
        return [place for flag in self.flags for place in self.model.places(flag)]

    @property
    def zeros(self) -> list[Place]:
        return [place for place in self.places if place not in self.layers]

    def tensors(self) -> dict[str, TensorRef]:
        """lora_A [parts * rank, in] and lora_B [rows of the parts, rank] of every layer; parts only of attn.qkv."""
        blocks: dict[str, list[tuple[TensorRef, TensorRef]]] = defaultdict(list)
        for place in self.places:
            blocks[place.module].append(self._pair(place))
        found: dict[str, TensorRef] = {}
        for module in sorted(blocks, key=natural):
            As, Bs = zip(*blocks[module], strict=True)
            found |= {f"{module}.lora_A": self._piled(As), f"{module}.lora_B": self._piled(Bs)}
        return found

    def _pair(self, place: Place) -> tuple[TensorRef, TensorRef]:
        """(A [rank, in], B [out, rank]) of one layer, or one part of attn.qkv."""
        if (item := self.layers.get(place)) is not None:
            assert isinstance(item.update, Lora), "misfits has looked"
            return item.update.A, item.update.B
        rows, columns = self.model.shapes[place]
        rank = folding.rank_of(self.lora)
        return folding.assembled((rank, columns), [], self.dtype), folding.assembled((rows, rank), [], self.dtype)

    def _piled(self, refs: Sequence[TensorRef]) -> TensorRef:
        """One below the other, in the dtype of all."""
        if len(refs) == 1 and refs[0].dtype == self.dtype:
            return refs[0]
        starts = [sum(ref.shape[0] for ref in refs[:number]) for number in range(len(refs))]
        shape = (starts[-1] + refs[-1].shape[0], refs[0].shape[1])
        return folding.assembled(shape, [(ref, (at, 0)) for ref, at in zip(refs, starts, strict=True)], self.dtype)


# -- the files beside them --------------------------------------------------------------------------------------------


def _hyperparameters(factors: _Factors, base: Checkpoint) -> str:
    scaling = factors.lora.factors
    assert scaling.alpha is not None, "uniform gives one"
    lines = {
        "checkpoint_dir": _quoted(str(base.folder)),
        "precision": "null",
        "lora_r": folding.rank_of(factors.lora),
        "lora_alpha": _number(scaling.alpha),
        "lora_dropout": "0.0",
        **{f"lora_{flag}": json.dumps(flag in factors.flags) for flag in FLAGS},
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def _number(value: float) -> str:
    """A number of YAML 1.1, where 1e-05 is a text and 1.0e-05 a number."""
    if value == int(value):
        return str(int(value))
    text = repr(value)
    return text if "." in text else text.replace("e", ".0e")


def _quoted(text: str) -> str:
    """A text in YAML's double quotes."""
    escapes, unseen = {'"': '\\"', "\\": "\\\\"}, "\\U{:08x}"
    inside = "".join(escapes.get(c, c if c.isprintable() else unseen.format(ord(c))) for c in text)
    return f'"{inside}"'


def _notes(
    given: Mapping[Place, Targeted], factors: _Factors, base: Checkpoint, files: Mapping[str, Content]
) -> Iterator[str]:
    loras = [item.update for item in given.values() if isinstance(item.update, Lora)]
    if len({(folding.rank_of(lora), lora.factors.factor) for lora in loras}) > 1:
        yield folding.uniform_note(given.values(), factors.layers.values())
    if factors.zeros:
        place = factors.zeros[0]
        where = place.module if place.part is None else f"the {PARTS[place.part]} of {place.module}"
        yield f"litgpt wants factors in every layer of a kind: {len(factors.zeros)} are zeros, such as {where}"
    if {ref.dtype for lora in loras for ref in lora.components().values()} != {factors.dtype}:
        yield f"all factors are {factors.dtype}, which holds what they were: litgpt has one dtype for all"
    if factors.dtype in ("F16", "BF16") and {ref.dtype for ref in base.tensors.values()} & {*FLOATS} - {factors.dtype}:
        yield f"litgpt's merge rounds the base to the dtype of the factors, {factors.dtype}; that of loratool does not"
    yield "hyperparameters.yaml has the base's path on this machine, for litgpt looks for it there"
    lost = [name for name in (TOKENIZER[-1], BASE_WEIGHTS) if not (base.folder / name).is_file()]
    if not {*TOKENIZER[:2]} & files.keys():
        lost.append(" or ".join(TOKENIZER[:2]))
    if lost:
        yield f"litgpt's merge looks for files that are not in {base.folder}: {', '.join(lost)}"

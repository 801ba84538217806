"""mlx-lm's adapters: ``adapters.safetensors`` (before 2024-05 ``adapters.npz``) beside its ``adapter_config.json``.

    linear     X.lora_a [in, rank]         X.lora_b [rank, out]         X.m [out] for DoRA
    embedding  X.lora_a [tokens, rank]     X.lora_b [rank, dim]         X.m [tokens] for DoRA
    experts    X.lora_a [E, rank, in]      X.lora_b [E, out, rank]      the first version: lora_a [rank * E, in]

The config is a dump of the trainer's arguments, no PEFT config despite its name. Its `scale` is the factor of the
delta itself; with an `alpha` beside it (2024-01 to 2024-06) the factor is scale * alpha / rank. A full fine-tune is a
file of whole weights under MLX's names. ``mlx_lm/tuner/{lora,dora}.py`` are the reference, their `fuse` is the truth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.adapter import Adapter, BaseIdentity, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import mlx_write
from loratool.conventions.choices import Choices
from loratool.conventions.headers import Said, SaidRank
from loratool.conventions.mlx_names import is_embedding, may_be_shifted
from loratool.conventions.peft_config import chosen_config
from loratool.conventions.scales import Scales
from loratool.errors import InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.names import natural, prefix_rule
from loratool.tensors import Shape, TensorRef, is_int
from loratool.updates import Dora, Lora, Replace, Scaling, Update

NAME = "mlx"
TITLE = "mlx-lm adapter"
KINDS = ("lora", "dora", "replace")
TESTED = "mlx-lm 0.32.2"
OPTIONS = ("base_name",)
SUFFIXES: tuple[str, ...] = ()
ASKS = ("alpha", "scaling", "config")
CONDITIONS: tuple[str, ...] = ()
misfits, write = mlx_write.misfits, mlx_write.write

_PART = re.compile(r"^(?P<module>.+)\.(?P<part>lora_a|lora_b|m)$")
# What a wrapper calls the layer that it wraps.
_INNER = ("linear", "embedding")
INTO_MLX = "merge into the MLX model; mlx_lm.convert makes it from the Hugging Face one"
UNQUANTISE = "merge into the 16-bit base that it was made from, or `mlx_lm.convert --dequantize` it"


def detect(source: Checkpoint) -> bool:
    if source.shards[0].path.suffix == ".gguf":
        return False  # llama.cpp has taken over the two names
    if _pairs(source.tensors):
        return True
    return _is_full(source) and not any(".lora_" in name for name in source.tensors)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    where = str(source.path)
    config = _Config.of(chosen_config(choices.config, _side_config(source), where) or {}, where)
    modules = _pairs(source.tensors)
    whole = {} if modules else dict(source.tensors)
    choices.check_used([*modules], where)
    reader = _Reader(modules, whole, config, Scales(source, choices), base, where)
    reader.refuse_strays(source.tensors, wrapped=bool(unwrap(source, choices)))
    updates = reader.updates()
    reader.scales.check()
    reader.notes += reader.scales.notes()
    identity = BaseIdentity(config.model)
    return Adapter(updates, identity, {"convention": NAME}, (*source.notes, *reader.notes))


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    """The base inside a model that was saved with its wrappers: ``X.linear.weight`` is X's own."""
    modules = _pairs(source.tensors)
    inner = {f"{module}.{name}": module for module in modules for name in _INNER}
    found = {}
    for name, ref in source.tensors.items():
        owner, _, last = name.rpartition(".")
        if owner in inner:
            found[f"{inner[owner]}.{last}"] = ref
        elif not (owner in modules and last in ("lora_a", "lora_b", "m")):
            found[name] = ref
    return found if any(name.rpartition(".")[0] in inner for name in source.tensors) else {}


def _pairs(tensors: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """The parts by module, of modules that have a factor."""
    found: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        if match := _PART.match(name):
            found.setdefault(match["module"], {})[match["part"]] = ref
    return {module: parts for module, parts in found.items() if parts.keys() & {"lora_a", "lora_b"}}


def _side_config(source: Checkpoint) -> dict[str, Any] | None:
    """The config beside the weights, if it is mlx-lm's."""
    config = source.side_json("adapter_config.json")
    return config if config and "peft_type" not in config else None


def _is_full(source: Checkpoint) -> bool:
    """Whether these are the whole weights of a full fine-tune: only the config and the file's name can tell."""
    if not re.fullmatch(r"(\d+_)?adapters", source.shards[0].path.stem):
        return False
    return (_side_config(source) or {}).get("fine_tune_type") == "full"


@dataclass(frozen=True)
class _Config:
    """What an adapter_config.json of mlx-lm says; `scale` is None where it does not."""

    scale: float | None = None
    rank: float | None = None
    alpha: float | None = None
    model: str = ""
    dora: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> _Config:
        if "peft_type" in config:
            what = "a PEFT config, for an adapter of mlx-lm"
            raise InvalidFile(Problem("E-CONFIG", what, where, "give the adapter_config.json that mlx-lm wrote"))
        parameters = config.get("lora_parameters") or {}
        numbers = parameters if isinstance(parameters, dict) else {"scale": parameters}
        for name in ("scale", "rank", "alpha"):
            value = numbers.get(name, 0)
            if not (is_int(value) or isinstance(value, float)) or not math.isfinite(value):
                what = f"lora_parameters.{name} of its config is {value!r:.80}, not a number"
                raise InvalidFile(Problem("E-CONFIG", what, where))
        model = config.get("model")
        dora = config.get("fine_tune_type") == "dora" or config.get("use_dora") is True
        return cls(
            numbers.get("scale"),
            numbers.get("rank"),
            numbers.get("alpha"),
            model if isinstance(model, str) else "",
            dora,
        )


@dataclass
class _Reader:
    """Turns the parts of every module into an update; what is wrong with one does not hide the next."""

    modules: Mapping[str, Mapping[str, TensorRef]]
    whole: Mapping[str, TensorRef]
    config: _Config
    scales: Scales
    base: Mapping[str, TensorRef] | None
    where: str
    notes: list[str] = field(default_factory=list)

    def refuse_strays(self, tensors: Mapping[str, TensorRef], *, wrapped: bool) -> None:
        """In an adapter, unlike in a wrapped model, every tensor is a part of an update."""
        known = {ref.name for parts in self.modules.values() for ref in parts.values()}
        strays = [] if self.whole or wrapped else [name for name, ref in tensors.items() if ref.name not in known]
        if strays:
            what = f"{len(strays)} tensors belong to no lora_a and lora_b: {', '.join(strays[:3])}"
            raise InvalidFile(Problem("E-UNUSED", what, self.where, "mlx-lm loads no such adapter either"))

    def updates(self) -> tuple[Targeted, ...]:
        names = [*self.whole, *(f"{module}.weight" for module in self.modules)]
        rename, notes = prefix_rule(names, names if self.base is None else self.base, self.where)
        self.notes += notes
        problems: list[Problem] = []
        found: list[Targeted] = []
        for name in sorted(names, key=natural):
            try:
                found.append(self._whole(name, rename(name)) if self.whole else self._module(name, rename(name)))
            except LoratoolError as error:
                problems += error.problems
        if problems:
            raise Mismatch(problems)
        return tuple(found)

    def _whole(self, name: str, target: str) -> Targeted:
        value = self.whole[name]
        stored = self._stored(target)
        if self.base is not None and (stored is None or stored.shape != value.shape):
            # Only MLX's own names and layouts (stacked experts, convolutions) are certain to fit whole weights.
            found = f"{list(stored.shape)} in the base, not {list(value.shape)}" if stored else "not in the base"
            raise Mismatch(Problem("E-TARGET", f"{name} is {found}", self.where, INTO_MLX))
        if may_be_shifted(target, self.base):
            what = f"{name}: MLX stores the norms of this model as weight + 1, and nothing shows which the base has"
            raise Unsupported(Problem("E-UNSUPPORTED", what, self.where, "fuse it with mlx_lm.fuse"))
        return Targeted(Target(target, value.shape), Replace(value))

    def _module(self, name: str, target: str) -> Targeted:
        module = name.removesuffix(".weight")
        parts = self.modules[module]
        A, B = (parts.get(part) for part in ("lora_a", "lora_b"))
        if A is None or B is None:
            what = f"{module} has only one of lora_a and lora_b"
            raise InvalidFile(Problem("E-COMPONENTS", what, self.where))
        stored = self._stored(target)
        self._refuse_packed(module, target, stored)
        if len(B.shape) == 3:
            return self._experts(module, target, A, B, stored, parts.get("m"))
        rank = B.shape[0] if B.shape else 0
        if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[1] != rank or not A.numel or not B.numel:
            raise InvalidFile(self._unfit(module, A, B, "[in, rank] and [rank, out]"))
        table = (A.shape[0], B.shape[1])  # an embedding's [tokens, dim], or a linear layer's [in, out]
        if self._is_table(module, stored, table):
            lora, shape, layout = Lora(B, A, self._scaling(module, rank)), table, "embedding"
        else:
            lora, shape, layout = Lora(A.T, B.T, self._scaling(module, rank)), table[::-1], ""
        return Targeted(Target(target, shape, layout=layout), self._with_magnitude(module, lora, parts.get("m")))

    def _with_magnitude(self, module: str, lora: Lora, m: TensorRef | None) -> Update:
        """DoRA's norm runs over a row in both kinds: over a linear layer's input, over one token's vector."""
        if m is None and self.config.dora:
            what = f"{module} has no m, and its config says DoRA"
            raise InvalidFile(Problem("E-COMPONENTS", what, self.where, "is it the adapter's own config?"))
        return lora if m is None else Dora(lora, m, 0)

    def _experts(
        self, module: str, target: str, A: TensorRef, B: TensorRef, stored: TensorRef | None, m: TensorRef | None
    ) -> Targeted:
        """lora_a [E, rank, in], or in the first version [rank * E, in]; lora_b [E, out, rank]."""
        experts, out, rank = B.shape
        if not B.numel or A.shape[:-1] not in ((experts, rank), (experts * rank,)) or not A.numel:
            raise InvalidFile(self._unfit(module, A, B, "[experts, rank, in] and [experts, out, rank]"))
        if m is not None:
            what = f"{module}: a magnitude of experts; mlx-lm has none"
            raise Unsupported(Problem("E-UNSUPPORTED", what, self.where))
        if self.base is not None and stored is None:
            what = f"{module}: MLX stacks the experts in one tensor, and the base has no {target}"
            raise Mismatch(Problem("E-TARGET", what, self.where, INTO_MLX))
        lora = Lora(A.reshape(experts, rank, A.shape[-1]), B, self._scaling(module, rank))
        return Targeted(Target(target, (experts, out, A.shape[-1]), experts=experts), lora)

    def _unfit(self, module: str, A: TensorRef, B: TensorRef, wanted: str) -> Problem:
        what = f"lora_a is {list(A.shape)}, lora_b {list(B.shape)}; they must be {wanted}"
        return Problem("E-SHAPE", what, f"{self.where}: {module}")

    def _scaling(self, module: str, rank: int) -> Scaling:
        """The config's rule; alpha that a user gives is for a file without its config."""
        scale, alpha, stated = self.config.scale, self.config.alpha, self.config.rank
        if stated is not None:
            self.scales.check_rank(module, rank, SaidRank(stated, "rank of adapter_config.json"))
        if scale is None:
            return self.scales.of(module, rank)
        if alpha is None:
            return self.scales.of(module, rank, Said(scale, "scale of adapter_config.json", "alpha"))
        return self.scales.of(module, rank, Said(scale * alpha, "scale and alpha of adapter_config.json"))

    # -- what the base says -------------------------------------------------------------------------------------------

    def _stored(self, target: str) -> TensorRef | None:
        return None if self.base is None else self.base.get(target)

    def _refuse_packed(self, module: str, target: str, stored: TensorRef | None) -> None:
        packed = stored is not None and stored.dtype == "U32"
        if packed or f"{target.removesuffix('weight')}scales" in (self.base or {}):
            what = f"{module} is quantised in the base: packed {stored.dtype if stored else 'weights'} with scales"
            raise Unsupported(Problem("E-QUANTISED", what, self.where, UNQUANTISE))

    def _is_table(self, module: str, stored: TensorRef | None, table: Shape) -> bool:
        """Whether the factors are an embedding's: the base's shape tells, or for a square one the module's name."""
        named = is_embedding(module)
        if stored is None or table[0] == table[1]:
            return named
        if stored.shape not in (table, table[::-1]):
            what = f"{module}: the factors make {list(table[::-1])}, the base has {list(stored.shape)}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, "is this the adapter's base?"))
        return stored.shape == table

"""Microsoft's loralib, the first LoRA library: its layers hold their factors themselves.

    X.weight        X.lora_A [rank, in]              X.lora_B [out, rank]                 Linear
    X.weight        X.lora_A [n * rank, in]          X.lora_B [n * block, rank]           MergedLinear
    X.weight        X.lora_A [rank, tokens]          X.lora_B [dim, rank]                 Embedding
    X.conv.weight   X.lora_A [rank * k, in * k]      X.lora_B [out / groups * k, rank * k]   Conv2d

A file is a whole state dict, or what `lora_state_dict` keeps: factors, and biases if they were trained. The scale is
alpha/rank. Alpha is not stored, nor which blocks of a MergedLinear are trained (`enable_lora`), nor the orientation
(`fan_in_fan_out`); and a model in eval mode has its delta in the weights, with no sign of it in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.adapter import Adapter, Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import litgpt
from loratool.conventions.already_merged import compare_with_base, trained_biases, without
from loratool.conventions.choices import Choices
from loratool.conventions.orientation import shown_layouts, square_layout
from loratool.conventions.packed import RULE, Pair, factor_modules, key, owner, pairs
from loratool.conventions.scales import Scales
from loratool.errors import ChoiceNeeded, InvalidFile, LoratoolError, Mismatch, Problem, Unsupported
from loratool.names import prefix_rule
from loratool.tensors import FLOATS, Computed, Shape, TensorRef, torch_dtype
from loratool.updates import Add, Lora, Replace, Scaling

if TYPE_CHECKING:
    import torch

NAME = "loralib"
TITLE = "loralib state dict"
KINDS = ("lora", "replace", "add")
TESTED = "loralib 0.1.2"
ASKS = ("alpha", "scaling", "layout", "enable_lora", "already_merged")

# Tables by their usual names: the delta is the same as that of a matrix stored [in, out], it is only called otherwise.
_TABLE = re.compile(r"(^|[._])(emb|embed|embedding|embeddings|wte|wpe)([._]|$)", re.IGNORECASE)


def detect(source: Checkpoint) -> bool:
    modules = factor_modules(source.tensors)
    foreign = any(
        name.startswith("base_model.model.") or name.rpartition(".")[2] == "lora_E" or "parametrizations" in name
        for name in source.tensors
    )  # PEFT's and AdaLoRA's, minLoRA's
    wrapped = any(key(module, "linear.weight") in source.tensors for module in modules)
    return bool(modules) and not foreign and not wrapped and not litgpt.detect(source)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    where = str(source.path)
    found, inside = pairs(source), _inside(source)
    choices.check_used([pair.module for pair in found], where)
    if choices.already_merged and not inside:
        raise ChoiceNeeded(Problem("E-OPTION", "--already-merged: there are no weights in it", where))
    scales = Scales(source, choices, RULE)
    reader = _Reader(scales, inside if base is None else base, where)
    names = [_weight_name(pair.module, reader.weights) for pair in found]
    rename, notes = prefix_rule(names, reader.weights or names, where)
    for pair, name in zip(found, names, strict=True):
        reader.add(pair, rename(name))
    updates = reader.result()
    scales.check()
    notes += scales.notes()
    biases = _loose_biases(source) if not inside else {}
    if inside and base is not None and reader.scales_known:  # only now are numbers read
        notes += compare_with_base(inside, base, rename, updates, choices.already_merged, where)
        biases = trained_biases(inside, base, rename)
        notes += [f"{len(biases)} biases differ from the base's: they were trained"] if biases else []
    elif inside and any(name.endswith("bias") for name in inside):
        notes.append("its biases count as the base's: whether they were trained (bias=...), nothing in it says")
    if choices.already_merged:
        notes.append(
            "already merged: its base weights are what is left without the delta, to rounding, without digests"
        )
    if skipped := [name for name, ref in biases.items() if ref.dtype not in FLOATS]:
        notes.append(f"{len(skipped)} buffers that are called bias are left out, they hold no floats: {skipped[0]} ...")
    replaced = [Targeted(Target(rename(n), r.shape), Replace(r)) for n, r in biases.items() if n not in skipped]
    provenance = {"convention": NAME}
    return Adapter(
        (*updates, *replaced), provenance=provenance, notes=(*source.notes, *notes), doubts=tuple(reader.doubts)
    )


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    inside = _inside(source)
    if not choices.already_merged or not inside:
        return inside
    updates = Adapter(read(source, choices, None).updates).targets()
    return {name: without(ref, updates[name]) if name in updates else ref for name, ref in inside.items()}


# -- what is in the file --------------------------------------------------------------------------------------------


def _weight_name(module: str, weights: Mapping[str, TensorRef]) -> str:
    """The layer's weight: a base that was saved from loralib's own convolution has it one level further down."""
    plain, nested = key(module, "weight"), key(module, "conv.weight")
    return nested if plain not in weights and nested in weights else plain


def _inside(source: Checkpoint) -> dict[str, TensorRef]:
    """The base's tensors in a whole state dict, by the names of the model without LoRA; {} for an adapter alone."""
    modules = factor_modules(source.tensors)
    base: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        if owner(name) is not None:
            continue
        clean = _without_conv(name, modules)
        if clean in base and base[clean].digest() != ref.digest():  # newer versions store a convolution twice
            what = f"{base[clean].name} and {name} both stand for {clean}, and differ"
            raise InvalidFile(Problem("E-NAMES", what, str(source.path)))
        base[clean] = ref
    missing = sorted(key(module, "weight") for module in modules if key(module, "weight") not in base)
    if len(missing) == len(modules):
        return {}
    if missing:
        what = "has factors but no weight, while other layers have theirs"
        raise InvalidFile(
            [Problem("E-COMPONENTS", f"{name.rpartition('.')[0]} {what}", str(source.path)) for name in missing]
        )
    return base


def _loose_biases(source: Checkpoint) -> dict[str, TensorRef]:
    """What `lora_state_dict` keeps beside the factors: every tensor with `bias` in its name."""
    rest = {name: ref for name, ref in source.tensors.items() if owner(name) is None}
    if unknown := [name for name in rest if "bias" not in name]:
        what = "is neither a factor nor a bias, and the weights of the LoRA layers are not in the file"
        raise InvalidFile([Problem("E-NAMES", f"{name} {what}", str(source.path)) for name in unknown])
    modules = factor_modules(source.tensors)
    return {_without_conv(name, modules): ref for name, ref in rest.items()}


def _without_conv(name: str, modules: set[str]) -> str:
    """``X.conv.bias`` -> ``X.bias`` for a LoRA layer X."""
    above, _, leaf = name.rpartition(".")
    module = above.removesuffix("conv").removesuffix(".")
    return key(module, leaf) if above == key(module, "conv") and module in modules else name


# -- factors to updates ---------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Turns pairs into updates of the weights they belong to, layer by layer; problems and doubts are collected."""

    scales: Scales
    weights: Mapping[str, TensorRef]  # of the base, or of the file itself; {} if neither is there
    where: str
    updates: list[Targeted] = field(default_factory=list)
    errors: list[LoratoolError] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    @property
    def choices(self) -> Choices:
        return self.scales.choices

    @cached_property
    def shown(self) -> Mapping[str, set[str]]:
        return shown_layouts(self.weights)

    @property
    def scales_known(self) -> bool:
        return not Adapter(tuple(self.updates)).unknown_scales()

    def add(self, pair: Pair, name: str) -> None:
        stored = self.weights.get(name)
        try:
            if stored is not None and len(stored.shape) > 2:
                self.updates.append(_convolution(pair, name, stored.shape, self.scales))
            else:
                self.updates += self._matrix(pair, name, None if stored is None else stored.shape)
        except LoratoolError as error:
            self.errors.append(error)

    def result(self) -> list[Targeted]:
        """Raises one error with the problems of all layers, of the first one's class."""
        if self.errors:
            raise type(self.errors[0])([problem for error in self.errors for problem in error.problems])
        return self.updates

    def _matrix(self, pair: Pair, name: str, shape: Shape | None) -> Iterator[Targeted]:
        """Linear, MergedLinear and Embedding: one update per trained block."""
        if pair.B.shape[0] % pair.blocks:
            what = f"{pair.module}: lora_A {list(pair.A.shape)} has {pair.blocks} blocks of rank {pair.rank}"
            raise InvalidFile(Problem("E-SHAPE", f"{what}, lora_B {list(pair.B.shape)} does not divide into them"))
        transposed = self._transposed(pair, name, shape)
        block = pair.B.shape[0] // pair.blocks
        out = None if shape is None else shape[1 if transposed else 0]
        enabled = self._enabled(pair, None if out is None else out // block)
        out, columns = len(enabled) * block, pair.A.shape[1]
        layout = "" if not transposed else "embedding" if self._is_table(pair.module, name) else "in_out"
        target = Target(name, (columns, out) if transposed else (out, columns), layout=layout)
        scaling = self.scales.of(pair.module, pair.rank)
        trained = [number for number, digit in enumerate(enabled) if digit == "1"]
        for number, (A, B) in zip(trained, pair.split([block] * pair.blocks), strict=True):
            start = number * block
            if not transposed:
                rows = (start, start + block) if block < out else None
                yield Targeted(replace(target, rows=rows), Lora(A, B, scaling))
            else:  # the blocks lie side by side in a matrix [in, out]: (B_i @ A_i).T in some of its columns
                right = B.T if block == out else _columns(B, start, out)
                yield Targeted(target, Lora(right, A.T, scaling))

    def _transposed(self, pair: Pair, name: str, shape: Shape | None) -> bool:
        """Whether the weight is stored [in, out], which `fan_in_fan_out` and Embedding do."""
        given = self.choices.layout_of(pair.module)
        if shape is None:
            if given is None:
                self.doubts.append(
                    f"{pair.module or 'the layer'}: a Linear, MergedLinear, Embedding or Conv2d, stored [out, in] or"
                    " [in, out]: only the base tells (or --layout in_out or out_in)"
                )
            return given == "in_out"
        block, columns = pair.B.shape[0] // pair.blocks, pair.A.shape[1]
        fits = {
            turned: len(shape) == 2 and shape[turned ^ 1] == columns and self._holds(shape[turned], block, pair.blocks)
            for turned in (False, True)
        }
        if not any(fits.values()):
            made = f"{pair.B.shape[0]} of the outputs and {columns} inputs" if pair.blocks > 1 else "a matrix"
            what = f"{pair.module}: {made} {[pair.B.shape[0], columns]} from its factors, but {name} is {list(shape)}"
            raise Mismatch(Problem("E-SHAPE", what, self.where, "is this the adapter's base?"))
        if not all(fits.values()):
            return fits[True]
        table = self._is_table(pair.module, name)
        layout = given if given or table else square_layout(name, False, self.weights, self.shown)
        if layout is None:
            self.doubts.append(
                f"{pair.module}: {name} is square, and nothing shows whether it is stored [out, in] or [in, out]"
                " (Conv1D, Embedding): give --layout PATTERN=out_in or in_out"
            )
        return layout == "in_out"

    @staticmethod
    def _holds(out: int, block: int, blocks: int) -> bool:
        return out % block == 0 and out // block >= blocks

    def _is_table(self, module: str, name: str) -> bool:
        return bool(_TABLE.search(module)) and key(module, "bias") not in self.weights

    def _enabled(self, pair: Pair, blocks: int | None) -> str:
        """Which blocks were trained, a digit each. `blocks` is how many the weight has, None if it is not there."""
        given = self.choices.enabled_of(pair.module)
        if blocks == pair.blocks == 1 or (blocks is None and pair.blocks == 1 and given is None):
            return "1"
        wanted = f"{pair.blocks} of {'some' if blocks is None else blocks} blocks"
        if given is not None:
            if given.count("1") != pair.blocks or (blocks is not None and len(given) != blocks):
                what = f"--enable-lora {given} for {pair.module}, but its factors are those of {wanted}"
                raise ChoiceNeeded(Problem("E-OPTION", what, self.where, "one digit per block, 1 for each trained one"))
            return given
        if blocks != pair.blocks:
            self.doubts.append(
                f"{pair.module}: {wanted} were trained, and the file does not say which:"
                " give --enable-lora PATTERN=DIGITS, like 101 for the first and third"
            )
        return "1" * pair.blocks + "0" * ((blocks or pair.blocks) - pair.blocks)


def _columns(B: TensorRef, start: int, out: int) -> TensorRef:
    """B [block, rank] as the right factor [rank, out] of a matrix [in, out] in which the block is some columns."""
    block, rank = B.shape

    def make() -> torch.Tensor:
        import torch

        wide = torch.zeros(rank, out, dtype=torch_dtype(B.dtype), device="cpu")
        wide[:, start : start + block] = B.read().T
        return wide

    return TensorRef(B.name, B.dtype, (rank, out), Computed(make), (rank, out))


def _convolution(pair: Pair, name: str, shape: Shape, scales: Scales) -> Targeted:
    """Conv2d: ``(B @ A).view(weight.shape)``, a matrix whose rows are not those of the flattened weight.

    The product is [out / groups * k, in * k], the weight [out, in / groups, k, k]. With q = k / groups, each row of
    the weight is q rows of the product one after the other: B is seen as [out, q * rank * k], and A stands q times on
    the diagonal of [q * rank * k, q * in * k]. Where q is not whole there is no such form, and the delta is dense.
    """
    A, B, kernel = pair.A, pair.B, shape[-1]
    groups = A.shape[1] // (kernel * shape[1])
    whole = A.shape[0] == B.shape[1] and not B.shape[1] % kernel and groups * shape[1] * kernel == A.shape[1]
    if not whole or not groups or shape[0] % groups or B.shape[0] != shape[0] // groups * kernel:
        what = (
            f"{pair.module}: lora_A {list(A.shape)} and lora_B {list(B.shape)} are not of a convolution {list(shape)}"
        )
        raise Mismatch(Problem("E-SHAPE", what, hint="is this the adapter's base?"))
    if B.shape[0] * A.shape[1] != math.prod(shape):
        what = f"{pair.module}: loralib's own Conv1d and Conv3d neither run nor merge with a kernel of {kernel}"
        raise Unsupported(
            Problem("E-UNSUPPORTED", what, name, "there is no formula for them: only Conv2d works in loralib")
        )
    scaling = scales.of(pair.module, pair.rank // kernel)
    if kernel % groups:
        dense = replace(scaling, rule="none", rank=None, alpha=None) if scaling.scale is not None else scaling
        return Targeted(Target(name, shape), Add(_product(A, B, shape), dense))
    times = kernel // groups
    inner = times * pair.rank
    if inner != scaling.rank:  # the rank that alpha goes with is not the inner dimension
        scaling = replace(scaling, rank=inner) if scaling.scale is None else Scaling("none", inner, None, scaling.scale)
    right = _diagonal(A, times).reshape(inner, *shape[1:])
    return Targeted(Target(name, shape), Lora(right, B.reshape(shape[0], inner), scaling))


def _diagonal(A: TensorRef, times: int) -> TensorRef:
    """A [rank, in] several times on the diagonal, [times * rank, times * in]."""
    rank, columns = A.shape
    shape = (times * rank, times * columns)

    def make() -> torch.Tensor:
        import torch

        wide = torch.zeros(shape, dtype=torch_dtype(A.dtype), device="cpu")
        for row, column in zip(range(0, shape[0], rank), range(0, shape[1], columns), strict=True):
            wide[row : row + rank, column : column + columns] = A.read()
        return wide

    return A if times == 1 else TensorRef(A.name, A.dtype, shape, Computed(make), shape)


def _product(A: TensorRef, B: TensorRef, shape: Shape) -> TensorRef:
    """The unscaled delta, dense, in float32 at least."""
    dtype = "F64" if "F64" in (A.dtype, B.dtype) else "F32"

    def make() -> torch.Tensor:
        import torch

        delta = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64, device="cpu")  # [out / groups * k, in * k]
        Lora(A, B, Scaling()).open(torch.float64, None).apply(delta, 0, 1.0)
        return delta.to(torch_dtype(dtype)).reshape(shape)

    return TensorRef(B.name, dtype, shape, Computed(make), shape)

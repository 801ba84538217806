"""Quantised checkpoints: which stored tensors are one weight together, and its numbers, some rows at a time.

The method is what the file names: a marker of the layer, the config, or the name of a part that only one method has; it
is never told by shapes. `logical` shows a checkpoint as its layers compute with it: `X.weight` with its scales becomes
one float32 tensor of the weight's own shape, which adapters bind to. What can be read: fp8 with scales of blocks,
channels, groups or the whole tensor (DeepSeek, transformers, compressed-tensors), bitsandbytes' nf4, fp4 and int8, and
ComfyUI's fp8, mxfp8 and int8 (`comfy`). Other methods are recognised by the names of their parts, and are refused when
an adapter wants to change one of their weights; so are 8-bit weights with scales of which nothing says what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratool.checkpoint import Checkpoint
from loratool.container import strict_json
from loratool.errors import InvalidFile, Problem
from loratool.quantised import comfy
from loratool.quantised.comfy import MARKER, OF_INPUTS, Unfit
from loratool.quantised.schemes import EightBit, FourBit, Scaled, Scheme
from loratool.tensors import CHUNK, FLOATS, FileState, Shape, TensorRef, as_bytes, files_of, is_int

if TYPE_CHECKING:
    import torch

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")  # after the weight's name: DeepSeek and transformers; compressed-tensors
BLOCK = (128, 128)  # of DeepSeek and of everybody since
STATE_LIMIT = 1 << 16  # bytes of its JSON, which has about 300
CONFIG_KEYS = ("quantization_config", "compression_config")  # the second: compressed-tensors before 0.6
NF4 = "quant_state.bitsandbytes__"  # then nf4 or fp4

SIXTEEN_BIT = "merge into the 16-bit checkpoint that it was made from, and quantise the result"
UNPACK_MXFP4 = "merge into a bf16 copy (transformers writes one: Mxfp4Config(dequantize=True))"
CODES = ("U8", "I8", "I32", "U32", *FP8)  # dtypes of the main part of a quantised weight
# Methods that are not read. Their weight X.weight is stored under another last segment, or beside one of these parts.
MAIN = ("qweight", "weight_packed", "W_q", "weight")
FOREIGN = (  # more telling ones first
    ("weight_global_scale", "nvfp4"),
    ("weight_scale_2", "nvfp4"),
    ("weight_packed", "packed integers of compressed-tensors"),
    ("weight_zero_point", "integers with zero points"),
    ("g_idx", "GPTQ"),
    ("qweight", "AWQ"),
    ("W_q", "HQQ"),
    ("scales", "grouped integers, such as MLX's"),
)
PARTS = (".qzeros", ".scales", ".g_idx", ".biases", ".scale_weight", ".weight_scale", ".weight_scale_2",
         ".weight_global_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")  # fmt: skip


@dataclass(frozen=True)
class Dequantised:
    """The data of a weight that is stored quantised. `beside` are stored tensors that only serve its quantisation."""

    scheme: Scheme
    beside: tuple[TensorRef, ...] = ()
    path: None = None

    @property
    def states(self) -> tuple[FileState, ...]:
        return tuple(files_of(self.scheme.parts))

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        return self.scheme.rows(0, math.prod(shape[:-1])).reshape(shape)

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        count, columns = math.prod(shape[:-1]), shape[-1]
        height = max(1, CHUNK // (4 * max(1, columns)))
        for start in range(0, count, height):
            yield as_bytes(self.scheme.rows(start, min(count, start + height)))

    def rows(self, start: int, stop: int, columns: int) -> torch.Tensor:
        """Rows start:stop of the weight seen as [..., columns], which is one or more of its own rows."""
        each = columns // self.scheme.columns
        return self.scheme.rows(start * each, stop * each).view(stop - start, columns)


@dataclass(frozen=True)
class Foreign:
    """The data of a weight whose quantisation is known by name, and not read."""

    method: str
    stored: TensorRef
    hint: str = SIXTEEN_BIT
    path: None = None

    @property
    def states(self) -> tuple[FileState, ...]:
        return self.stored.data.states

    def load(self, dtype: str, shape: Shape) -> torch.Tensor:
        raise InvalidFile(self.problem(self.stored.name))

    def chunks(self, dtype: str, shape: Shape) -> Iterator[memoryview]:
        raise InvalidFile(self.problem(self.stored.name))

    def problem(self, name: str, where: str = "") -> Problem:
        what = f"{name} is quantised ({self.method}, stored as {self.stored.name}): that can not be merged into"
        return Problem("E-QUANTISED", what, where, self.hint)


def stored_part(ref: TensorRef) -> TensorRef:
    """What a file holds under a weight's name: its codes, if it is quantised."""
    return ref.data.scheme.parts[0] if isinstance(ref.data, Dequantised) else ref


def parts(ref: TensorRef | None) -> Sequence[TensorRef]:
    """The stored tensors that the numbers of a quantised weight come from; none for another one."""
    return ref.data.scheme.parts if ref is not None and isinstance(ref.data, Dequantised) else ()


# --- recognition -----------------------------------------------------------------------------------------------------


def logical(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every quantised weight as one tensor under its own name, and without its other parts.

    Shards keep the stored tensors. Raises InvalidFile for parts that do not fit each other. A checkpoint of which
    nothing is quantised is itself.
    """
    look = _Look(checkpoint)
    found: dict[str, TensorRef] = {}
    parts: set[str] = set()
    problems: list[Problem] = []
    for name, ref in checkpoint.tensors.items():
        if ref.dtype in CODES:
            try:
                look.at(name, ref, found, parts)
            except Unfit as unfit:
                what = f"{name} can not be dequantised: {unfit}"
                problems.append(Problem("E-QUANTISED", what, str(checkpoint.path), "is it complete?"))
    if problems:
        raise InvalidFile(problems)
    if not found:
        return checkpoint
    hidden = parts - found.keys()
    kept = {name: found.get(name, ref) for name, ref in checkpoint.tensors.items() if name not in hidden}
    return replace(checkpoint, tensors={**kept, **found})


class _Look:
    """Looks at the stored tensors of one checkpoint, each of them once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = checkpoint.tensors
        self.clean = {ref.name: name for name, ref in self.tensors.items()}  # by stored name
        self.configs = {name: _config(part) for name, part in (checkpoint.components or {"": checkpoint}).items()}
        self.methods = comfy.methods(checkpoint)
        self.old_markers = comfy.old_markers(self.tensors)
        # Layers with something that may be the scale of their weight: by the name without its last segment.
        scales = [name for name in self.tensors if "scale" in name.rpartition(".")[2]]
        self.scales = {name.rpartition(".")[0]: name for name in scales if not name.endswith(OF_INPUTS)}

    def config(self, name: str) -> Mapping[str, Any]:
        """The quantization_config that goes for a tensor: in a pipeline, that of its component."""
        return self.configs.get("") or self.configs.get(name.partition(".")[0], {})

    def at(self, name: str, ref: TensorRef, found: dict[str, TensorRef], parts: set[str]) -> None:
        """If a stored tensor is the main part of a quantised weight, note the weight, and the names of all parts."""
        whole = self.weight(name, ref)
        if whole is not None:
            assert isinstance(whole.data, Dequantised)
            found[name] = whole
            parts.update(self.clean[part.name] for part in whole.data.scheme.parts)
            parts.update(self.clean[ref.name] for ref in whole.data.beside)
            return
        foreign = self.foreign(name, ref)
        if foreign is not None:
            clean, data, endings = foreign
            stem = name.removesuffix("_blocks") if name.endswith("_blocks") else name.rpartition(".")[0]
            found[clean] = replace(ref, data=data, views=(), shape=_shape(stem, ref, self.tensors))
            parts.update({f"{stem}{ending}" for ending in endings} & self.tensors.keys())

    def weight(self, name: str, ref: TensorRef) -> TensorRef | None:
        """The weight whose main part is a stored tensor, if its method is one that is read."""
        tensors, stem = self.tensors, name.removesuffix(".weight")
        if (method := self.methods.get(stem)) is not None and name == f"{stem}.weight":
            scheme = comfy.scheme_of(name, ref, method, tensors)
            return None if scheme is None else _float(scheme, ref.shape, comfy.beside(name, method, tensors))
        if ref.dtype in FP8 and name.endswith(".weight") and f"{stem}.scale_weight" in tensors:
            others = (*comfy.beside(name, None, tensors), *self.old_markers)
            return _float(comfy.old_scaled(ref, tensors[f"{stem}.scale_weight"]), ref.shape, others)
        if ref.dtype in (*FP8, "I8") and f"{name}_zero_point" not in tensors:
            suffix = next((s for s in SCALES if name + s in tensors), None)
            if suffix is not None and self.named(name, ref, suffix):
                scaled = _scaled(ref, tensors[name + suffix], self.config(name))
                return _float(scaled, ref.shape, comfy.beside(name, None, tensors))
        if ref.dtype == "U8":
            state = tensors.get(f"{name}.{NF4}nf4") or tensors.get(f"{name}.{NF4}fp4")
            return None if state is None else _four_bit(name, ref, state, tensors)
        if ref.dtype == "I8" and f"{stem}.SCB" in tensors:
            return _eight_bit(ref, tensors[f"{stem}.SCB"], tensors.get(f"{stem}.weight_format"))
        return None

    def named(self, name: str, ref: TensorRef, suffix: str) -> bool:
        """Whether something says what the scale beside a weight means: a config, or the scale's own name and size."""
        scale = self.tensors[name + suffix]
        if scale.dtype not in (*FLOATS, "F8_E8M0"):
            return False
        if self.config(name).get("quant_method"):
            return ref.dtype != "I8" or suffix == "_scale"  # beside another one, its bytes are pairs of 4-bit numbers
        if ref.dtype == "I8" or scale.dtype == "F8_E8M0":
            return False
        of_rows = scale.numel == 1 or scale.shape in (ref.shape[:-1], (*ref.shape[:-1], 1))
        return suffix == "_scale_inv" or of_rows  # DeepSeek's name, which is of blocks of 128 x 128

    def foreign(self, name: str, ref: TensorRef) -> tuple[str, Foreign, tuple[str, ...]] | None:
        """A weight of a method that is not read, told by the names of its parts: its name, and what they end in."""
        if name.endswith("_blocks") and ref.dtype == "U8" and f"{name.removesuffix('_blocks')}_scales" in self.tensors:
            return name.removesuffix("_blocks"), Foreign("mxfp4", ref, hint=UNPACK_MXFP4), ("_blocks", "_scales")
        stem, _, last = name.rpartition(".")
        if last == "weight" and (told := self.methods.get(stem)) is not None:
            return name, Foreign(f"{told.format}, as ComfyUI's marker says", ref), (MARKER, *PARTS)
        if last in MAIN:
            for suffix, method in FOREIGN:
                if f"{stem}.{suffix}" in self.tensors:
                    return f"{stem}.weight", Foreign(method, ref), (f".{last}", *PARTS)
        if ref.dtype in (*FP8, "I8") and "scale" not in last and stem and stem in self.scales:
            return name, Foreign(f"{ref.dtype} with {self.scales[stem]}, and nothing names the method", ref), ()
        return None


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the config.json beside a checkpoint says of its quantisation; empty if there is none."""
    config = checkpoint.side_json("config.json") or {}
    found = next((config[key] for key in CONFIG_KEYS if key in config), None)
    return found if isinstance(found, dict) else {}


def _shape(stem: str, main: TensorRef, tensors: Mapping[str, TensorRef]) -> Shape:
    """The shape that a weight of a method that is not read has for adapters, as far as its parts tell."""
    parts = {part: tensors.get(f"{stem}.{part}") for part in ("g_idx", "scales", "weight_shape")}
    order, scales, shape = parts.values()
    last = main.name.rpartition(".")[2]
    if last.endswith("_blocks") and len(main.shape) == 4:  # [experts, out, in / 32, 16 bytes], transposed to be used
        return main.shape[0], main.shape[2] * 32, main.shape[1]
    if last == "qweight" and len(main.shape) == 2:  # packed along the inputs by GPTQ, along the outputs by AWQ
        if order is not None:
            return main.shape[1], order.numel
        return (scales.shape[-1], main.shape[0]) if scales is not None and scales.shape else main.shape
    if shape is not None and shape.numel <= 4:
        return tuple(map(int, shape.read().flatten().tolist()))
    if main.dtype == "U8" and len(main.shape) == 2 and last != "W_q":
        return main.shape[0], main.shape[1] * 2
    return main.shape


def _float(scheme: Scheme, shape: Shape, beside: tuple[TensorRef, ...] = ()) -> TensorRef:
    return TensorRef(scheme.parts[0].name, "F32", shape, Dequantised(scheme, beside), shape)


def _scaled(codes: TensorRef, scales: TensorRef, config: Mapping[str, Any]) -> Scaled:
    """fp8 with scales, whatever their tiles are: told by the shapes, and by the config where shapes leave it open."""
    if len(codes.shape) < 2 or not codes.numel:
        raise Unfit(f"{list(codes.shape)} is no matrix")
    columns = codes.shape[-1]
    count = codes.numel // columns
    tile = _tile(codes.shape, scales.shape, _block(config))
    if tile is None:
        raise Unfit(f"its scales are {list(scales.shape)}, which fits no tiling of {list(codes.shape)}")
    grid = scales.reshape(-(-count // tile[0]), -(-columns // tile[1]))
    powers = config.get("scale_fmt") == "ue8m0" or scales.dtype == "F8_E8M0"
    return Scaled(codes.reshape(count, columns), grid, tile, (codes, scales), powers)


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
    """The (rows, columns) of a block as a quantization_config has them: transformers' way, or compressed-tensors'."""
    groups = config.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    declared = [config.get("weight_block_size")] + [w.get("block_structure") for w in weights if isinstance(w, dict)]
    for size in declared:
        if isinstance(size, list) and len(size) == 2 and all(is_int(side) and side > 0 for side in size):
            return size[0], size[1]
    return BLOCK


def _tile(shape: Shape, scales: Shape, block: tuple[int, int]) -> tuple[int, int] | None:
    """The (rows, columns) of a tile of a weight [..., rows, columns], by the shape of its scales; None if none fits."""
    rows, columns = shape[-2:]
    if math.prod(scales) == 1:
        return math.prod(shape[:-1]), columns
    if len(scales) == len(shape) - 1:
        scales = (*scales, 1)
    if len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return None
    down, across = scales[-2:]
    tall = rows if down == 1 else 1 if down == rows else block[0] if -(-rows // block[0]) == down else 0
    wide = columns if across == 1 else block[1] if -(-columns // block[1]) == across else 0
    if tall == 1 and not wide and across and columns % across == 0:
        wide = columns // across  # groups, of any size
    if not tall or not wide or (len(shape) > 2 and rows % tall):
        return None
    return tall, wide


def _four_bit(name: str, packed: TensorRef, state: TensorRef, tensors: Mapping[str, TensorRef]) -> TensorRef:
    """bitsandbytes' 4 bits: the shape and the block sizes are JSON in the bytes of a tensor."""
    try:
        text = bytes(state.narrow(0, 0, min(state.numel, STATE_LIMIT)).read().tolist()).decode()
        facts: Any = strict_json(text, name, "E-QUANTISED", "")
        shape, block = tuple(map(int, facts["shape"])), int(facts["blocksize"])
        nested = None
        if f"{name}.nested_absmax" in tensors:
            outer = (tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"])
            nested = (*outer, int(facts["nested_blocksize"]), float(facts["nested_offset"]))
        absmax, table = tensors[f"{name}.absmax"], tensors[f"{name}.quant_map"]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, InvalidFile) as error:
        raise Unfit(f"its quant_state is broken or incomplete: {error}") from None
    blocks = -(-math.prod(shape) // block) if block > 0 else -1
    fits = packed.numel == -(-math.prod(shape) // 2) and absmax.shape == (blocks,) and table.shape == (16,)
    if nested is not None:
        fits &= nested[2] > 0 and nested[0].shape == (-(-blocks // nested[2]),) and nested[1].shape == (256,)
        fits &= absmax.dtype == "U8"
    if not fits or min(shape, default=0) < 1:
        raise Unfit(f"its parts do not fit a weight {list(shape)} in blocks of {block}")
    return _float(FourBit(packed, absmax, table, shape[-1], block, state, nested), shape)


def _eight_bit(codes: TensorRef, absmax: TensorRef, order: TensorRef | None) -> TensorRef:
    if len(codes.shape) != 2 or absmax.shape != codes.shape[:1]:
        raise Unfit(f"SCB is {list(absmax.shape)}, the weight {list(codes.shape)}")
    if order is not None and order.read().flatten().tolist() != [0]:
        raise Unfit("its weight_format is not row-major: save it again with a newer bitsandbytes")
    return _float(EightBit(codes, absmax, () if order is None else (order,)), codes.shape)

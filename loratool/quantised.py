"""Quantised checkpoints: which stored tensors are one weight together, and its numbers, some rows at a time.

`logical` shows a checkpoint as its layers compute with it: `X.weight` with its scales becomes one float32 tensor of the
weight's own shape, which adapters bind to. What can be read: fp8 with scales of blocks, channels, groups or the whole
tensor (DeepSeek, transformers, compressed-tensors), and bitsandbytes' nf4, fp4 and int8. Other methods are recognised
by the names of their parts, and are refused when an adapter wants to change one of their weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from loratool.checkpoint import Checkpoint
from loratool.container import strict_json
from loratool.errors import InvalidFile, Problem
from loratool.tensors import CHUNK, FLOATS, FileState, Shape, TensorRef, as_bytes, is_int

if TYPE_CHECKING:
    import torch

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")  # after the weight's name: DeepSeek and transformers; compressed-tensors
# Scales of the activations of a layer, which mean nothing once its weight is no longer quantised.
OF_ACTIVATIONS = ("input_scale", "activation_scale")
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
    ("scale_weight", "ComfyUI's scaled fp8"),
)
PARTS = (".qzeros", ".scales", ".g_idx", ".biases", ".scale_weight", ".weight_scale", ".weight_scale_2",
         ".weight_global_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")  # fmt: skip


class Scheme(Protocol):
    """How the numbers of one weight [rows, columns] are stored."""

    title: ClassVar[str]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop in float32."""

    @property
    def columns(self) -> int: ...

    @property
    def parts(self) -> Sequence[TensorRef]:
        """The stored tensors, of which the first has the weight's name."""


@dataclass(frozen=True)
class Scaled:
    """Codes [rows, columns] times the scale of the tile they lie in: W = q * scale.

    Scales are [tile rows, tile columns]; the last tiles of a row or column may be cut off. Per tensor is one tile, per
    channel a tile for each row, grouped a tile for so many columns of a row.
    """

    title: ClassVar[str] = "8 bits with scales"
    codes: TensorRef  # [rows, columns]
    scales: TensorRef  # [tile rows, tile columns]
    tile: tuple[int, int]
    whole: tuple[TensorRef, TensorRef]  # both as they are stored, of any number of dimensions
    powers_of_two: bool = False  # scales are to be such (DeepSeek's scale_fmt "ue8m0")

    @property
    def parts(self) -> Sequence[TensorRef]:
        return self.whole

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        q = self.codes.narrow(0, start, stop - start).read(torch.float32)  # [rows, columns]
        first, last = start // self.tile[0], -(-stop // self.tile[0])
        scale = self.scales.narrow(0, first, last - first).read(torch.float32)
        return q.mul_(self.spread(scale, start, stop))

    def spread(self, scale: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The scale of each element of rows start:stop, given those of the tile rows they lie in; or what broadcasts
        to it."""
        import torch

        height, width = self.tile
        which = torch.arange(start, stop, device="cpu") // height - start // height
        scale = scale[which] if len(scale) > 1 else scale  # [rows, tile columns]
        return scale if scale.shape[1] == 1 else scale.repeat_interleave(width, dim=1)[:, : self.columns]


@dataclass(frozen=True)
class FourBit:
    """bitsandbytes: two 4-bit codes per byte, the first in the upper half, an index into `table`; blocks of the
    flattened weight have one scale each. With `nested` the scales are 8-bit codes themselves, in blocks of their own.
    """

    title: ClassVar[str] = "bitsandbytes 4-bit"
    packed: TensorRef  # [ceil(rows * columns / 2), 1], U8
    absmax: TensorRef  # [blocks], F32; U8 if nested
    table: TensorRef  # [16]
    columns: int
    block: int
    state: TensorRef
    nested: tuple[TensorRef, TensorRef, int, float] | None = None  # absmax, table [256], block, offset

    @property
    def parts(self) -> Sequence[TensorRef]:
        return self.packed, self.absmax, self.table, self.state, *(self.nested[:2] if self.nested else ())

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        first, last = start * self.columns, stop * self.columns  # of the flattened weight
        pairs = self.packed.reshape(self.packed.numel).narrow(0, first // 2, -(-last // 2) - first // 2).read()
        codes = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1)[first % 2 :][: last - first]
        scale = self.scale(first // self.block, -(-last // self.block))
        which = torch.arange(first, last, device="cpu") // self.block - first // self.block
        table = self.table.read(torch.float32)
        return (table[codes.int()] * scale[which]).view(stop - start, self.columns)

    def scale(self, first: int, last: int) -> torch.Tensor:
        """The scales of blocks first:last, [last - first]."""
        import torch

        stored = self.absmax.narrow(0, first, last - first).read()
        if self.nested is None:
            return stored.float()
        absmax, table, block, offset = self.nested
        low, high = first // block, -(-last // block)
        outer = absmax.narrow(0, low, high - low).read(torch.float32)
        which = torch.arange(first, last, device="cpu") // block - low
        return table.read(torch.float32)[stored.int()] * outer[which] + offset


@dataclass(frozen=True)
class EightBit:
    """bitsandbytes LLM.int8(): W = q * SCB / 127, one SCB per row."""

    title: ClassVar[str] = "bitsandbytes int8"
    codes: TensorRef  # [rows, columns], I8
    absmax: TensorRef  # [rows]
    more: tuple[TensorRef, ...] = ()  # weight_format

    @property
    def parts(self) -> Sequence[TensorRef]:
        return self.codes, self.absmax, *self.more

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        import torch

        q = self.codes.narrow(0, start, stop - start).read(torch.float32)  # [rows, columns]
        scale = self.absmax.narrow(0, start, stop - start).read(torch.float32)  # [rows]
        return q.mul_(scale.unsqueeze(1)).mul_(1 / 127)


@dataclass(frozen=True)
class Dequantised:
    """The data of a weight that is stored quantised. `beside` are stored tensors that only serve its quantisation."""

    scheme: Scheme
    beside: tuple[TensorRef, ...] = ()
    path: None = None

    @property
    def state(self) -> FileState | None:
        return self.scheme.parts[0].data.state

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
    def state(self) -> FileState | None:
        return self.stored.data.state

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
            except _Unfit as unfit:
                what = f"{name} can not be dequantised: {unfit}"
                problems.append(Problem("E-QUANTISED", what, str(checkpoint.path), "is it complete?"))
    if problems:
        raise InvalidFile(problems)
    if not found:
        return checkpoint
    hidden = parts - found.keys()
    kept = {name: found.get(name, ref) for name, ref in checkpoint.tensors.items() if name not in hidden}
    return replace(checkpoint, tensors={**kept, **found})


class _Unfit(Exception):
    """The parts of a weight contradict each other."""


class _Look:
    """Looks at the stored tensors of one checkpoint, each of them once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors = checkpoint.tensors
        self.clean = {ref.name: name for name, ref in self.tensors.items()}  # by stored name
        self.configs = {name: _config(part) for name, part in (checkpoint.components or {"": checkpoint}).items()}
        # Layers with something that may be the scale of their weight: by the name without its last segment.
        scales = [name for name in self.tensors if "scale" in name.rpartition(".")[2]]
        self.scales = {name.rpartition(".")[0]: name for name in scales if not name.endswith(OF_ACTIVATIONS)}

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
        if ref.dtype in (*FP8, "I8") and f"{name}_zero_point" not in tensors:
            scale = next((tensors[name + suffix] for suffix in SCALES if name + suffix in tensors), None)
            if ref.dtype == "I8":
                scale = tensors.get(f"{name}_scale")  # beside another one, its bytes are pairs of 4-bit numbers
            if scale is not None and scale.dtype in (*FLOATS, "F8_E8M0"):
                beside = [tensors[f"{stem}.{n}"] for n in OF_ACTIVATIONS if f"{stem}.{n}" in tensors]
                return _float(_scaled(ref, scale, self.config(name)), ref.shape, tuple(beside))
        if ref.dtype == "U8":
            state = tensors.get(f"{name}.{NF4}nf4") or tensors.get(f"{name}.{NF4}fp4")
            return None if state is None else _four_bit(name, ref, state, tensors)
        if ref.dtype == "I8" and f"{stem}.SCB" in tensors:
            return _eight_bit(ref, tensors[f"{stem}.SCB"], tensors.get(f"{stem}.weight_format"))
        return None

    def foreign(self, name: str, ref: TensorRef) -> tuple[str, Foreign, tuple[str, ...]] | None:
        """A weight of a method that is not read, told by the names of its parts: its name, and what they end in."""
        if name.endswith("_blocks") and ref.dtype == "U8" and f"{name.removesuffix('_blocks')}_scales" in self.tensors:
            return name.removesuffix("_blocks"), Foreign("mxfp4", ref, hint=UNPACK_MXFP4), ("_blocks", "_scales")
        stem, _, last = name.rpartition(".")
        if last in MAIN:
            for suffix, method in FOREIGN:
                if f"{stem}.{suffix}" in self.tensors:
                    return f"{stem}.weight", Foreign(method, ref), (f".{last}", *PARTS)
        if ref.dtype in FP8 and "scale" not in last and stem and stem in self.scales:
            return name, Foreign(f"fp8 with {self.scales[stem]}", ref), ()
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
        raise _Unfit(f"{list(codes.shape)} is no matrix")
    columns = codes.shape[-1]
    count = codes.numel // columns
    tile = _tile(codes.shape, scales.shape, _block(config))
    if tile is None:
        raise _Unfit(f"its scales are {list(scales.shape)}, which fits no tiling of {list(codes.shape)}")
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
        raise _Unfit(f"its quant_state is broken or incomplete: {error}") from None
    blocks = -(-math.prod(shape) // block) if block > 0 else -1
    fits = packed.numel == -(-math.prod(shape) // 2) and absmax.shape == (blocks,) and table.shape == (16,)
    if nested is not None:
        fits &= nested[2] > 0 and nested[0].shape == (-(-blocks // nested[2]),) and nested[1].shape == (256,)
        fits &= absmax.dtype == "U8"
    if not fits or min(shape, default=0) < 1:
        raise _Unfit(f"its parts do not fit a weight {list(shape)} in blocks of {block}")
    return _float(FourBit(packed, absmax, table, shape[-1], block, state, nested), shape)


def _eight_bit(codes: TensorRef, absmax: TensorRef, order: TensorRef | None) -> TensorRef:
    if len(codes.shape) != 2 or absmax.shape != codes.shape[:1]:
        raise _Unfit(f"SCB is {list(absmax.shape)}, the weight {list(codes.shape)}")
    if order is not None and order.read().flatten().tolist() != [0]:
        raise _Unfit("its weight_format is not row-major: save it again with a newer bitsandbytes")
    return _float(EightBit(codes, absmax, () if order is None else (order,)), codes.shape)

"""Flux's original names, XLabs' for the same layers, and kohya's flattened ones, in diffusers' names.

diffusers has several modules where the original has one, stacked along the output: they share the down factor, and each
has its rows of the up factor. How many, its own shapes say. It also swaps the halves of one layer's output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from loratool.errors import Mismatch, Problem, Unsupported
from loratool.tensors import Computed, TensorRef

if TYPE_CHECKING:
    import torch

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    # XLabs': the attention processors' own, 1 for the image and 2 for the text
    "qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "proj_lora1": ("attn.to_out.0",),
    "proj_lora2": ("attn.to_add_out",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "proj_lora": ("proj_out",),
}
SWAPPED = "final_layer.adaLN_modulation.1"  # (shift, scale) in the original, (scale, shift) in diffusers
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    SWAPPED: "norm_out.linear",
}
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_XLABS = re.compile(r"_blocks\.\d+\.(qkv|proj)_lora[12]?$")
OUTPUTS = ("lora_B.weight", "lora_B.bias", "lora_magnitude_vector")  # parts with a row per output, the factor first
# The way back, where XLabs' names for the same modules come after the original's own.
_ORIGINAL = {
    kind: {own: name for name, owns in reversed(table.items()) for own in owns}
    for kind, table in (("double", _DOUBLE), ("single", _SINGLE))
}
_TOP_ORIGINAL = {own: name for name, own in _TOP.items()}
_DIFFUSERS_BLOCK = re.compile(r"(?P<single>single_)?transformer_blocks\.(?P<number>\d+)\.(?P<rest>.+)")
# kohya's: names flattened to one word, and what the parts are called in `flattened`
_FLAT_BLOCK = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
_FLAT = {name.replace(".", "_"): name for name in (*_DOUBLE, *_SINGLE, *_TOP)}
_FLAT_OUTPUTS = ("up", "diff", "diff_b", "magnitude")
_FLAT_PARTS = {"down", "alpha", *_FLAT_OUTPUTS}


def is_xlabs(module: str) -> bool:
    """Whether a module is called as XLabs' attention processors are: a name that no base has."""
    return _XLABS.search(module) is not None


def is_original(module: str) -> bool:
    """Whether a module of a block is called as in the original model: diffusers' own Flux has no such name."""
    return _BLOCK.fullmatch(module) is not None and bool(diffusers_modules(module))


def diffusers_modules(module: str) -> tuple[str, ...]:
    """The modules that diffusers has for one of the original: ``single_blocks.0.linear2`` -> its ``proj_out``."""
    match = _BLOCK.fullmatch(module)
    if match is None:
        return (_TOP[module],) if module in _TOP else ()
    kind, number, name = match.groups()
    blocks, table = ("transformer_blocks", _DOUBLE) if kind == "double" else ("single_transformer_blocks", _SINGLE)
    return tuple(f"{blocks}.{number}.{own}" for own in table.get(name, ()))


def original_module(module: str) -> str:
    """The module of the original model that diffusers' is, or is a part of; "" if there is none."""
    match = _DIFFUSERS_BLOCK.fullmatch(module)
    if match is None:
        return _TOP_ORIGINAL.get(module, "")
    kind = "single" if match["single"] else "double"
    name = _ORIGINAL[kind].get(match["rest"], "")
    return f"{kind}_blocks.{match['number']}.{name}" if name else ""


def original_of(flat: str) -> str:
    """The original module of a flattened name, "" if there is none: ``single_blocks_0_linear1`` -> with dots."""
    match = _FLAT_BLOCK.fullmatch(flat)
    if match is None:
        return _FLAT[flat] if _FLAT.get(flat) in _TOP else ""
    kind, number, name = match.groups()
    module = f"{kind}_blocks.{number}.{_FLAT.get(name, '')}"
    return module if diffusers_modules(module) else ""


def split_flat(
    flat: str, parts: Mapping[str, TensorRef], base: Mapping[str, TensorRef], where: str
) -> list[tuple[str, dict[str, TensorRef]]]:
    """A module of a flattened name by diffusers' modules, as `split` has it; [] if the base has none of them."""
    module, component = original_of(flat), component_of(base)
    if not module or component is None:
        return []
    before = f"{component}." if component else ""

    def rows_of(name: str) -> int | None:
        ref = base.get(f"{before}{name}.weight")
        return ref.shape[0] if ref is not None and ref.shape else None

    names = diffusers_modules(module)
    if any(rows_of(name) is None for name in names):
        return []
    scale = parts.get("dora_scale")
    # A magnitude of rows [out, 1] is parted like them; one of columns [1, in] belongs to all rows together.
    outputs = (*_FLAT_OUTPUTS, *(["dora_scale"] if scale is not None and scale.shape[:1] != (1,) else []))
    whole = {"dora_scale"} if len(names) == 1 else set()
    if (len(names) > 1 or module == SWAPPED) and (foreign := sorted(parts.keys() - _FLAT_PARTS - {*outputs} - whole)):
        what = f"{flat}: diffusers has {', '.join(names)} for it, and {', '.join(foreign)} can not be parted so"
        hint = "give the original model's file as the base (flux1-dev.safetensors and the like), not diffusers' folder"
        raise Unsupported(Problem("E-UNSUPPORTED", what, where, hint))
    return [*split(module, parts, rows_of, where, outputs)]


def component_of(base: Mapping[str, TensorRef]) -> str | None:
    """The component of a base in which Flux has diffusers' names ("" for it alone); None if there is none."""
    for component in ("transformer", ""):
        before = f"{component}." if component else ""
        if any(name.startswith((f"{before}transformer_blocks.", f"{before}single_transformer_")) for name in base):
            return component
    return None


def split(
    module: str,
    parts: Mapping[str, TensorRef],
    rows_of: Callable[[str], int | None],
    where: str,
    outputs: Collection[str] = OUTPUTS,
) -> Iterator[tuple[str, dict[str, TensorRef]]]:
    """A module's parts, by diffusers' modules. `rows_of` is the number of outputs that the base has for one of them.

    `outputs` are the parts with a row per output, the left factor first.
    """
    names = diffusers_modules(module)
    whole = next((parts[part].shape[0] for part in outputs if part in parts and parts[part].shape), 0)
    if len(names) == 1 or not whole:
        moves = outputs if module == SWAPPED else ()
        yield names[0], {part: swapped(ref) if part in moves else ref for part, ref in parts.items()}
        return
    rows = [rows_of(name) or 0 for name in names]
    if sum(rows) != whole:
        what = f"{module} has {whole} outputs, the base's {', '.join(names)} have {rows}"
        raise Mismatch(Problem("E-SHAPE", what, where, "is this the adapter's base?"))
    for name, count, start in zip(names, rows, (sum(rows[:n]) for n in range(len(rows))), strict=True):
        yield name, {p: ref.narrow(0, start, count) if p in outputs else ref for p, ref in parts.items()}


def swapped(ref: TensorRef) -> TensorRef:
    """The two halves of the rows, the second one first."""

    def make() -> torch.Tensor:
        import torch

        return torch.cat(ref.read().chunk(2)[::-1])  # [out, ...]

    return TensorRef(ref.name, ref.dtype, ref.shape, Computed(make), ref.shape)

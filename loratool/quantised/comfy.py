"""Weights that ComfyUI's library quantised: each layer says how, and shapes would not tell.

`X.comfy_quant` is JSON in the bytes of a tensor (``{"format": "float8_e4m3fn"}``), and the header's
`_quantization_metadata` lists the same for all layers; the scales are `X.weight_scale`. Files of before have
`X.scale_weight` and a tensor `scaled_fp8`. Reference: comfy-kitchen, with which the tests compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.checkpoint import Checkpoint
from loratool.container import strict_json
from loratool.errors import InvalidFile, Problem
from loratool.quantised.schemes import TALL, WIDE, Microscaled, Rotated, Scaled, Scheme
from loratool.tensors import FLOATS, TensorRef

MARKER = ".comfy_quant"
HEADER_KEY = "_quantization_metadata"
OLD_MARKER = "scaled_fp8"
MARKER_LIMIT = 1 << 16  # bytes of its JSON, which has about 60
OF_INPUTS = ("input_scale", "scale_input", "activation_scale")  # of a layer's inputs: nothing without its weight's
FP8_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


class Unfit(Exception):
    """The parts of a weight contradict each other, or are not complete."""


@dataclass(frozen=True)
class Method:
    """What a layer says of its quantisation; `marker` is the tensor that says it, if one does."""

    facts: Mapping[str, Any]
    marker: TensorRef | None = None

    @property
    def format(self) -> str:
        return str(self.facts.get("format", "without a format"))[:60]


def methods(checkpoint: Checkpoint) -> dict[str, Method]:
    """What each layer says, by its name. Raises InvalidFile for markers that can not be read or contradict others."""
    found = {
        name.removesuffix(MARKER): Method(_parsed(name, ref), ref)
        for name, ref in checkpoint.tensors.items()
        if name.endswith(MARKER) and ref.dtype == "U8"
    }
    parts = checkpoint.components or {"": checkpoint}
    clean = {ref.name: name for name, ref in checkpoint.tensors.items()}
    for component, part in parts.items():
        for stored, facts in _of_header(part).items():
            path = f"{component}.{stored}" if component else stored
            name = clean.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")
            known = found.get(name)
            if known is not None and known.facts.get("format") != facts.get("format"):
                what = f"{name} is {known.format} by its {MARKER[1:]}, {facts.get('format')!r:.60} by the header"
                raise InvalidFile(Problem("E-QUANTISED", what, str(checkpoint.path), "quantise the model again"))
            found.setdefault(name, Method(facts))
    return found


def scheme_of(name: str, ref: TensorRef, method: Method, tensors: Mapping[str, TensorRef]) -> Scheme | None:
    """How the numbers of a marked weight are read; None for a format that is not.

    Raises Unfit for parts that are not as the format has them.
    """
    scale = tensors.get(f"{name}_scale")
    if method.format in FP8_FORMATS and ref.dtype == FP8_FORMATS[method.format]:
        return _tensorwise(ref, _needed(scale))
    if method.format == "mxfp8" and ref.dtype == "F8_E4M3":
        return _microscaled(ref, _needed(scale))
    if method.format == "int8_tensorwise" and ref.dtype == "I8":
        return _int8(ref, _needed(scale), method)
    if method.format in (*FP8_FORMATS, "mxfp8", "int8_tensorwise"):
        raise Unfit(f"its marker says {method.format}, and it is stored as {ref.dtype}")
    return None


def old_scaled(ref: TensorRef, scale: TensorRef) -> Scheme:
    """`X.scale_weight`, one number: W = q * scale."""
    return _tensorwise(ref, scale)


def beside(name: str, method: Method | None, tensors: Mapping[str, TensorRef]) -> tuple[TensorRef, ...]:
    """The stored tensors that only serve the quantisation of a weight: its marker, the scales of the layer's inputs."""
    stem = name.removesuffix(".weight")
    found = [tensors[f"{stem}.{other}"] for other in OF_INPUTS if f"{stem}.{other}" in tensors]
    return (*found, *((method.marker,) if method is not None and method.marker is not None else ()))


def old_markers(tensors: Mapping[str, TensorRef]) -> tuple[TensorRef, ...]:
    return tuple(ref for name, ref in tensors.items() if name.rpartition(".")[2] == OLD_MARKER)


def _parsed(name: str, ref: TensorRef) -> Mapping[str, Any]:
    try:
        text = bytes(ref.narrow(0, 0, min(ref.numel, MARKER_LIMIT)).read().tolist()).decode()
        facts = strict_json(text, name, "E-QUANTISED", "")
    except (ValueError, IndexError, InvalidFile) as error:
        raise InvalidFile(Problem("E-QUANTISED", f"{name} can not be read: {error}", name, "is it complete?")) from None
    return facts if isinstance(facts, dict) else {}


def _of_header(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, Any]]:
    text = checkpoint.metadata.get(HEADER_KEY)
    if text is None:
        return {}
    document = strict_json(text, str(checkpoint.path), "E-QUANTISED", "")
    layers = document.get("layers") if isinstance(document, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(facts, dict) for facts in layers.values()):
        what = f"{HEADER_KEY} in the header lists no layers"
        raise InvalidFile(Problem("E-QUANTISED", what, str(checkpoint.path), "quantise the model again"))
    return layers


def _needed(scale: TensorRef | None) -> TensorRef:
    if scale is None:
        raise Unfit("its weight_scale is missing")
    return scale


def _tensorwise(codes: TensorRef, scale: TensorRef) -> Scaled:
    if scale.numel != 1 or scale.dtype not in FLOATS or not codes.shape:
        raise Unfit(f"its scale is {scale.dtype} {list(scale.shape)}, and one number is due")
    columns = codes.shape[-1]
    count = codes.numel // max(1, columns)
    return Scaled(codes.reshape(count, columns), scale.reshape(1, 1), (max(1, count), columns), (codes, scale))


def _microscaled(codes: TensorRef, exponents: TensorRef) -> Microscaled:
    if len(codes.shape) != 2 or codes.shape[1] % 32:
        raise Unfit(f"{list(codes.shape)} is no matrix of blocks of 32 columns")
    rows, blocks = codes.shape[0], codes.shape[1] // 32
    due = (-(-rows // TALL) * TALL, -(-blocks // WIDE) * WIDE)
    if exponents.dtype not in ("F8_E8M0", "U8") or exponents.numel != due[0] * due[1]:
        raise Unfit(f"its scales are {exponents.dtype} {list(exponents.shape)}, and {list(due)} exponents are due")
    return Microscaled(codes, exponents.reshape(*due))


def _int8(codes: TensorRef, scale: TensorRef, method: Method) -> Scheme:
    if len(codes.shape) != 2 or scale.numel not in (1, codes.shape[0]) or scale.dtype not in FLOATS:
        raise Unfit(f"its scale is {scale.dtype} {list(scale.shape)}, the weight {list(codes.shape)}")
    rows, columns = codes.shape
    if method.facts.get("convrot") is True:
        group = method.facts.get("convrot_groupsize", 256)
        if group not in (4, 16, 64, 256, 1024, 4096) or columns % group:
            raise Unfit(f"it is rotated in groups of {group!r:.20}, and has {columns} columns")
        return Rotated(codes, scale, int(group))
    tall = rows if scale.numel == 1 else 1
    return Scaled(codes, scale.reshape(scale.numel, 1), (tall, columns), (codes, scale))

"""LyCORIS: LoCon, LoHa, LoKr, DoRA, full differences and norms, in files like kohya's.

Per module, after its flattened name (`lycoris_...` or sd-scripts' prefixes):

    lora_down, lora_up, lora_mid .weight          up @ down, with a Tucker core [rank, rank, kernel...]
    hada_w1_a [out, rank], hada_w1_b [rank, in*kernel], hada_w2_a, hada_w2_b; with hada_t1, hada_t2 w*_a is [rank, out]
    lokr_w1 or lokr_w1_a @ lokr_w1_b; lokr_w2 or lokr_w2_a @ lokr_w2_b; with lokr_t2 w2_a is [rank, b]
    diff, diff_b, w_norm, b_norm                  differences of weight and bias
    diff_m                                        difference of the module's own parameter `modulation` (Wan's)
    set_weight, reshape_weight                    ComfyUI's: a whole weight; the shape of one that gets more inputs
    dora_scale [out, 1...] or [1, in, 1...]       DoRA's magnitude, and by its shape the axis of the norm
    magnitude, lora_magnitude_vector [out]        the same by other trainers' names, one number per output
    weight [out] or [in], on_input 0 or 1         IA3: W' = W (1 + w) by rows, or by columns; no scale
    a1 [in, rank], a2 [rank, in]; b1 [out, rank], b2 [rank, in, kernel...], each .weight     GLoRA: (W a1) a2 + b1 b2
    alpha                                         scale = alpha / rank, whatever the trainer's rule was

What is learned is what LyCORIS's forward computes; its `merge_to` applies the scale of LoHa and LoKr twice.
GLoRA changes the base's weights by what these are: given the base, it is a LoRA. IA3 only needs their shape.
OFT and BOFT rotate the base's weights, and are refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.conventions import kohya, lycoris_write, of_base
from loratool.conventions.choices import Choices
from loratool.conventions.flattened import (
    FlatReader,
    Foreign,
    Module,
    Piece,
    bare,
    may_be_flattened,
    number,
)
from loratool.conventions.headers import training_args
from loratool.errors import InvalidFile, Mismatch, Problem, Unsupported
from loratool.maps.cutting import Derived
from loratool.tensors import Shape, TensorRef, torch_dtype
from loratool.updates import RULES, Add, Dora, Loha, Lokr, Lora, Replace, Scale, Scaling

if TYPE_CHECKING:
    import torch

NAME = "lycoris"
TITLE = "LyCORIS adapter"
KINDS = ("lora", "dora", "loha", "lokr", "scale", "replace", "add")
TESTED = "lycoris-lora 4.1.3"
OPTIONS = ("component", "uniform", "base_name")
SUFFIXES = (".safetensors",)
ASKS = ("alpha", "scaling", "components")
CONDITIONS: tuple[str, ...] = ()
misfits, write = lycoris_write.misfits, lycoris_write.write

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_GLORA = ("a1", "a2", "b1", "b2")
_IA3 = {"weight": "w", "on_input": "on_input"}
_INTEGERS = {"I32": "i", "I64": "q"}  # their codes in struct
_WHOLE = ("diff", "diff_b", "w_norm", "b_norm")
_MAGNITUDES = ("magnitude", *kohya.PEFT_MAGNITUDES)
PARTS = {
    **kohya.PARTS,
    "lora_mid.weight": "mid",
    **{part: part for part in (*_HADA, *_LOKR, *_WHOLE, "dora_scale")},
    **{f"{part}.weight": part for part in _GLORA},
    **dict.fromkeys(_MAGNITUDES, "magnitude"),
    "diff_m": "diff_m",
    "set_weight": "set",
    "reshape_weight": "reshaped",
}

# Methods whose change is no kind of update, even where the base is known.
_MERGE = "let LyCORIS (or the trainer) merge it into the base, and take that model as the base from then on"
OFT = Foreign("OFT", "it rotates the base's weights, W' = R W", _MERGE)
BOFT = Foreign("BOFT", "it rotates the base's weights with butterfly factors, W' = R1 R2 ... W", _MERGE)
TUCKER = Foreign("GLoRA with a Tucker core", "no version of LyCORIS that is known writes one", _MERGE)
TLORA = Foreign("T-LoRA", "its rank depends on the time step, and its delta on factors that it started from", _MERGE)
FOREIGN = {
    **kohya.FOREIGN,
    **dict.fromkeys(kohya.OFT_PARTS, OFT),
    "bm.weight": TUCKER,
    **dict.fromkeys(("q_layer.weight", "p_layer.weight", "lambda_layer"), TLORA),
}


def detect(source: Checkpoint) -> bool:
    return may_be_flattened(source) and kohya.is_lycoris(source)


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    told = training_args(source)
    rescaled = str(told.get("rs_lora", "")).lower() == "true" if told else None
    # IA3's `weight` is too common a name to be looked for where there is nothing else of IA3.
    parts = PARTS | (_IA3 if any(name.endswith(".on_input") for name in source.tensors) else {})

    def pieces(module: Module, region: Shape | None) -> Iterator[Piece]:
        return _pieces(module, region, rescaled)

    adapter = FlatReader(source, choices, base, parts, FOREIGN, _method, pieces).adapter(NAME)
    return replace(adapter, notes=(*adapter.notes, *_unused_alpha(source)))


def _unused_alpha(source: Checkpoint) -> Iterator[str]:
    """Where whole LoKr factors have an alpha that LyCORIS would not have stored: it writes the dimension there."""
    dim = source.metadata.get("ss_network_dim", "")
    whole = [name.removesuffix(".lokr_w1") for name in source.tensors if name.endswith(".lokr_w1")]
    refs = [source.tensors.get(f"{owner}.alpha") for owner in whole if f"{owner}.lokr_w2" in source.tensors]
    alphas = {number(ref) for ref in refs if ref is not None}
    if dim.isdecimal() and int(dim) and len(alphas) == 1 and (alpha := alphas.pop()) != int(dim):
        what = f"two whole LoKr factors have a scale of 1, as LyCORIS loads them; the file says alpha {alpha:g}"
        weight = f"ADAPTER@{alpha / int(dim):g}"
        yield f"{what} and dimension {dim}: if it was trained with their ratio, give the weight, {weight}"


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return {}


def _method(part: str, ref: TensorRef) -> Foreign:
    """OFT has one stack of blocks [blocks, size, size]; BOFT several, one after the other."""
    return BOFT if part == "oft_blocks" and len(ref.shape) == 4 else FOREIGN[part]


def _pieces(module: Module, region: Shape | None, rescaled: bool | None) -> Iterator[Piece]:
    """What the parts of one module do: one algorithm for its weight, and perhaps a difference of its bias."""
    parts = module.parts
    algorithms: dict[str, set[str]] = {
        "LoCon": parts.keys() & {"down", "up", "mid"},
        "LoHa": parts.keys() & set(_HADA),
        "LoKr": parts.keys() & set(_LOKR),
        "GLoRA": parts.keys() & set(_GLORA),
        "IA3": parts.keys() & set(_IA3.values()),
        "full": parts.keys() & {"diff"},
        "norm": parts.keys() & {"w_norm"},
        "a whole weight": parts.keys() & {"set"},
    }
    if (reshaped := parts.get("reshaped")) is not None:
        _check_reshaped(module, reshaped)
    used = [name for name, found in algorithms.items() if found]
    if len(used) > 1:
        what = f"{module.key} has parts of {' and '.join(used)}: their combination is not defined"
        raise InvalidFile(Problem("E-COMPONENTS", what))
    if algorithms["LoCon"]:
        yield _decomposed(module, kohya.lora(module, region), region is not None)
    elif algorithms["LoHa"]:
        yield _decomposed(module, _loha(module, region), region is not None)
    elif algorithms["LoKr"]:
        yield _decomposed(module, _lokr(module, region, rescaled), region is not None)
    elif algorithms["GLoRA"]:
        yield _without_magnitude(module, _glora(module, region, rescaled))
    elif algorithms["IA3"]:
        yield _without_magnitude(module, _ia3(module, region))
    elif algorithms["full"] or algorithms["norm"]:
        yield _without_magnitude(module, _difference(module, parts["diff" if "diff" in parts else "w_norm"], region))
    elif algorithms["a whole weight"]:
        yield _without_magnitude(module, _whole(module, parts["set"], region))
    elif not parts.keys() & {"diff_b", "b_norm"} or parts.keys() & {"dora_scale", "magnitude"}:
        raise InvalidFile(Problem("E-COMPONENTS", f"{module.key} has only {', '.join(parts)}, and no factors"))
    biases = [parts[part] for part in ("diff_b", "b_norm") if part in parts]
    for value in biases:
        yield Piece("bias", value.shape, _add(value))


def _add(value: TensorRef) -> Add:
    return Add(value, Scaling("none", None, None, 1.0))


def _difference(module: Module, value: TensorRef, region: Shape | None) -> Piece:
    fitted = module.fit(value.shape, region)
    return Piece("weight", fitted, _add(value.reshape(*fitted)))


def _whole(module: Module, value: TensorRef, region: Shape | None) -> Piece:
    fitted = module.fit(value.shape, region)
    return Piece("weight", fitted, Replace(value.reshape(*fitted)))


def _without_magnitude(module: Module, piece: Piece) -> Piece:
    if found := sorted(module.parts.keys() & {"dora_scale", "magnitude"}):
        raise InvalidFile(Problem("E-COMPONENTS", f"{module.key} has a {found[0]} and no factors that it is for"))
    return piece


def _ia3(module: Module, region: Shape | None) -> Piece:
    """One w per output or input; stored [n], or of convolutions [1, n, 1...]."""
    w, flag = kohya.pair(module, "w", "on_input", "weight", "on_input")
    axis, length = number(flag), math.prod(w.shape)
    if axis not in (0, 1):
        raise InvalidFile(Problem("E-SHAPE", f"{module.key}: on_input is {axis:g}, neither 0 nor 1"))
    if not length or sum(dim != 1 for dim in w.shape) > 1:
        raise InvalidFile(Problem("E-SHAPE", f"{module.key}: IA3's weight is {list(w.shape)}, not one row of numbers"))
    if region is None or module.stored is None:
        module.doubts.add("IA3 has one side of each weight: only the base can tell the other")
        return Piece("weight", (length,), Scale(_one_more(w, length), 0))
    if len(region) < 2 or region[int(axis)] != length:
        what = (
            f"{module.key}: IA3's weight has {length} numbers, for the {'inputs' if axis else 'outputs'} of the base's"
        )
        raise Mismatch(Problem("E-SHAPE", f"{what} {list(region)}", hint="is this the adapter's base?"))
    return Piece("weight", region, Scale(_one_more(w, length), int(axis)))


def _one_more(w: TensorRef, length: int) -> TensorRef:
    """1 + w [length], the factors: in float64, which holds what float32 would round away."""

    def make() -> torch.Tensor:
        return w.read(torch_dtype("F64")).reshape(length) + 1

    return TensorRef(w.name, "F64", (length,), Derived(w, make), (length,))


def _glora(module: Module, region: Shape | None, rescaled: bool | None) -> Piece:
    """(W a1) a2 + b1 b2 as one product, [b1 | W a1] times b2 over a2; a1, a2 and b1 have kernels of size 1."""
    b1, b2 = kohya.pair(module, "b1", "b2", "b1.weight", "b2.weight")
    a1, a2 = kohya.pair(module, "a1", "a2", "a1.weight", "a2.weight")
    shapes = f"{module.key}: " + ", ".join(f"{part} {list(module.parts[part].shape)}" for part in _GLORA)
    small = [a1, a2, b1]
    if any(len(ref.shape) < 2 or math.prod(ref.shape[2:]) != 1 for ref in small) or len(b2.shape) < 2 or not b2.numel:
        raise InvalidFile(Problem("E-SHAPE", f"{shapes}; they must be matrices, only b2 with a kernel"))
    a1, a2, b1 = (ref.reshape(*ref.shape[:2]) for ref in small)
    (inputs, rank), (out, own) = a1.shape, b1.shape
    if a2.shape != (rank, inputs) or b2.shape[:2] != (own, inputs) or not rank * own * out:
        needs = "; they must be a1 [in, rank], a2 [rank, in], b1 [out, rank], b2 [rank, in, ...]"
        raise InvalidFile(Problem("E-SHAPE", shapes + needs))
    fitted = module.fit((out, *b2.shape[1:]), region)
    if module.stored is None:
        module.doubts.add("GLoRA's delta has the base's weights in it, (W a1) a2: only the base can tell it")
    else:
        module.notes.add("GLoRA as a LoRA with this base's weights in it, W a1: it is for no other base")
    A, B = of_base.spread(a2, b2.reshape(own, *fitted[1:]), fitted), of_base.sent_through(a1, b1, fitted, module.stored)
    return Piece("weight", fitted, Lora(A, B, _glora_scaling(module, own, B.shape[1], rescaled)))


def _glora_scaling(module: Module, rank: int, inner: int, rescaled: bool | None) -> Scaling:
    """Both halves have the scale of one; `inner` is the rank of their sum. Unlike others', this alpha stays raw."""
    scaling = module.scaling(rank)
    scale = scaling.factor
    if rescaled is None:
        module.notes.add(
            "GLoRA: no metadata says whether it was trained with rs_lora; alpha / rank, as LyCORIS loads it"
        )
    elif rescaled and scaling.alpha is not None and "alpha" in module.parts:
        scale = RULES["alpha/sqrt(rank)"](scaling.alpha, rank)
        module.notes.add(
            "GLoRA with rs_lora: trained with alpha / sqrt(rank), though LyCORIS loads it with alpha / rank"
        )
    return Scaling("none", inner, None, scale)


def _loha(module: Module, region: Shape | None) -> Piece:
    a1, b1 = kohya.pair(module, "hada_w1_a", "hada_w1_b")
    a2, b2 = kohya.pair(module, "hada_w2_a", "hada_w2_b")
    core = [module.parts[part] for part in ("hada_t1", "hada_t2") if part in module.parts]
    _matrices(module, a1, b1, a2, b2)
    if len(core) == 1:
        raise InvalidFile(Problem("E-COMPONENTS", f"{module.key} has only one of hada_t1 and hada_t2"))
    if core:  # w*_a is [rank, out]
        rank, out = a1.shape
        made = (out, b1.shape[1], *core[0].shape[2:])
        fitted = module.fit(made, region)
        update = Loha(b1, a1.T, b2, a2.T, module.scaling(rank), core[0], core[1])
    else:
        out, rank = a1.shape
        fitted = module.fit((out, b1.shape[1]), region, flat=True)
        A1, A2 = (_reshaped(module, b, (b.shape[0], *fitted[1:])) for b in (b1, b2))
        update = Loha(A1, a1, A2, a2, module.scaling(rank))
    return Piece("weight", fitted, update)


def _lokr(module: Module, region: Shape | None, rescaled: bool | None) -> Piece:
    """Kronecker factors: a and c are the first one's rows and columns, b and d the second one's."""
    parts = module.parts
    w1, w2, core = parts.get("lokr_w1"), parts.get("lokr_w2"), parts.get("lokr_t2")
    B1 = A1 = B2 = A2 = None
    if w1 is None:
        B1, A1 = kohya.pair(module, "lokr_w1_a", "lokr_w1_b", "lokr_w1 or lokr_w1_a", "lokr_w1 or lokr_w1_b")
        _matrices(module, B1, A1)
        a, c = B1.shape[0], A1.shape[1]
    else:
        _matrices(module, w1)
        a, c = w1.shape
    if w2 is not None:
        made: Shape = w2.shape
    else:
        B2, A2 = kohya.pair(module, "lokr_w2_a", "lokr_w2_b", "lokr_w2 or lokr_w2_a", "lokr_w2 or lokr_w2_b")
        _matrices(module, B2, A2)
        B2 = B2.T if core is not None else B2  # stored as [rank, b] with a core
        made = (B2.shape[0], A2.shape[1], *(core.shape[2:] if core is not None else ()))
    if extra := [part for part in _LOKR if part in parts and part[:7] in parts and part[:7] != part]:
        raise InvalidFile(Problem("E-COMPONENTS", f"{module.key} has both {extra[0]} and {extra[0][:7]}"))
    if len(made) < 2 or not made[0] * made[1]:
        raise InvalidFile(Problem("E-SHAPE", f"{module.key}: the second factor is {list(made)}"))
    fitted = module.fit((a * made[0], c * made[1], *made[2:]), region, flat=w2 is None and core is None)
    second = (fitted[1] // c if c else 0, *fitted[2:])  # [d, kernel...]
    if A2 is not None and core is None:
        A2 = _reshaped(module, A2, (A2.shape[0], *second))
    if w2 is not None:
        w2 = _reshaped(module, w2, (w2.shape[0], *second))
    scaling = _lokr_scaling(module, A1 or A2, rescaled)
    return Piece("weight", fitted, Lokr(scaling, w1, A1, B1, w2, A2, B2, core))


def _lokr_scaling(module: Module, low_rank: TensorRef | None, rescaled: bool | None) -> Scaling:
    """alpha / rank where a factor is of low rank. Two whole factors have a scale of 1, whatever alpha says."""
    if low_rank is not None:
        return module.scaling(low_rank.shape[0])
    if rescaled:
        what = f"{module.key}: rs_lora with two whole LoKr factors has a scale that the file does not hold"
        raise Unsupported(Problem("E-UNSUPPORTED", what, hint="let LyCORIS merge it"))
    return Scaling("none", None, None, 1.0)


def _decomposed(module: Module, piece: Piece, known: bool) -> Piece:
    """The update with DoRA's magnitude on it, if there is one. Its shape says along which axis it lies."""
    magnitude, outputs = module.parts.get("dora_scale"), module.parts.get("magnitude")
    if magnitude is not None and outputs is not None:
        what = f"{module.key} has two magnitudes, {magnitude.name} and {outputs.name}"
        raise InvalidFile(Problem("E-DUPLICATE", what))
    if outputs is not None:
        if outputs.numel != piece.region[0]:
            what = f"{module.key}: {outputs.name} is {list(outputs.shape)}, for {piece.region[0]} outputs"
            raise InvalidFile(Problem("E-SHAPE", what))
        return piece._replace(update=Dora(piece.update, outputs.reshape(outputs.numel), axis=0))
    if magnitude is None:
        return piece
    shape, (rows, columns) = bare(magnitude.shape), piece.region[:2]
    lengths: list[Shape] = [(rows, 1), (1, columns)]
    if not known and len(shape) == 2 and shape[0] == 1 and shape[1] and columns % shape[1] == 0:
        lengths[1] = shape  # the base would tell how many of the columns are a kernel's
    if shape not in lengths:
        what = f"{module.key}: dora_scale is {list(magnitude.shape)}, neither [out, 1, ...] nor [1, in, ...]"
        raise InvalidFile(Problem("E-SHAPE", f"{what} of {list(piece.region)}"))
    axis = lengths.index(shape)
    return piece._replace(update=Dora(piece.update, magnitude.reshape(magnitude.numel), axis))


def _check_reshaped(module: Module, ref: TensorRef) -> None:
    """ComfyUI pads a weight to the shape in `reshape_weight`, which is to be that of the update itself."""
    down, up = kohya.pair(module, "down", "up", "lora_down", "lora_up")
    made = (*up.shape[:1], *down.shape[1:])
    if ref.dtype not in _INTEGERS or len(ref.shape) != 1 or ref.numel != len(made):
        raise InvalidFile(Problem("E-SHAPE", f"{ref.name} is {ref.dtype} {list(ref.shape)}, not the shape of a weight"))
    raw = b"".join(map(bytes, ref.chunks()))
    if (shape := struct.unpack(f"<{ref.numel}{_INTEGERS[ref.dtype]}", raw)) != made:
        what = f"{module.key}: reshape_weight is {list(shape)}, its factors make {list(made)}"
        raise InvalidFile(Problem("E-SHAPE", what))


def _matrices(module: Module, *refs: TensorRef) -> None:
    for ref in refs:
        if len(ref.shape) != 2 or not ref.numel:
            raise InvalidFile(Problem("E-SHAPE", f"{module.key}: {ref.name} is {list(ref.shape)}, not a matrix"))


def _reshaped(module: Module, ref: TensorRef, shape: Shape) -> TensorRef:
    if ref.numel != math.prod(shape):
        what = f"{module.key}: {ref.name} is {list(ref.shape)}, which is not {list(shape)}"
        raise Mismatch(Problem("E-SHAPE", what))
    return ref.reshape(*shape)

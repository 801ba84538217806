"""kohya's sd-scripts, and what ComfyUI reads like it: one file, a pair of factors and an alpha per module.

    lora_unet_down_blocks_0_..._to_q.lora_down.weight [rank, in, kernel...]   .lora_up.weight [out, rank, 1...]   .alpha

The scale is alpha / rank, and 1 without alpha. How modules are found in the base is told in `flattened`.
sd-scripts' `split_qkv` trains q, k and v apart and saves them stacked: down [3 * rank, in], up block-diagonal, alpha
as it was. Every loader, its own included, then scales by alpha / (3 * rank), and so does a merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.conventions import kohya_write
from loratool.conventions.choices import Choices
from loratool.conventions.flat_names import PIPELINE, component_of
from loratool.conventions.flattened import (
    FlatReader,
    Foreign,
    Module,
    Piece,
    may_be_flattened,
    parts_pattern,
)
from loratool.conventions.headers import training_args
from loratool.errors import InvalidFile, Problem
from loratool.tensors import Shape, TensorRef
from loratool.updates import Lora

NAME = "kohya"
TITLE = "kohya sd-scripts LoRA"
KINDS = ("lora",)
TESTED = "diffusers 0.42.1 as consumer"
OPTIONS = ("component", "uniform", "base_name")
SUFFIXES = (".safetensors",)
ASKS = ("alpha", "scaling", "components")
CONDITIONS: tuple[str, ...] = ()
misfits, write = kohya_write.misfits, kohya_write.write

FACTORS = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_A.weight": "down", "lora_B.weight": "up"}
PARTS = {**FACTORS, "alpha": "alpha"}
FOREIGN: dict[str, Foreign] = {}

# Parts that only LyCORIS writes, the first group under any name, the second where a component goes before them.
LYCORIS_PARTS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "lora_mid.weight", "dora_scale",
)  # fmt: skip
DIFFERENCES = ("diff", "diff_b", "diff_m", "w_norm", "b_norm", "set_weight", "reshape_weight", "magnitude")
OFT_PARTS = ("oft_blocks", "oft_diag", "oft_R.weight", *(f"oft_blocks.{number}" for number in range(8)))
LYCORIS_SHORT_PARTS = (
    *DIFFERENCES, *OFT_PARTS, "on_input", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight",
    "q_layer.weight", "p_layer.weight", "lambda_layer",
)  # fmt: skip
# PEFT's names for DoRA's magnitude, which some scripts leave under a flattened name.
PEFT_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")


def detect(source: Checkpoint) -> bool:
    """Factors, and nothing of LyCORIS. `lora_A` and `lora_B` after dots are diffusers' and PEFT's names, too."""
    factors = parts_pattern(FACTORS)
    matches = [match for match in map(factors.fullmatch, source.tensors) if match]
    return (
        may_be_flattened(source)
        and not is_lycoris(source)
        and any("down" in m["part"] or "up" in m["part"] or _is_flattened(m["module"]) for m in matches)
    )


def _is_flattened(module: str) -> bool:
    return "." not in module and bool(component_of(module).prefix)


def is_lycoris(source: Checkpoint) -> bool:
    """Whether a file of this family is LyCORIS's: by parts that only it has, or by what it says of its trainer."""
    if source.metadata.get("ss_network_module", "").startswith("lycoris"):
        return True
    patterns = {prefix: parts_pattern(parts) for prefix, parts in _TELLING.items()}
    return any(
        name.startswith("lycoris_") or patterns[_beginning(component_of(name).prefix)].fullmatch(name)
        for name in source.tensors
    )


# What tells by the kind of a key's beginning: none, a pipeline's component, another one with dots, a flattened one.
_TELLING = {
    "": LYCORIS_PARTS,
    "pipeline": (*LYCORIS_PARTS, *DIFFERENCES),
    "dotted": (*LYCORIS_PARTS, *LYCORIS_SHORT_PARTS),
    "flat": (*LYCORIS_PARTS, *LYCORIS_SHORT_PARTS, *PEFT_MAGNITUDES),
}


def _beginning(prefix: str) -> str:
    if not prefix or prefix in PIPELINE:
        return "pipeline" if prefix else ""
    return "flat" if prefix.endswith("_") else "dotted"


def read(source: Checkpoint, choices: Choices, base: Mapping[str, TensorRef] | None) -> Adapter:
    adapter = FlatReader(source, choices, base, PARTS, FOREIGN, _method, _pieces).adapter(NAME)
    if str(training_args(source).get("split_qkv", "")).lower() == "true":
        note = "trained with split_qkv: its scale is alpha / (rank of q, k and v together), as sd-scripts loads it"
        adapter = replace(adapter, notes=(*adapter.notes, note))
    return adapter


def unwrap(source: Checkpoint, choices: Choices) -> Mapping[str, TensorRef]:
    return {}


def _method(part: str, ref: TensorRef) -> Foreign:
    return FOREIGN[part]


def _pieces(module: Module, region: Shape | None) -> Iterator[Piece]:
    yield lora(module, region)


def lora(module: Module, region: Shape | None) -> Piece:
    """The update of down [rank, in, kernel...] and up [out, rank, 1...], perhaps with a core between them."""
    down, up = pair(module, "down", "up", "lora_down", "lora_up")
    mid = module.parts.get("mid")
    shapes = f"{module.key}: lora_down is {list(down.shape)}, lora_up {list(up.shape)}"
    if len(down.shape) < 2 or len(up.shape) < 2 or any(dim != 1 for dim in up.shape[2:]) or not down.numel * up.numel:
        raise InvalidFile(Problem("E-SHAPE", f"{shapes}; they must be [rank, in, ...] and [out, rank, 1, ...]"))
    out, rank = up.shape[:2]
    if down.shape[0] != rank:
        raise InvalidFile(Problem("E-SHAPE", f"{shapes}: they differ in rank"))
    inputs = down.shape[1:]
    if mid is not None:
        if mid.shape[:2] != (rank, rank) or any(dim != 1 for dim in down.shape[2:]):
            raise InvalidFile(Problem("E-SHAPE", f"{shapes}, lora_mid {list(mid.shape)}"))
        inputs = (down.shape[1], *mid.shape[2:])
    fitted = module.fit((out, *inputs), region)
    A = down.reshape(rank, *fitted[1:]) if mid is None else down.reshape(rank, fitted[1])
    return Piece("weight", fitted, Lora(A, up.reshape(out, rank), module.scaling(rank), mid))


def pair(module: Module, one: str, other: str, *names: str) -> tuple[TensorRef, TensorRef]:
    """Two parts that make no sense alone; `names` is what the file calls them, if not so."""
    first, second = module.parts.get(one), module.parts.get(other)
    if first is None or second is None:
        missing = (names or (one, other))[0 if first is None else 1]
        raise InvalidFile(Problem("E-COMPONENTS", f"{module.key} has no {missing}"))
    return first, second

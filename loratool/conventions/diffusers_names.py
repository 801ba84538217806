"""The names in diffusers' adapters, of three generations, taken apart: component, module, part."""

from __future__ import annotations

import re
from typing import NamedTuple

FILE_STEM = "pytorch_lora_weights"
METADATA_KEY = "lora_adapter_metadata"

# What diffusers' pipelines load adapters into (`_lora_loadable_modules` of its loaders).
COMPONENTS = (
    "unet", "transformer", "transformer_2", "transformer_ref", "prior", "connectors", "text_conditioner",
    "text_encoder", "text_encoder_2", "text_encoder_3",
)  # fmt: skip
# What other trainers (ai-toolkit, ComfyUI's) put before the original model's names: no component, only a prefix.
FOREIGN_PREFIX = "diffusion_model."
# First segments of denoisers, diffusers' and the original ones: by them a file without prefixes is known.
ROOTS = {
    "down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks",
    "double_blocks", "single_blocks",
}  # fmt: skip
# Flux control adapters come with trained norms, which replace the base's; the original names end in `.scale`.
NORM = re.compile(r"\.(norm_q|norm_k|norm_added_q|norm_added_k)\.weight$|\.(query_norm|key_norm)\.scale$")

_PART = re.compile(
    r"^(?P<module>.+?)(?:"
    r"\.(?P<peft>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?|alpha)"
    r"|\.lora(?:_linear_layer)?\.(?P<side>down|up)\.weight"
    r"|\.(?P<leaf>\w+)_lora(?P<stream>[12]?)\.(?P<old>down|up)\.weight)$"
)
MAGNITUDE = "lora_magnitude_vector"
# A text encoder's adapter is loaded by transformers, which (5.24) finds no place for the magnitude without this ending.
MAGNITUDE_IN_TEXT = f"{MAGNITUDE}.weight"
SIDES = {"down": "lora_A.weight", "up": "lora_B.weight"}
# Attention processors had the UNet's names for a text encoder's projections as well.
_TEXT_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Key(NamedTuple):
    """A stored name, taken apart. `component` is "" where the name has none."""

    component: str
    module: str
    part: str


def key_of(name: str) -> Key | None:
    """``unet.a.attn1.processor.to_out_lora.up.weight`` -> ("unet", "a.attn1.to_out.0", "lora_B.weight")."""
    match = _PART.match(name)
    if match is None:
        return None
    segments = [segment for segment in match["module"].split(".") if segment != "processor"]
    component = segments.pop(0) if segments and segments[0] in COMPONENTS else ""
    if not component and match["module"].startswith(FOREIGN_PREFIX):
        segments.pop(0)
    leaf = match["leaf"]
    if component.startswith("text_encoder"):
        segments += [leaf] if leaf else []
        segments[-1:] = [_TEXT_LEAVES.get(segment, segment) for segment in segments[-1:]]
    elif leaf in ("qkv", "proj"):
        segments.append(f"{leaf}_lora{match['stream']}")  # XLabs': it names no module of any base
    elif leaf:
        segments += ["to_out", "0"] if leaf == "to_out" else [leaf]
    side = match["side"] or match["old"]
    part = SIDES[side] if side else match["peft"]
    part = MAGNITUDE if part == MAGNITUDE_IN_TEXT else part
    return Key(component, ".".join(segments), part) if segments else None


def path_of(component: str, name: str) -> str:
    return f"{component}.{name}" if component else name

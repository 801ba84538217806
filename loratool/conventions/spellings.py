"""Stable Diffusion modules go by two names: the original repositories' and the libraries'. Both are derived here.

    ldm, sgm    input_blocks.4.1.proj_in    transformer.resblocks.0.attn.in_proj_weight (q, k, v in one)
    libraries   down_blocks.1.attentions.0.proj_in    text_model.encoder.layers.0.self_attn.q_proj

A base is stored in one of them, and trainers save in either: the base's names are spelled the other way, too. Every
released UNet (SD 1, SD 2, SDXL) has two residual blocks per level.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

PER_LEVEL = 2


class Spelling(NamedTuple):
    """Another name of a module: `head` (untouched) and `tail`; with `part`, it is that third of the stored rows."""

    head: str
    tail: str
    part: int | None = None

    @property
    def path(self) -> str:
        return self.head + self.tail


# Modules outside the blocks, and those inside a residual block: original, diffusers.
_UNET = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_CLIP = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
         "attn.out_proj": "self_attn.out_proj"}  # fmt: skip

_ORIGINAL_BLOCK = re.compile(r"(?P<side>input_blocks|output_blocks|middle_block)\.(?P<n>\d+)\.(?P<rest>.+)")
_DIFFUSERS_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<n>\d+)\.(?P<rest>.+)"
)
_OPENCLIP = re.compile(r"transformer\.resblocks\.(?P<layer>\d+)\.(?P<rest>.+)")
_BARE_CLIP = re.compile(r"(?:encoder\.layers\.\d+|embeddings|final_layer_norm)\b.*")
_LIBRARY_ROOTS = r"conv_in|conv_norm_out|conv_out|time_embedding|add_embedding|down_blocks|mid_block|up_blocks"
_ROOTS = (
    r"input_blocks|middle_block|output_blocks|out|time_embed|label_emb|transformer\.resblocks|encoder\.layers"
    rf"|{_LIBRARY_ROOTS}"
)
_LIBRARY = re.compile(rf"(?:{_LIBRARY_ROOTS})(?=\.|$)")
_ROOT = re.compile(rf"(?:^|(?<=\.))(?:{_ROOTS})(?=\.|$)")


def others(path: str) -> Iterator[Spelling]:
    """Every other name of the base's module `path`.

    >>> [other.path for other in others("model.diffusion_model.input_blocks.4.1.proj_in")]
    ['model.diffusion_model.down_blocks.1.attentions.0.proj_in']
    """
    root = _ROOT.search(path)
    if root is None:
        return
    head, tail = path[: root.start()], path[root.start() :]
    if tail in _UNET:
        yield Spelling(head, _UNET[tail])
    elif tail in _BACK_UNET:
        yield Spelling(head, _BACK_UNET[tail])
    elif match := _ORIGINAL_BLOCK.fullmatch(tail):
        yield from (Spelling(head, other) for other in _to_diffusers(match["side"], int(match["n"]), match["rest"]))
    elif match := _DIFFUSERS_BLOCK.fullmatch(tail):
        yield from (Spelling(head, other) for other in _to_original(match))
    elif match := _OPENCLIP.fullmatch(tail):
        yield from _to_clip(head, match["layer"], match["rest"])
    elif _BARE_CLIP.fullmatch(tail) and not head.endswith("text_model."):
        yield Spelling(head, f"text_model.{tail}")  # transformers 5 has no such level


def libraries(path: str) -> list[Spelling]:
    """What the libraries call a module of a component that begins at the path's start: itself, or up to three parts.

    >>> [other.path for other in libraries("input_blocks.4.1.proj_in")]
    ['down_blocks.1.attentions.0.proj_in']
    >>> [other.path for other in libraries("down_blocks.1.attentions.0.proj_in")]
    ['down_blocks.1.attentions.0.proj_in']
    """
    theirs = [] if _LIBRARY.match(path) else [other for other in others(path) if not other.head]
    return theirs or [Spelling("", path)]


def _to_diffusers(side: str, n: int, rest: str) -> Iterator[str]:
    slot, _, inner = rest.partition(".")
    if side == "middle_block":  # residual, attention, residual
        kind = ("resnets.0", "attentions.0", "resnets.1")[n] if n < 3 else None
        if kind and (name := _RESNET.get(rest) if "resnets" in kind else rest):
            yield f"mid_block.{kind}.{name}"
        return
    blocks = "down_blocks" if side == "input_blocks" else "up_blocks"
    level, index = divmod(n - 1 if side == "input_blocks" else n, PER_LEVEL + 1)
    if inner == "op":
        yield f"{blocks}.{level}.downsamplers.0.conv"
    elif inner == "conv":
        yield f"{blocks}.{level}.upsamplers.0.conv"
    elif slot == "0" and inner in _RESNET:
        yield f"{blocks}.{level}.resnets.{index}.{_RESNET[inner]}"
    elif slot == "1":
        yield f"{blocks}.{level}.attentions.{index}.{inner}"


def _to_original(match: re.Match[str]) -> Iterator[str]:
    kind, index, rest = match["kind"], int(match["n"]), match["rest"]
    inner = _BACK_RESNET.get(rest) if kind == "resnets" else rest
    if inner is None:
        return
    if match["side"] is None:
        yield f"middle_block.{1 if kind == 'attentions' else 2 * index}.{inner}"
        return
    start = int(match["level"]) * (PER_LEVEL + 1)
    if kind == "downsamplers":
        yield f"input_blocks.{start + PER_LEVEL + 1}.0.op"
    elif kind == "upsamplers":  # behind an attention, or not
        yield from (f"output_blocks.{start + PER_LEVEL}.{slot}.conv" for slot in (1, 2))
    else:
        slot = 0 if kind == "resnets" else 1
        block = f"input_blocks.{start + index + 1}" if match["side"] == "down" else f"output_blocks.{start + index}"
        yield f"{block}.{slot}.{inner}"


def _to_clip(head: str, layer: str, rest: str) -> Iterator[Spelling]:
    path = f"text_model.encoder.layers.{layer}"
    if rest == "attn":
        yield from (Spelling(head, f"{path}.self_attn.{letter}_proj", part) for part, letter in enumerate("qkv"))
    elif rest in _CLIP:
        yield Spelling(head, f"{path}.{_CLIP[rest]}")


_BACK_UNET = {diffusers: original for original, diffusers in _UNET.items()}
_BACK_RESNET = {diffusers: original for original, diffusers in _RESNET.items()}

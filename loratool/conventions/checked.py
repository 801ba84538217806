"""Which model families each writer's output was loaded for, by the program that it is for: the tests go by this table.

A family is what a model's own config calls it: diffusers' ``_class_name``, else transformers' ``model_type``. For any
other one, and where no base tells, a conversion says that nobody has tried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint


@dataclass(frozen=True)
class Checked:
    """A program that loads a convention's files, and the families of which the tests let it."""

    consumer: str
    families: Collection[str]


CHECKED: Mapping[str, Checked] = {
    "peft": Checked(
        "PEFT",
        (
            "llama", "gpt2", "bert", "mixtral", "gpt_oss", "qwen2", "qwen3", "gemma2", "phi3", "t5",
            "clip_text_model", "UNet2DConditionModel", "FluxTransformer2DModel", "SD3Transformer2DModel",
        ),
    ),
    "diffusers": Checked(
        "diffusers", ("UNet2DConditionModel", "FluxTransformer2DModel", "SD3Transformer2DModel", "clip_text_model")
    ),
    "kohya": Checked("diffusers", ("UNet2DConditionModel", "FluxTransformer2DModel", "clip_text_model")),
    "lycoris": Checked("LyCORIS", ("UNet2DConditionModel", "SD3Transformer2DModel")),
    "litgpt": Checked("litgpt", ("llama", "mixtral", "qwen3_moe")),
    "torchtune": Checked("torchtune", ("llama", "mistral", "gemma2", "qwen2", "phi3")),
    "mlx": Checked("mlx-lm", ("llama", "mixtral", "qwen3_moe")),
    "gguf": Checked(
        "llama.cpp",
        (
            "llama", "mistral", "mixtral", "ministral3", "granite", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma",
            "gemma2", "gemma3_text", "phi", "phi3",
        ),
    ),
}  # fmt: skip


def family_of(model: Checkpoint) -> str:
    """What a model's config calls it; "" where there is none."""
    config = model.side_json("config.json") or {}
    found = config.get("_class_name", config.get("model_type"))
    return found if isinstance(found, str) else ""


def families_of(adapter: Adapter, base: Checkpoint | None) -> tuple[str, ...]:
    """The families of the models that an adapter changes; "" for one that nothing names."""
    if base is None:
        return ("",)
    if not base.components:
        return (family_of(base),)
    changed = dict.fromkeys(name.partition(".")[0] for name in adapter.targets())
    return tuple(family_of(base.components[name]) for name in changed if name in base.components)


def notes(convention: str, adapter: Adapter, base: Checkpoint | None) -> Iterator[str]:
    """What nobody has tried of a conversion."""
    checked = CHECKED.get(convention)
    if checked is None:
        return
    strange = [family for family in families_of(adapter, base) if family not in checked.families]
    named = [family for family in strange if family]
    if named:
        tried = ", ".join(checked.families)
        yield f"that {checked.consumer} loads it for {', '.join(named)} is not tested; it is for {tried}"
    if len(named) < len(strange):
        helps = "give it with --base BASE" if base is None else "no config.json says it"
        yield f"which model it is for is not known ({helps}): that {checked.consumer} loads it is not tested"

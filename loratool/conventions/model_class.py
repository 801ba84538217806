"""The class of a model of diffusers or transformers, as its own ``config.json`` names it."""

from __future__ import annotations

from loratool.checkpoint import Checkpoint


def class_of(model: Checkpoint) -> str:
    """``FluxTransformer2DModel``, ``LlamaForCausalLM``; "" where no config says it."""
    config = model.side_json("config.json") or {}
    listed = config.get("architectures")
    names = [config.get("_class_name"), *(listed if isinstance(listed, list) else ())]
    return next((name for name in names if isinstance(name, str)), "")

"""Tiny diffusers pipelines, adapters of them in every way that diffusers writes or reads, and diffusers' own fusing."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from models import State
from safetensors.torch import save_file
from torch import nn

UNET_TARGETS = ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "ff.net.0.proj", "time_emb_proj"]
TEXT_TARGETS = ["q_proj", "out_proj", "fc1"]
FLUX_TARGETS = ["to_q", "to_out.0", "add_k_proj", "ff.net.2", "proj_mlp", "norm1.linear", "x_embedder"]


def quiet(monkeypatch: Any) -> None:
    """No chatter; and transformers 5.24 asks for a PEFT that was not out yet, to load into a text encoder."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)


def tokenizer(folder: Path) -> Any:
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a", "b</w>", "ab</w>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def clip() -> nn.Module:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=50,
            max_position_embeddings=16, projection_dim=16, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def stable_diffusion(folder: Path) -> Path:
    """A pipeline like Stable Diffusion 1.5: unet, text encoder, VAE, tokenizer and scheduler."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=clip(), tokenizer=tokenizer(folder), unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "sd")
    return folder / "sd"


def flux(folder: Path) -> Path:
    """A pipeline like Flux: a transformer in several shards, a text encoder, a VAE."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer, text_encoder=clip(),
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1),
        tokenizer=tokenizer(folder), text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "flux", max_shard_size="100KB")
    return folder / "flux"


def load(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "Flux" in (folder / "model_index.json").read_text():
            return diffusers.FluxPipeline.from_pretrained(folder, text_encoder_2=None, tokenizer_2=None)
        return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def trained(model: nn.Module, config: peft.LoraConfig) -> State:
    """A random adapter of a model, as PEFT's state dict."""
    peft.inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}
    model._hf_peft_config_loaded = True
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data = parameter.data * (1 + 0.2 * torch.rand(parameter.shape, generator=generator))
        elif "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes biases for broken factors
        return {name: tensor.contiguous() for name, tensor in peft.get_peft_model_state_dict(model).items()}


def fused(pipeline: Any, adapter: Path | State, scale: float = 1.0) -> dict[str, State]:
    """What diffusers makes of the pipeline's weights, by component."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what it does itself
        pipeline.load_lora_weights(adapter)
        touched = [name for name in pipeline._lora_loadable_modules if is_adapted(getattr(pipeline, name))]
        pipeline.fuse_lora(components=touched, lora_scale=scale)
        pipeline.unload_lora_weights()
    return states(pipeline)


def is_adapted(model: nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def states(pipeline: Any) -> dict[str, State]:
    return {
        name: {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for name, model in pipeline.components.items()
        if isinstance(model, nn.Module)
    }


def below(component: str, state: State, rename: Callable[[str], str] = str) -> State:
    """The state dict of one component as a pipeline's file has it; every tensor has its own memory."""
    return {f"{component}.{rename(name)}": tensor.clone() for name, tensor in state.items()}


def middle(name: str) -> str:
    """PEFT's names -> those between: ``.lora.down`` in a denoiser."""
    return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def middle_text(name: str) -> str:
    return name.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")


def oldest(name: str) -> str:
    """PEFT's names -> those of attention processors."""
    for part, side in ((".lora_A.", "down"), (".lora_B.", "up")):
        owner, found, rest = name.partition(part)
        if found:
            owner, _, leaf = owner.replace(".to_out.0", ".to_out").rpartition(".")
            return f"{owner}.processor.{leaf}_lora.{side}.{rest}"
    return name


def oldest_text(name: str) -> str:
    leaves = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    for leaf, old in leaves.items():
        for part, side in (("lora_A", "down"), ("lora_B", "up")):
            name = name.replace(f".{leaf}.{part}.", f".{old}_lora.{side}.")
    return middle_text(name)


def write(folder: Path, state: State, metadata: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir()
    header = {"format": "pt"} | ({} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)})
    save_file(state, folder / "pytorch_lora_weights.safetensors", metadata=header)
    return folder

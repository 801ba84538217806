"""Tiny models of llama.cpp's architectures: as transformers saves them, and in GGUF as its converter makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from models import State, read
from strategies import RULES, Maker, make_update
from torch import Tensor

from loratool import Adapter, Target, Targeted

VOCAB, HIDDEN, HEADS, KV = 40, 32, 4, 2
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GEMMA = {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 32}
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip

# The class of transformers' configuration, what is different in it, and llama.cpp's architecture.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {}, "llama"),
    "mistral": ("MistralConfig", {}, "llama"),
    "mixtral": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}, "llama"),
    "mistral3": ("Ministral3Config", {"head_dim": 8, "rope_parameters": _YARN}, "mistral3"),
    "granite": ("GraniteConfig", {"embedding_multiplier": 2.0, "residual_multiplier": 0.5}, "granite"),
    "qwen2": ("Qwen2Config", {}, "qwen2"),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, "qwen3"),
    "qwen2moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 20}, "qwen2moe"),
    "qwen3moe": ("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 8, "norm_topk_prob": True}, "qwen3moe"),
    "gemma": ("GemmaConfig", {"head_dim": 8, "tie_word_embeddings": True}, "gemma"),
    "gemma2": ("Gemma2Config", _GEMMA, "gemma2"),
    "gemma3": ("Gemma3TextConfig", _GEMMA, "gemma3"),
    "phi2": ("PhiConfig", {"num_key_value_heads": HEADS, "intermediate_size": 4 * HIDDEN}, "phi2"),
    "phi3": ("Phi3Config", {}, "phi3"),
}


def save_model(name: str, folder: Path, seed: int = 0) -> Path:
    """A model of random numbers, as transformers saves it."""
    import transformers

    config, more, _ = MODELS[name]
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**LLAMA, **more}))
    for key, parameter in model.named_parameters():
        norm = "norm" in key and not name.startswith("gemma")  # Gemma's are 1 + the weight
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + norm
    model.save_pretrained(folder)
    return folder


def adapter_for(base: Path, dtype: str = "F32") -> Adapter:
    """A LoRA on every matrix that llama.cpp adapts, of several ranks and under every rule."""
    state, items = read(base), []
    for number, (name, value) in enumerate(sorted(state.items())):
        if value.dim() < 2 or ("embed_tokens" in name and "lm_head.weight" not in state):
            continue
        layout = "embedding" if "embed_tokens" in name else ""
        update = make_update(
            "lora",
            tuple(value.shape),
            Maker(number, dtype),
            1 + number % 3,
            RULES[number % 4],
            (0.3, 1.0, 0.7)[number % 3],
        )
        items.append(Targeted(Target(name, tuple(value.shape), layout=layout), update))
    return Adapter(tuple(items))


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """What convert_hf_to_gguf.py does to the rows of q and k, and convert_lora_to_gguf.py to those of lora_b."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def converted_base(folder: Path, name: str) -> State:
    """The tensors of a saved model by llama.cpp's names and in its order, as convert_hf_to_gguf.py makes them."""
    architecture = MODELS[name][2]
    number = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    names = gguf.get_tensor_name_map(number, LLAMA["num_hidden_layers"])  # type: ignore[arg-type]
    found: State = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for key, value in read(folder).items():
        head, _, rest = key.partition(".experts.")
        if rest:  # they lie apart on the disk: its converter stacks them under the name without a number
            expert, _, part = rest.partition(".")
            stacks.setdefault(f"{head}.experts.{part}", {})[int(expert)] = value
            continue
        ggml = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert ggml is not None, key
        if architecture in ("llama", "mistral3", "granite") and key.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleaved(value, HEADS if "q_proj" in key else KV)
        found[ggml] = value + 1 if architecture.startswith("gemma") and "norm" in key else value
    for key, parts in stacks.items():
        ggml = names.get_name(key, try_suffixes=(".weight",))
        found[ggml] = torch.stack([parts[expert] for expert in range(len(parts))])
    return found


def write_model(folder: Path, name: str, out: Path) -> Path:
    """The saved model in GGUF, with tokens that stand for nothing: as much as llama.cpp needs to run it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = MODELS[name][2]
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    size = getattr(config, "head_dim", None) or HIDDEN // HEADS
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(int(size * config.rope_parameters.get("partial_rotary_factor", 1)))
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    epsilon = getattr(config, "rms_norm_eps", None)
    if epsilon is None:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(epsilon)
    _more(writer, config, architecture, rope)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<{token}>" for token in range(3, VOCAB))])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3, *[4] * (VOCAB - 3)])
    writer.add_add_bos_token(False)
    for ggml, value in converted_base(folder, name).items():
        writer.add_tensor(ggml, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _more(writer: Any, config: Any, architecture: str, rope: dict[str, Any]) -> None:
    """What only some architectures have."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "phi3":
        writer.add_sliding_window(0)
    if architecture == "mistral3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])

"""The known fields of an ``adapter_config.json``: all of PEFT 0.21.2's, and those of others that change nothing.

PEFT writes every field it has. One that is not known may say that the factors mean something else, so it is refused
unless it is at rest: null, false, zero or empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Of LoraConfig, AdaLoraConfig, LoHaConfig, LoKrConfig, IA3Config and TrainableTokensConfig. What they mean for a merge
# is in `peft_config`: some are used, some are refused where they are set, the others are for training only.
OF_PEFT = frozenset({
    "alora_invocation_tokens", "alpha", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path",
    "beta1", "beta2", "bias", "corda_config", "decompose_both", "decompose_factor", "deltaT", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "feedforward_modules", "inference_mode", "init_ia3_weights",
    "init_lora_weights", "init_r", "init_weights", "kasa_config", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "module_dropout", "modules_to_save", "monteclora_config", "orth_reg_weight",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_dropout", "rank_dropout_scale", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "target_r", "task_type", "tfinal", "tinit",
    "token_indices", "total_step", "trainable_token_indices", "use_bdlora", "use_dora", "use_effective_conv2d",
    "use_qalora", "use_rslora", "velora_config",
})  # fmt: skip
# Written by earlier versions and by other trainers: how it was trained, or what with.
HARMLESS = frozenset({
    "_comment", "_name_or_path", "architectures", "base_model_class", "comment", "dtype", "library_name",
    "library_version", "license", "lora_dtype", "lora_plus_lr_ratio", "loraplus_lr_embedding", "loraplus_lr_ratio",
    "lorap_emb_lr", "lorap_lr_ratio", "merge_weights", "model_type", "parent_library", "tokenizer_name_or_path",
    "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version",
})  # fmt: skip


def unknown(document: Mapping[str, Any]) -> Iterator[str]:
    """The fields that may mean anything: not known, and not at rest."""
    for name, value in document.items():
        if name not in OF_PEFT and name not in HARMLESS and value:
            yield name

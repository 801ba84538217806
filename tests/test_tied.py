"""A base whose head is its embedding, and adapters that trained them apart: merged, it answers as PEFT's model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import Cli
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, Qwen2Config, Qwen2ForCausalLM

IDS = torch.tensor([[1, 5, 17, 7]])


def qwen(folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=20, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def mamba(folder: Path) -> None:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 20, "intermediate_size": 32}
    MambaForCausalLM(MambaConfig(**sizes, time_step_rank=2)).save_pretrained(folder)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "both": (qwen, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding": (qwen, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "head": (qwen, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "delta of the head": (mamba, {"target_modules": ["in_proj", "lm_head"]}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_it_was_trained(case: str, cli: Cli, tmp_path: Path) -> None:
    make, options = CASES[case]
    torch.manual_seed(3)
    make(tmp_path / "base")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2, lora_alpha=4, **options)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    line = ("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    refused = cli(*line)
    assert refused.code == 2
    assert "--allow-new" in refused.err
    merged = cli(*line, "--allow-new")
    assert merged.code == 0, merged.err
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    assert torch.allclose(got, wanted, atol=1e-5), (got - wanted).abs().max()

"""Live models of transformers: adapters that PEFT wrote, applied to what was loaded, against a merge of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import one

import loratool

pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # that is the case
]


def llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    return LlamaForCausalLM(config)


def mixture() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
                            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                            num_experts=4, num_experts_per_tok=2)  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def trained(model: Any, folder: Path, **options: Any) -> Path:
    """An adapter that PEFT made for a model, with factors that are not zero."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "magnitude" in name:
            torch.nn.init.normal_(parameter, std=0.05) if "lora_" in name else parameter.data.mul_(1.1)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    wrapped.unload()
    return folder


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: llama(False), {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
        (lambda: llama(True), {"target_modules": ["q_proj", "embed_tokens"]}),
        (lambda: llama(False), {"target_modules": ["q_proj", "o_proj"], "use_dora": True}),
        (mixture, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    ],
)
def test_a_loaded_model_becomes_what_loading_the_merged_one_gives(
    make: Callable[[], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    made = make().bfloat16().eval()
    made.save_pretrained(tmp_path / "base")
    adapter = trained(made, tmp_path / "adapter", **options)
    kind = type(made)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "merged")
    model, merged = (kind.from_pretrained(tmp_path / name, dtype=torch.bfloat16) for name in ("base", "merged"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with loratool.apply(model, adapter) as handle, torch.no_grad():
        assert handle.report.changed > 0
        for name, value in merged.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        tokens = torch.arange(12)[None]
        assert torch.equal(model(tokens).logits, merged(tokens).logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_of_single_experts_is_led_to_the_fused_parameters(tmp_path: Path) -> None:
    """On disk every expert has its own tensors, in memory all experts of a layer are one parameter."""
    torch.manual_seed(0)
    mixture().bfloat16().save_pretrained(tmp_path / "base")
    path, shapes = "model.layers.1.mlp.experts", {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    items = [
        item
        for expert in (0, 3)
        for n, (name, shape) in enumerate(shapes.items())
        for item in one("lora", shape, name=f"{path}.{expert}.{name}.weight", seed=7 * expert + n).updates
    ]
    adapter = loratool.Adapter(tuple(items))
    loratool.merge(tmp_path / "base", adapter, tmp_path / "merged", reproducible=True)
    from transformers import Qwen3MoeForCausalLM

    model, merged = (
        Qwen3MoeForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16) for name in ("base", "merged")
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with loratool.apply(model, adapter, reproducible=True) as handle:
        assert handle.report.survival.keys() == {f"{path}.gate_up_proj", f"{path}.down_proj"}
        assert all(torch.equal(model.state_dict()[name], value) for name, value in merged.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

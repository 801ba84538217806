"""llama.cpp itself, from the wheels of xllamacpp: with a base and an adapter that was written, it predicts what
transformers predicts with the merged model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf", reason="needs gguf")
llama_cpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp")

# ruff: noqa: E402  # the imports below need what is looked for above
import torch
from gguf_models import MODELS, VOCAB, adapter_for, save_model, write_model
from models import fill
from torch import Tensor

import loratool

pytestmark = pytest.mark.peers

PROMPT = [1, 7, 30, 4, 9, 5]


def said_by_llama_cpp(model: Path, adapter: Path | None = None) -> Tensor:
    """The logarithms of the next token's probabilities, [vocab], computed with a cache in float32."""
    params = llama_cpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 32, 1, 0
    params.warmup, params.verbosity = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    question = {"prompt": PROMPT, "n_predict": 1, "n_probs": VOCAB, "temperature": 0.0, "cache_prompt": False}
    answer = llama_cpp.Server(params).handle_completions(question)
    found = {item["id"]: item["logprob"] for item in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    return torch.tensor([found[token] for token in range(VOCAB)])


def said_by_transformers(model: Any) -> Tensor:
    """The same of a model, or of a folder with one."""
    if isinstance(model, Path):
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.tensor([PROMPT])).logits[0, -1]
    return logits.log_softmax(-1)


def farthest(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_says_what_the_merged_model_says(name: str, tmp_path: Path) -> None:
    base = save_model(name, tmp_path / "base")
    model = write_model(base, name, tmp_path / "base.gguf")
    made = adapter_for(base)
    loratool.convert(made, tmp_path / "a.gguf", "gguf", base=base)
    loratool.merge(base, made, tmp_path / "merged")
    before, want = said_by_transformers(base), said_by_transformers(tmp_path / "merged")
    apart = farthest(said_by_llama_cpp(model), before)  # its GELU is a table, for instance
    assert apart < 5e-3
    got = said_by_llama_cpp(model, tmp_path / "a.gguf")
    assert farthest(want, before) > 1
    assert farthest(got, want) < 8 * apart + 2e-5


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_llama_cpp_takes_16_bit_factors(dtype: str, tmp_path: Path) -> None:
    """It rounds what it multiplies with them to 16 bits as well."""
    base = save_model("mixtral", tmp_path / "base")
    model = write_model(base, "mixtral", tmp_path / "base.gguf")
    made = adapter_for(base, dtype)
    loratool.convert(made, tmp_path / "a.gguf", "gguf", base=base)
    loratool.merge(base, made, tmp_path / "merged")
    want = said_by_transformers(tmp_path / "merged")
    assert farthest(want, said_by_transformers(base)) > 1
    assert farthest(said_by_llama_cpp(model, tmp_path / "a.gguf"), want) < 0.1


def test_pefts_patterns_arrive(tmp_path: Path) -> None:
    """rsLoRA and patterns of ranks and alphas, which llama.cpp's own converter leaves out, from PEFT's own merge."""
    import peft
    import transformers

    base = save_model("llama", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, rank_pattern={"q_proj": 2, "lm_head": 3},
                             alpha_pattern={"k_proj": 7, "embed_tokens": 1.3}, target_modules=targets)  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    fill(wrapped, seed=2)
    wrapped.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    loratool.convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=base)
    got = said_by_llama_cpp(write_model(base, "llama", tmp_path / "base.gguf"), tmp_path / "a.gguf")
    want = said_by_transformers(wrapped.merge_and_unload())
    assert farthest(want, said_by_transformers(base)) > 1
    assert farthest(got, want) < 2e-5

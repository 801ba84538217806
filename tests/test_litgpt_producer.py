"""litgpt itself: its models with factors, the folder that its fine-tuning leaves, and its own merge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import State, assert_float32_close, assert_same_bits, own, read
from safetensors.torch import load_file

import loratool

litgpt = pytest.importorskip("litgpt")
yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.peers

ALPHA, RANK = 6, 2
SIZES = {"block_size": 16, "vocab_size": 32, "padded_vocab_size": 32, "n_layer": 2, "n_embd": 16, "n_head": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "query and value": ("query value", {"n_query_groups": 2}),
    "key of one group": ("key", {"n_query_groups": 1, "head_size": 8, "bias": False}),
    "query and key, no groups": ("query key", {}),
    "all, llama": ("query key value projection mlp head", {"mlp_class_name": "LLaMAMLP", "n_query_groups": 2}),
    "all, neox": ("query key value projection mlp head", {"lm_head_bias": True}),
    "gemma": ("projection mlp", {"mlp_class_name": "GemmaMLP"}),
    "experts": ("value mlp", {"mlp_class_name": "LLaMAMoE", "n_expert": 3, "n_expert_per_token": 2}),
    "head": ("head", {}),
}


class Run:
    """A base and a fine-tuned model of one case, in the folders that litgpt leaves."""

    def __init__(self, folder: Path, case: str, dtype: torch.dtype = torch.float32) -> None:
        from litgpt.lora import GPT, Config
        from litgpt.model import GPT as Base
        from litgpt.model import Config as BaseConfig
        from litgpt.utils import save_config

        parts, special = CASES[case]
        config = {**SIZES, "intermediate_size": 24, **special}
        self.base, self.adapter = folder / "base", folder / "adapter"
        torch.manual_seed(1)
        base = Base(BaseConfig(**config)).to(dtype)
        self.state: State = own(base.state_dict())
        known = ("query", "key", "value", "projection", "mlp", "head")
        self.hyper = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05}
        self.hyper |= {f"lora_{part}": part in parts.split() for part in known}
        self.model = GPT(Config(**config, **self.hyper)).to(dtype)
        self.model.load_state_dict(base.state_dict(), strict=False)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.3
        for place in (self.base, self.adapter):
            place.mkdir()
            save_config(base.config, place)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (place / file).write_text("{}")
        torch.save(base.state_dict(), self.base / "lit_model.pth")
        self.whole = own(self.model.state_dict())
        self.save_factors()

    def save_factors(self) -> None:
        """By litgpt's own function, with the settings beside it as its fine-tuning has them."""
        import lightning
        from litgpt.finetune.lora import save_lora_checkpoint

        fabric = lightning.Fabric(devices=1, accelerator="cpu")
        save_lora_checkpoint(fabric, self.model, self.weights)
        settings = {"checkpoint_dir": str(self.base), "precision": None, **self.hyper}
        settings["data"] = {"class_path": "litgpt.data.Alpaca2k", "init_args": {"lora_r": 99, "num_workers": 4}}
        (self.adapter / "hyperparameters.yaml").write_text(yaml.dump(settings))

    @property
    def weights(self) -> Path:
        return self.adapter / "lit_model.pth.lora"

    def merged_by_litgpt(self) -> State:
        from litgpt.scripts.merge_lora import merge_lora

        merge_lora(self.adapter)
        merged: State = torch.load(self.adapter / "lit_model.pth")
        return merged


@pytest.mark.parametrize("case", CASES)
def test_merge(tmp_path: Path, case: str) -> None:
    run = Run(tmp_path, case)
    loratool.merge(run.base / "lit_model.pth", run.weights, tmp_path / "merged.safetensors")
    got, want = load_file(tmp_path / "merged.safetensors"), run.merged_by_litgpt()
    assert sorted(got) == sorted(want)
    for name in want:
        assert_float32_close(got[name], want[name], name=name)
    targets = {item.target.name for item in loratool.load(run.weights).updates}
    assert targets == {name for name in got if not torch.equal(got[name], run.state[name])}
    factors = {name.rpartition(".")[0] for name in run.whole if "lora_" in name}
    assert targets == {f"{module}.weight" for module in factors}


@pytest.mark.parametrize("case", CASES)
def test_forward(tmp_path: Path, case: str) -> None:
    """The fine-tuned model, not merged, computes what the merged checkpoint does in litgpt's plain model."""
    from litgpt.model import GPT, Config

    run = Run(tmp_path, case)
    loratool.merge(run.base / "lit_model.pth", run.weights, tmp_path / "merged.safetensors")
    plain = GPT(Config.from_file(run.base / "model_config.yaml")).eval()
    tokens = torch.arange(12).reshape(1, 12)
    with torch.inference_mode():
        want = run.model.eval()(tokens)
        before = plain(tokens)
        plain.load_state_dict(load_file(tmp_path / "merged.safetensors"))
        got = plain(tokens)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_wrapped_checkpoint(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    run = Run(tmp_path, case, dtype)
    torch.save(run.whole, run.adapter / "whole.pth")
    path = run.adapter / "whole.pth"
    report = loratool.extract(path, tmp_path / "a.safetensors", base_out=tmp_path / "clean")
    assert_same_bits(read(tmp_path / "clean"), run.state)
    assert report.convention == "litgpt"
    theirs = loratool.load(run.weights)
    ours = loratool.load(tmp_path / "a.safetensors")
    assert [item.target for item in ours.updates] == [item.target for item in theirs.updates]
    assert [item.update.scaling for item in ours.updates] == [item.update.scaling for item in theirs.updates]


def test_hyperparameters_as_litgpt_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own writer, with the arguments of a command line."""
    pytest.importorskip("jsonargparse")
    pytest.importorskip("requests")  # which litgpt asks jsonargparse to use
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from litgpt.finetune.lora import setup
    from litgpt.parser_config import save_hyperparameters

    run = Run(tmp_path, "query and value")
    arguments = ["--lora_r", RANK, "--lora_alpha", ALPHA, "--lora_query", "true", "--lora_value", "true"]
    monkeypatch.setattr(sys, "argv", ["litgpt", str(run.base), *map(str, arguments)])
    save_hyperparameters(setup, run.adapter)
    assert "lora_alpha: 6" in (run.adapter / "hyperparameters.yaml").read_text()
    adapter = loratool.load(run.weights)
    assert [item.target.rows for item in adapter.updates] == [(0, 16), (24, 32)] * 2
    assert {item.update.scaling.alpha for item in adapter.updates if item.update.scaling} == {ALPHA}

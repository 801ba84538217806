"""litgpt itself: its models with factors, the folder that its fine-tuning leaves, and its own merge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import State, assert_float32_close, assert_same_bits, fill, llama, mixtral, own, read, save_base
from safetensors.torch import load_file
from strategies import Maker, make_update
from torch import nn

import loratool
from loratool import Adapter, Target, Targeted
from loratool.conventions.checked import CHECKED

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
    report = loratool.verify(run.adapter / "lit_model.pth", run.base / "lit_model.pth", run.weights)
    assert report.answer, report.findings


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


# --- written for litgpt ---------------------------------------------------------------------------------------------


def merge_lora(folder: Path) -> State:
    """litgpt's own merge, which finds the base by hyperparameters.yaml and loads strictly."""
    from litgpt.scripts.merge_lora import merge_lora

    merge_lora(folder)
    merged: State = torch.load(folder / "lit_model.pth")
    return merged


def assert_same_model(got: State, want: State) -> None:
    assert sorted(got) == sorted(want)
    for name in want:
        assert_float32_close(got[name], want[name], name=name)


@pytest.mark.parametrize("case", CASES)
def test_what_litgpt_wrote_is_written_again(tmp_path: Path, case: str) -> None:
    run = Run(tmp_path, case)
    loratool.convert(run.adapter, tmp_path / "out", "litgpt", base=run.base)
    theirs, ours = (torch.load(folder / "lit_model.pth.lora")["model"] for folder in (run.adapter, tmp_path / "out"))
    assert_same_bits(ours, theirs)
    assert_same_model(merge_lora(tmp_path / "out"), run.merged_by_litgpt())


def random_adapter(state: State, seed: int) -> Adapter:
    """LoRA of many ranks and scales on some of the layers: whole ones, ranges of rows, two of one."""
    pick = torch.Generator().manual_seed(seed)
    items = []
    for name, weight in state.items():
        if weight.dim() < 2 or not any(part in name for part in (".attn.", ".mlp.", "lm_head.")):
            continue
        for _ in range(int(torch.randint(0, 3, (), generator=pick))):
            start, rank = int(torch.randint(0, 2, (), generator=pick)), int(torch.randint(1, 4, (), generator=pick))
            rows = (start, weight.shape[0] - 1) if start else None
            height = weight.shape[0] if rows is None else rows[1] - rows[0]
            update = make_update("lora", (height, weight.shape[1]), Maker(seed + len(items)), rank, "alpha/rank", 0.7)
            items.append(Targeted(Target(name, (*weight.shape,), rows), update))
    return Adapter(tuple(items))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", ["all, llama", "all, neox", "gemma", "experts", "key of one group"])
def test_whatever_is_written_litgpt_merges(tmp_path: Path, case: str, seed: int) -> None:
    run = Run(tmp_path, case)
    made = random_adapter(run.state, seed)
    loratool.convert(made, tmp_path / "out", "litgpt", base=run.base)
    loratool.merge(run.base / "lit_model.pth", made, tmp_path / "merged.safetensors")
    assert_same_model(merge_lora(tmp_path / "out"), load_file(tmp_path / "merged.safetensors"))


def test_what_yaml_reads(tmp_path: Path) -> None:
    """litgpt finds the base under any name, and gets a number for an alpha that YAML could take for a text."""
    place = tmp_path / 'a "b" \\ é \U0001f600: #\u0085'
    place.mkdir()
    run = Run(place, "head")
    update = make_update("lora", (32, 16), Maker(1), 1, "none", 1e-05)
    made = Adapter((Targeted(Target("lm_head.weight", (32, 16)), update),))
    loratool.convert(made, place / "out", "litgpt", base=run.base)
    settings = yaml.safe_load((place / "out" / "hyperparameters.yaml").read_text())
    assert settings["checkpoint_dir"] == str(run.base)
    assert settings["lora_alpha"] == 1e-05
    loratool.merge(run.base / "lit_model.pth", made, tmp_path / "merged.safetensors")
    assert_same_model(merge_lora(place / "out"), load_file(tmp_path / "merged.safetensors"))


def converted(state: State, config: Any) -> State:
    """transformers' weights as litgpt's own conversion makes them its own."""
    from litgpt.scripts import convert_hf_checkpoint as conversion

    found: State = {}
    copy = conversion.copy_weights_qwen_3 if config.norm_qk else conversion.copy_weights_hf_llama
    copy(config, {}, found, dict(state))
    return found


def qwen3_moe() -> nn.Module:
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "moe_intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2}
    model: nn.Module = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **heads))
    return model


ATTENTION, MLP = ["q_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
LLAMA = {"mlp_class_name": "LLaMAMLP", "n_layer": 2, "n_query_groups": 2, "intermediate_size": 24}
SPARSE = {"mlp_class_name": "LLaMAMoE", "n_layer": 1, "n_expert": 3, "n_expert_per_token": 2, "intermediate_size": 12}
MODELS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "llama": (lambda: llama(layers=2), LLAMA, [*ATTENTION, *MLP, "lm_head"]),
    "llama, attention": (lambda: llama(layers=2), LLAMA, ["k_proj"]),
    "mixtral": (mixtral, SPARSE | {"n_head": 2, "n_query_groups": 1}, [*ATTENTION, "lm_head"]),
    "qwen 3": (qwen3_moe, SPARSE | {"n_query_groups": 2, "head_size": 8, "norm_qk": True}, ATTENTION),
}


@pytest.mark.parametrize("model", MODELS)
def test_from_peft_and_back(tmp_path: Path, model: str) -> None:
    """PEFT's adapter of a model of transformers, merged by litgpt into its conversion of it; and read back for it."""
    peft = pytest.importorskip("peft")
    from litgpt.model import GPT, Config
    from litgpt.utils import save_config

    make, special, targets = MODELS[model]
    torch.manual_seed(3)
    network = make()
    base = save_base(network, tmp_path / "base")
    state = read(base)
    vocabulary = {"vocab_size": 40, "padded_vocab_size": 40}
    shape = {"n_embd": 16, "n_head": 4, "rotary_percentage": 1.0, "parallel_residual": False, "bias": False}
    config = Config(**{"block_size": 16, "norm_class_name": "RMSNorm", **vocabulary, **shape, **special})
    mine = converted(state, config)
    GPT(config).load_state_dict(mine)  # it is the model that this config describes
    torch.save(mine, base / "lit_model.pth")
    save_config(config, base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text("{}")
    options = {"r": 3, "lora_alpha": 5, "target_modules": targets, "rank_pattern": {targets[0]: 2}}
    wrapped = peft.get_peft_model(network, peft.LoraConfig(**options))
    fill(wrapped, 4)
    wrapped.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    loratool.convert(tmp_path / "peft", tmp_path / "out", "litgpt", base=base)
    loratool.merge(base, tmp_path / "peft", tmp_path / "merged")
    want = read(tmp_path / "merged")
    assert_same_model(merge_lora(tmp_path / "out"), converted(want, config))
    loratool.merge(base, tmp_path / "out" / "lit_model.pth.lora", tmp_path / "back")
    assert_same_model(read(tmp_path / "back"), want)


def test_the_families_are_those_that_are_claimed() -> None:
    assert {make().config.model_type for make, _, _ in MODELS.values()} == {*CHECKED["litgpt"].families}

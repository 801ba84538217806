"""PEFT's (IA)^3: what its own merge makes of a base, and what only the base can tell."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft_cases
import pytest
import torch
from models import State, assert_float32_close, changed, gpt2, llama, read, save_base
from safetensors.torch import load_file, save_file
from torch import nn

import loratool

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "pattern": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": r".*\.down_proj"},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    "square": {"target_modules": ["attn.c_proj"], "feedforward_modules": [], "fan_in_fan_out": True},
    "nets": {"target_modules": ["fc", "conv", "wide"], "feedforward_modules": ["wide"], "modules_to_save": ["head"]},
}


class Nets(nn.Module):
    """Convolutions, whose vectors do not show which side they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.conv, self.wide = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Made:
    """An adapter of PEFT's, its base on disk, and its merge in float64."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        model = {"gpt2": gpt2, "square": gpt2, "nets": Nets}.get(name, llama)()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter)
        self.base = save_base(model, folder / "base", **({"names": "memory"} if name == "nets" else {}))
        self.adapter = folder / "adapter"
        peft = peft_cases.peft()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(model, peft.IA3Config(**CONFIGS[name]))
            for key, parameter in wrapped.named_parameters():
                if "ia3_l" in key:
                    parameter.data = 1 + torch.randn_like(parameter)
                    parameter.data.view(-1)[0] = 0
            wrapped.save_pretrained(self.adapter)
            self.wrapped = {key: value.clone() for key, value in wrapped.state_dict().items()}
            self.want: State = dict(wrapped.double().merge_and_unload().state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_merges_as_peft_does(name: str, tmp_path: Path) -> None:
    made = Made(name, tmp_path)
    loratool.merge(made.base, made.adapter, tmp_path / "out")
    before, got = read(made.base), read(tmp_path / "out")
    assert len(changed(before, got)) >= 2
    for key, value in got.items():
        assert_float32_close(value, made.want[key], name=key)
    native = tmp_path / "a.lora.safetensors"
    report = loratool.convert(made.adapter, native, "native", base=made.base)
    assert any("they are for no other base" in note for note in report.notes)
    assert loratool.load(native).base.tensors.keys() >= {key for key in changed(before, got) if "head" not in key}
    loratool.merge(made.base, native, tmp_path / "again")
    again = read(tmp_path / "again")
    assert all(torch.equal(again[key], value) for key, value in got.items())


def test_without_the_base_it_can_be_looked_at_and_no_more(tmp_path: Path) -> None:
    made = Made("llama", tmp_path)
    summary = loratool.inspect(made.adapter)
    shapes = {layer.target.rpartition("layers.0.")[2]: (layer.kind, layer.shape) for layer in summary.layers}
    assert shapes == {
        "self_attn.k_proj.weight": ("add", (8,)),
        "self_attn.v_proj.weight": ("add", (8,)),
        "mlp.down_proj.weight": ("add", (24,)),
    }
    assert any(note.startswith("(IA)^3 multiplies the base's weights") for note in summary.notes)
    with pytest.raises(loratool.LoratoolError, match="multiplies the base's weights") as caught:
        loratool.convert(made.adapter, tmp_path / "a.lora.safetensors", "native")
    assert "--base" in caught.value.problems[0].hint


def test_a_wrapped_checkpoint_of_it_is_refused(tmp_path: Path) -> None:
    made = Made("llama", tmp_path)
    torch.save(made.wrapped, tmp_path / "wrapped.pth")
    for options in ({}, {"config": made.adapter / "adapter_config.json"}):
        with pytest.raises(loratool.Unsupported, match="IA3 is not supported: a wrapped checkpoint"):
            loratool.extract(tmp_path / "wrapped.pth", tmp_path / "a.lora.safetensors", **options)


KEY = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
BAD: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str, str]] = {
    "length": ({KEY: (9, 1)}, {}, "E-SHAPE", "9 numbers, for the outputs of the base's [8, 16]"),
    "matrix": ({KEY: (8, 2)}, {}, "E-SHAPE", "one row or column"),
    "vector": ({KEY: (8,)}, {}, "E-SHAPE", "nothing can be made of that"),
    "empty": ({KEY: (0, 1)}, {}, "E-SHAPE", "nothing can be made of that"),
    "other-side": ({KEY: (1, 16)}, {}, "E-CONFIG", "feedforward_modules of the config says otherwise"),
    "config": ({}, {"feedforward_modules": ["k_proj", "down_proj"]}, "E-CONFIG", "says otherwise"),
    "no-list": ({}, {"feedforward_modules": 3}, "E-CONFIG", "a pattern or a list of names"),
    "pattern": ({}, {"feedforward_modules": "(a+)+b"}, "E-CONFIG", "repeats a repetition"),
    "kind": ({}, {"peft_type": "LORA"}, "E-CONFIG", "has parts of IA3, the adapter_config is of LORA"),
    "target": ({KEY.replace("k_proj", "x_proj"): (8, 1)}, {}, "E-TARGET", "x_proj"),
    "factors": ({KEY.replace("ia3_l", "lora_A.weight"): (2, 16)}, {}, "E-COMPONENTS", "lora_A.weight as well"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    shapes, config, code, message = BAD[name]
    made = Made("llama", tmp_path)
    weights, described = made.adapter / "adapter_model.safetensors", made.adapter / "adapter_config.json"
    save_file({**load_file(weights), **{key: torch.ones(shape) for key, shape in shapes.items()}}, weights)
    described.write_text(json.dumps({**json.loads(described.read_text()), **config}))
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(made.base, made.adapter, tmp_path / "out")
    assert code in {problem.code for problem in caught.value.problems}
    assert message in str(caught.value)


def test_only_the_config_tells_the_side_of_a_convolution(tmp_path: Path) -> None:
    made = Made("nets", tmp_path)
    (made.adapter / "adapter_config.json").unlink()
    with pytest.raises(loratool.LoratoolError, match="whether it is a feedforward layer is not stored") as caught:
        loratool.merge(made.base, made.adapter, tmp_path / "out")
    assert "--config" in caught.value.problems[0].hint

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
from strategies import Maker, make_update
from torch import nn

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.updates import Scale

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
    assert not any("for no other base" in note for note in report.notes)
    assert {item.update.kind for item in loratool.load(native).updates} <= {"scale", "replace"}
    assert not loratool.load(native).base.tensors
    loratool.merge(made.base, native, tmp_path / "again")
    again = read(tmp_path / "again")
    assert all(torch.equal(again[key], value) for key, value in got.items())


def test_without_the_base_it_can_be_looked_at_and_no_more(tmp_path: Path) -> None:
    made = Made("llama", tmp_path)
    summary = loratool.inspect(made.adapter)
    shapes = {layer.target.rpartition("layers.0.")[2]: (layer.kind, layer.shape) for layer in summary.layers}
    assert shapes == {
        "self_attn.k_proj.weight": ("scale", (8,)),
        "self_attn.v_proj.weight": ("scale", (8,)),
        "mlp.down_proj.weight": ("scale", (24,)),
    }
    assert any(note.startswith("(IA)^3 has one side of each weight") for note in summary.notes)
    with pytest.raises(loratool.LoratoolError, match="one side of each weight") as caught:
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


# -- written again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_written_for_peft_it_merges_as_before(name: str, tmp_path: Path) -> None:
    """By way of the native file, with the names of all layers and of those that are multiplied at their inputs."""
    made, native, folder = Made(name, tmp_path), tmp_path / "a.lora.safetensors", tmp_path / "again"
    loratool.convert(made.adapter, native, "native", base=made.base)
    report = loratool.convert(native, folder, "peft", base=made.base)
    assert not any("baked" in note for note in report.notes)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (made.adapter, folder))
    assert {key: value for key, value in after.items() if key.endswith("ia3_l")}.keys() <= before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    peft = peft_cases.peft()
    model = {"gpt2": gpt2, "square": gpt2, "nets": Nets}.get(name, llama)().double()
    state = {key: value.double() for key, value in read(made.base).items()}
    model.load_state_dict(state, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    for key, value in read(made.base).items():
        if not torch.equal(made.want[key], value.double()):
            assert_float32_close(got[key], made.want[key], name=key)


MODULE = "model.layers.0.self_attn.k_proj"


def factors(count: int, seed: int = 0) -> TensorRef:
    return TensorRef.of(torch.randn(count, generator=torch.Generator().manual_seed(seed)))


def scale(name: str, shape: tuple[int, ...], axis: int, seed: int = 0, **where: Any) -> Targeted:
    target = Target(name, shape, **where)
    return Targeted(target, Scale(factors(target.region[axis], seed), axis))


WEIGHT, OTHER = (f"{MODULE}.weight", (8, 16)), ("model.layers.0.self_attn.q_proj.weight", (16, 16))
MISFITS: dict[str, tuple[list[Targeted], str]] = {
    "rows": ([scale(*WEIGHT, 0, rows=(0, 4))], "of whole layers only"),
    "bias-alone": ([scale(f"{MODULE}.bias", (8,), 0)], "a bias only by what it multiplies the layer's outputs by"),
    "bias-of-inputs": ([scale(*WEIGHT, 1), scale(f"{MODULE}.bias", (8,), 0)], "a bias only by what it multiplies"),
    "other-bias": (
        [scale(*WEIGHT, 0), scale(f"{MODULE}.bias", (8,), 0, 1)],
        "a bias only by what it multiplies the layer's outputs by",
    ),
    "norm": ([scale(*WEIGHT, 0), scale("model.norm.weight", (16,), 0)], "a bias only by what"),
    "embedding": ([scale("model.embed_tokens.weight", (32, 16), 1, layout="embedding")], "Conv3d layers only"),
    "no-base": ([scale(*WEIGHT, 0)], "only the base tells whether it has one"),
    "lora": (
        [scale(*WEIGHT, 0), Targeted(Target(*OTHER), make_update("lora", OTHER[1], Maker(1)))],
        "a LoRA adapter of PEFT has no scale update",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_peft_has_no_place_for_is_refused(name: str, tmp_path: Path) -> None:
    items, message = MISFITS[name]
    with pytest.raises(loratool.Unsupported, match=message) as caught:
        loratool.convert(Adapter(tuple(items)), tmp_path / "out", "peft")
    assert "--base BASE" in caught.value.problems[0].hint
    assert not (tmp_path / "out").exists()


def test_a_bias_that_stays_is_no_case_for_peft(tmp_path: Path) -> None:
    """It multiplies the bias of a layer with its outputs; LyCORIS and the native file do not."""
    save_file({WEIGHT[0]: torch.ones(8, 16), f"{MODULE}.bias": torch.ones(8)}, tmp_path / "base.safetensors")
    adapter = Adapter((scale(*WEIGHT, 0),))
    with pytest.raises(loratool.Unsupported, match="multiplies the layer's bias as well, and here it stays"):
        loratool.convert(adapter, tmp_path / "out", "peft", base=tmp_path / "base.safetensors")
    loratool.convert(adapter, tmp_path / "baked", "peft", base=tmp_path / "base.safetensors", bake=True)
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "baked", tmp_path / "merged.safetensors")
    loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / "want.safetensors")
    got, want = (load_file(tmp_path / f"{name}.safetensors") for name in ("merged", "want"))
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_inputs_need_no_base(tmp_path: Path) -> None:
    loratool.convert(Adapter((scale(*WEIGHT, 1),)), tmp_path / "out", "peft")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["feedforward_modules"] == [MODULE]


# -- judged and taken out ----------------------------------------------------------------------------------------------


def test_verify_measures_its_weight(tmp_path: Path) -> None:
    made = Made("llama", tmp_path)
    for asked, done in ((1.0, 1.0), (0.5, 0.5), (1.0, 0.5)):
        out = tmp_path / f"{asked}-{done}"
        loratool.merge(made.base, [(made.adapter, done)], out)
        (out / "loratool-receipt.json").unlink(missing_ok=True)
        report = loratool.verify(out, made.base, [(made.adapter, asked)])
        assert report.answer is (asked == done)
        (applied,) = report.applied
        assert applied.weight == pytest.approx(done, rel=1e-5)


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_it_is_taken_out_exactly(weight: float, dtype: str, tmp_path: Path) -> None:
    made = Made("gpt2", tmp_path)
    before, part = read(made.base), [(made.adapter, weight)]
    loratool.merge(made.base, part, tmp_path / "out", undo=tmp_path / "record", dtype=dtype)
    for way, options in {"undo": {"undo": tmp_path / "record"}, "base": {"base": made.base}}.items():
        loratool.unmerge(tmp_path / "out", part, tmp_path / f"by-{way}", **options)
        after = read(tmp_path / f"by-{way}")
        assert all(torch.equal(after[key], value) for key, value in before.items())

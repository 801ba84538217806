"""Every family that a writer's output is claimed for: the program that it is for loads it, and merges as we do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_float32_close, bert, changed, gpt2, gpt_oss, llama, mixtral
from safetensors.torch import load_file, save_file
from strategies import Maker, make_update
from torch import nn

import loratool
import loratool.conventions
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.conventions.checked import CHECKED
from loratool.updates import Replace

pytestmark = pytest.mark.peers
diffusers = pytest.importorskip("diffusers")

import peft  # noqa: E402
import transformers  # noqa: E402
from diffusers_cases import clip, quiet, stable_diffusion  # noqa: E402

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0,
}  # fmt: skip


def causal(name: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**SMALL, **more))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16,
    )  # fmt: skip


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "qwen2": causal("Qwen2Config"),
    "qwen3": causal("Qwen3Config", head_dim=8),
    "gemma2": causal("Gemma2Config", head_dim=8),
    "phi3": causal("Phi3Config"),
    "t5": t5,
    "clip_text_model": clip,
    "UNet2DConditionModel": unet,
    "FluxTransformer2DModel": flux,
    "SD3Transformer2DModel": sd3,
}
DENOISERS = ["UNet2DConditionModel", "FluxTransformer2DModel", "SD3Transformer2DModel"]
LYCORIS = ["UNet2DConditionModel", "SD3Transformer2DModel"]
COMPONENT = {"UNet2DConditionModel": "unet"}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)


def saved(family: str, folder: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    model.save_pretrained(folder)
    return model, folder


def adapter_of(model: nn.Module, base: Path) -> Adapter:
    """LoRAs of all Linear layers that are stored under their own names, of several ranks and scales."""
    (file,) = base.glob("*.safetensors")
    state, items = load_file(file), []
    for name, module in model.named_modules():
        found = [key for key in (f"{name}.weight", f"text_model.{name}.weight") if key in state]
        kind = type(module).__name__
        if not found or kind not in ("Linear", "Conv1D", "LoRACompatibleLinear") or "lm_head" in name:
            continue
        shape = tuple(state[found[0]].shape)
        update = make_update("lora", shape, Maker(len(items)), 1 + len(items) % 3, "none", 0.5 + len(items) % 2)
        layout = "in_out" if kind == "Conv1D" else ""
        items.append(Targeted(Target(found[0], shape, layout=layout), update))
    assert len(items) > 1
    return Adapter(tuple(items))


def merged(model: nn.Module, base: Path, adapter: Adapter, folder: Path) -> dict[str, torch.Tensor]:
    loratool.merge(base, adapter, folder)
    return type(model).from_pretrained(folder).state_dict()


def test_every_family_that_is_claimed_has_a_model() -> None:
    assert {*CHECKED["peft"].families} == MODELS.keys()
    assert {*CHECKED["diffusers"].families} == {*DENOISERS, "clip_text_model"}
    assert {*CHECKED["lycoris"].families} == {*LYCORIS}
    assert {*CHECKED["kohya"].families} == {"UNet2DConditionModel", "FluxTransformer2DModel", "clip_text_model"}
    assert CHECKED.keys() | {"native"} == loratool.conventions.writers().keys()


@pytest.mark.parametrize("family", MODELS)
def test_peft_loads_what_was_written(family: str, tmp_path: Path) -> None:
    model, base = saved(family, tmp_path / "base")
    made = adapter_of(model, base)
    report = loratool.convert(made, tmp_path / "peft", "peft", base=base)
    assert not any("is not tested" in note for note in report.notes)
    wrapped = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), tmp_path / "peft")
    got = wrapped.merge_and_unload().state_dict()
    for name, value in merged(model, base, made, tmp_path / "out").items():
        assert_float32_close(got[name], value, name=name)


AUTO = {
    "llama": peft.AutoPeftModelForCausalLM,
    "gpt2": peft.AutoPeftModelForCausalLM,
    "bert": peft.AutoPeftModel,
    "t5": peft.AutoPeftModelForSeq2SeqLM,
    "clip_text_model": peft.AutoPeftModel,
    "UNet2DConditionModel": peft.AutoPeftModel,
}


@pytest.mark.parametrize("family", AUTO)
def test_pefts_auto_classes_find_the_base(family: str, tmp_path: Path) -> None:
    """By nothing but the written folder, where the base lies in a hub cache."""
    revision, cached = "0123456789" * 4, tmp_path / "hub" / "models--tiny--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    model, base = saved(family, cached / "snapshots" / revision)
    made = adapter_of(model, base)
    loratool.convert(made, tmp_path / "peft", "peft", base=base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AUTO[family].from_pretrained(tmp_path / "peft", cache_dir=tmp_path / "hub")
    assert (loaded.peft_config["default"].base_model_name_or_path, loaded.peft_config["default"].revision) == (
        "tiny/model", revision,
    )  # fmt: skip
    got = loaded.merge_and_unload().state_dict()
    for name, value in merged(model, base, made, tmp_path / "out").items():
        assert_float32_close(got[name], value, name=name)


def test_a_classifier_with_its_head_is_found_by_its_task(tmp_path: Path) -> None:
    revision, cached = "0123456789" * 4, tmp_path / "hub" / "models--tiny--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    model, base = saved("bert", cached / "snapshots" / revision)
    heads = {name: torch.randn(p.shape) for name, p in model.named_parameters() if name.startswith("classifier.")}
    head = [Targeted(Target(n, tuple(v.shape)), Replace(TensorRef.of(v))) for n, v in heads.items()]
    layers = [item for item in adapter_of(model, base).updates if "classifier" not in item.target.name]
    made = Adapter((*layers, *head))
    loratool.convert(made, tmp_path / "peft", "peft", base=base)
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "peft", cache_dir=tmp_path / "hub", num_labels=len(heads["classifier.bias"])
    )
    got = loaded.merge_and_unload().state_dict()
    for name, value in merged(model, base, made, tmp_path / "out").items():
        assert_float32_close(got[name], value, name=name)


def test_peft_loads_the_folder_of_each_model(tmp_path: Path) -> None:
    """A kohya file for a UNet and a text encoder, each part loaded into its own model."""
    torch.manual_seed(0)
    base, state = stable_diffusion(tmp_path), {}
    places = {"unet": ("lora_unet_", "to_q"), "text_encoder": ("lora_te_text_model_", "q_proj")}
    classes = {"unet": diffusers.UNet2DConditionModel, "text_encoder": transformers.CLIPTextModel}
    for component, (prefix, end) in places.items():
        for name, module in classes[component].from_pretrained(base / component).named_modules():
            if name.endswith(end):
                key, (out, into) = prefix + name.removeprefix("text_model.").replace(".", "_"), module.weight.shape
                state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = (
                    torch.randn(2, into),
                    torch.randn(out, 2),
                )
                state[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "kohya.safetensors")
    loratool.convert(tmp_path / "kohya.safetensors", tmp_path / "peft", "peft", base=base)
    loratool.merge(base, tmp_path / "kohya.safetensors", tmp_path / "out")
    for component, kind in classes.items():
        wrapped = peft.PeftModel.from_pretrained(kind.from_pretrained(base / component), tmp_path / "peft" / component)
        got, before = wrapped.merge_and_unload().state_dict(), kind.from_pretrained(base / component).state_dict()
        want = kind.from_pretrained(tmp_path / "out" / component).state_dict()
        assert changed(before, want)
        for name, value in want.items():
            assert_float32_close(got[name], value, name=name)


@pytest.mark.parametrize("family", DENOISERS)
def test_diffusers_loads_what_was_written(family: str, tmp_path: Path) -> None:
    model, base = saved(family, tmp_path / "base")
    made = adapter_of(model, base)
    report = loratool.convert(made, tmp_path / "lora", "diffusers", base=base)
    assert not any("is not tested" in note for note in report.notes)
    loaded = type(model).from_pretrained(base)
    loaded.load_lora_adapter(
        tmp_path / "lora", prefix=COMPONENT.get(family, "transformer"), weight_name="pytorch_lora_weights.safetensors",
    )  # fmt: skip
    loaded.fuse_lora()
    got = {n.replace(".base_layer", ""): v for n, v in loaded.state_dict().items() if ".lora_" not in n}
    for name, value in merged(model, base, made, tmp_path / "out").items():
        assert_float32_close(got[name], value, name=name)


@torch.no_grad()
@pytest.mark.parametrize("family", LYCORIS)
def test_lycoris_loads_what_was_written(family: str, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    model, base = saved(family, tmp_path / "base")
    made = adapter_of(model, base)
    report = loratool.convert(made, tmp_path / "lora.safetensors", "lycoris", base=base, as_component="model")
    assert not any("is not tested" in note for note in report.notes)
    loaded = type(model).from_pretrained(base)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "lora.safetensors"), loaded)
    assert len(network.loras) == len(made.targets())
    network.merge_to(1.0)
    got = loaded.state_dict()
    for name, value in merged(model, base, made, tmp_path / "out").items():
        assert_float32_close(got[name], value, name=name)


def test_a_family_that_nobody_tried_is_told(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.GraniteConfig(**SMALL))
    model.save_pretrained(tmp_path / "base")
    made = adapter_of(model, tmp_path / "base")
    report = loratool.convert(made, tmp_path / "peft", "peft", base=tmp_path / "base")
    assert any("PEFT loads it for granite is not tested" in note for note in report.notes)
    report = loratool.convert(made, tmp_path / "alone", "peft")
    assert any("which model it is for is not known" in note for note in report.notes)
    assert not any("tested" in note for note in loratool.convert(made, tmp_path / "x.safetensors", "native").notes)

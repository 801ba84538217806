"""diffusers' adapters, from files made by hand: names, scales, what is detected and what is refused, and why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import conventions
from loratool.checkpoint import open_checkpoint

State = dict[str, Tensor]
RANK = 3
NAMES = {  # per generation: how the factors of one denoiser's and one text encoder's projection are called
    "oldest": (
        "unet.d.attn1.processor.to_out_lora",
        "text_encoder.l.self_attn.to_out_lora",
        "down.weight",
        "up.weight",
    ),
    "middle": (
        "unet.d.attn1.to_out.0.lora",
        "text_encoder.l.self_attn.out_proj.lora_linear_layer",
        "down.weight",
        "up.weight",
    ),
    "current": (
        "transformer.d.attn1.to_out.0",
        "text_encoder.l.self_attn.out_proj",
        "lora_A.weight",
        "lora_B.weight",
    ),
}


def pair(module: str, down: str = "lora_A.weight", up: str = "lora_B.weight", shape: tuple[int, int] = (6, 4)) -> State:
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"{module}.{down}": torch.randn(RANK, shape[1], generator=generator),
        f"{module}.{up}": torch.randn(shape[0], RANK, generator=generator),
    }


def saved(path: Path, state: State, config: Mapping[str, Any] | str | None = None) -> Path:
    metadata = None if config is None else config if isinstance(config, str) else json.dumps(config)
    save_file(state, path, {"format": "pt"} | ({"lora_adapter_metadata": metadata} if metadata is not None else {}))
    return path


def problems(call: Callable[[], object]) -> str:
    with pytest.raises(loratool.LoratoolError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("generation", NAMES)
def test_names(tmp_path: Path, generation: str) -> None:
    """Each generation, merged into a pipeline, into its component alone, and read without a base."""
    denoiser, text, down, up = NAMES[generation]
    component = denoiser.partition(".")[0]
    base = {f"{component}.d.attn1.to_out.0.weight": (6, 4), "text_encoder.l.self_attn.out_proj.weight": (6, 4)}
    path = saved(tmp_path / "a.safetensors", pair(denoiser, down, up) | pair(text, down, up))
    assert {item.target.name: item.target.shape for item in loratool.load(path).updates} == base
    weights = {name: torch.zeros(shape) for name, shape in base.items()}
    save_file(weights, tmp_path / "whole.safetensors")
    loratool.merge(tmp_path / "whole.safetensors", path, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    factors = load_file(path)
    for name, module in zip(base, (denoiser, text), strict=True):
        torch.testing.assert_close(found[name], factors[f"{module}.{up}"] @ factors[f"{module}.{down}"])
    alone = saved(tmp_path / "b.safetensors", pair(denoiser, down, up))
    bare = {name.partition(".")[2]: tensor for name, tensor in weights.items() if not name.startswith("text")}
    save_file(bare, tmp_path / "one.safetensors")
    report = loratool.merge(tmp_path / "one.safetensors", alone, tmp_path / "out2.safetensors")
    assert [*report.receipt.tensors] == ["d.attn1.to_out.0.weight"]


@pytest.mark.parametrize("before", ["diffusion_model.", "transformer.", "", "model.diffusion_model."])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", ""])
def test_prefixes_of_other_trainers(tmp_path: Path, before: str, prefix: str) -> None:
    """The base's names decide: whatever stands before the module, and wherever the module is."""
    base = f"{before}double_blocks.0.q.weight"
    save_file({base: torch.zeros(6, 4)}, tmp_path / "base.safetensors")
    path = saved(tmp_path / "a.safetensors", pair(f"{prefix}double_blocks.0.q"))
    report = loratool.merge(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors")
    assert [*report.receipt.tensors] == [base]


def test_several_components_need_the_pipeline(tmp_path: Path) -> None:
    """Both text encoders of SDXL fit either of them alone: taking one would be a guess, dropping one a loss."""
    save_file({"l.fc.weight": torch.zeros(6, 4)}, tmp_path / "one.safetensors")
    state = pair("text_encoder.l.fc") | pair("text_encoder_2.l.fc")
    path = saved(tmp_path / "a.safetensors", state)
    text = problems(lambda: loratool.merge(tmp_path / "one.safetensors", path, tmp_path / "out.safetensors"))
    assert "several components (text_encoder, text_encoder_2)" in text
    assert "give the pipeline's folder" in text


def test_a_lookalike_component_is_no_match(tmp_path: Path) -> None:
    save_file({"transformer.blocks.0.q.weight": torch.zeros(6, 4)}, tmp_path / "base.safetensors")
    path = saved(tmp_path / "a.safetensors", pair("transformer_2.blocks.0.q"))
    text = problems(lambda: loratool.merge(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors"))
    assert "the base has no 'transformer_2.blocks.0.q.weight'" in text


def test_two_places_for_a_bare_name(tmp_path: Path) -> None:
    save_file({f"{c}.blocks.0.q.weight": torch.zeros(6, 4) for c in ("transformer", "transformer_2")},
              tmp_path / "base.safetensors")  # fmt: skip
    path = saved(tmp_path / "pytorch_lora_weights.safetensors", pair("blocks.0.q"))
    text = problems(lambda: loratool.merge(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors"))
    assert "E-AMBIGUOUS" in text
    assert "transformer_2.blocks.0.q.weight" in text


# --- scale -----------------------------------------------------------------------------------------------------------


@given(
    alpha=st.floats(0.25, 64, width=16).map(float),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    shape=st.sampled_from([(), (1,)]),
)
def test_alpha_tensors(tmp_path_factory: pytest.TempPathFactory, alpha: float, dtype: torch.dtype, shape: Any) -> None:
    path = tmp_path_factory.mktemp("alpha") / "a.safetensors"
    saved(
        path, pair("transformer.blocks.0.q") | {"transformer.blocks.0.q.alpha": torch.full(shape, alpha, dtype=dtype)}
    )
    (layer,) = loratool.inspect(path).layers
    assert (layer.alpha, layer.scaling, layer.scale) == (alpha, "alpha/rank", alpha / RANK)


def test_bfloat16_alpha(tmp_path: Path) -> None:
    alpha = torch.tensor(5.0, dtype=torch.bfloat16)
    state = pair("transformer.blocks.0.q") | {"transformer.blocks.0.q.alpha": alpha}
    assert loratool.inspect(saved(tmp_path / "a.safetensors", state)).layers[0].alpha == 5.0


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"transformer.r": 3, "transformer.lora_alpha": 6}, [2.0, 2.0]),
        ({"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.use_rslora": True}, [6 / 3**0.5] * 2),
        ({"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"k": 12}}, [4.0, 2.0]),
        ({"transformer.r": 9, "transformer.rank_pattern": {"k|q": 3}, "transformer.lora_alpha": 3}, [1.0, 1.0]),
    ],
)
def test_the_config_of_the_header(tmp_path: Path, config: dict[str, Any], scales: list[float]) -> None:
    state = pair("transformer.blocks.0.q") | pair("transformer.blocks.0.k")
    layers = loratool.inspect(saved(tmp_path / "a.safetensors", state, config)).layers
    assert [layer.scale for layer in layers] == pytest.approx(scales)


def test_alpha_of_the_user(tmp_path: Path) -> None:
    """Where nothing is stored diffusers' rule holds, and the note says how to say otherwise; what is stored stays."""
    state = pair("unet.blocks.0.q")
    path = saved(tmp_path / "a.safetensors", state)
    shown = loratool.inspect(path)
    assert shown.layers[0].scale == 1
    assert "a scale of 1, as their loaders take it" in str(shown.notes)
    (item,) = loratool.load(path, alpha=6, scaling="alpha/rank").updates
    assert item.update.scaling is not None
    assert item.update.scaling.scale == 2
    stored = saved(tmp_path / "b.safetensors", state | {"unet.blocks.0.q.alpha": torch.tensor(2.0)})
    assert "the file says alpha itself: 2 (unet.blocks.0.q.alpha)" in problems(
        lambda: loratool.load(stored, alpha=6, scaling="alpha/rank")
    )


def test_inspect_needs_no_torch(tmp_path: Path) -> None:
    state = pair("unet.blocks.0.q") | {"unet.blocks.0.q.alpha": torch.tensor(6.0)}
    path = saved(tmp_path / "a.safetensors", state)
    code = "import sys, loratool; assert loratool.inspect(sys.argv[1]).layers[0].scale == 2; assert 'torch' not in "
    code += "sys.modules"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


# --- what is detected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modules", "detected"),
    [
        ("a", "unet.blocks.0.q", True),
        ("a", "text_encoder_2.l.fc1", True),
        ("a", "diffusion_model.blocks.0.q", True),
        ("a", "down_blocks.0.q", True),
        ("pytorch_lora_weights", "anything.q", True),
        ("a", "anything.q", False),
        ("a", "base_model.model.unet.q", False),
        ("adapter_model", "unet.blocks.0.q", False),
        ("a", "transformer.h.0.attn.c_attn", False),
        ("a", "model.layers.0.self_attn.q_proj", False),
    ],
)
def test_detection(tmp_path: Path, name: str, modules: str, detected: bool) -> None:
    source = open_checkpoint(saved(tmp_path / f"{name}.safetensors", pair(modules)))
    assert conventions.diffusers.detect(source) is detected
    if detected:
        assert [found.NAME for found in conventions.matching(source)] == ["diffusers"]


FOREIGN = {
    "plain": ["unet.q.linear.weight", "unet.q.lora.A", "unet.q.lora.B"],
    "loralib": ["unet.q.lora_A", "unet.q.lora_B"],
    "peft wrapped": ["unet.q.base_layer.weight", "unet.q.lora_A.default.weight", "unet.q.lora_B.default.weight"],
    "kohya": ["lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight", "lora_unet_q.alpha"],
    "lycoris": ["lora_unet_q.hada_w1_a", "lora_unet_q.hada_w1_b", "lora_unet_q.dora_scale"],
    "torchtune": ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"],
    "mlx": ["model.layers.0.q_proj.lora_a", "model.layers.0.q_proj.lora_b"],
    "litgpt": ["transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"],
    "unet": ["down_blocks.0.attn1.to_q.weight", "down_blocks.0.attn1.to_out.0.bias", "mid_block.alpha"],
    "pipeline": ["unet.down_blocks.0.attn1.to_q.weight", "text_encoder.l.fc1.weight"],
}


@pytest.mark.parametrize("convention", FOREIGN)
def test_other_conventions_are_not_ours(tmp_path: Path, convention: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(2, 2) for name in FOREIGN[convention]}, path)
    assert not conventions.diffusers.detect(open_checkpoint(path))


# --- refusals --------------------------------------------------------------------------------------------------------

Q = "unet.blocks.0.q"
REFUSED: dict[str, tuple[State, Any, str]] = {
    "no up": ({f"{Q}.lora_A.weight": torch.ones(3, 4)}, None, f"{Q} has lora_A.weight and no up (lora_B)"),
    "no down": ({f"{Q}.lora.up.weight": torch.ones(6, 3)}, None, f"{Q} has lora_B.weight and no down (lora_A)"),
    "alpha alone": (pair("unet.a") | {f"{Q}.alpha": torch.tensor(1.0)}, None, f"{Q} has alpha and no down and up"),
    "ranks differ": (
        pair(Q) | {f"{Q}.lora_A.weight": torch.ones(2, 4)}, None, "down has rank 2, up 3: a grouped convolution",
    ),
    "flat factor": (pair(Q) | {f"{Q}.lora_A.weight": torch.ones(3)}, None, "they must be [rank, in...]"),
    "empty factor": (pair(Q) | {f"{Q}.lora_A.weight": torch.ones(3, 0)}, None, "they must be [rank, in...]"),
    "both names": (pair(Q) | pair(f"{Q}.lora", "down.weight", "up.weight"), None, "are the same part of blocks.0.q"),
    "dora_scale": (pair(Q) | {f"{Q}.dora_scale": torch.ones(6, 1)}, {"unet.r": 3}, "matches: lycoris, diffusers"),
    "stranger": (pair(Q) | {"emb.clip_l": torch.ones(2, 2)}, None, "1 tensor is no part of an adapter"),
    "no magnitude": (
        pair(Q) | pair("unet.a") | {f"{Q}.lora_magnitude_vector": torch.ones(6)}, None,
        "unet is DoRA, and a has no magnitude",
    ),
    "magnitude": (pair(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(5)}, None, "the magnitude is [5], for 6 outputs"),
    "no dora": (
        pair(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(6)}, {"unet.r": 3, "unet.use_dora": False},
        "says that unet is no DoRA",
    ),
    "alpha shape": (pair(Q) | {f"{Q}.alpha": torch.ones(2)}, None, "not one floating-point number"),
    "alpha dtype": (pair(Q) | {f"{Q}.alpha": torch.tensor(4)}, None, "not one floating-point number"),
    "alpha NaN": (pair(Q) | {f"{Q}.alpha": torch.tensor(float("nan"))}, None, "is not finite"),
    "alpha twice": (pair(Q) | {f"{Q}.alpha": torch.tensor(1.0)}, {"unet.r": 3}, "alpha is stored twice"),
    "config rank": (pair(Q), {"unet.r": 5}, "the rank is 5 (r of lora_adapter_metadata in the header), and 3"),
    "config type": (pair(Q), {"unet.r": "3"}, "r is '3', not a whole number"),
    "pissa": (pair(Q), {"unet.r": 3, "unet.init_lora_weights": "pissa"}, "it changed the base before training"),
    "lokr": (pair(Q), {"unet.r": 3, "unet.peft_type": "LOKR"}, "peft_type LOKR is not supported"),
    "no config": (pair(Q), {"text_encoder.r": 3}, "alpha is not stored"),
    "config list": (pair(Q), "[]", "lora_adapter_metadata is not a JSON object"),
    "config text": (pair(Q), "{", "E-CONFIG"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, cli: Cli, case: str) -> None:
    state, config, message = REFUSED[case]
    save_file({f"{Q}.weight": torch.zeros(6, 4), "unet.a.weight": torch.zeros(6, 4)}, tmp_path / "base.safetensors")
    path = saved(tmp_path / "a.safetensors", state, config)
    result = cli("merge", tmp_path / "base.safetensors", path, "-o", tmp_path / "out.safetensors")
    assert result.code == 2, result.err
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "out.safetensors").exists()


def test_all_problems_at_once(tmp_path: Path) -> None:
    state = {f"{name}.lora_A.weight": torch.ones(3, 4) for name in ("unet.a", "unet.b", "unet.c")}
    text = problems(lambda: loratool.load(saved(tmp_path / "a.safetensors", state)))
    assert text.count("E-COMPONENTS") == 3


def test_options_that_mean_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", pair(Q))
    assert "--layout means nothing" in problems(lambda: loratool.load(path, layout={"*": "in_out"}))

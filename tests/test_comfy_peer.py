"""Bases that ComfyUI's library quantised, written and dequantised by that library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import small_blocks

import loratool

pytestmark = pytest.mark.peers

NAMES = ("blocks.0.attn.proj", "blocks.1.attn.proj")
SHAPE = (192, 512)  # one and a half tiles of 128 rows, two groups of a rotation
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fp8": ("TensorCoreFP8Layout", {"scale": "recalculate"}, {"format": "float8_e4m3fn"}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}),
    "int8": ("TensorWiseINT8Layout", {"is_weight": True, "per_channel": True}, {"format": "int8_tensorwise"}),
    "int8-whole": ("TensorWiseINT8Layout", {"is_weight": True}, {"format": "int8_tensorwise"}),
    "int8-rotated": (
        "TensorWiseINT8Layout",
        {"is_weight": True, "per_channel": True, "convrot": True, "convrot_groupsize": 256},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    ),
    "int8-rotated-64": (
        "TensorWiseINT8Layout",
        {"is_weight": True, "per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
    ),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}),
}


def written(folder: Path, kind: str, told_by: str = "tensor", as_bytes: bool = False) -> dict[str, torch.Tensor]:
    """A base of this kind, and an adapter of it; its weights as the library dequantises them."""
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    layout, options, facts = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    state, truth, lora = {"norm.weight": torch.ones(4)}, {}, {}
    for name in NAMES:
        rows = torch.logspace(-1, 1, SHAPE[0])[:, None] * torch.logspace(-0.5, 0.5, SHAPE[1])
        W = torch.randn(SHAPE, generator=generator) * 0.02 * rows  # [rows, columns]
        quantised = tensor.QuantizedTensor.from_float(W, layout, **options)
        state |= {key: value.contiguous().clone() for key, value in quantised.state_dict(f"{name}.weight").items()}
        truth[name] = quantised.dequantize().float()
        if as_bytes:
            state[f"{name}.weight_scale"] = state[f"{name}.weight_scale"].view(torch.uint8)
        if told_by == "tensor":
            state[f"{name}.comfy_quant"] = torch.tensor([*json.dumps(facts).encode()], dtype=torch.uint8)
        lora[f"{name}.lora_down.weight"] = torch.randn(4, SHAPE[1], generator=generator) * 0.05
        lora[f"{name}.lora_up.weight"] = torch.randn(SHAPE[0], 4, generator=generator) * 0.05
        lora[f"{name}.alpha"] = torch.tensor(4.0)
    header = {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(NAMES, facts)})}
    save_file(state, folder / "base.safetensors", header if told_by == "header" else {})
    save_file({f"diffusion_model.{name}": value for name, value in lora.items()}, folder / "lora.safetensors")
    return {
        name: W.double() + lora[f"{name}.lora_up.weight"].double() @ lora[f"{name}.lora_down.weight"].double()
        for name, W in truth.items()
    }


READ = [kind for kind in KINDS if kind != "nvfp4"]


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("told_by", ["tensor", "header"])
def test_what_its_library_dequantises_is_merged_and_no_marker_is_left(tmp_path: Path, kind: str, told_by: str) -> None:
    wanted = written(tmp_path, kind, told_by)
    with small_blocks(64):  # a few rows at a time
        loratool.merge(
            tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors", dtype="fp32"
        )
    merged = load_file(tmp_path / "out.safetensors")
    for name, W in wanted.items():
        error = (merged[f"{name}.weight"].double() - W).abs().max() / W.abs().max()
        assert error < 1e-6, (name, float(error))
    assert set(merged) == {"norm.weight", *(f"{name}.weight" for name in NAMES)}
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert "_quantization_metadata" not in file.metadata()


def test_exponents_stored_as_bytes_are_the_same(tmp_path: Path) -> None:
    wanted = written(tmp_path, "mxfp8", as_bytes=True)
    base, adapter, out = tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    loratool.merge(base, adapter, out, dtype="fp32")
    merged = load_file(out)
    assert all(torch.allclose(merged[f"{name}.weight"].double(), W, rtol=0, atol=1e-6) for name, W in wanted.items())


def test_fp8_stays_fp8_and_its_library_reads_it(tmp_path: Path) -> None:
    wanted = written(tmp_path, "fp8")
    base, adapter, out = tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    loratool.merge(base, adapter, out)
    merged, tensor = load_file(out), pytest.importorskip("comfy_kitchen.tensor")
    assert set(merged) == set(load_file(base))
    for name, W in wanted.items():
        params = tensor.get_layout_class("TensorCoreFP8Layout").Params(
            scale=merged[f"{name}.weight_scale"], orig_dtype=torch.float32, orig_shape=SHAPE
        )
        quantised = tensor.QuantizedTensor(merged[f"{name}.weight"], "TensorCoreFP8Layout", params)
        assert (quantised.dequantize().double() - W).norm() / W.norm() < 0.03


@pytest.mark.parametrize("kind", ["mxfp8", "int8", "int8-rotated"])
def test_what_is_not_quantised_again_asks_for_a_dtype(tmp_path: Path, cli: Cli, kind: str) -> None:
    written(tmp_path, kind)
    result = cli(
        "merge", tmp_path / "base.safetensors", tmp_path / "lora.safetensors", "-o", tmp_path / "out.safetensors"
    )
    assert (result.code, "--dtype bf16" in result.err) == (2, True)


def test_a_format_that_is_not_read_is_refused_by_its_name(tmp_path: Path, cli: Cli) -> None:
    written(tmp_path, "nvfp4")
    for options in ([], ["--dtype", "bf16"]):
        out = tmp_path / "out.safetensors"
        result = cli("merge", tmp_path / "base.safetensors", tmp_path / "lora.safetensors", "-o", out, *options)
        assert (result.code, "nvfp4" in result.err, out.exists()) == (2, True, False)

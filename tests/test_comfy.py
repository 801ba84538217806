"""What ComfyUI's markers say is believed, and nothing else: contradictory, broken and missing ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool

E4M3 = torch.float8_e4m3fn
FP8 = {"l.q.weight": torch.ones(8, 4).to(E4M3), "l.q.weight_scale": torch.tensor(0.5)}
INT8 = {"l.q.weight": torch.ones(8, 4, dtype=torch.int8), "l.q.weight_scale": torch.ones(8, 1)}
MX = {"l.q.weight": torch.ones(8, 32).to(E4M3), "l.q.weight_scale": torch.zeros(128, 4, dtype=torch.uint8)}


def marker(facts: Any) -> dict[str, torch.Tensor]:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    return {"l.q.comfy_quant": torch.tensor([*text.encode()], dtype=torch.uint8)}


def plan_of(folder: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> loratool.Plan:
    save_file(state, folder / "base.safetensors", metadata or {})
    columns = state["l.q.weight"].shape[1]
    factors = {"l.q.lora_down.weight": torch.ones(2, columns), "l.q.lora_up.weight": torch.ones(8, 2)}
    save_file(factors | {"l.q.alpha": torch.tensor(2.0)}, folder / "a.safetensors")
    return loratool.plan(folder / "base.safetensors", folder / "a.safetensors", folder / "o.safetensors", dtype="bf16")


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (FP8 | marker("{"), "can not be read"),
        (FP8 | marker([]), "without a format"),
        (FP8 | marker({"format": "new_method"}), "new_method"),
        (FP8 | marker({"format": "float8_e5m2"}), "stored as F8_E4M3"),
        ({"l.q.weight": FP8["l.q.weight"]} | marker({"format": "float8_e4m3fn"}), "weight_scale is missing"),
        (FP8 | {"l.q.weight_scale": torch.ones(4)} | marker({"format": "float8_e4m3fn"}), "one number is due"),
        (INT8 | marker({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32}), "groups of 32"),
        (INT8 | marker({"format": "int8_tensorwise", "convrot": True}), "groups of 256"),
        (INT8 | {"l.q.weight_scale": torch.ones(4)} | marker({"format": "int8_tensorwise"}), "its scale is F32 [4]"),
        (MX | {"l.q.weight_scale": torch.zeros(8, 1, dtype=torch.uint8)} | marker({"format": "mxfp8"}), "are due"),
        (MX, "nothing names the method"),
        (INT8, "nothing names the method"),
    ],
)
def test_what_can_not_be_believed_is_refused(tmp_path: Path, state: dict[str, torch.Tensor], word: str) -> None:
    with pytest.raises(loratool.LoratoolError) as caught:
        plan_of(tmp_path, state)
    assert caught.value.code == "E-QUANTISED"
    assert word in str(caught.value)


def test_a_marker_and_a_header_that_differ_are_refused(tmp_path: Path) -> None:
    header = {"_quantization_metadata": json.dumps({"layers": {"l.q": {"format": "mxfp8"}}})}
    with pytest.raises(loratool.InvalidFile, match="by its comfy_quant, 'mxfp8' by the header"):
        plan_of(tmp_path, FP8 | marker({"format": "float8_e4m3fn"}), header)
    with pytest.raises(loratool.InvalidFile, match="lists no layers"):
        plan_of(tmp_path, FP8, {"_quantization_metadata": "{}"})


def test_the_older_scaled_fp8_is_read_with_its_one_scale_and_leaves_nothing_behind(tmp_path: Path) -> None:
    state = {
        "l.q.weight": torch.full((8, 4), 2.0).to(E4M3),
        "l.q.scale_weight": torch.tensor([0.25]),
        "l.q.scale_input": torch.tensor([1.0]),
        "scaled_fp8": torch.zeros(2).to(E4M3),
    }
    plan_of(tmp_path, state)
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "o.safetensors", dtype="bf16")
    merged = load_file(tmp_path / "o.safetensors")
    assert set(merged) == {"l.q.weight"}
    assert merged["l.q.weight"].unique().tolist() == [2.5]  # 2 * 0.25 + 1 * 2
    kept = loratool.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "k.safetensors")
    assert kept.changed == 2
    again = load_file(tmp_path / "k.safetensors")
    assert set(again) == set(state)
    assert (again["l.q.weight"].float() * again["l.q.scale_weight"]).unique().tolist() == pytest.approx([2.5])

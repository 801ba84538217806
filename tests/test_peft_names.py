"""PEFT's keys where its prefix, or the model's own, is not where PEFT itself puts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool

PREFIX, MODULE = "base_model.model.", "model.layers.0.self_attn.q_proj"
A, B, W = torch.arange(10.0).reshape(2, 5), torch.arange(12.0).reshape(6, 2), torch.arange(30.0).reshape(6, 5)
CASES = {  # the adapter's module with its prefixes, and the base's
    "PEFT's own": (f"{PREFIX}{MODULE}", MODULE),
    "without its prefix": (MODULE, MODULE),
    "one part of the model was wrapped": (f"thinker.{PREFIX}{MODULE}", f"thinker.{MODULE}"),
    "the whole of it": (f"{PREFIX}thinker.{MODULE}", f"thinker.{MODULE}"),
    "the language model of a VLM": (f"{PREFIX}{MODULE}", MODULE.replace("model.", "model.language_model.", 1)),
    "a VLM's on its language model": (f"{PREFIX}{MODULE.replace('model.', 'model.language_model.', 1)}", MODULE),
    "twice": (f"{PREFIX}{PREFIX}{MODULE}", MODULE),
}


def adapter_of(folder: Path, *modules: str) -> Path:
    folder.mkdir()
    factors = {f"{name}.lora_{part}.weight": value.clone() for name in modules for part, value in (("A", A), ("B", B))}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_prefixes(case: str, tmp_path: Path) -> None:
    module, target = CASES[case]
    save_file({f"{target}.weight": W}, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", adapter_of(tmp_path / "a", module), tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[f"{target}.weight"], W + 3 * B @ A)


def test_two_keys_for_one_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(loratool.InvalidFile, match="both stand for") as caught:
        loratool.load(adapter_of(tmp_path / "a", MODULE, f"{PREFIX}{MODULE}"))
    assert caught.value.code == "E-DUPLICATE"

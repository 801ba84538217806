"""An adapter on a base that lacks its targets: one line says what they have in common, and it is said soon."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import Cli, Kit
from safetensors.torch import save_file

import loratool
from loratool.names import COMPARED


def saved(path: Path, names: Iterable[str], shape: tuple[int, int] = (4, 4)) -> Path:
    save_file({name: torch.ones(*shape) for name in names}, path)
    return path


def lora(folder: Path, modules: Iterable[str]) -> Path:
    """A PEFT adapter of these modules."""
    folder.mkdir()
    factors = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}
    tensors = {f"base_model.model.{name}.{part}": value.clone() for name in modules for part, value in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


def refused(base: Path, adapter: Path) -> loratool.LoratoolError:
    with pytest.raises(loratool.Mismatch) as caught:
        loratool.plan(base, adapter, base.parent / "out.safetensors")
    return caught.value


LLAMA = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(4) for p in "qkvo"]


def test_the_other_architecture(tmp_path: Path) -> None:
    base = saved(tmp_path / "base.safetensors", [f"h.{n}.attn.c_attn.weight" for n in range(4)])
    error = refused(base, lora(tmp_path / "adapter", [f"unet.down.{n}.attn.to_q" for n in range(8)]))
    assert error.message.startswith("none of the adapter's 8 targets is in the base: it calls its tensors h.0.attn")
    assert "--map FILE" in error.hint
    assert len(error.problems) == 9


def test_a_larger_model_of_the_same_kind(tmp_path: Path) -> None:
    base = saved(tmp_path / "base.safetensors", LLAMA)
    modules = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(6) for p in "qkvo"]
    error = refused(base, lora(tmp_path / "adapter", modules))
    assert "16 of the adapter's 24 targets are in the base: it has 4 layers in model.layers" in error.message
    assert "goes to number 5" in error.message


def test_one_shard_of_several(tmp_path: Path) -> None:
    base = saved(tmp_path / "model-00001-of-00003.safetensors", LLAMA[:4])
    error = refused(base, lora(tmp_path / "adapter", [name.removesuffix(".weight") for name in LLAMA]))
    assert "one shard of 3" in error.message
    assert "folder" in error.hint


def test_few_missing_targets_need_no_summary(tmp_path: Path) -> None:
    base = saved(tmp_path / "base.safetensors", LLAMA)
    error = refused(base, lora(tmp_path / "adapter", ["model.layers.0.self_attn.x_proj"]))
    assert [problem.message for problem in error.problems] == [
        "the base has no 'model.layers.0.self_attn.x_proj.weight'"
    ]
    assert "q_proj" in error.hint


def test_swapped_arguments(kit: Kit, cli: Cli) -> None:
    result = cli("merge", kit / "adapter", kit / "base", "-o", kit / "out")
    assert result.code == 2
    assert "E-WRAPPED" in result.err
    assert "are the two swapped?" in result.err


def test_letters_are_compared_of_a_bounded_number_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = difflib.get_close_matches

    def counted(word: str, candidates: list[str], n: int, cutoff: float) -> list[str]:
        compared.append(len(candidates))
        return original(word, candidates, n, cutoff)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    base = saved(tmp_path / "base.safetensors", [f"model.layers.{n}.fc.weight" for n in range(1000)])
    error = refused(base, lora(tmp_path / "adapter", [f"model.blocks.{n}.fc" for n in range(1000)]))
    assert len(error.problems) == 1001
    assert len(compared) <= 3
    assert max(compared) <= COMPARED
    assert error.problems[1].hint.startswith("near names in the base: model.layers.")

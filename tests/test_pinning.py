"""An adapter and its base: proven by digests, doubted by names, and said where neither tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli, Kit
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import ChoiceNeeded, Mismatch


def other_base(kit: Kit) -> Path:
    """The same shapes, other weights."""
    folder = kit / "other"
    folder.mkdir()
    state = {name: value + 1 for name, value in load_file(kit / "base" / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_pinned_adapter_is_refused_on_any_other_base(kit: Kit, cli: Cli) -> None:
    made = cli("pin", kit / "adapter", "--base", kit / "base", "-o", kit / "pinned.lora.safetensors")
    assert (made.code, "bound to 1 tensor" in made.out) == (0, True)
    assert loratool.validate(kit / "pinned.lora.safetensors") == []
    arguments = ["merge", kit / "base", kit / "pinned.lora.safetensors", "--require-pinned"]
    assert cli(*arguments, "-o", kit / "out").code == 0
    assert "not proven" not in cli(*arguments, "-o", kit / "again").out
    refused = cli("merge", other_base(kit), kit / "pinned.lora.safetensors", "-o", kit / "wrong")
    assert (refused.code, "E-BASE-MISMATCH" in refused.err) == (2, True)


def test_convert_pins_as_pin_does(kit: Kit) -> None:
    loratool.pin(kit / "adapter", kit / "one.lora.safetensors", kit / "base")
    loratool.convert(kit / "adapter", kit / "two.lora.safetensors", "native", base=kit / "base", pin=True)
    assert (kit / "one.lora.safetensors").read_bytes() == (kit / "two.lora.safetensors").read_bytes()
    with pytest.raises(ChoiceNeeded, match="native file"):
        loratool.convert(kit / "adapter", kit / "peft", "peft", base=kit / "base", pin=True)
    with pytest.raises(ChoiceNeeded, match="native file"):
        loratool.convert(kit / "adapter", kit / "x.lora.safetensors", "native", pin=True)


def test_nothing_is_pinned_to_a_base_that_does_not_fit(kit: Kit) -> None:
    folder = kit / "small"
    folder.mkdir()
    save_file({"l.0.q.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(Mismatch):
        loratool.pin(kit / "adapter", kit / "x.lora.safetensors", folder)
    assert not (kit / "x.lora.safetensors").exists()


def test_what_is_not_pinned_is_said_and_refused_where_that_is_required(kit: Kit, cli: Cli) -> None:
    merged = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out")
    assert "base not proven" in merged.out
    assert "not pinned" in cli("inspect", kit / "adapter").out
    refused = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out2", "--require-pinned")
    assert (refused.code, "E-NOT-PINNED" in refused.err, "loratool pin" in refused.err) == (2, True, True)
    with pytest.raises(Mismatch, match="E-NOT-PINNED"):
        loratool.plan(kit / "base", [kit / "adapter"], kit / "out3", require_pinned=True)


@pytest.mark.parametrize(
    ("theirs", "own", "doubted"),
    [
        ("meta/Llama-3-8B", "meta/Llama-3-8B", False),
        ("meta/Llama-3-8B", "somebody/llama-3-8b", False),
        ("/home/me/models/Llama-3-8B/", "meta/Llama-3-8B", False),
        ("meta/Llama-3-8B", "meta/Llama-3-8B-Instruct", True),
        ("", "meta/Llama-3-8B", False),
        ("meta/Llama-3-8B", "", False),
    ],
)
def test_names_that_contradict_each_other_are_said(kit: Kit, theirs: str, own: str, doubted: bool) -> None:
    config = {**kit.json("adapter/adapter_config.json"), "base_model_name_or_path": theirs}
    kit.write("adapter/adapter_config.json", config)
    kit.write("base/config.json", {"_name_or_path": own} if own else {})
    notes = loratool.plan(kit / "base", kit / "adapter", kit / "out").notes
    assert any("trained on" in note and "calls itself" in note for note in notes) == doubted


def test_the_hub_cache_says_which_model_and_revision_a_base_is(kit: Kit) -> None:
    snapshot = kit / "models--meta--Llama-3-8B" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    (kit / "base").rename(snapshot)
    config = {**kit.json("adapter/adapter_config.json"), "base_model_name_or_path": "meta/Llama-3-8B"}
    kit.write("adapter/adapter_config.json", {**config, "revision": "b" * 40})
    notes = loratool.plan(snapshot, kit / "adapter", kit / "out").notes
    assert any(f"revision {'b' * 40}" in note and "a" * 40 in note for note in notes)
    kit.write("adapter/adapter_config.json", {**config, "revision": "a" * 40})
    notes = loratool.plan(snapshot, kit / "adapter", kit / "out").notes
    assert not any("revision" in note for note in notes)
    assert json.dumps(notes)  # plain texts

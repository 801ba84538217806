"""A merge that changes nothing: said, counted rightly, and refused unless it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, Kit
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import ChoiceNeeded, Mismatch


def edited(kit: Kit, **config: Any) -> Path:
    """The PEFT adapter with another config."""
    kit.write("adapter/adapter_config.json", {**kit.json("adapter/adapter_config.json"), **config})
    return kit / "adapter"


def scaled(kit: Kit, factor: float) -> Path:
    path = kit / "adapter" / "adapter_model.safetensors"
    save_file({name: value * factor for name, value in load_file(path).items()}, path)
    return kit / "adapter"


def same_bytes(kit: Kit, out: Path) -> bool:
    one, two = load_file(kit / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("how", ["alpha 0", "pattern 0", "zero factors", "weight 0"])
def test_an_adapter_that_changes_nothing_is_refused_unless_asked_for(kit: Kit, cli: Cli, how: str) -> None:
    adapter = {
        "alpha 0": lambda: edited(kit, lora_alpha=0),
        "pattern 0": lambda: edited(kit, alpha_pattern={"q": 0}),
        "zero factors": lambda: scaled(kit, 0.0),
        "weight 0": lambda: f"{kit / 'adapter'}@0",
    }[how]()
    refused = cli("merge", kit / "base", adapter, "-o", kit / "out", "--dry-run")
    assert (refused.code, "E-NO-CHANGE" in refused.err) == (2, True)
    assert "--allow-unchanged" in refused.err
    assert not (kit / "out").exists()
    taken = cli("merge", kit / "base", adapter, "-o", kit / "out", "--allow-unchanged")
    assert taken.code == 0
    assert "0 of 3 tensors changed" in taken.out
    assert same_bytes(kit, kit / "out")


def test_a_change_below_every_step_of_the_dtype_is_refused_after_it_was_computed(kit: Kit, cli: Cli) -> None:
    adapter = scaled(kit, 1e-12)
    refused = cli("merge", kit / "base", adapter, "-o", kit / "out", "--undo", kit / "u")
    assert (refused.code, "E-NO-CHANGE" in refused.err) == (2, True)
    assert not (kit / "out").exists()
    assert not (kit / "u").exists()
    document = cli("merge", kit / "base", adapter, "-o", kit / "out", "--allow-unchanged", "--json").json
    assert document["tensors_changed"] == 0
    assert document["unchanged"] == ["l.0.q.weight"]


@pytest.mark.parametrize("options", [[], ["--no-digests"], ["--reproducible"], ["--threads", "1"]])
def test_only_tensors_that_really_changed_are_counted(kit: Kit, cli: Cli, options: list[str]) -> None:
    path = kit / "adapter" / "adapter_model.safetensors"
    tiny = {f"base_model.model.l.0.v.lora_{part}.weight": torch.full(shape, 1e-9) for part, shape in SIDES.items()}
    save_file({**load_file(path), **tiny}, path)
    document = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out", "--json", *options).json
    assert (document["tensors_changed"], document["unchanged"]) == (1, ["l.0.v.weight"])
    assert any("nothing of the change is left" in note for note in document["notes"])
    text = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out2", *options).out
    assert "1 of 3 tensors changed" in text


SIDES = {"A": (2, 4), "B": (3, 2)}


def test_what_a_resumed_merge_kept_is_counted_like_the_rest(kit: Kit) -> None:
    report = loratool.merge(kit / "base", kit / "adapter", kit / "out", resume=True)
    assert (report.changed, report.unchanged) == (1, ())


def test_a_weight_of_zero_beside_others_is_a_note(kit: Kit) -> None:
    report = loratool.merge(kit / "base", {kit / "adapter": 1.0, kit / "native.lora.safetensors": 0}, kit / "out")
    assert report.changed == 1
    assert any("has the weight 0: it changes nothing" in note for note in report.plan.notes)


def test_a_mapping_of_adapters_keeps_its_weights(kit: Kit) -> None:
    loratool.merge(kit / "base", {str(kit / "adapter"): 0.5}, kit / "one")
    loratool.merge(kit / "base", [(kit / "adapter", 0.5)], kit / "two")
    names = [json.loads((kit / out / "loratool_receipt.json").read_text())["adapters"] for out in ("one", "two")]
    assert names[0] == names[1]
    assert names[0][0]["weight"] == 0.5


@pytest.mark.parametrize(
    "adapters",
    [
        [],
        {},
        (),
        None,
        3,
        [None],
        [3],
        [("adapter", "0.5")],
        [("adapter", True)],
        {"adapter": float("nan")},
        {"adapter": None, 1: 2.0},
    ],
    ids=repr,
)
def test_what_is_no_adapter_or_no_weight_is_a_typed_error(
    kit: Kit, adapters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kit.folder)
    calls = [
        lambda: loratool.merge("base", adapters, "out"),
        lambda: loratool.plan("base", adapters, "out"),
        lambda: loratool.verify("merged", "base", adapters),
        lambda: loratool.unmerge("merged", adapters, "out"),
        lambda: loratool.open_merged("base", adapters),
        lambda: loratool.iter_merged("base", adapters),
    ]
    for call in calls:
        with pytest.raises(ChoiceNeeded) as caught:
            call()
        assert caught.value.code == "E-OPTION"


def test_the_way_back_of_a_merge_that_changed_nothing(kit: Kit) -> None:
    adapter = edited(kit, lora_alpha=0)
    with pytest.raises(Mismatch, match="E-NO-CHANGE"):
        loratool.merge(kit / "base", adapter, kit / "out")
    loratool.merge(kit / "base", adapter, kit / "out", allow_unchanged=True)
    assert loratool.unmerge(kit / "out", adapter, kit / "back", base=kit / "base").exact


@pytest.mark.parametrize("pattern", ["", "*q*="])
def test_a_negative_alpha_leads_to_a_weight(kit: Kit, cli: Cli, pattern: str) -> None:
    bare = load_file(kit / "adapter" / "adapter_model.safetensors")
    save_file(bare, kit / "bare.safetensors")
    options = ["--alpha", f"{pattern}-8", "--scaling", "alpha/rank", "-o", kit / "out"]
    code, _, text = cli("merge", kit / "base", kit / "bare.safetensors", *options)
    assert (code, "E-OPTION" in text, "@-1" in text) == (2, True, True)
    assert not (kit / "out").exists()

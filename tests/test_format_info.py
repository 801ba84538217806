"""What an adapter says of itself: it stays with the adapter, and no merge looks at it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import one

import loratool
from loratool.cli import run
from loratool.format import content_digest

INFO: dict[str, Any] = {
    "title": "Ink",
    "description": "drawings\nin ink",
    "triggers": ["inked", "in ink"],
    "license": "Apache-2.0",
    "authors": ["A. Nyone"],
    "source": "https://example.org/ink",
    "weight": 0.8,
    "training": {"steps": 1200, "images": 40},
    "config": {"adapter_config.json": {"r": 2, "lora_dropout": 0.1, "revision": None}},
    "of the future": [True],
}
METADATA = {"ss_output_name": "ink", "modelspec.title": "Ink", "modelspec.author": "é"}
NAME = "a.weight"


def told(**more: Any) -> loratool.Adapter:
    return replace(one("lora", (4, 3), name=NAME), **({"info": INFO, "metadata": METADATA} | more))


def test_it_is_in_the_file_as_it_was_said(tmp_path: Path) -> None:
    path = tmp_path / "a.lora.safetensors"
    loratool.save(told(), path)
    assert loratool.validate(path) == []
    loaded = loratool.load(path)
    assert (loaded.info, loaded.metadata) == (INFO, METADATA)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert [*header["__metadata__"]] == ["loratool", "modelspec.author", "modelspec.title", "ss_output_name"]
    loratool.save(loaded, tmp_path / "again.lora.safetensors")
    assert (tmp_path / "again.lora.safetensors").read_bytes() == raw


def test_a_merge_does_not_look_at_it(tmp_path: Path) -> None:
    save_file({NAME: torch.ones(4, 3)}, tmp_path / "base.safetensors")
    results = []
    for name, adapter in {"told": told(), "silent": one("lora", (4, 3), name=NAME)}.items():
        loratool.save(adapter, tmp_path / f"{name}.lora.safetensors")
        loratool.merge(
            tmp_path / "base.safetensors", tmp_path / f"{name}.lora.safetensors", tmp_path / f"{name}.safetensors"
        )
        results.append(load_file(tmp_path / f"{name}.safetensors")[NAME])
    assert results[0].equal(results[1])
    assert content_digest(told()) == content_digest(one("lora", (4, 3), name=NAME))


def test_convert_keeps_it_and_inspect_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loratool.save(told(), tmp_path / "a.lora.safetensors")
    loratool.convert(tmp_path / "a.lora.safetensors", tmp_path / "b.lora.safetensors", to="native")
    again = loratool.load(tmp_path / "b.lora.safetensors")
    assert (again.info, again.metadata) == (INFO, METADATA)
    summary = loratool.inspect(tmp_path / "b.lora.safetensors")
    assert (summary.info, summary.metadata) == (INFO, METADATA)
    assert run(["inspect", str(tmp_path / "b.lora.safetensors")]) == 0
    shown = capsys.readouterr().out
    for text in ("Ink", "drawings in ink", "Apache-2.0", "inked, in ink", "A. Nyone", "0.8"):
        assert text in shown, text


@pytest.mark.parametrize(
    ("code", "rule", "change"),
    [
        ("E-MANIFEST", "R-046", {"info": {"title": 1}}),
        ("E-MANIFEST", "R-046", {"info": {"triggers": "inked"}}),
        ("E-MANIFEST", "R-046", {"info": {"weight": True}}),
        ("E-MANIFEST", "R-046", {"info": {"config": []}}),
        ("E-MANIFEST", "R-046", {"info": {"weight": float("nan")}}),
        ("E-MANIFEST", "R-050", {"info": {"training": {"loss": float("inf")}}}),
        ("E-MANIFEST", "R-050", {"info": {"x": {1, 2}}}),
        ("E-MANIFEST", "R-050", {"info": {"x": {1: 2}}}),
        ("E-MANIFEST", "R-050", {"info": {"x": "\ud800"}}),
        ("E-LIMIT", "R-016", {"info": {"x": [0] * 100_000}}),
        ("E-LIMIT", "R-016", {"provenance": {str(i): "" for i in range(100_001)}}),
        ("E-LIMIT", "R-010", {"info": {"training": {"deep": json.loads("[" * 14 + "]" * 14)}}}),
        ("E-CANONICAL", "R-051", {"metadata": {"format": "pt"}}),
        ("E-CANONICAL", "R-051", {"metadata": {"ss_x": 1}}),
        ("E-CANONICAL", "R-051", {"metadata": {"a.b": "\ud800"}}),
        ("E-CANONICAL", "R-051", {"metadata": {"loratool": "{}"}}),
    ],
)
def test_what_no_file_can_hold_is_refused(code: str, rule: str, change: Mapping[str, Any], tmp_path: Path) -> None:
    with pytest.raises(loratool.InvalidFile) as caught:
        loratool.save(told(**change), tmp_path / "a.lora.safetensors")
    assert {(problem.code, problem.rule) for problem in caught.value.problems} == {(code, rule)}
    assert [*tmp_path.iterdir()] == []


def test_the_deepest_info_and_the_most_values_are_written(tmp_path: Path) -> None:
    deep = {"training": {"deep": json.loads("[" * 13 + "]" * 13)}}
    many = {"training": {"losses": [0] * (100_000 - 5)}}
    for name, info in (("deep", deep), ("many", many)):
        adapter = told(info=info, metadata={}, provenance={"tool": "test"} if name == "many" else {})
        loratool.save(adapter, tmp_path / f"{name}.lora.safetensors")
        assert loratool.load(tmp_path / f"{name}.lora.safetensors").info == info

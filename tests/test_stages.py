"""Merges one on top of the other: allowed where proven or asked for, kept in the receipt, taken out one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import PREFIX, Cli, Kit
from safetensors.torch import load_file, save_file

import loratool
from loratool import receipt
from loratool.checkpoint import open_checkpoint
from loratool.errors import InvalidFile, Mismatch


def second(kit: Kit, name: str = "second") -> Path:
    """Another PEFT adapter, of the other matrix and of the one that the first adapter changes."""
    folder = kit / name
    folder.mkdir()
    shapes = {"q": ((2, 4), (6, 2)), "v": ((2, 4), (3, 2))}
    parts = {
        f"{PREFIX}l.0.{matrix}.lora_{side}.weight": torch.full(shape, 0.25)
        for matrix, pair in shapes.items()
        for side, shape in zip("AB", pair, strict=True)
    }
    save_file(parts, folder / "adapter_model.safetensors")
    kit.write(f"{name}/adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors" if folder.is_dir() else folder)


def same(one: Path, two: Path) -> bool:
    left, right = weights(one), weights(two)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_second_merge_is_refused_with_a_way_on(kit: Kit, cli: Cli) -> None:
    refused = cli("merge", kit / "merged", second(kit), "-o", kit / "two")
    assert (refused.code, "E-MERGED" in refused.err, "--onto-merged" in refused.err) == (2, True, True)
    assert cli("merge", kit / "merged", kit / "second", "-o", kit / "two", "--onto-merged").code == 0


def test_digests_that_prove_the_merged_base_are_enough(kit: Kit) -> None:
    loratool.pin(second(kit), kit / "pinned.lora.safetensors", kit / "merged")
    report = loratool.merge(kit / "merged", kit / "pinned.lora.safetensors", kit / "two")
    assert [len(stage.adapters) for stage in report.receipt.stages] == [1, 1]
    with pytest.raises(Mismatch, match="E-MERGED"):
        loratool.plan(kit / "merged", [kit / "pinned.lora.safetensors", kit / "adapter"], kit / "three")


@pytest.mark.parametrize("single", [False, True])
def test_the_last_stage_is_taken_out_first(kit: Kit, single: bool) -> None:
    end = ".safetensors" if single else ""
    base = kit / ("base/model.safetensors" if single else "base")
    one, two, three = (kit / f"{name}{end}" for name in ("merged", "two", "three"))
    adapter = second(kit)
    loratool.merge(one, adapter, two, onto_merged=True, undo=kit / "undo")
    report = loratool.merge(two, [(adapter, 0.5)], three, onto_merged=True)
    assert any("is in this base already" in note for note in report.plan.notes)
    assert len(report.receipt.stages) == 3
    back = loratool.unmerge(three, adapter, kit / f"b2{end}", base=two)
    assert back.exact
    assert same(kit / f"b2{end}", two)
    assert receipt.find(open_checkpoint(kit / f"b2{end}")) == receipt.find(open_checkpoint(two))
    loratool.unmerge(kit / f"b2{end}", adapter, kit / f"b1{end}", undo=kit / "undo")
    assert same(kit / f"b1{end}", one)
    last = loratool.unmerge(kit / f"b1{end}", kit / "adapter", kit / f"b0{end}", base=base)
    assert last.exact
    assert same(kit / f"b0{end}", base)
    assert receipt.find(open_checkpoint(kit / f"b0{end}")) is None


def test_what_comes_back_only_to_rounding_has_no_receipt(kit: Kit, cli: Cli) -> None:
    loratool.merge(kit / "merged", second(kit), kit / "two", onto_merged=True)
    result = cli("unmerge", kit / "two", kit / "second", "-o", kit / "back")
    assert result.code == 0
    assert "the last of 2 merges" in result.out
    assert receipt.find(open_checkpoint(kit / "back")) is None


def test_status_and_verify_know_stages(kit: Kit, cli: Cli) -> None:
    loratool.merge(kit / "merged", second(kit), kit / "two", onto_merged=True)
    text = cli("status", kit / "two", "--check").out.splitlines()
    assert [line.split()[:2] for line in text[:2]] == [["earlier", "adapter@1"], ["merged", "second@1"]]
    assert loratool.verify(kit / "two", kit / "merged", kit / "second").answer


def test_a_chain_without_end_is_no_receipt(kit: Kit) -> None:
    found = receipt.find(open_checkpoint(kit / "merged"))
    assert found is not None
    document = found
    for _ in range(receipt.MAX_STAGES - 1):
        document = receipt.Receipt(found.tool, found.dtype, found.adapters, found.tensors, previous=document)
    (kit / "merged" / receipt.FILE_NAME).write_text(document.dumps())
    with pytest.raises(Mismatch, match="the most there can be"):
        loratool.plan(kit / "merged", second(kit), kit / "out", onto_merged=True)
    document = receipt.Receipt(found.tool, found.dtype, found.adapters, found.tensors, previous=document)
    (kit / "merged" / receipt.FILE_NAME).write_text(document.dumps())
    with pytest.raises(InvalidFile, match="merges one after the other"):
        receipt.find(open_checkpoint(kit / "merged"))

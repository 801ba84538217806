"""What --force leaves alone, wherever an input lies; and one file out of a folder, there and back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import Cli, Kit, tree
from safetensors import safe_open
from safetensors.torch import load_file
from strategies import one, save_sharded

import loratool

# --- what is not replaced -------------------------------------------------------------------------------------------


def refused(kit: Kit, cli: Cli, *arguments: object, code: str = "E-EXISTS") -> str:
    """Nothing is changed, and the message says why and what helps."""
    before = tree(kit.folder)
    result = cli(*arguments)
    assert (result.code, result.err.startswith(f"error[{code}]"), "help: " in result.err) == (2, True, True), result
    assert tree(kit.folder) == before
    return result.err


@pytest.mark.parametrize("where", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("verb", ["merge", "pin", "convert", "undo"])
def test_a_part_of_an_input_folder_is_not_replaced(where: str, verb: str, kit: Kit, cli: Cli) -> None:
    base, adapter, out = kit / "base", kit / "adapter", kit / where
    refused(
        kit,
        cli,
        *{
            "merge": ["merge", base, adapter, "-o", out],
            "pin": ["pin", adapter, "--base", base, "-o", out],
            "convert": ["convert", adapter, "--base", base, "--to", "native", "-o", out],
            "undo": ["merge", base, adapter, "-o", kit / "new", "--undo", out],
        }[verb],
        "--force",
        code="E-OUTPUT" if verb == "merge" else "E-EXISTS",
    )


@pytest.mark.parametrize("name", ["base.safetensors", "native.lora.safetensors"])
def test_an_undo_record_does_not_replace_an_input(name: str, kit: Kit, cli: Cli) -> None:
    os.link(kit / "base" / "model.safetensors", kit / "base.safetensors")
    arguments = ["merge", kit / "base.safetensors", kit / "native.lora.safetensors", "-o", kit / "new"]
    assert "which is read" in refused(kit, cli, *arguments, "--undo", kit / name, "--force")


@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_an_input_that_only_links_into_the_output_is_seen(verb: str, kit: Kit, cli: Cli) -> None:
    """As a cache has it: a folder of links, whose files lie elsewhere."""
    there = kit / "elsewhere"
    there.mkdir()
    source = kit / {"merge": "base/model.safetensors", "convert": "adapter/adapter_model.safetensors"}[verb]
    source.rename(there / source.name)
    source.symlink_to(there / source.name)
    how = ["--to", "peft"] if verb == "convert" else [kit / "adapter"]
    first = [kit / "base"] if verb == "merge" else [kit / "adapter"]
    assert "which is read" in refused(kit, cli, verb, *first, *how, "-o", there, "--force")


@pytest.mark.parametrize("what", [".git", "checkpoint-500"])
def test_a_folder_with_more_than_an_output_is_not_replaced(what: str, kit: Kit, cli: Cli) -> None:
    (kit / "work" / what).mkdir(parents=True)
    (kit / "work" / "config.json").write_text("{}")
    for force in ([], ["--force"]):
        text = refused(kit, cli, "merge", kit / "base", kit / "adapter", "-o", kit / "work", *force)
        assert what in text
        assert "--force replaces" not in text


def test_home_is_not_replaced(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (kit / "people" / "me").mkdir(parents=True)
    for folder in (kit / "people", kit / "people" / "me"):
        (folder / "config.json").write_text("{}")
        monkeypatch.setenv("HOME", str(kit / "people" / "me"))
        text = refused(kit, cli, "merge", kit / "base", kit / "adapter", "-o", folder, "--force")
        assert "your home folder" in text


def test_an_empty_mount_point_is_told_before_the_work(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's volume: nothing can be renamed over it."""
    (kit / "volume").mkdir()
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == kit / "volume" or ismount(path))
    text = refused(kit, cli, "merge", kit / "base", kit / "adapter", "-o", kit / "volume")
    assert "a new folder in it" in text
    assert cli("merge", kit / "base", kit / "adapter", "-o", kit / "volume" / "new").code == 0


@pytest.mark.parametrize("verb", ["merge", "pin"])
def test_a_slash_behind_a_file_s_name(verb: str, kit: Kit, cli: Cli) -> None:
    arguments = [kit / "base", kit / "adapter"] if verb == "merge" else [kit / "adapter", "--base", kit / "base"]
    refused(kit, cli, verb, *arguments, "-o", f"{kit / 'new.safetensors'}/", code="E-OUTPUT")
    with pytest.raises(loratool.OutputRefused, match="slash"):
        loratool.merge(kit / "base", kit / "adapter", f"{kit / 'new.safetensors'}/")
    assert cli("merge", kit / "base", kit / "adapter", "-o", f"{kit / 'new'}/").code == 0
    assert (kit / "new").is_dir()


def test_a_link_to_the_parent_is_followed(kit: Kit, cli: Cli) -> None:
    (kit / "real").mkdir()
    (kit / "link").symlink_to("real")
    for force in ([], ["--force"]):
        assert cli("merge", kit / "base", kit / "adapter", "-o", kit / "link" / "new", *force).code == 0
    assert (kit / "real" / "new" / "model.safetensors").is_file()


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize("verb", ["merge", "unmerge", "extract", "convert", "pin"])
def test_a_parent_that_may_not_be_written(
    verb: str, force: list[str], kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whom the system says so: root may write everywhere."""
    line: list[object] = {
        "merge": [kit / "base", kit / "adapter", "-o", kit / "out"],
        "unmerge": [kit / "merged", kit / "adapter", "--base", kit / "base", "-o", kit / "out"],
        "extract": [kit / "plain.pth", "-o", kit / "out.safetensors"],
        "convert": [kit / "adapter", "--to", "peft", "-o", kit / "out"],
        "pin": [kit / "adapter", "--base", kit / "base", "-o", kit / "out.safetensors"],
    }[verb]
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    refused(kit, cli, verb, *line, *force, code="E-DISK")


# --- one file out of a folder ---------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_sharded({f"{name}.weight": torch.randn(30, 20).bfloat16() for name in "abcd"}, tmp_path / "base", shards=3)
    (tmp_path / "base" / "config.json").write_text("{}")
    loratool.save(one("lora", (30, 20), name="c.weight"), tmp_path / "a.lora.safetensors")
    return tmp_path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_shards_become_one_file_and_come_back(sharded: Path, cli: Cli) -> None:
    base, adapter, out = sharded / "base", sharded / "a.lora.safetensors", sharded / "merged.safetensors"
    undo = sharded / "u.safetensors"
    report = loratool.merge(base, adapter, out, undo=undo)
    assert any("config.json of base are not in it" in note for note in report.plan.notes)
    loratool.merge(base, adapter, sharded / "folder")
    want, got = weights(sharded / "folder"), load_file(out)
    assert [*safe_open(out, "pt").keys()]
    assert {**got}.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert loratool.status(out, check=True).answer
    assert loratool.verify(out, base, adapter).answer
    for number, options in enumerate(({"base": base}, {"undo": undo})):
        back = sharded / f"back{number}.safetensors"
        assert loratool.unmerge(out, adapter, back, **options).exact  # type: ignore[arg-type]
        assert loratool.status(back).receipt is None
        restored = load_file(back)
        assert all(torch.equal(restored[name], value) for name, value in weights(base).items())
    assert loratool.unmerge(sharded / "folder", adapter, sharded / "one.safetensors", base=base).exact
    assert load_file(sharded / "one.safetensors").keys() == want.keys()


def test_one_file_of_shards_is_resumed_and_replaced(sharded: Path, cli: Cli) -> None:
    line = ["merge", sharded / "base", sharded / "a.lora.safetensors", "-o", sharded / "m.safetensors", "--resume"]
    assert cli(*line).code == 0
    first = (sharded / "m.safetensors").read_bytes()
    assert cli(*line).code == 2
    assert cli(*line, "--force").code == 0
    assert (sharded / "m.safetensors").read_bytes() == first


def test_a_pipeline_is_no_single_file(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    result = cli("merge", tmp_path / "pipe", tmp_path / "x", "-o", tmp_path / "new.safetensors")
    assert (result.code, result.err.startswith("error[E-OUTPUT]")) == (2, True)


def test_no_file_in_a_folder_keeps_the_receipt_of_an_earlier_merge(kit: Kit, cli: Cli) -> None:
    """A single file has its receipt in its header; in a folder the one beside the weights holds."""
    base, adapter, one_file = kit / "base" / "model.safetensors", kit / "native.lora.safetensors", kit / "m.safetensors"
    loratool.merge(base, adapter, one_file)
    assert loratool.status(one_file).receipt is not None
    loratool.unmerge(one_file, adapter, kit / "back", base=base)
    loratool.merge(one_file, adapter, kit / "twice", onto_merged=True)
    for folder in ("back", "twice"):
        (file,) = (kit / folder).glob("*.safetensors")
        assert loratool.status(file).receipt is None, "of this file alone it would be a claim that does not hold"
    assert loratool.status(kit / "back").receipt is None
    found = loratool.status(kit / "twice", check=True)
    assert found.answer
    assert found.receipt is not None
    assert len(found.receipt.stages) == 2

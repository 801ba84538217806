"""What an output may be called, what may stand there, and pickles that are written again as pickles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Cli, Kit, tree
from safetensors.torch import load_file, save_file

import loratool

VERBS = ("merge", "unmerge", "extract", "convert to peft", "convert to native", "pin")
FILES = {"extract", "convert to native", "pin"}  # what is one file only


def argv(kit: Kit, verb: str, *out: object) -> list[object]:
    """A command line that would succeed with a good name."""
    adapter = kit / "adapter"
    return {
        "merge": ["merge", kit / "base", adapter],
        "unmerge": ["unmerge", kit / "merged", adapter, "--base", kit / "base"],
        "extract": ["extract", kit / "plain.pth", "--alpha", 4, "--scaling", "alpha/rank"],
        "convert to peft": ["convert", kit / "native.lora.safetensors", "--to", "peft"],
        "convert to native": ["convert", adapter, "--to", "native", "--base", kit / "base"],
        "pin": ["pin", adapter, "--base", kit / "base"],
    }[verb] + ["-o", *out]


def good(verb: str) -> str:
    return "out.safetensors" if verb in FILES else "out"


def there(path: Path, what: str) -> None:
    """Put something at the place of an output."""
    if what == "full folder":
        path.mkdir()
        (path / "config.json").write_text("{}")
    elif what == "stranger's folder":
        path.mkdir()
        (path / "thesis.tex").touch()
    elif what == "empty folder":
        path.mkdir()
    elif what == "file":
        path.write_text("mine")
    elif what == "link":
        (path.parent / "elsewhere").mkdir()
        path.symlink_to("elsewhere")
    elif what == "dangling link":
        path.symlink_to("nowhere")
    elif what == "fifo":
        os.mkfifo(path)


# --- one rule for all verbs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_suffix_says_file_and_no_suffix_says_folder(verb: str, kit: Kit, cli: Cli) -> None:
    before = tree(kit.folder)
    wrong = ["out", "out.pth", "out.gguf", "out.onnx"]
    if verb not in FILES:
        wrong = [*wrong[1:], "out.bin", "out.h5", *(["out.safetensors"] if verb == "convert to peft" else [])]
    for name in wrong:
        code, _, text = cli(*argv(kit, verb, kit / name))
        assert (code, text.startswith("error[E-OUTPUT]"), "help: " in text) == (2, True, True), (name, text)
    assert tree(kit.folder) == before
    code, _, text = cli(*argv(kit, verb, kit / good(verb)))
    assert (code, text) == (0, "")
    assert (kit / good(verb)).is_file() == (verb in FILES)


@pytest.mark.parametrize("what", ["full folder", "stranger's folder", "file", "link", "dangling link", "fifo"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_there_stays(verb: str, what: str, kit: Kit, cli: Cli) -> None:
    there(kit / good(verb), what)
    before = tree(kit.folder)
    code, _, text = cli(*argv(kit, verb, kit / good(verb)))
    assert (code, text.startswith("error[E-EXISTS]"), "help: " in text) == (2, True, True), text
    assert tree(kit.folder) == before
    code, _, text = cli(*argv(kit, verb, kit / good(verb), "--force"))
    fits = what == ("file" if verb in FILES else "full folder")
    assert (code, text.startswith("error[E-EXISTS]")) == ((0, False) if fits else (2, True)), text
    if fits:
        alone = argv(kit, verb, kit / f"new {good(verb)}")
        assert cli(*alone).code == 0
        assert tree(kit / good(verb)) == tree(kit / f"new {good(verb)}")
    else:
        assert tree(kit.folder) == before


@pytest.mark.parametrize("verb", VERBS)
def test_an_empty_folder_is_as_good_as_none(verb: str, kit: Kit, cli: Cli) -> None:
    there(kit / good(verb), "empty folder")
    code, _, text = cli(*argv(kit, verb, kit / good(verb)))
    if verb in FILES:
        assert (code, text.startswith("error[E-EXISTS]")) == (2, True)
        assert not [*(kit / good(verb)).iterdir()]
    else:
        assert (code, text) == (0, "")
        assert [*(kit / good(verb)).iterdir()]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [".", "..", "missing/", "base/", "adapter/"])
def test_places_that_no_output_gets(verb: str, name: str, kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (kit / "here").mkdir()
    monkeypatch.chdir(kit / "here")
    before = tree(kit.folder)
    out = Path(name) if name.startswith(".") else kit / name / good(verb)
    for force in ([], ["--force"]):
        code, _, text = cli(*argv(kit, verb, out, *force))
        if name.startswith((".", "missing")) or verb not in FILES:
            assert (code, text.startswith(("error[E-EXISTS]", "error[E-OUTPUT]"))) in [(2, True), (0, False)], text
        if name.startswith((".", "missing")):
            assert code == 2
            assert tree(kit.folder) == before


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_may_not_be_written(verb: str, kit: Kit, cli: Cli) -> None:
    (kit / "locked").mkdir(mode=0o500)
    code, _, text = cli(*argv(kit, verb, kit / "locked" / good(verb)))
    assert (code, text.startswith("error[E-DISK]")) == (2, True)


@pytest.mark.parametrize("verb", ["merge", "unmerge", "convert to native"])
def test_an_input_is_never_replaced(verb: str, kit: Kit, cli: Cli) -> None:
    before = tree(kit.folder)
    source = {"merge": "base", "unmerge": "merged", "convert to native": "adapter/adapter_model.safetensors"}[verb]
    arguments = argv(kit, verb, kit / source, "--force")
    if verb == "convert to native":
        arguments[1] = kit / "adapter" / "adapter_model.safetensors"
    code, _, text = cli(*arguments)
    assert (code, text.startswith("error[E-EXISTS]"), "which is read" in text) == (2, True, True), text
    (kit / "above").mkdir()
    (kit / "base").rename(kit / "above" / "base")
    (kit / "above" / "config.json").touch()
    code, _, text = cli("merge", kit / "above" / "base", kit / "adapter", "-o", kit / "above", "--force")
    assert (code, text.startswith("error[E-EXISTS]")) == (2, True)
    (kit / "above" / "base").rename(kit / "base")
    (kit / "above" / "config.json").unlink()
    (kit / "above").rmdir()
    assert tree(kit.folder) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_name_is_told_before_torch_is_there(verb: str, kit: Kit) -> None:
    there(kit / good(verb), "file" if verb in FILES else "full folder")
    code = (
        "import sys\nfrom loratool.cli import run\n"
        "assert run(sys.argv[1:]) == 2\nassert 'torch' not in sys.modules, 'torch was imported'"
    )
    for name in (good(verb), "missing/" + good(verb), "out.gguf"):
        arguments = [str(word) for word in argv(kit, verb, kit / name)]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "error[E-" in done.stderr


def test_force_replaces_the_undo_record_too(kit: Kit, cli: Cli) -> None:
    merge = ["merge", kit / "base", kit / "adapter", "-o", kit / "out", "--undo", kit / "u.safetensors"]
    assert cli(*merge).code == 0
    first = tree(kit.folder)
    assert cli(*merge).code == 2
    loratool.merge(kit / "base", [(kit / "adapter", 0.5)], kit / "out", undo=kit / "u.safetensors", force=True)
    assert tree(kit.folder) != first
    code, _, text = cli(*merge, "--force")
    assert (code, text) == (0, "")
    assert tree(kit.folder) == first
    back = ["unmerge", kit / "out", kit / "adapter", "--undo", kit / "u.safetensors", "-o", kit / "back"]
    assert cli(*back).code == 0


def test_force_and_resume_go_together(kit: Kit, cli: Cli) -> None:
    merge = ["merge", kit / "base", kit / "adapter", "-o", kit / "out", "--resume"]
    assert cli(*merge).code == 0
    assert cli(*merge).code == 2
    assert cli(*merge, "--force").code == 0


def test_library_calls_replace_only_when_told(kit: Kit) -> None:
    calls: dict[str, Callable[[Path, bool], object]] = {
        "out": lambda out, force: loratool.merge(kit / "base", kit / "adapter", out, force=force),
        "back": lambda out, force: loratool.unmerge(
            kit / "merged", kit / "adapter", out, base=kit / "base", force=force
        ),
        "a.safetensors": lambda out, force: loratool.pin(kit / "adapter", out, kit / "base", force=force),
        "peft": lambda out, force: loratool.convert(kit / "native.lora.safetensors", out, "peft", force=force),
        "x.safetensors": lambda out, force: loratool.extract(
            kit / "plain.pth", out, alpha=4, scaling="alpha/rank", force=force
        ),
    }
    for name, call in calls.items():
        call(kit / name, False)
        with pytest.raises(loratool.OutputRefused, match="--force"):
            call(kit / name, False)
        call(kit / name, True)


# --- pickles, written again -----------------------------------------------------------------------------------------


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "l.0.q.weight": torch.randn(6, 4, generator=generator),
        "head.weight": torch.randn(5, 4, generator=generator).bfloat16(),
        "steps": torch.arange(3),
    }


@pytest.mark.parametrize("name", ["out.pth", "out.pt", "out.bin"])
def test_a_book_s_model_comes_back_as_it_went_in(name: str, kit: Kit, cli: Cli) -> None:
    """Nested dicts, number keys, ties and what is no tensor stay; torch reads it in every way it knows."""
    model = state()
    tied = {**model, "tied.weight": model["head.weight"]}
    torch.save({"model": tied, "epoch": 3, "config": {"rope": [1, 2.5], 7: "seven"}}, kit / "m.pth")
    code, _, text = cli("merge", kit / "m.pth", kit / "adapter", "-o", kit / name)
    assert (code, text) == (0, "")
    loratool.merge(kit / "m.pth", kit / "adapter", kit / "want.safetensors")
    want = load_file(kit / "want.safetensors")
    for options in ({}, {"mmap": True}):
        got = torch.load(kit / name, weights_only=True, **options)  # type: ignore[arg-type]
        assert [*got] == ["model", "epoch", "config"]
        assert (got["epoch"], got["config"]) == (3, {"rope": [1, 2.5], 7: "seven"})
        assert [*got["model"]] == [*tied]
        assert got["model"]["tied.weight"].data_ptr() == got["model"]["head.weight"].data_ptr()
        assert all(torch.equal(got["model"][key], want[key]) for key in model)
        assert got["model"]["l.0.q.weight"].dtype == torch.float32
    with zipfile.ZipFile(kit / name) as archive:
        assert archive.testzip() is None
        assert json.loads(archive.read("m/loratool.receipt"))["tensors"].keys() == {"l.0.q.weight"}
    assert not torch.equal(want["l.0.q.weight"], model["l.0.q.weight"])


def test_the_way_back_gives_the_very_file(kit: Kit, cli: Cli) -> None:
    torch.save(state(), kit / "m.pth")
    undo = kit / "u.undo.safetensors"
    loratool.merge(kit / "m.pth", kit / "adapter", kit / "out.pth", undo=undo)
    assert cli("status", kit / "out.pth", "--check").code == 0
    assert cli("verify", kit / "out.pth", kit / "adapter", "--base", kit / "m.pth").code == 0
    refused = cli("merge", kit / "out.pth", kit / "adapter", "-o", kit / "twice.pth")
    assert (refused.code, "E-MERGED" in refused.err) == (2, True)
    for number, how in enumerate((["--base", kit / "m.pth"], ["--undo", undo])):
        back = kit / f"back{number}.pth"
        assert cli("unmerge", kit / "out.pth", kit / "adapter", *how, "-o", back).code == 0
        assert back.read_bytes() == (kit / "m.pth").read_bytes()
    assert cli("unmerge", kit / "out.pth", kit / "adapter", "--base", kit / "m.pth", "-o", kit / "folder").code == 0
    got = load_file(kit / "folder" / "out.safetensors")
    assert all(torch.equal(got[name], value) for name, value in state().items())


def test_stages_of_pickles(kit: Kit) -> None:
    torch.save(state(), kit / "m.pth")
    loratool.merge(kit / "m.pth", kit / "adapter", kit / "one.pth")
    loratool.merge(kit / "one.pth", kit / "adapter", kit / "two.pth", onto_merged=True)
    found = loratool.status(kit / "two.pth").receipt
    assert found is not None
    assert len(found.stages) == 2
    loratool.unmerge(kit / "two.pth", kit / "adapter", kit / "back.pth", base=kit / "one.pth")
    assert (kit / "back.pth").read_bytes() == (kit / "one.pth").read_bytes()


def test_as_pth_writes_the_pickle_into_a_folder(kit: Kit, cli: Cli) -> None:
    torch.save(state(), kit / "m.pth")
    assert cli("merge", kit / "m.pth", kit / "adapter", "-o", kit / "out", "--as", "pth").code == 0
    assert sorted(path.name for path in (kit / "out").iterdir()) == ["loratool_receipt.json", "m.pth"]
    assert cli("merge", kit / "m.pth", kit / "adapter", "-o", kit / "out.pth").code == 0
    got, want = (torch.load(path, weights_only=True) for path in (kit / "out" / "m.pth", kit / "out.pth"))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_tied_weights_change_together(kit: Kit) -> None:
    model = state()
    torch.save({**model, "again": model["l.0.q.weight"]}, kit / "m.pth")
    loratool.merge(kit / "m.pth", kit / "adapter", kit / "out.pth")
    got = torch.load(kit / "out.pth", weights_only=True)
    assert got["again"].data_ptr() == got["l.0.q.weight"].data_ptr()
    loratool.unmerge(kit / "out.pth", kit / "adapter", kit / "back.pth", base=kit / "m.pth")
    assert (kit / "back.pth").read_bytes() == (kit / "m.pth").read_bytes()


def swap(path: Path) -> None:
    """Make of an archive what a big-endian machine writes."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)


@pytest.mark.parametrize(
    "case",
    [
        "view",
        "overlap",
        "alias",
        "transposed alias",
        "elsewhere",
        "big-endian",
        "legacy",
        "dtype",
        "new",
        "safetensors",
        "folder",
        "as",
    ],
)
def test_what_can_not_be_the_same_pickle_is_refused(case: str, kit: Kit, cli: Cli) -> None:
    model, options, base = state(), [], kit / "m.pth"
    if case == "view":
        model["l.0.q.weight"] = torch.randn(4, 6).T
    if case == "overlap":
        rows = torch.randn(8, 4)
        model |= {"l.0.q.weight": rows[:6], "rows": rows[3:]}
    if case == "alias":
        model["flat"] = model["l.0.q.weight"].reshape(-1)
    if case == "transposed alias":
        model["turned"] = model["l.0.q.weight"].T
    if case == "elsewhere":
        model["best"] = [{"of": model["l.0.q.weight"]}]  # type: ignore[assignment]
    torch.save(model, base, _use_new_zipfile_serialization=case != "legacy")
    if case == "big-endian":
        swap(base)
    if case == "dtype":
        options = ["--dtype", "bf16"]
    if case == "new":
        loratool.merge(kit / "base", kit / "adapter", kit / "x")
        save_file({"base_model.model.new.weight": torch.ones(2)}, kit / "adapter" / "vit.safetensors")
        options = ["--allow-new"]
    out = kit / ("out.safetensors" if case == "as" else "out.pth")
    if case == "as":
        options = ["--as", "pth"]
    if case in ("safetensors", "folder"):
        base = kit / "base" / ("model.safetensors" if case == "safetensors" else "")
    before = tree(kit.folder)
    code, _, text = cli("merge", base, kit / "adapter", "-o", out, *options)
    assert (code, "E-OUTPUT" in text, "help: " in text) == (2, True, True), text
    assert tree(kit.folder) == before

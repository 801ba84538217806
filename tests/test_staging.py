"""What may happen beside a run: another output appears, a source is replaced, a disk is small or fails."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from strategies import one, save_sharded

import loratool
from loratool import staging
from loratool.errors import OutputRefused


def code_of(error: pytest.ExceptionInfo[loratool.LoratoolError]) -> str:
    return error.value.code


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    move = staging._move

    def late(place: Path, path: Path) -> None:
        path.write_text("another's")
        move(place, path)

    monkeypatch.setattr(staging, "_move", late)
    with pytest.raises(OutputRefused) as caught, staging.staged(out) as place:
        place.write_text("ours")
    assert code_of(caught) == "E-EXISTS"
    assert out.read_text() == "another's"
    assert [*tmp_path.iterdir()] == [out]


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    move = staging._move

    def late(place: Path, path: Path) -> None:
        path.mkdir()
        (path / "x").write_text("another's")
        move(place, path)

    monkeypatch.setattr(staging, "_move", late)
    with pytest.raises(OutputRefused) as caught, staging.staged(out) as place:
        place.mkdir()
    assert code_of(caught) == "E-EXISTS"
    assert (out / "x").read_text() == "another's"


def test_where_there_are_no_links_a_file_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with staging.staged(tmp_path / "out") as place:
        place.write_text("ours")
    assert (tmp_path / "out").read_text() == "ours"


def test_a_scratch_folder_taken_for_abandoned_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = staging.tempfile.mkdtemp, list[str]()

    def raced(*arguments: Any, **options: Any) -> str:
        made.append(make(*arguments, **options))
        if len(made) == 1:
            shutil.rmtree(made[0])  # as another run does that finds it unlocked
        return made[-1]

    monkeypatch.setattr(staging.tempfile, "mkdtemp", raced)
    with staging.staged(tmp_path / "out") as place:
        place.write_text("ours")
    assert len(made) == 2
    assert (tmp_path / "out").read_text() == "ours"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_sharded({f"{name}.weight": torch.randn(30, 20) for name in "ab"}, tmp_path / "base", shards=2)
    (tmp_path / "base" / "tokenizer.json").write_bytes(b"t" * 5000)
    loratool.save(one("lora", (30, 20), name="a.weight"), tmp_path / "a.lora.safetensors")
    return tmp_path


def test_a_source_replaced_by_one_of_equal_size_and_time_is_noticed(model: Path) -> None:
    base = model / "base"
    plan = loratool.plan(base, model / "a.lora.safetensors", model / "out")
    file = plan.inputs[-1].path
    other = model / "other"
    shutil.copy2(file, other)
    other.replace(file)
    with pytest.raises(loratool.LoratoolError) as caught:
        importlib.import_module("loratool.merge").run_merge(plan)
    assert code_of(caught) == "E-CHANGED"
    assert str(file) == caught.value.where
    assert not (model / "out").exists()


def test_a_source_that_vanishes_at_the_end_is_no_fault_of_the_output(model: Path) -> None:
    plan = loratool.plan(model / "base", model / "a.lora.safetensors", model / "out")

    def last(step: loratool.Progress) -> None:
        if step.done == step.total:
            shutil.rmtree(model / "base")

    with pytest.raises(loratool.LoratoolError) as caught:
        importlib.import_module("loratool.merge").run_merge(plan, last)
    assert code_of(caught) == "E-CHANGED"
    assert not (model / "out").exists()


def test_extract_notices_a_source_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = {"x.linear.weight": torch.ones(5, 4), "x.lora.A": torch.ones(4, 2), "x.lora.B": torch.ones(2, 5)}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    module = importlib.import_module("loratool.extract")
    identities = module._identities

    def meanwhile(*arguments: Any) -> Any:
        os.utime(tmp_path / "wrapped.safetensors", ns=(1, 1))
        return identities(*arguments)

    monkeypatch.setattr(module, "_identities", meanwhile)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(tmp_path / "wrapped.safetensors", tmp_path / "a.lora.safetensors", alpha=1, scaling="alpha")
    assert code_of(caught) == "E-CHANGED"
    assert [*tmp_path.iterdir()] == [tmp_path / "wrapped.safetensors"]


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("link", [False, True])
def test_space_is_what_is_really_written(model: Path, monkeypatch: pytest.MonkeyPatch, link: bool) -> None:
    plan = loratool.plan(model / "base", model / "a.lora.safetensors", model / "out", link=link)
    needed = sum(file.size for file in plan.files if not (link and file.same_as)) + 5000
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(10**9, 0, free))
        if fits:
            assert loratool.plan(model / "base", model / "a.lora.safetensors", model / "out", link=link)
            continue
        with pytest.raises(loratool.LoratoolError) as caught:
            loratool.plan(model / "base", model / "a.lora.safetensors", model / "out", link=link)
        assert code_of(caught) == "E-SPACE"


def test_extract_asks_for_the_space_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = {"x.linear.weight": torch.ones(5, 4), "x.lora.A": torch.ones(4, 2), "x.lora.B": torch.ones(2, 5)}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10))
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(
            tmp_path / "wrapped.safetensors",
            tmp_path / "a.lora.safetensors",
            alpha=1,
            scaling="alpha",
            base_out=tmp_path / "base",
        )
    assert code_of(caught) == "E-SPACE"
    assert [*tmp_path.iterdir()] == [tmp_path / "wrapped.safetensors"]


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.json"])
def test_a_disk_that_fails_to_read_names_the_file(model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    opened = Path.open

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name and path.parent == model / "base":
            raise OSError(errno.EIO, "Input/output error")  # without a file name, as from a read
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(model / "base", model / "a.lora.safetensors", model / "out")
    assert code_of(caught) == "E-READ"
    assert caught.value.where.endswith(name)
    assert not (model / "out").exists()


def test_a_signal_while_a_thread_is_started_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it runs already, and its pool has not noted it yet."""
    save_sharded({f"{name}.weight": torch.randn(64, 64) for name in "abcd"}, tmp_path / "base", shards=2)
    adapter = one("lora", (64, 64), name="a.weight")
    start, before = threading.Thread.start, {*threading.enumerate()}
    left = -1

    def interrupted(self: threading.Thread) -> None:
        nonlocal left
        start(self)
        left -= 1
        if left < 0 and threading.current_thread() is threading.main_thread():
            left = 1 << 30
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    for count in range(100):
        left = count
        try:
            loratool.merge(tmp_path / "base", adapter, tmp_path / "out", threads=2)
        except KeyboardInterrupt:
            for thread in {*threading.enumerate()} - before:
                thread.join(10)
                assert not thread.is_alive(), "a worker waits for others that never came"
            assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
        else:
            break
    assert count >= 4, "the workers, and those that look after torch's number of threads"
    assert (tmp_path / "out").is_dir()

"""An interrupted merge goes on from its finished files, after verifying every byte of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import one, save_sharded

import loratool

# Kills itself once the second of three files is begun: the first is finished by then, with one worker.
KILLED = """
import os, signal, sys, loratool
seen = []
def stop(step):
    if step.what not in seen:
        seen.append(step.what)
    if step.what == seen[-1] and len(seen) == 3 and step.done > int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
loratool.merge(sys.argv[1], sys.argv[2], sys.argv[3], threads=1, progress=stop)
"""


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A base in three shards, an adapter for two of its tensors, and what a killed merge of them left."""
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.randn(300, 200).bfloat16() for name in "abc"}
    save_sharded(state, tmp_path / "base", shards=3)
    loratool.save(one("lora", (300, 200), name="b.weight"), tmp_path / "a.lora.safetensors")
    arguments = [str(tmp_path / name) for name in ("base", "a.lora.safetensors", "out")]
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments, str(size * 9 // 10)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert scratch(tmp_path)
    return tmp_path


def scratch(folder: Path) -> list[Path]:
    return [*folder.glob(".out.partial-*")]


def same(one_folder: Path, other: Path) -> bool:
    names = {path.name for path in one_folder.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    return all((one_folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_finished_files_are_kept_and_the_result_is_the_same(interrupted: Path) -> None:
    finished = {path.name: path.stat().st_ino for path in scratch(interrupted)[0].glob("out/*.safetensors")}
    loratool.merge(interrupted / "base", interrupted / "a.lora.safetensors", interrupted / "out", resume=True)
    kept = [name for name, inode in finished.items() if (interrupted / "out" / name).stat().st_ino == inode]
    assert kept, "nothing was kept"
    loratool.merge(interrupted / "base", interrupted / "a.lora.safetensors", interrupted / "again")
    assert same(interrupted / "out", interrupted / "again")
    assert not scratch(interrupted)


def test_a_damaged_file_is_written_again(interrupted: Path) -> None:
    for path in scratch(interrupted)[0].glob("out/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
    loratool.merge(interrupted / "base", interrupted / "a.lora.safetensors", interrupted / "out", resume=True)
    loratool.merge(interrupted / "base", interrupted / "a.lora.safetensors", interrupted / "again")
    assert same(interrupted / "out", interrupted / "again")


@pytest.mark.parametrize("change", ["weight", "base", "journal"])
def test_the_files_of_another_merge_are_not_kept(interrupted: Path, change: str) -> None:
    weight = 0.5 if change == "weight" else 1.0
    if change == "base":
        file = next((interrupted / "base").glob("*.safetensors"))
        state = {name: value * 2 for name, value in load_file(file).items()}
        save_file(state, file, {"format": "pt"})
    if change == "journal":
        (scratch(interrupted)[0] / "journal").write_bytes(b'{"plan": "x"}\n{"file')
    adapter = [(interrupted / "a.lora.safetensors", weight)]
    loratool.merge(interrupted / "base", adapter, interrupted / "out", resume=True)
    loratool.merge(interrupted / "base", adapter, interrupted / "again")
    assert same(interrupted / "out", interrupted / "again")


def test_without_resume_what_a_killed_run_left_goes(interrupted: Path) -> None:
    loratool.merge(interrupted / "base", interrupted / "a.lora.safetensors", interrupted / "out")
    assert not scratch(interrupted)


def test_with_nothing_to_resume_it_is_a_plain_merge(interrupted: Path) -> None:
    shutil.rmtree(scratch(interrupted)[0])
    loratool.merge(interrupted / "base", interrupted / "a.lora.safetensors", interrupted / "out", resume=True)
    assert (interrupted / "out").is_dir()


def test_a_run_that_is_still_going_is_left_alone(interrupted: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    handle = os.open(scratch(interrupted)[0], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    loratool.merge(interrupted / "base", interrupted / "a.lora.safetensors", interrupted / "out", resume=True)
    assert scratch(interrupted)
    os.close(handle)


@pytest.mark.parametrize("choices", [{"digests": False}, {"undo": "x.undo.safetensors"}])
def test_what_can_not_be_verified_is_refused(interrupted: Path, choices: dict[str, object]) -> None:
    if "undo" in choices:
        choices = {"undo": interrupted / "x.undo.safetensors"}
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(
            interrupted / "base", interrupted / "a.lora.safetensors", interrupted / "out", resume=True, **choices
        )
    assert caught.value.code == "E-OPTION"

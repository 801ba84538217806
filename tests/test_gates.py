"""What a script relies on: a no stays a no, whoever reads the output, and `ok` says the same as the exit code."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Cli, Kit
from safetensors.torch import load_file, save_file
from test_cli import SCRIPT

import loratool

# A command line in the kit's folder, and the exit code of its answer.
GATES = [
    ("verify merged native.lora.safetensors --base base", 0),
    ("verify base native.lora.safetensors --base base", 1),
    ("verify changed native.lora.safetensors --base base", 1),
    ("status merged --check", 0),
    ("status base", 1),
    ("status changed --check", 1),
    ("validate native.lora.safetensors", 0),
    ("validate bad.lora.safetensors", 1),
    ("unmerge merged adapter -o out --exact", 1),
    ("unmerge base adapter -o out", 2),
    ("merge nowhere adapter -o out", 2),
    ("inspect nowhere", 2),
    ("verify", 2),
    ("nonsense", 2),
]
# What becomes of stdout and stderr: read, a pipe whose reader is gone, or closed before the start.
READERS = [
    ("gone", "read"),
    ("gone", "gone"),
    ("read", "gone"),
    ("closed", "read"),
    ("read", "closed"),
    ("closed",) * 2,
]

# Runs each command line in a process of its own, in which nothing has to be imported any more.
DRIVER = """
import json, os, sys
import torch, loratool.cli.verify, loratool.cli.status, loratool.cli.validate, loratool.cli.unmerge
from loratool.cli import main
lines, streams = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for line in lines:
    child = os.fork()
    if not child:
        for number, (name, state) in enumerate(zip(("stdout", "stderr"), streams), start=1):
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer if state == "gone" else os.open(os.devnull, os.O_WRONLY), number)
            os.close(writer)
            setattr(sys, name, None if state == "closed" else open(number, "w", closefd=False))
            if state == "closed":
                os.close(number)
        sys.argv[1:] = line.split()
        try:
            main()
        except SystemExit as error:
            code = error.code
        except BaseException:
            code = 99
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except BaseException:
            code = 98
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    kit = Kit(tmp_path_factory.mktemp("gates"))
    state = load_file(kit / "merged" / "model.safetensors")
    state["l.0.q.weight"] = state["l.0.q.weight"] + 1
    (kit / "changed").mkdir()
    for file in (kit / "merged").iterdir():
        (kit / "changed" / file.name).write_bytes(file.read_bytes())
    save_file(state, kit / "changed" / "model.safetensors")
    kit.native({**kit.manifest(), "features": ["rows"]})
    return kit


@pytest.mark.parametrize("streams", READERS, ids=" ".join)
def test_a_no_is_a_no_whoever_reads_it(gates: Kit, streams: tuple[str, str]) -> None:
    asked = {f"{line}{flags}": code for line, code in GATES for flags in ("", " --json")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([*asked]), json.dumps(streams)],
        cwd=gates.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    found = [*map(int, done.stdout.split())]
    assert dict(zip(asked, found, strict=True)) == asked


@pytest.mark.parametrize(("line", "code"), GATES, ids=[line for line, _ in GATES])
def test_ok_says_what_the_exit_code_says(
    gates: Kit, cli: Cli, line: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(gates.folder)
    result = cli(*line.split(), "--json")
    assert result.code == code
    assert result.json["ok"] == (code == 0)
    assert not {"answer", "valid"} & result.json.keys()


def test_a_pipe_that_breaks_elsewhere_is_an_error(kit: Kit, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cluster's connection, say: the reader of the output is still there."""

    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(loratool, "merge", broken)
    assert cli("merge", kit / "base", kit / "adapter", "-o", kit / "out").code == 101


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_a_merge_whose_output_is_closed_writes_it_all_the_same(gates: Kit, tmp_path: Path) -> None:
    """The number of a closed stdout must not become that of a file to write."""
    line = shlex.join([sys.executable, "-c", SCRIPT, "merge", "base", "adapter", "-o", str(tmp_path / "out")])
    done = subprocess.run(["bash", "-c", f"{line} >&- 2>&-"], cwd=gates.folder, check=False, timeout=60)
    assert done.returncode == 0
    left, right = load_file(tmp_path / "out" / "model.safetensors"), load_file(gates / "merged" / "model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in right)

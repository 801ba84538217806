"""Seconds of the fuzzer, with the same inputs in every run, and the files that broke something once."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import CHANGE, REGRESSIONS, Fuzzer, World, capped

INPUTS = {"header": 400, "index": 150, "manifest": 100, "receipt": 40, "undo": 150}


@pytest.mark.parametrize("target", CHANGE)
def test_changed_files_get_an_answer(target: str, tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path, seed=1)
    for _ in range(INPUTS[target]):
        fuzzer.step(target)
    assert fuzzer.findings == {}
    assert len(fuzzer.answers[target]) > 10, "the changes are not different enough"


@pytest.mark.parametrize("file", sorted(REGRESSIONS.glob("*-*")), ids=lambda file: file.name)
def test_what_broke_something_once(file: Path, tmp_path: Path) -> None:
    world, content = World(tmp_path), file.read_bytes()
    with capped():
        world.check(file.name.partition("-")[0], content)

"""Progress callbacks: what they may rely on, and how they end the work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tree
from safetensors.torch import load_file, save_file
from strategies import one, save_sharded, small_blocks

import loratool
from loratool import Adapter, Progress
from loratool.comparing import Comparison
from loratool.workers import ProgressCallback

SHAPE = (48, 32)
NAMES = [f"l.{n}.weight" for n in range(6)]
Work = Callable[[Path, ProgressCallback], object]


def adapter() -> Adapter:
    return Adapter(tuple(one("lora", SHAPE, seed=n, name=name).updates[0] for n, name in enumerate(NAMES[::2])))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(SHAPE, generator=generator).bfloat16() for name in NAMES}
    state["empty"] = torch.zeros(0, 3)
    save_sharded(state, tmp_path / "base", shards=3)
    save_file(state, tmp_path / "one.safetensors")
    loratool.merge(tmp_path / "base", adapter(), tmp_path / "merged", undo=tmp_path / "undo.safetensors")
    wrapped = {f"{name.removesuffix('.weight')}.linear.weight": value for name, value in state.items() if value.numel()}
    wrapped |= {f"l.{n}.lora.A": torch.ones(SHAPE[1], 2) for n in range(6)}
    wrapped |= {f"l.{n}.lora.B": torch.ones(2, SHAPE[0]) for n in range(6)}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    return tmp_path


def _extract(d: Path, progress: ProgressCallback, base_out: Path | None = None) -> object:
    return loratool.extract(
        d / "wrapped.pth", d / "x.lora.safetensors", alpha=4, scaling="alpha/rank", base_out=base_out, progress=progress
    )


def _unmerge(d: Path, progress: ProgressCallback, **given: Path) -> object:
    return loratool.unmerge(d / "merged", adapter(), d / "out", progress=progress, **given)  # type: ignore[arg-type]


WORK: dict[str, Work] = {
    "merge": lambda d, p: loratool.merge(d / "base", adapter(), d / "out", progress=p),
    "merge to one dtype": lambda d, p: loratool.merge(d / "base", adapter(), d / "out", dtype="fp32", progress=p),
    "merge a file": lambda d, p: loratool.merge(d / "one.safetensors", adapter(), d / "out.safetensors", progress=p),
    "merge --undo": lambda d, p: loratool.merge(d / "base", adapter(), d / "out", undo=d / "new.undo", progress=p),
    "merge --link": lambda d, p: loratool.merge(d / "base", adapter(), d / "out", link=True, progress=p),
    "unmerge": _unmerge,
    "unmerge --base": lambda d, p: _unmerge(d, p, base=d / "base"),
    "unmerge --undo": lambda d, p: _unmerge(d, p, undo=d / "undo.safetensors"),
    "verify": lambda d, p: loratool.verify(d / "merged", d / "base", adapter(), progress=p),
    "extract": _extract,
    "extract --base-out": lambda d, p: _extract(d, p, d / "x"),
    "status --check": lambda d, p: loratool.status(d / "merged", check=True, progress=p),
}


@pytest.mark.parametrize("name", WORK)
def test_steps_grow_to_the_total_one_at_a_time(name: str, folder: Path) -> None:
    steps: list[Progress] = []
    busy = threading.Lock()

    def note(step: Progress) -> None:
        assert busy.acquire(blocking=False), "two threads at once"
        time.sleep(0.0005)
        steps.append(step)
        busy.release()

    with small_blocks(64):
        WORK[name](folder, note)
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert {step.total for step in steps} == {done[-1]}
    assert all(step.what for step in steps)
    assert len(steps) >= 3


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", WORK)
def test_an_exception_ends_the_work_and_leaves_nothing(name: str, place: str, folder: Path) -> None:
    class Enough(Exception):
        pass

    share = {"first": 0.0, "middle": 0.5, "last": 1.0}[place]
    before, calls = tree(folder), 0

    def stop(step: Progress) -> None:
        nonlocal calls
        if step.done >= share * step.total:
            calls += 1
            raise Enough(place)

    with small_blocks(64), pytest.raises(Enough, match=place):
        WORK[name](folder, stop)
    assert calls == 1, "it is not called again"
    assert tree(folder) == before


def test_a_stopped_verify_looks_at_no_more_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    look = Comparison.look

    def slow(self: Comparison, job: object) -> object:
        looked.append(job)
        time.sleep(0.1)
        return look(self, job)  # type: ignore[arg-type]

    monkeypatch.setattr(Comparison, "look", slow)
    with pytest.raises(KeyboardInterrupt):
        loratool.verify(folder / "merged", folder / "base", adapter(), threads=1, progress=_interrupt)
    assert len(looked) <= 3 < len(NAMES)


def _interrupt(step: Progress) -> None:
    raise KeyboardInterrupt


def test_without_a_callback_nothing_changes(folder: Path) -> None:
    loratool.merge(folder / "base", adapter(), folder / "out", progress=lambda step: None)
    merged = {path.name: load_file(path) for path in (folder / "merged").glob("*.safetensors")}
    assert merged
    for name, tensors in merged.items():
        assert (folder / "out" / name).read_bytes() == (folder / "merged" / name).read_bytes(), tensors.keys()

"""The way of a block to another device and back, forced on the CPU: what only a GPU has is replaced."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Cli, tree
from strategies import MATRIX_FORMS, Maker, make_update, raw, save_sharded, small_blocks

import loratool
from loratool import Adapter, Target, Targeted
from loratool.tensors import converted

rows: ModuleType = importlib.import_module("loratool.rows")
plan: ModuleType = importlib.import_module("loratool.plan")


class Arrival:
    """Sent, but not there before somebody waits: until then the buffer must not be filled again."""

    def __init__(self, waited: list[int]) -> None:
        self.waited = waited

    def synchronize(self) -> None:
        self.waited.append(1)


def forced(monkeypatch: pytest.MonkeyPatch, waited: list[int]) -> None:
    """`cpu:0` is another device than `cpu` to loratool, and the same to torch."""

    def unpinned(height: int, columns: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        return torch.empty(height, columns, dtype=dtype)

    def sent(self: torch.Tensor, device: Any = None, *more: Any, **options: Any) -> torch.Tensor:
        copied = original(self, device, *more, **options)
        return copied.clone() if options.get("non_blocking") else copied  # another memory, as a device has

    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", sent)
    monkeypatch.setattr(rows, "on_host", unpinned)
    monkeypatch.setattr(rows, "arrival", lambda device: Arrival(waited))
    monkeypatch.setattr(rows, "own_stream", lambda device: contextlib.nullcontext())


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    waited: list[int] = []
    forced(monkeypatch, waited)
    monkeypatch.setattr(plan, "refuse_device", lambda device: None)
    return waited


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_device_gives_the_same_bytes_and_takes_them_back(
    dtype: torch.dtype, elsewhere: list[int], tmp_path: Path
) -> None:
    make = Maker(3)
    state = {form: make.values(24, 16, dtype=dtype) for form in MATRIX_FORMS}
    items = [Targeted(Target(form, (24, 16)), make_update(form, (24, 16), make)) for form in MATRIX_FORMS]
    save_sharded(state, tmp_path / "base", shards=2)
    adapter = Adapter(tuple(items))
    with small_blocks(64):  # some blocks each, so that both buffers are used again
        for n, options in enumerate(({}, {"reproducible": True})):
            here, there = tmp_path / f"here{n}", tmp_path / f"there{n}"
            loratool.merge(tmp_path / "base", adapter, here, **options)  # type: ignore[arg-type]
            elsewhere.clear()
            loratool.merge(tmp_path / "base", adapter, there, device="cpu:0", undo=tmp_path / f"u{n}", **options)  # type: ignore[arg-type]
            assert tree(here) == tree(there)
            assert elsewhere, "a buffer was filled again before what it held had arrived"
            back = loratool.unmerge(there, adapter, tmp_path / f"back{n}", undo=tmp_path / f"u{n}", device="cpu:0")
            assert back.exact


def test_a_device_that_is_not_there_is_named(tmp_path: Path, cli: Cli) -> None:
    save_sharded({"w": torch.ones(4, 4)}, tmp_path / "base")
    update = make_update("lora", (4, 4), Maker(1))
    loratool.save(Adapter((Targeted(Target("w", (4, 4)), update),)), tmp_path / "a.safetensors")
    for device, what in (("tpu", "is not cpu, cuda or cuda:N"), ("cuda:99", "there is no GPU 'cuda:99'")):
        done = cli("merge", tmp_path / "base", tmp_path / "a.safetensors", "-o", tmp_path / "out", "--device", device)
        assert (done.code, what in done.err) == (2, True), done.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("narrow", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2])
def test_8_bits_become_wider_by_a_table(narrow: torch.dtype, wide: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(narrow).reshape(2, 128)
    for values in (codes, codes.T, codes[:, ::2], codes[:0]):
        want = torch.empty(values.shape, dtype=wide).copy_(values)
        got = converted(values, torch.empty(values.shape, dtype=wide))
        assert raw(got) == raw(want)

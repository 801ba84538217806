"""How much of a change is left after rounding: what a merge says of it, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file, save_file
from strategies import small_blocks

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.survival import Survival
from loratool.updates import Lora, Replace, Scaling

NAME = "layers.0.q.weight"


def adapter_of(size: float, rows: tuple[int, int] | None = None, shape: tuple[int, int] = (64, 48)) -> Adapter:
    made = torch.Generator().manual_seed(3)
    height = shape[0] if rows is None else rows[1] - rows[0]
    A, B = torch.randn(4, shape[1], generator=made), torch.randn(height, 4, generator=made)
    update = Lora(TensorRef.of(A), TensorRef.of(B), Scaling("none", 4, None, size))
    return Adapter((Targeted(Target(NAME, shape, rows=rows), update),))


def base_of(path: Path, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, int] = (64, 48)) -> torch.Tensor:
    W = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    save_file({NAME: W, "layers.1.q.weight": W.clone()}, path)
    return W


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_share_is_that_of_a_sample_of_rows(size: float, dtype: torch.dtype, tmp_path: Path) -> None:
    W = base_of(tmp_path / "base.safetensors", dtype).double().numpy()
    adapter = adapter_of(size)
    report = loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", allow_unchanged=True)
    merged = load_file(tmp_path / "out.safetensors")[NAME].double().numpy()
    update = adapter.updates[0].update
    assert isinstance(update, Lora)
    delta = (update.B.read().double() @ update.A.read().double()).numpy() * size
    rows = slice(None, None, 16)
    wanted, change = delta[rows], (merged - W)[rows]
    found = report.survival[NAME]
    assert report.survival.keys() == {NAME}
    # float32, in which 16-bit weights are computed, knows a delta that is far below them only roughly.
    assert found.share == pytest.approx((wanted * change).sum() / (wanted**2).sum(), rel=0.02, abs=0.02)
    assert found.elements == wanted.size or size == 1e-8
    assert found.moved == np.count_nonzero(change)
    shares = report.to_json()["survival"]
    assert shares["share"] == shares["tensors"][NAME]["share"] == round(found.share or 0, 4)


def test_a_change_that_is_rounded_away_is_warned_about(cli: Cli, tmp_path: Path) -> None:
    base_of(tmp_path / "base.safetensors")

    def warnings(size: float, *options: str) -> str:
        out = tmp_path / f"{size}{''.join(options)}.safetensors"
        loratool.save(adapter_of(size), out.with_suffix(".lora.safetensors"))
        result = cli("merge", tmp_path / "base.safetensors", out.with_suffix(".lora.safetensors"), "-o", out, *options)
        return " ".join(result.out.split())

    small = warnings(1e-6)
    assert f"1 of 1 tensors keep less than 90% of their change after rounding, {NAME}" in small
    assert "--dtype fp32 keeps all of it" in small
    assert "keep less" not in warnings(1e-2)
    assert "keep less" not in warnings(1e-6, "--dtype", "fp32")


def test_rows_without_a_delta_do_not_count(tmp_path: Path) -> None:
    base_of(tmp_path / "base.safetensors")
    report = loratool.merge(tmp_path / "base.safetensors", adapter_of(0.1, (16, 33)), tmp_path / "out.safetensors")
    assert report.survival[NAME].elements == 2 * 48  # rows 16 and 32


def test_blocks_are_a_sample_too(tmp_path: Path) -> None:
    base_of(tmp_path / "base.safetensors")
    with small_blocks(2 * 4 * 48):  # four rows
        report = loratool.merge(tmp_path / "base.safetensors", adapter_of(0.1), tmp_path / "out.safetensors")
    assert report.survival[NAME].elements == 4 * 48  # rows 0, 16, 32 and 48


def test_what_asks_for_nothing_has_no_share(tmp_path: Path) -> None:
    W = base_of(tmp_path / "base.safetensors")
    nothing = loratool.merge(
        tmp_path / "base.safetensors", adapter_of(0.0), tmp_path / "1.safetensors", allow_unchanged=True
    )
    assert nothing.survival == {}
    assert nothing.to_json()["survival"] == {"share": None, "moved": None, "tensors": {}}
    replaced = Adapter((Targeted(Target(NAME, (64, 48)), Replace(TensorRef.of(W + 1))),))
    report = loratool.merge(tmp_path / "base.safetensors", replaced, tmp_path / "2.safetensors", allow_unchanged=True)
    assert report.survival[NAME].share == 1


def test_sums() -> None:
    one, two = Survival(4.0, 2.0, 10, 5), Survival(1.0, 1.0, 2, 2)
    assert one.plus(two) == Survival(5.0, 3.0, 12, 7)
    assert one.plus(two).share == pytest.approx(0.6)
    assert Survival().share is None
    assert Survival().moved_share is None

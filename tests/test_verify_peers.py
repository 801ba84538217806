"""`verify` and the merges of diffusers and mlx-lm, in every dtype: all are right, and a wrong weight is not."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import loratool

pytestmark = pytest.mark.peers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISION = {"sequential", "rounded-delta", "rounded-factors", "rounded-scale", "rounding"}


def right(report: loratool.VerifyReport) -> bool:
    assert report.findings == ()
    assert {remark.word for remark in report.remarks} <= PRECISION
    return report.answer


@pytest.mark.parametrize("dtype", [*DTYPES])
@pytest.mark.parametrize("weights", [(1.0,), (0.7,), (0.7, -0.4)], ids=str)
def test_diffusers(dtype: str, weights: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from diffusers_cases import UNET_TARGETS, load, quiet, stable_diffusion, states, trained, write
    from peft import LoraConfig

    quiet(monkeypatch)
    torch.manual_seed(0)
    pipeline = load(stable_diffusion(tmp_path)).to(DTYPES[dtype])
    base = pipeline.unet.state_dict()
    save_file({name: value.contiguous() for name, value in base.items()}, tmp_path / "base.safetensors")
    names = [f"adapter{n}" for n in range(len(weights))]
    for n, name in enumerate(names):
        other = load(tmp_path / "sd")
        made = trained(other.unet, LoraConfig(r=4, lora_alpha=4, target_modules=UNET_TARGETS[: 5 + n]))
        write(tmp_path / name, {f"unet.{key}": value * (1 + n) for key, value in made.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    pipeline.set_adapters(names, [*weights])
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    save_file({n: v.contiguous() for n, v in states(pipeline)["unet"].items()}, tmp_path / "fused.safetensors")
    given = [tmp_path / name for name in names]
    asked = [*zip(given, weights, strict=True)]
    assert right(loratool.verify(tmp_path / "fused.safetensors", tmp_path / "base.safetensors", asked))
    wrong = [(given[0], weights[0] * 0.8), *asked[1:]]
    report = loratool.verify(tmp_path / "fused.safetensors", tmp_path / "base.safetensors", wrong)
    assert {finding.word for finding in report.findings} == {"scale"}
    assert report.applied[0].weight == pytest.approx(weights[0], rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale", [20.0, 3.5, 1.7])
def test_mlx(dtype: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    import test_mlx_peer as peer

    monkeypatch.setattr(peer, "SCALE", scale)
    with contextlib.redirect_stdout(None):
        made: Any = peer.trained(tmp_path, "llama", dtype=getattr(mx, dtype))
    stored = getattr(torch, dtype)
    save_file({name: value.to(stored) for name, value in made.fused.items()}, tmp_path / "fused.safetensors")
    assert right(loratool.verify(tmp_path / "fused.safetensors", made.base, made.adapter))
    report = loratool.verify(tmp_path / "fused.safetensors", made.base, [(made.adapter, 2.0)])
    assert {finding.word for finding in report.findings} == {"scale"}

"""Quantised bases as their producers write them: their own dequantising is the truth for ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from strategies import one, raw, rounded, save_sharded, small_blocks, tensors_of
from test_quantised import NAME, OTHER, array, delta, lora, quantise, refused, spread, values

import loratool

pytestmark = pytest.mark.peers

STEM = NAME.removesuffix(".weight")


def written_as(base: Path, out: Path, dtype: str = "bf16") -> torch.Tensor:
    """The weight NAME, dequantised on the way through a merge that changes another tensor."""
    with small_blocks(64):  # a few rows at a time
        loratool.merge(base, one("lora", (4, 4), name=OTHER), out, dtype=dtype)
    return tensors_of(out)[NAME]


def plain() -> Mapping[str, torch.Tensor]:
    return {OTHER: values(4, 4).bfloat16()}


# --- transformers' fine-grained fp8 ----------------------------------------------------------------------------------


def fine_grained(block: Any, scale_fmt: str) -> tuple[Any, Any]:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    owner = SimpleNamespace(quantization_config=config)
    return module.Fp8Quantize(owner), module.Fp8Dequantize(owner)


@pytest.mark.parametrize("block", [[128, 128], [64, 32], None])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_transformers_fp8(block: Any, scale_fmt: str, experts: tuple[int, ...], tmp_path: Path) -> None:
    producer, truth = fine_grained(block, scale_fmt)
    name = "layers.0.experts.up_proj" if experts else NAME
    parts = producer._quantize_one(name, values(*experts, 256, 384))
    state = {key: value.contiguous() for key, value in parts.items()}
    scale_name = next(key for key in state if key != name)
    state[scale_name] = torch.atleast_2d(state[scale_name])
    save_sharded({**state, **plain()}, tmp_path / "base")
    config = {"quant_method": "fp8", "weight_block_size": block, "scale_fmt": scale_fmt}
    (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": config}))
    loratool.merge(tmp_path / "base", one("lora", (4, 4), name=OTHER), tmp_path / "out", dtype="fp32")
    assert raw(tensors_of(tmp_path / "out")[name]) == raw(
        truth._dequantize_one(state[name], state[scale_name], torch.float32)
    )
    if experts:
        return
    # Quantised again, as transformers would quantise the merged weight.
    adapter = lora((256, 384))
    loratool.merge(tmp_path / "base", adapter, tmp_path / "again")
    found = tensors_of(tmp_path / "again")
    before = truth._dequantize_one(state[name], state[scale_name], torch.float32)
    wanted = producer._quantize_one(name, torch.from_numpy(array(before) + delta(adapter)).float())
    assert torch.allclose(found[scale_name].float(), torch.atleast_2d(wanted[scale_name]).float(), rtol=1e-6)
    assert found[scale_name].dtype == state[scale_name].dtype
    codes = (found[name].view(torch.int8).int() - wanted[name].view(torch.int8).int()).abs()
    assert codes.max() <= 1
    assert (codes > 0).sum() <= 30  # a unit of float32 apart, and on the other side of a tie


def test_transformers_loads_what_was_merged(tmp_path: Path) -> None:
    """Both outputs give the logits of the model with the merged weight, to rounding of bf16 and of fp8."""
    transformers = pytest.importorskip("transformers")
    producer, _ = fine_grained([128, 128], "float")
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64)).bfloat16()
    model.save_pretrained(tmp_path / "base")
    state = {}
    for name, value in model.state_dict().items():
        linear = name.endswith("proj.weight")
        state |= producer._quantize_one(name, value) if linear else {name: value}
    save_sharded({name: value.contiguous().clone() for name, value in state.items()}, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "dequantize": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": method}))
    target = "model.layers.0.self_attn.q_proj.weight"
    adapter = one("lora", (256, 256), name=target)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "fp8")
    loratool.merge(tmp_path / "base", adapter, tmp_path / "bf16", dtype="bf16")
    ids = torch.arange(10).unsqueeze(0)

    def load(folder: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)

    with torch.no_grad():
        base = load("base")
        before = base(ids).logits
        weight = dict(base.named_parameters())[target]
        weight.add_(torch.from_numpy(delta(adapter)).float())
        truth = base(ids).logits
        moved = (truth - before).abs().max()
        for folder, share in (("fp8", 0.15), ("bf16", 0.02)):
            assert (load(folder)(ids).logits - truth).abs().max() < share * moved


# --- compressed-tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("strategy", "tile", "shape", "extra"),
    [
        ("tensor", (200, 384), (1,), {}),
        ("channel", (1, 384), (200, 1), {}),
        ("group", (1, 64), (200, 6), {"group_size": 64}),
        ("block", (128, 128), (2, 3), {"block_structure": [128, 128]}),
        ("block", (64, 96), (4, 4), {"block_structure": [64, 96]}),
    ],
)
@pytest.mark.parametrize("kind", ["float", "int"])
def test_compressed_tensors(
    kind: str, strategy: str, tile: tuple[int, int], shape: tuple[int, ...], extra: Any, dtype: Any, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    W = values(200, 384)
    args = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, symmetric=True, **extra)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    _, scale = quantise(W, tile)
    scale = (scale * (448 / 127 if kind == "int" else 1)).reshape(shape).to(dtype)
    stored = NaiveQuantizationCompressor.compress({"weight": W.to(dtype), "weight_scale": scale}, scheme)
    state = {f"{STEM}.{name}": value.contiguous() for name, value in stored.items()}
    save_sharded({**state, **plain()}, tmp_path / "base")
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": scheme.model_dump(mode="json")}}
    (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": config}))
    if strategy == "block":  # its own decompress pads for no block that is cut off: the formula it has for others
        q, columns = stored["weight"].float(), spread(scale.float(), (200, 384), tile)
        truth = (q * columns).to(dtype)
    else:
        truth = NaiveQuantizationCompressor.decompress(stored, scheme)["weight"]
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    assert raw(written_as(tmp_path / "base", tmp_path / "out", name)) == raw(truth)


def test_nvfp4_and_packed_integers_are_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4

    scheme = QuantizationScheme(targets=["Linear"], **NVFP4)
    given = {"weight": values(32, 64), "weight_scale": torch.ones(32, 4), "weight_global_scale": torch.ones(1)}
    stored = NVFP4PackedCompressor.compress(given, scheme)
    state = {f"{STEM}.{name}": value.contiguous() for name, value in stored.items()}
    save_sharded({**state, **plain()}, tmp_path / "base")
    error = refused(lambda: loratool.merge(tmp_path / "base", lora((32, 64)), tmp_path / "out"))
    assert error.code == "E-QUANTISED"
    assert "nvfp4" in str(error)


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "block"), [((48, 64), 64), ((130, 200), 128), ((7, 9), 64)])
def test_bitsandbytes_four_bit(kind: str, nested: bool, shape: tuple[int, int], block: int, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    W = values(*shape).bfloat16()
    packed, state = functional.quantize_4bit(W, blocksize=block, quant_type=kind, compress_statistics=nested)
    parts = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_sharded({NAME: packed, **parts, **plain()}, tmp_path / "base")
    truth = functional.dequantize_4bit(packed, state)
    ours = written_as(tmp_path / "base", tmp_path / "out")
    assert torch.equal(ours, truth)
    assert kind == "fp4" or raw(ours) == raw(truth)  # fp4 has a code for -0, of which its CPU kernel makes 0
    assert tensors_of(tmp_path / "out").keys() == {NAME, OTHER}
    error = refused(lambda: loratool.merge(tmp_path / "base", lora(shape), tmp_path / "kept"))
    assert error.code == "E-QUANTISED"
    assert "--dtype bf16" in str(error)
    loratool.merge(tmp_path / "base", lora(shape), tmp_path / "merged", dtype="bf16")
    merged = tensors_of(tmp_path / "merged")[NAME]
    exact = array(functional.dequantize_4bit(packed.clone(), _in_float32(state))) + delta(lora(shape))
    assert (array(merged) != rounded(exact, "BF16")).mean() < 0.01  # 2 units of float32 from a tie
    assert np.allclose(array(merged), exact, rtol=2**-8)
    back = loratool.unmerge(tmp_path / "merged", lora(shape), tmp_path / "back", base=tmp_path / "base")
    assert back.exact
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "base" / "model.safetensors"
    ).read_bytes()


def _in_float32(state: Any) -> Any:
    state.dtype = torch.float32
    return state


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    W = values(48, 64).half()
    codes, absmax, _ = functional.int8_vectorwise_quant(W)
    state = {NAME: codes, f"{STEM}.SCB": absmax, f"{STEM}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_sharded({**state, **plain()}, tmp_path / "base")
    truth = functional.int8_vectorwise_dequant(codes, absmax)
    ours = written_as(tmp_path / "base", tmp_path / "out", "fp32")
    assert np.allclose(array(ours), array(truth.float()), rtol=2.5e-7, atol=0)
    assert tensors_of(tmp_path / "out").keys() == {NAME, OTHER}
    error = refused(lambda: loratool.merge(tmp_path / "base", lora((48, 64)), tmp_path / "kept"))
    assert "bitsandbytes int8" in str(error)
    save_sharded({**state, f"{STEM}.weight_format": torch.tensor(2, dtype=torch.uint8), **plain()}, tmp_path / "base")
    error = refused(lambda: written_as(tmp_path / "base", tmp_path / "other"))
    assert "row-major" in str(error)

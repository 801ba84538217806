"""Megatron's adapters by hand. The producer needs CUDA: the truth is a second derivation of its forward, in NumPy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from models import State, assert_rounded, changed, read
from safetensors.torch import save_file
from torch import Tensor

import loratool

ALPHA, RANK = 8.0, 2
QUERY, GROUPS, SIZE, HIDDEN, INNER = 6, 2, 3, 10, 7
LAYER = "decoder.layers.0."
QKV, PROJ = f"{LAYER}self_attention.linear_qkv", f"{LAYER}self_attention.linear_proj"
FC1, FC2 = f"{LAYER}mlp.linear_fc1", f"{LAYER}mlp.linear_fc2"
CONFIG = {"num_attention_heads": QUERY, "num_key_value_heads": GROUPS}
HF = "model.layers.0."


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 11 * sum(shape)))


BASE = {
    f"{HF}self_attn.q_proj.weight": randn(QUERY * SIZE, HIDDEN),
    f"{HF}self_attn.k_proj.weight": randn(GROUPS * SIZE, HIDDEN),
    f"{HF}self_attn.v_proj.weight": randn(GROUPS * SIZE, HIDDEN, seed=1),
    f"{HF}self_attn.o_proj.weight": randn(HIDDEN, QUERY * SIZE),
    f"{HF}mlp.gate_proj.weight": randn(INNER, HIDDEN),
    f"{HF}mlp.up_proj.weight": randn(INNER, HIDDEN, seed=1),
    f"{HF}mlp.down_proj.weight": randn(HIDDEN, INNER),
    "model.norm.weight": randn(HIDDEN),
}


def interleaved(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Rows of Megatron's linear_qkv, one head at a time: the queries of a group, its key, its value."""
    rows = []
    for group in range(GROUPS):
        for head in range(QUERY // GROUPS):
            first = (group * (QUERY // GROUPS) + head) * SIZE
            rows += [q[first + i] for i in range(SIZE)]
        rows += [k[group * SIZE + i] for i in range(SIZE)]
        rows += [v[group * SIZE + i] for i in range(SIZE)]
    return np.stack(rows)


def numpy(state: Mapping[str, Tensor], name: str) -> Any:
    return state[f"{HF}{name}.weight"].double().numpy()


def as_megatron(state: Mapping[str, Tensor]) -> State:
    """A Hugging Face state under Megatron's names and in its order, in float64."""
    q, k, v = (numpy(state, f"self_attn.{part}_proj") for part in "qkv")
    return {
        f"{QKV}.weight": torch.from_numpy(interleaved(q, k, v)),
        f"{PROJ}.weight": torch.from_numpy(numpy(state, "self_attn.o_proj")),
        f"{FC1}.weight": torch.from_numpy(np.concatenate([numpy(state, "mlp.gate_proj"), numpy(state, "mlp.up_proj")])),
        f"{FC2}.weight": torch.from_numpy(numpy(state, "mlp.down_proj")),
        "decoder.final_layernorm.weight": state["model.norm.weight"].double(),
    }


def pair(module: str, out: int, into: int, seed: int = 0) -> dict[str, Tensor]:
    return {
        f"{module}.linear_in.weight": randn(RANK, into, seed=seed),
        f"{module}.linear_out.weight": randn(out, RANK, seed=seed + 1),
    }


SINGLE = {**pair(f"{PROJ}.adapter", HIDDEN, QUERY * SIZE), **pair(f"{FC2}.adapter", HIDDEN, INNER)}
FUSED = {
    **SINGLE,
    **pair(f"{QKV}.adapter", (QUERY + 2 * GROUPS) * SIZE, HIDDEN),
    **pair(f"{FC1}.adapter", 2 * INNER, HIDDEN),
}
CANONICAL = {
    **SINGLE,
    **pair(f"{QKV}.adapter.adapter_q", QUERY * SIZE, HIDDEN),
    **pair(f"{QKV}.adapter.adapter_k", GROUPS * SIZE, HIDDEN, seed=2),
    **pair(f"{QKV}.adapter.adapter_v", GROUPS * SIZE, HIDDEN, seed=4),
    **pair(f"{FC1}.adapter.adapter_gate", INNER, HIDDEN, seed=6),
    **pair(f"{FC1}.adapter.adapter_up", INNER, HIDDEN, seed=8),
}
KINDS = {"fused": FUSED, "canonical": CANONICAL}


def delta(parts: Mapping[str, Tensor], module: str) -> Any:
    A, B = (parts[f"{module}.linear_{part}.weight"].double().numpy() for part in ("in", "out"))
    return ALPHA / RANK * B @ A


def truth(parts: Mapping[str, Tensor]) -> State:
    """Megatron's merged weights: what its layers add to their output, as rows of its own matrices."""
    state = as_megatron(BASE)
    for module in (PROJ, FC2):
        state[f"{module}.weight"] += torch.from_numpy(delta(parts, f"{module}.adapter"))
    if f"{QKV}.adapter.linear_in.weight" in parts:
        qkv, fc1 = delta(parts, f"{QKV}.adapter"), delta(parts, f"{FC1}.adapter")
    else:
        qkv = interleaved(*(delta(parts, f"{QKV}.adapter.adapter_{key}") for key in "qkv"))
        fc1 = np.concatenate([delta(parts, f"{FC1}.adapter.adapter_{key}") for key in ("gate", "up")])
    state[f"{QKV}.weight"] += torch.from_numpy(qkv)
    state[f"{FC1}.weight"] += torch.from_numpy(fc1)
    return state


def save(
    folder: Path, parts: Mapping[str, Tensor], base: Mapping[str, Tensor] = BASE, config: object = CONFIG
) -> tuple[Path, Path]:
    (folder / "base").mkdir()
    save_file({name: value.float().contiguous() for name, value in base.items()}, folder / "base" / "model.safetensors")
    if config is not None:
        (folder / "base" / "config.json").write_text(json.dumps(config))
    save_file(dict(parts), folder / "adapter.safetensors")
    return folder / "base", folder / "adapter.safetensors"


def load(base: Path, adapter: Path) -> Any:
    return loratool.load(adapter, base=base, alpha=ALPHA, scaling="alpha/rank")


@pytest.mark.parametrize("kind", KINDS)
def test_into_a_hugging_face_base(kind: str, tmp_path: Path) -> None:
    base, adapter = save(tmp_path, KINDS[kind])
    loratool.merge(base, load(base, adapter), tmp_path / "out")
    got = read(tmp_path / "out")
    assert len(changed(BASE, got)) == 7
    for name, value in as_megatron(got).items():
        assert_rounded(value.float(), truth(KINDS[kind])[name], name=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "model.module."])
def test_into_a_megatron_base(prefix: str, kind: str, tmp_path: Path) -> None:
    parts = {f"{prefix}{name}": value for name, value in KINDS[kind].items()}
    state = {f"{prefix}{name}": value for name, value in as_megatron(BASE).items()}
    base, adapter = save(tmp_path, parts, state)
    loratool.merge(base, load(base, adapter), tmp_path / "out")
    want = truth(KINDS[kind])
    for name, value in read(tmp_path / "out").items():
        assert_rounded(value, want[name.removeprefix(prefix)], name=name)


@pytest.mark.parametrize("inner", ["", ".to_wrap"])
def test_a_whole_model_is_unwrapped(inner: str, tmp_path: Path) -> None:
    weights = {
        name.replace(".weight", f"{inner}.weight") if "linear" in name else name: value.float().contiguous()
        for name, value in as_megatron(BASE).items()
    }
    save_file({**weights, **FUSED}, tmp_path / "model.safetensors")
    out, base = tmp_path / "a.lora.safetensors", tmp_path / "base-out"
    loratool.extract(tmp_path / "model.safetensors", out, alpha=ALPHA, scaling="alpha/rank", base_out=base)
    assert sorted(read(base)) == sorted(as_megatron(BASE))
    loratool.merge(base, out, tmp_path / "out")
    for name, value in read(tmp_path / "out").items():
        assert_rounded(value, truth(FUSED)[name], name=name)


def test_alpha_is_asked_for(tmp_path: Path, cli: Cli) -> None:
    base, adapter = save(tmp_path, FUSED)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert caught.value.code == "E-ALPHA"
    assert cli("inspect", adapter, "--json").json["convention"] == "megatron"
    assert {layer.rank for layer in loratool.inspect(adapter, base=base).layers} == {RANK}


def test_without_its_base_the_names_are_open(tmp_path: Path) -> None:
    _, adapter = save(tmp_path, CANONICAL)
    assert loratool.load(adapter).doubts
    assert len(loratool.inspect(adapter).layers) == 7


def halved(parts: Mapping[str, Tensor], name: str, dim: int) -> dict[str, Tensor]:
    return {**parts, name: parts[name].chunk(2, dim)[0].contiguous()}


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in FUSED.items()}


REFUSED: dict[str, tuple[Mapping[str, Tensor], object, str, str]] = {
    "half a pair": (
        {n: v for n, v in FUSED.items() if n != f"{QKV}.adapter.linear_out.weight"},
        CONFIG, "E-COMPONENTS", "only one of",
    ),
    "a shard by columns": (halved(FUSED, f"{QKV}.adapter.linear_in.weight", 0), CONFIG, "E-SHAPE", "tensor-parallel"),
    "a shard by rows": (halved(FUSED, f"{PROJ}.adapter.linear_out.weight", 0), CONFIG, "E-SHAPE", "tensor-parallel"),
    "a shard of the input": (
        halved(FUSED, f"{PROJ}.adapter.linear_in.weight", 1), CONFIG, "E-SHAPE", "tensor-parallel",
    ),
    "a shard of q": (halved(CANONICAL, f"{QKV}.adapter.adapter_q.linear_out.weight", 0), CONFIG, "E-SHAPE", "q_proj"),
    "rows that do not divide": (
        {**FUSED, f"{QKV}.adapter.linear_out.weight": randn(31, RANK)}, CONFIG, "E-SHAPE", "do not divide into 10",
    ),
    "experts": (renamed("mlp.linear_fc1", "mlp.experts.linear_fc1"), CONFIG, "E-UNSUPPORTED", "experts"),
    "latent attention": (renamed("linear_qkv", "linear_q_down_proj"), CONFIG, "E-UNSUPPORTED", "linear_q_down_proj"),
    "another part": (
        renamed("linear_fc2.adapter", "linear_fc2.adapter.adapter_q"), CONFIG, "E-UNSUPPORTED", "linear_fc2",
    ),
    "DoRA": ({**FUSED, f"{FC2}.adapter.weight_magnitude": randn(HIDDEN)}, CONFIG, "E-UNSUPPORTED", "weight_magnitude"),
    "no config": (FUSED, None, "E-CONFIG", "num_attention_heads"),
    "heads that do not divide": (FUSED, {**CONFIG, "num_key_value_heads": 4}, "E-CONFIG", "num_key_value_heads"),
    "a vector": ({**FUSED, f"{FC2}.adapter.linear_in.weight": randn(3)}, CONFIG, "E-SHAPE", r"linear_in is \[3\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path, cli: Cli) -> None:
    parts, config, code, message = REFUSED[case]
    base, adapter = save(tmp_path, parts, config=config)
    with pytest.raises(loratool.LoratoolError, match=message) as caught:
        load(base, adapter)
    assert caught.value.code == code
    assert cli("inspect", adapter).code in (0, 2)
    assert cli("merge", base, adapter, "-o", tmp_path / "out").code == 2


@pytest.mark.parametrize(
    ("name", "dim"), [(f"{FC1}.adapter.adapter_gate", 0), (f"{QKV}.adapter.adapter_k", 0)], ids=["gate", "k"]
)
def test_a_projection_of_another_size_than_megatrons_rows(name: str, dim: int, tmp_path: Path) -> None:
    parts = {**CANONICAL, f"{name}.linear_out.weight": randn(2 * GROUPS, RANK)}
    base, adapter = save(tmp_path, parts, as_megatron(BASE))
    with pytest.raises(loratool.LoratoolError, match=r"belong to \d+ rows"):
        load(base, adapter)


def test_detection(tmp_path: Path) -> None:
    model = {"adapter.weight": randn(4, 4), "blocks.0.adapter.down.weight": randn(4, 4)}
    save_file(model, tmp_path / "model.safetensors")
    assert loratool.inspect(tmp_path / "model.safetensors").convention is None

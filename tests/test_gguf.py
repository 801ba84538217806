"""GGUF adapters by hand: the container's bytes, llama.cpp's names and orders, and what is refused."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import State, assert_rounded, read
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.gguf import read_gguf

ALPHA, RANK, HEADS, KV, SIZE = 6.0, 2, 4, 2, 4
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": ALPHA,
}


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def value_of(value: Any) -> bytes:
    match value:
        case str():
            return struct.pack("<I", 8) + text(value)
        case float():
            return struct.pack("<If", 6, value)
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        case _:
            return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def gguf_bytes(
    tensors: Mapping[str, Tensor | tuple[int, tuple[int, ...], bytes]], keys: Mapping[str, Any] = KEYS, version: int = 3
) -> bytes:
    """A file from llama.cpp's description of it; a tensor may be (ggml type, shape, bytes)."""
    parts = {
        name: (TYPES[t.dtype], tuple(t.shape), raw_bytes(t)) if isinstance(t, Tensor) else t
        for name, t in tensors.items()
    }
    head = b"GGUF" + struct.pack("<IQQ", version, len(parts), len(keys))
    head += b"".join(text(name) + value_of(value) for name, value in keys.items())
    data = b""
    for name, (kind, shape, raw) in parts.items():
        dims = shape[::-1]
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


HIDDEN = 8
BASE = {
    "model.embed_tokens.weight": randn(9, HIDDEN),
    "lm_head.weight": randn(9, HIDDEN, seed=1),
    "model.layers.0.self_attn.q_proj.weight": randn(HEADS * SIZE, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": randn(KV * SIZE, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": randn(KV * SIZE, HIDDEN, seed=2),
    "model.layers.0.mlp.down_proj.weight": randn(HIDDEN, 12),
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}


def factors(ggml: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    out, into = BASE[f"{NAMES[ggml]}.weight"].shape
    if ggml == "token_embd":
        return randn(out, RANK, seed=seed), randn(into, RANK, seed=seed + 1)
    return randn(RANK, into, seed=seed), randn(out, RANK, seed=seed + 1)


PARTS: dict[str, Tensor] = {}
for number, ggml_name in enumerate(NAMES):
    PARTS[f"{ggml_name}.weight.lora_a"], PARTS[f"{ggml_name}.weight.lora_b"] = factors(ggml_name, seed=number)

CONFIG = {"num_attention_heads": HEADS, "num_key_value_heads": KV}


def save(
    folder: Path,
    parts: Mapping[str, Any] = PARTS,
    keys: Mapping[str, Any] = KEYS,
    config: object = CONFIG,
    base: Mapping[str, Tensor] = BASE,
) -> tuple[Path, Path]:
    (folder / "base").mkdir()
    save_file(dict(base), folder / "base" / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "base" / "config.json").write_text(json.dumps(config))
    adapter = folder / "adapter.gguf"
    adapter.write_bytes(gguf_bytes(parts, keys))
    return folder / "base", adapter


def row_of(row: int) -> int:
    """Where transformers has a row that llama.cpp has at `row`: pairs that are rotated together lie side by side."""
    head, inside = divmod(row, SIZE)
    pair, which = divmod(inside, 2)
    return head * SIZE + which * SIZE // 2 + pair


def truth(scale: float, parts: Mapping[str, Tensor] = PARTS, *, reordered: bool = True) -> State:
    state = {name: value.double() for name, value in BASE.items()}
    for ggml, module in NAMES.items():
        a, b = parts[f"{ggml}.weight.lora_a"].double(), parts[f"{ggml}.weight.lora_b"].double()
        delta = a @ b.T if ggml == "token_embd" else b @ a
        if reordered and ggml in ("blk.0.attn_q", "blk.0.attn_k"):
            moved = torch.empty_like(delta)
            for row, value in enumerate(delta):
                moved[row_of(row)] = value
            delta = moved
        state[f"{module}.weight"] += scale * delta
    return state


def check(out: Path, want: State) -> None:
    for name, value in read(out).items():
        assert_rounded(value, want[name], name=name)


def without_alpha() -> dict[str, Any]:
    return {name: value for name, value in KEYS.items() if name != "adapter.lora.alpha"}


@pytest.mark.parametrize(
    ("keys", "scale"),
    [(KEYS, ALPHA / RANK), (without_alpha(), 1.0), ({**KEYS, "adapter.lora.alpha": 0.0}, 1.0)],
    ids=["alpha", "no alpha", "alpha of 0"],
)
def test_the_scale_is_llama_cpps(keys: Mapping[str, Any], scale: float, tmp_path: Path) -> None:
    base, adapter = save(tmp_path, keys=keys)
    loratool.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth(scale))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rows_of_q_and_k_come_back_into_order(architecture: str, tmp_path: Path) -> None:
    base, adapter = save(tmp_path, keys={**KEYS, "general.architecture": architecture})
    loratool.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth(ALPHA / RANK, reordered=architecture == "llama"))


def rotated(x: Tensor, position: int, pairs: list[tuple[int, int]]) -> Tensor:
    """x [heads, size] with every pair of numbers turned by its angle."""
    out = x.clone()
    for number, (i, j) in enumerate(pairs):
        angle = torch.tensor(position * 100.0 ** (-2 * number / SIZE), dtype=x.dtype)
        out[:, i] = x[:, i] * angle.cos() - x[:, j] * angle.sin()
        out[:, j] = x[:, i] * angle.sin() + x[:, j] * angle.cos()
    return out


def test_attention_is_the_same_in_both_orders(tmp_path: Path) -> None:
    """Not the formula again: scores of llama.cpp's rotation on its rows, and of transformers' on the merged ones."""
    order = [row_of(row) for row in range(HEADS * SIZE)]
    base, adapter = save(tmp_path)
    loratool.merge(base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    x, y = randn(HIDDEN, seed=3).double(), randn(HIDDEN, seed=4).double()
    neighbours, halves = [(2 * i, 2 * i + 1) for i in range(SIZE // 2)], [(i, i + SIZE // 2) for i in range(SIZE // 2)]

    def theirs(ggml: str, rows: int) -> Tensor:
        W = BASE[f"{NAMES[ggml]}.weight"].double()[order[:rows]]  # as convert_hf_to_gguf stores it
        a, b = PARTS[f"{ggml}.weight.lora_a"].double(), PARTS[f"{ggml}.weight.lora_b"].double()
        return W + ALPHA / RANK * b @ a

    def scores(q: Tensor, k: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
        query = rotated((q @ x).reshape(HEADS, SIZE), 5, pairs)
        key = rotated((k @ y).reshape(KV, SIZE), 2, pairs)
        return (query * key.repeat_interleave(HEADS // KV, 0)).sum(1)

    want = scores(theirs("blk.0.attn_q", HEADS * SIZE), theirs("blk.0.attn_k", KV * SIZE), neighbours)
    q, k = (got[f"model.layers.0.self_attn.{part}_proj.weight"].double() for part in "qk")
    assert torch.allclose(scores(q, k, halves), want, rtol=1e-5)
    assert not torch.allclose(scores(q, k, neighbours), want, rtol=1e-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_factors(dtype: torch.dtype, tmp_path: Path) -> None:
    parts = {name: value.to(dtype) for name, value in PARTS.items()}
    base, adapter = save(tmp_path, parts)
    loratool.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth(ALPHA / RANK, parts))
    assert set(loratool.inspect(adapter).dtypes) == {"F16" if dtype == torch.float16 else "BF16"}


def q8_0(values: np.ndarray[Any, Any]) -> tuple[bytes, Tensor]:
    """Blocks of 32, and the numbers they stand for."""
    raw, exact = b"", []
    for block in values.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / 127)
        codes = np.round(block / np.float32(scale)).astype(np.int8)
        raw += scale.tobytes() + codes.tobytes()
        exact.append(np.float64(scale) * codes)
    return raw, torch.from_numpy(np.concatenate(exact).reshape(values.shape))


def test_q8_0_is_read_exactly(tmp_path: Path) -> None:
    a, b = randn(RANK, 64), randn(5, RANK)
    raw, exact = q8_0(a.numpy())
    base = {"model.layers.0.mlp.up_proj.weight": randn(5, 64)}
    parts = {"blk.0.ffn_up.weight.lora_a": (8, (RANK, 64), raw), "blk.0.ffn_up.weight.lora_b": b}
    folder, adapter = save(tmp_path, parts, base=base)
    item = loratool.load(adapter, base=folder).updates[0]
    assert torch.equal(item.update.components()["A"].read().double(), exact)
    loratool.merge(folder, adapter, tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert_rounded(read(tmp_path / "out")[name], base[name].double() + ALPHA / RANK * b.double() @ exact)


EXPERTS: dict[str, Tensor] = {}
for seed, (part, (out, into)) in enumerate({"gate": (6, HIDDEN), "up": (6, HIDDEN), "down": (HIDDEN, 6)}.items()):
    EXPERTS[f"blk.0.ffn_{part}_exps.weight.lora_a"] = randn(3, RANK, into, seed=seed)
    EXPERTS[f"blk.0.ffn_{part}_exps.weight.lora_b"] = randn(3, out, RANK, seed=seed + 5)
SPLIT = {
    "llama": ("model.layers.0.block_sparse_moe.experts.{}.{}.weight", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3moe": ("model.layers.0.mlp.experts.{}.{}_proj.weight", {"gate": "gate", "up": "up", "down": "down"}),
}


def expert_deltas() -> dict[str, Tensor]:
    """[E, out, in] by part."""
    deltas = {}
    for part in ("gate", "up", "down"):
        a, b = (EXPERTS[f"blk.0.ffn_{part}_exps.weight.lora_{factor}"].double() for factor in "ab")
        deltas[part] = ALPHA / RANK * torch.einsum("eor,eri->eoi", b, a)
    return deltas


@pytest.mark.parametrize("architecture", SPLIT)
def test_experts_of_a_base_with_one_tensor_each(architecture: str, tmp_path: Path) -> None:
    pattern, parts = SPLIT[architecture]
    shapes = {part: delta.shape[1:] for part, delta in expert_deltas().items()}
    state = {pattern.format(e, parts[p]): randn(*shapes[p], seed=e) for p in parts for e in range(3)}
    base, adapter = save(tmp_path, EXPERTS, {**KEYS, "general.architecture": architecture}, base=state)
    loratool.merge(base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    for part, delta in expert_deltas().items():
        for e in range(3):
            name = pattern.format(e, parts[part])
            assert_rounded(got[name], state[name].double() + delta[e], name=name)


@pytest.mark.parametrize("architecture", SPLIT)
def test_experts_of_a_base_with_stacks(architecture: str, tmp_path: Path) -> None:
    prefix = "model.layers.0.mlp.experts"
    state = {f"{prefix}.gate_up_proj": randn(3, 12, HIDDEN), f"{prefix}.down_proj": randn(3, HIDDEN, 6)}
    base, adapter = save(tmp_path, EXPERTS, {**KEYS, "general.architecture": architecture}, base=state)
    loratool.merge(base, adapter, tmp_path / "out")
    deltas = expert_deltas()
    both = torch.cat([deltas["gate"], deltas["up"]], 1)
    got = read(tmp_path / "out")
    assert_rounded(got[f"{prefix}.gate_up_proj"], state[f"{prefix}.gate_up_proj"].double() + both)
    assert_rounded(got[f"{prefix}.down_proj"], state[f"{prefix}.down_proj"].double() + deltas["down"])


def test_experts_of_neither_kind(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, EXPERTS)
    with pytest.raises(loratool.LoratoolError, match=r"neither .*experts\.0\.w1.* nor .*gate_up_proj") as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert caught.value.code == "E-TARGET"
    assert len(caught.value.problems) == 3


def test_inspect_imports_no_torch(tmp_path: Path, cli: Cli) -> None:
    _, adapter = save(tmp_path)
    result = cli("inspect", adapter, "--json")
    assert result.code == 0
    assert result.json["convention"] == "gguf"
    layers = {layer.target: layer for layer in loratool.inspect(adapter).layers}
    assert {name: layer.shape for name, layer in layers.items()} == {n: tuple(v.shape) for n, v in BASE.items()}
    assert {(layer.rank, layer.alpha, layer.scale) for layer in layers.values()} == {(RANK, ALPHA, ALPHA / RANK)}
    code = "import sys, loratool; loratool.inspect(sys.argv[1]); assert not {'torch', 'numpy'} & set(sys.modules)"
    package = str(Path(loratool.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, adapter], check=True, env={"PYTHONPATH": package})


def test_without_its_base_the_order_is_open(tmp_path: Path) -> None:
    _, adapter = save(tmp_path)
    assert any("order of the rows" in doubt for doubt in loratool.load(adapter).doubts)
    with pytest.raises(loratool.LoratoolError):
        loratool.save(loratool.load(adapter), tmp_path / "a.lora.safetensors")
    one = {name: value for name, value in PARTS.items() if "ffn_down" in name}
    adapter.write_bytes(gguf_bytes(one))
    assert not loratool.load(adapter).doubts


def test_norms_are_left_out_aloud(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, {**PARTS, "blk.0.attn_norm.weight": randn(HIDDEN)})
    report = loratool.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth(ALPHA / RANK))
    assert any("norm tensors are not used" in note for note in report.plan.notes)


Q = "blk.0.attn_q.weight.lora_"
REFUSED: dict[str, tuple[Mapping[str, Any], Mapping[str, Any], object, str, str]] = {
    "a model": (PARTS, {**KEYS, "general.type": "model"}, CONFIG, "E-UNSUPPORTED", "a GGUF model"),
    "no type": (PARTS, {"general.architecture": "llama"}, CONFIG, "E-UNSUPPORTED", "a GGUF model"),
    "another method": (PARTS, {**KEYS, "adapter.type": "cvec"}, CONFIG, "E-UNSUPPORTED", "cvec, not lora"),
    "alora": (
        PARTS, {**KEYS, "adapter.alora.invocation_tokens": [3, 4]}, CONFIG, "E-CONDITIONAL", "after the tokens 3, 4",
    ),
    "alora without tokens": (
        PARTS, {**KEYS, "adapter.alora.invocation_tokens": "3"}, CONFIG, "E-HEADER", "token numbers",
    ),
    "another architecture": (
        PARTS, {**KEYS, "general.architecture": "falcon"}, CONFIG, "E-UNSUPPORTED", "'falcon' are not known",
    ),
    "alpha in words": (PARTS, {**KEYS, "adapter.lora.alpha": "big"}, CONFIG, "E-CONFIG", "big, not a number"),
    "alpha of nan": (PARTS, {**KEYS, "adapter.lora.alpha": float("nan")}, CONFIG, "E-SCALE", "not finite"),
    "half a pair": ({n: v for n, v in PARTS.items() if n != f"{Q}b"}, KEYS, CONFIG, "E-COMPONENTS", "attn_q"),
    "a stray": ({**PARTS, "blk.0.attn_q.weight": randn(2)}, KEYS, CONFIG, "E-UNUSED", "neither lora_a nor lora_b"),
    "an unknown part": (
        {**PARTS, "blk.0.ssm_in.weight.lora_a": randn(2, 8), "blk.0.ssm_in.weight.lora_b": randn(8, 2)}, KEYS, CONFIG,
        "E-UNSUPPORTED", "ssm_in",
    ),
    "ranks that differ": ({**PARTS, f"{Q}a": randn(3, HIDDEN)}, KEYS, CONFIG, "E-SHAPE", r"\[3, 8\] and \[16, 2\]"),
    "a vector": ({**PARTS, f"{Q}a": randn(3)}, KEYS, CONFIG, "E-SHAPE", r"\[3\] and"),
    "another base": ({**PARTS, f"{Q}a": randn(RANK, 6)}, KEYS, CONFIG, "E-SHAPE", r"q_proj.* is \[16, 8\]"),
    "no config": (PARTS, KEYS, None, "E-CONFIG", "num_attention_heads"),
    "a config without heads": (PARTS, KEYS, {"num_attention_heads": "4"}, "E-CONFIG", "num_attention_heads"),
    "heads that do not divide": (PARTS, KEYS, {"num_attention_heads": 3}, "E-SHAPE", "among 3 heads"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path, cli: Cli) -> None:
    parts, keys, config, code, message = REFUSED[case]
    base, adapter = save(tmp_path, parts, keys, config)
    with pytest.raises(loratool.LoratoolError, match=message) as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()
    assert cli("inspect", adapter).code in (0, 2)


def test_options_that_mean_nothing(tmp_path: Path) -> None:
    _, adapter = save(tmp_path)
    with pytest.raises(loratool.LoratoolError, match="--alpha means nothing"):
        loratool.load(adapter, alpha=3.0, scaling="alpha")


# --- the container ------------------------------------------------------------------------------

WHOLE = gguf_bytes(PARTS, {**KEYS, "general.tags": ["a", "b"], "x.flag": True, "x.list": [1, 2, 3]})


def edited(start: bytes, replacement: bytes) -> bytes:
    assert WHOLE.count(start) >= 1
    return WHOLE.replace(start, replacement, 1)


BROKEN = {
    "empty": b"",
    "another magic": b"GGML" + WHOLE[4:],
    "version 1": WHOLE[:4] + struct.pack("<I", 1) + WHOLE[8:],
    "big-endian": WHOLE[:4] + struct.pack(">I", 3) + WHOLE[8:],
    "tensors without end": WHOLE[:8] + struct.pack("<Q", 2**63) + WHOLE[16:],
    "keys without end": WHOLE[:16] + struct.pack("<Q", 2**63) + WHOLE[24:],
    "a string without end": edited(text("general.architecture"), struct.pack("<Q", 2**62) + b"general.architecture"),
    "a key twice": edited(text("general.architecture") + value_of("llama"), text("x.flag") + value_of("llama")),
    "not UTF-8": edited(b"llama", b"\xff\xfe\xfd\xfc\xfb"),
    "an array without end": edited(struct.pack("<IIQ", 9, 4, 3), struct.pack("<IIQ", 9, 4, 2**61)),
    "an array of arrays": edited(struct.pack("<IIQ", 9, 4, 3), struct.pack("<IIQ", 9, 9, 3)),
    "an unknown type of key": edited(struct.pack("<IIQ", 9, 4, 3), struct.pack("<IIQ", 77, 4, 3)),
    "alignment of 3": gguf_bytes(PARTS, {**KEYS, "general.alignment": 3}),
    "a tensor not aligned": gguf_bytes(PARTS, {**KEYS, "general.alignment": 64}) + bytes(64),
    "a tensor twice": edited(b"blk.0.attn_q.weight.lora_a", b"blk.0.attn_q.weight.lora_b"),
    "an unknown type of tensor": gguf_bytes({**PARTS, f"{Q}a": (12, (RANK, HIDDEN), bytes(64))}),
    "five dimensions": gguf_bytes({**PARTS, f"{Q}a": (0, (1, 1, 1, RANK, HIDDEN), bytes(64))}),
    "dimensions without end": gguf_bytes({**PARTS, f"{Q}a": (0, (2**62, 2**62), bytes(64))}),
    "half a Q8_0 block": gguf_bytes({**PARTS, f"{Q}a": (8, (RANK, HIDDEN), bytes(64))}),
    "a truncated tensor": WHOLE[:-40],
    "tensors that overlap": gguf_bytes({**PARTS, f"{Q}a": (0, (RANK, 8 * HIDDEN), bytes(64))}),
}  # fmt: skip


def test_the_file_that_is_broken_below_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(WHOLE)
    found = read_gguf(tmp_path / "a.gguf")
    assert found.metadata["x.list"] == "[3 values]"
    assert {name: ref.shape for name, ref in found.tensors.items()} == {n: tuple(v.shape) for n, v in PARTS.items()}
    assert all(torch.equal(ref.read(), PARTS[name]) for name, ref in found.tensors.items())


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(BROKEN[case])
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.inspect(tmp_path / "a.gguf")
    assert str(tmp_path) in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_typed_error_or_none(data: st.DataObject, tmp_path: Path) -> None:
    raw = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 900))] = data.draw(st.integers(0, 255))
    file = tmp_path / "damaged.gguf"
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw))) or None])
    with contextlib.suppress(loratool.LoratoolError):
        loratool.inspect(file)

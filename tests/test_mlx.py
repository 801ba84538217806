"""mlx-lm's files by hand, in the layout that test_mlx_peer.py proves with mlx-lm, and what is refused of them."""

from __future__ import annotations

import contextlib
import json
import zipfile
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
from loratool.checkpoint import open_checkpoint
from loratool.conventions import gguf, megatron, mlx
from loratool.npz import read_npz

RANK, SCALE = 2, 2.5
CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "model": "org/model",
    "num_layers": 1,
    "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


BASE = {
    "model.embed_tokens.weight": randn(7, 4),
    "model.layers.0.self_attn.q_proj.weight": randn(6, 4),
    "model.layers.0.self_attn.o_proj.weight": randn(4, 4),
    "model.layers.0.mlp.switch_mlp.up_proj.weight": randn(3, 5, 4),
    "model.norm.weight": randn(4),
}
PARTS = {
    "model.embed_tokens.lora_a": randn(7, RANK),
    "model.embed_tokens.lora_b": randn(RANK, 4),
    "model.layers.0.self_attn.q_proj.lora_a": randn(4, RANK),
    "model.layers.0.self_attn.q_proj.lora_b": randn(RANK, 6),
    "model.layers.0.self_attn.o_proj.lora_a": randn(4, RANK, seed=1),
    "model.layers.0.self_attn.o_proj.lora_b": randn(RANK, 4, seed=2),
    "model.layers.0.mlp.switch_mlp.up_proj.lora_a": randn(3, RANK, 4),
    "model.layers.0.mlp.switch_mlp.up_proj.lora_b": randn(3, 5, RANK),
}


def save(
    folder: Path, parts: Mapping[str, Tensor] = PARTS, config: object = CONFIG, base: Mapping[str, Tensor] = BASE
) -> tuple[Path, Path]:
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    save_file(dict(base), folder / "base" / "model.safetensors", metadata={"format": "mlx"})
    save_file(dict(parts), folder / "adapter" / "adapters.safetensors")
    if config is not None:
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder / "base", folder / "adapter"


def truth(scale: float, parts: Mapping[str, Tensor] = PARTS) -> State:
    """W + scale * delta in float64, written from mlx-lm's layouts anew."""
    state = {name: value.double() for name, value in BASE.items()}
    for name in state:
        module = name.removesuffix(".weight")
        if f"{module}.lora_a" not in parts:
            continue
        A, B = parts[f"{module}.lora_a"].double(), parts[f"{module}.lora_b"].double()
        if "switch" in name:
            state[name] += scale * torch.einsum("eor,eri->eoi", B, A.reshape(3, RANK, 4))
        elif "embed" in name:
            state[name] += scale * torch.einsum("vr,rd->vd", A, B)
        else:
            state[name] += scale * torch.einsum("ir,ro->oi", A, B)
    return state


def check(out: Path, want: State) -> None:
    for name, value in read(out).items():
        assert_rounded(value, want[name], name=name)


SCALES = {
    "scale": ({"rank": RANK, "scale": SCALE}, SCALE),
    "scale of an integer": ({"rank": RANK, "scale": 20}, 20.0),
    # From 2024-01 to 2024-06: the trainer multiplied by alpha / rank as well.
    "scale and alpha": ({"rank": RANK, "alpha": 16, "scale": 10.0}, 10.0 * 16 / RANK),
}


@pytest.mark.parametrize("case", SCALES)
def test_both_eras_of_the_scale(case: str, tmp_path: Path) -> None:
    parameters, scale = SCALES[case]
    base, adapter = save(tmp_path, config={**CONFIG, "lora_parameters": parameters})
    loratool.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth(scale))
    summary = loratool.inspect(adapter)
    assert {(layer.rank, layer.scale) for layer in summary.layers} == {(RANK, scale)}


def test_a_rank_that_is_not_the_tensors_is_refused(tmp_path: Path) -> None:
    """It is another adapter's config, and so may its scale be."""
    base, adapter = save(tmp_path, config={**CONFIG, "lora_parameters": {"rank": 64, "scale": SCALE}})
    with pytest.raises(loratool.Mismatch, match=f"the rank is 64 .*, and {RANK} in the factors") as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert caught.value.code == "E-RANK"


def test_experts_of_the_first_version(tmp_path: Path) -> None:
    """lora_a was [rank * E, in]; the same numbers in the same order."""
    name = "model.layers.0.mlp.switch_mlp.up_proj.lora_a"
    parts = {**PARTS, name: PARTS[name].reshape(3 * RANK, 4)}
    base, adapter = save(tmp_path, parts)
    loratool.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth(SCALE))


def test_inspect(tmp_path: Path, cli: Cli) -> None:
    _, adapter = save(tmp_path)
    result = cli("inspect", adapter, "--json")
    assert result.code == 0
    assert result.json["convention"] == "mlx"
    assert result.json["base_name"] == "org/model"
    rows = {layer.target: layer for layer in loratool.inspect(adapter).layers}
    assert {name: layer.shape for name, layer in rows.items()} == {
        name: tuple(value.shape) for name, value in BASE.items() if name != "model.norm.weight"
    }
    assert rows["model.layers.0.mlp.switch_mlp.up_proj.weight"].part == "3 experts"


def test_a_square_module_is_an_embedding_by_its_name(tmp_path: Path) -> None:
    _, adapter = save(tmp_path)
    layouts = {item.target.name: item.target.layout for item in loratool.load(adapter).updates}
    assert [name for name, layout in layouts.items() if layout] == ["model.embed_tokens.weight"]
    # With the base, an embedding under any name is known by its shape.
    renamed = {name.replace("embed_tokens", "lookup"): value for name, value in PARTS.items()}
    table = {name.replace("embed_tokens", "lookup"): value for name, value in BASE.items()}
    (tmp_path / "two").mkdir()
    base, adapter = save(tmp_path / "two", renamed, base=table)
    targets = {item.target.name: item.target for item in loratool.load(adapter, base=base).updates}
    assert targets["model.lookup.weight"].layout == "embedding"
    assert targets["model.lookup.weight"].shape == (7, 4)


def test_without_its_config_the_scale_is_asked_for(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, config=None)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert caught.value.code == "E-ALPHA"
    known = loratool.load(adapter, alpha=SCALE, scaling="alpha")
    loratool.merge(base, known, tmp_path / "out")
    check(tmp_path / "out", truth(SCALE))
    other = tmp_path / "config.json"
    other.write_text(json.dumps(CONFIG))
    assert {item.update.scaling.scale for item in loratool.load(adapter, config=other).updates} == {SCALE}


def without(*names: str) -> dict[str, Tensor]:
    return {name: value for name, value in PARTS.items() if not name.endswith(names)}


Q = "model.layers.0.self_attn.q_proj"
E = "model.layers.0.mlp.switch_mlp.up_proj"
REFUSED: dict[str, tuple[Mapping[str, Tensor], Any, str, str]] = {
    "half a pair": (without("q_proj.lora_b"), CONFIG, "E-COMPONENTS", r"q_proj has only one"),
    "a stray tensor": ({**PARTS, "model.norm.weight": randn(4)}, CONFIG, "E-UNUSED", r"model\.norm\.weight"),
    "a magnitude alone": ({**PARTS, "model.x.m": randn(4)}, CONFIG, "E-UNUSED", r"model\.x\.m"),
    "ranks that differ": ({**PARTS, f"{Q}.lora_a": randn(4, 3)}, CONFIG, "E-SHAPE", r"lora_a is \[4, 3\]"),
    "a vector": ({**PARTS, f"{Q}.lora_a": randn(4)}, CONFIG, "E-SHAPE", "q_proj"),
    "a scalar": ({**PARTS, f"{Q}.lora_b": torch.tensor(1.0)}, CONFIG, "E-SHAPE", "q_proj"),
    "no rank": (
        {**PARTS, f"{Q}.lora_a": torch.zeros(4, 0), f"{Q}.lora_b": torch.zeros(0, 6)}, CONFIG, "E-SHAPE", "q_proj",
    ),
    "another base": ({**PARTS, f"{Q}.lora_b": randn(RANK, 5)}, CONFIG, "E-SHAPE", r"make \[5, 4\].*\[6, 4\]"),
    "experts that do not divide": ({**PARTS, f"{E}.lora_a": randn(5, 4)}, CONFIG, "E-SHAPE", "up_proj"),
    "experts of another number": ({**PARTS, f"{E}.lora_a": randn(2, RANK, 4)}, CONFIG, "E-SHAPE", "up_proj"),
    "a magnitude of experts": ({**PARTS, f"{E}.m": randn(3, 5)}, CONFIG, "E-UNSUPPORTED", "magnitude of experts"),
    "a magnitude too long": ({**PARTS, f"{Q}.m": randn(7)}, CONFIG, "E-SHAPE", r"magnitude is \[7\]"),
    "dora without m": (PARTS, {**CONFIG, "fine_tune_type": "dora"}, "E-COMPONENTS", "has no m"),
    "a PEFT config": (PARTS, {"peft_type": "LORA"}, "E-ALPHA", "alpha"),
    "a scale in words": (PARTS, {"lora_parameters": {"scale": "big"}}, "E-CONFIG", "'big', not a number"),
    "a scale of true": (PARTS, {"lora_parameters": {"scale": True}}, "E-CONFIG", "True, not a number"),
    "a scale of null": (PARTS, {"lora_parameters": {"scale": None}}, "E-CONFIG", "None, not a number"),
    "parameters in words": (PARTS, {"lora_parameters": "many"}, "E-CONFIG", "'many', not a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path, cli: Cli) -> None:
    parts, config, code, message = REFUSED[case]
    base, adapter = save(tmp_path, parts, config)
    with pytest.raises(loratool.LoratoolError, match=message) as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()
    assert cli("merge", base, adapter, "-o", tmp_path / "out").code == 2
    assert cli("inspect", adapter).code in (0, 2)


def test_all_problems_at_once(tmp_path: Path) -> None:
    parts = {**without("q_proj.lora_b"), f"{E}.lora_a": randn(5, 4)}
    base, adapter = save(tmp_path, parts)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert {problem.code for problem in caught.value.problems} == {"E-COMPONENTS", "E-SHAPE"}


FULL = {**CONFIG, "fine_tune_type": "full", "lora_parameters": None}


def test_a_full_fine_tune_replaces(tmp_path: Path) -> None:
    whole = {"model.norm.weight": randn(4, seed=9), f"{E}.weight": randn(3, 5, 4, seed=9)}
    base, adapter = save(tmp_path, whole, FULL)
    loratool.merge(base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    for name, value in BASE.items():
        assert torch.equal(got[name], whole.get(name, value))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.switch_mlp.gate_proj.weight", (3, 5, 4), "not in the base"),
        ("model.norm.weight", (1, 4), r"\[4\] in the base, not \[1, 4\]"),
    ],
)
def test_whole_weights_need_the_base_they_come_from(
    name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    base, adapter = save(tmp_path, {name: randn(*shape)}, FULL)
    with pytest.raises(loratool.LoratoolError, match=message) as caught:
        loratool.merge(base, adapter, tmp_path / "out", allow_new=True)
    assert "MLX model" in caught.value.hint


def test_norms_that_mlx_shifts_are_not_taken_over(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, {"model.norm.weight": randn(4)}, FULL)
    (base / "config.json").write_text(json.dumps({"text_config": {"model_type": "qwen3_next"}}))
    with pytest.raises(loratool.LoratoolError, match=r"weight \+ 1"):
        loratool.merge(base, adapter, tmp_path / "out")


def test_detection(tmp_path: Path) -> None:
    base, adapter = save(tmp_path)
    assert loratool.inspect(base).convention is None
    assert loratool.inspect(adapter).convention == "mlx"
    foreign = {
        "torchtune": {"layers.0.q_proj.lora_a.weight": randn(2, 4), "layers.0.q_proj.lora_b.weight": randn(4, 2)},
        "kohya": {"lora_unet_x.lora_down.weight": randn(2, 4), "lora_unet_x.lora_up.weight": randn(4, 2)},
        "loralib": {"q.lora_A": randn(2, 4), "q.lora_B": randn(4, 2), "q.weight": randn(4, 4)},
        "litgpt": {"q.lora_A": randn(2, 4), "q.lora_B": randn(4, 2), "q.linear.weight": randn(4, 4)},
        "diffusers": {"unet.q.lora_A.weight": randn(2, 4), "unet.q.lora_B.weight": randn(4, 2)},
        "megatron": {"q.adapter.linear_in.weight": randn(2, 4), "q.adapter.linear_out.weight": randn(4, 2)},
        "checkpoint": {"m": randn(4), "model.m": randn(4)},
    }
    for name, parts in foreign.items():
        file = tmp_path / f"{name}.safetensors"
        save_file(parts, file)
        source = open_checkpoint(file)
        found = {convention.NAME for convention in (gguf, megatron, mlx) if convention.detect(source)}
        assert found == ({"megatron"} if name == "megatron" else set()), name


# --- .npz ---------------------------------------------------------------------------------------


def test_numpy_archives(tmp_path: Path) -> None:
    base, adapter = save(tmp_path)
    arrays = {
        name: np.asfortranarray(value.numpy()) if "lora_b" in name else value.numpy() for name, value in PARTS.items()
    }
    (adapter / "adapters.safetensors").unlink()
    np.savez(adapter / "adapters.npz", **arrays)
    loratool.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth(SCALE))
    (tmp_path / "out").rename(tmp_path / "before")
    loratool.merge(base, adapter / "adapters.npz", tmp_path / "out")
    check(tmp_path / "out", truth(SCALE))


def test_compressed_archives_are_refused_with_the_remedy(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", **{"q.lora_a": np.ones((4, 2)), "q.lora_b": np.ones((2, 4))})
    with pytest.raises(loratool.LoratoolError, match="is compressed") as caught:
        loratool.inspect(tmp_path / "a.npz")
    assert "numpy.savez" in caught.value.hint


def npz(
    file: Path, description: str, data: bytes = bytes(16), name: str = "a.npy", magic: bytes = b"\x93NUMPY"
) -> Path:
    raw = magic + b"\x01\x00" + len(description).to_bytes(2, "little") + description.encode() + data
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, raw)
    return file


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }\n"
BROKEN = {
    "pickled objects": {"description": GOOD.replace("<f4", "|O")},
    "big-endian": {"description": GOOD.replace("<f4", ">f4")},
    "records": {"description": GOOD.replace("'<f4'", "[('x', '<f4')]")},
    "code": {"description": GOOD.replace("(2, 2)", "(2, __import__('os'))")},
    "too short": {"description": GOOD, "data": bytes(15)},
    "too long": {"description": GOOD, "data": bytes(17)},
    "huge": {"description": GOOD.replace("(2, 2)", "(9999999999, 9999999999)")},
    "not an array": {"description": GOOD, "name": "a.txt"},
    "another magic": {"description": GOOD, "magic": b"\x93NUMPX"},
}


def test_the_archive_that_is_broken_below_is_whole(tmp_path: Path) -> None:
    assert read_npz(npz(tmp_path / "a.npz", GOOD))["a"].shape == (2, 2)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_archives(case: str, tmp_path: Path) -> None:
    file = npz(tmp_path / "a.npz", **BROKEN[case])
    with pytest.raises(loratool.InvalidFile):
        loratool.inspect(file)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_typed_error_or_none(data: st.DataObject, tmp_path: Path) -> None:
    file = tmp_path / "whole.npz"
    if not file.exists():
        np.savez(file, **{"q.lora_a": np.ones((4, 2), np.float32), "q.lora_b": np.ones((2, 4), np.float32)})
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(raw[: data.draw(st.integers(0, len(raw))) or None])
    with contextlib.suppress(loratool.LoratoolError):
        for ref in read_npz(damaged).values():
            ref.read()

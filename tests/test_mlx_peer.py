"""mlx-lm itself: adapters of its trainer, and its own fuse and forward as the truth."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

mx = pytest.importorskip("mlx.core", reason="needs mlx[cpu]")
pytest.importorskip("mlx_lm", reason="needs mlx-lm")

# ruff: noqa: E402  # the imports below need what is looked for above
import mlx.nn as mlx_nn
import mlx.optimizers
import numpy as np
import torch
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama as mlx_llama
from mlx_lm.models import mixtral as mlx_mixtral
from mlx_lm.models import qwen2_moe as mlx_qwen2_moe
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import save_config
from models import HIDDEN, VOCAB, State, assert_float32_close, changed, llama, own, read, save_base
from safetensors.torch import load_file, save_file

import loratool

pytestmark = pytest.mark.peers

SCALE, RANK = 3.5, 4
COMMON = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def mlx_model(kind: str) -> Any:
    match kind:
        case "llama":
            args = mlx_llama.ModelArgs(
                model_type="llama", intermediate_size=24, tie_word_embeddings=False, **HEADS, **COMMON
            )
            return mlx_llama.Model(args)
        case "tied":
            args = mlx_llama.ModelArgs(
                model_type="llama", intermediate_size=24, tie_word_embeddings=True, **HEADS, **COMMON
            )
            return mlx_llama.Model(args)
        case "mixtral":
            args = mlx_mixtral.ModelArgs(
                model_type="mixtral",
                intermediate_size=24,
                num_local_experts=3,
                num_experts_per_tok=2,
                **HEADS,
                **COMMON,
            )
            return mlx_mixtral.Model(args)
        case _:
            args = mlx_qwen2_moe.ModelArgs(
                model_type="qwen2_moe",
                intermediate_size=24,
                num_experts=3,
                num_experts_per_tok=2,
                moe_intermediate_size=12,
                shared_expert_intermediate_size=20,
                tie_word_embeddings=False,
                **HEADS,
                **COMMON,
            )
            return mlx_qwen2_moe.Model(args)


def weights(model: Any) -> dict[str, Any]:
    return dict(tree_flatten(model.parameters()))


def fill(model: Any, seed: int) -> None:
    """Values that no initialisation gives: an adapter starts at lora_b = 0."""
    random = np.random.default_rng(seed)
    values = {}
    for name, value in tree_flatten(model.trainable_parameters()):
        noise = random.standard_normal(value.shape).astype(np.float32) * 0.2
        values[name] = mx.array(np.abs(noise) + 0.5 if name.endswith(".m") else noise)
    model.update(tree_unflatten(list(values.items())))


def state(model: Any) -> State:
    """In float32: NumPy has no bfloat16."""
    return {name: torch.from_numpy(np.array(value.astype(mx.float32))) for name, value in weights(model).items()}


class Trained(NamedTuple):
    base: Path
    adapter: Path
    model: Any  # with the adapter in it
    fused: State


def trained(
    folder: Path, kind: str, *, keys: list[str] | None = None, tune: str = "lora", dtype: Any = None
) -> Trained:
    """A base as MLX saves it, and the adapter folder that its trainer would leave."""
    mx.random.seed(3)
    model = mlx_model(kind)
    if dtype is not None:
        model.set_dtype(dtype)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    mx.save_safetensors(str(base / "model.safetensors"), weights(model), metadata={"format": "mlx"})
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": kind == "tied"}))
    model.freeze()
    parameters: dict[str, Any] | None = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    if tune == "full":
        parameters = None
        for layer in model.layers[-1:]:
            layer.unfreeze()
    else:
        assert parameters is not None
        if keys is not None:
            parameters["keys"] = keys
        linear_to_lora_layers(model, 2, parameters, use_dora=tune == "dora")
    fill(model, seed=4)
    save_config(
        {"fine_tune_type": tune, "num_layers": 2, "lora_parameters": parameters, "model": f"org/{kind}"},
        adapter / "adapter_config.json",
    )
    mx.save_safetensors(str(adapter / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    fused = mlx_model(kind)
    fused.load_weights(str(base / "model.safetensors"))
    load_adapters(fused, str(adapter))  # the files are what mlx-lm reads
    done = [(name, module.fuse()) for name, module in fused.named_modules() if hasattr(module, "fuse")]
    fused.update_modules(tree_unflatten(done))
    return Trained(base, adapter, model, state(fused))


def check(out: Path, made: Trained, *, count: int) -> None:
    got, before = read(out), read(made.base)
    assert sorted(got) == sorted(made.fused) == sorted(before)
    assert len(changed(before, got)) == count
    for name, value in got.items():
        assert_float32_close(value, made.fused[name], name=name)


EXPERTS = ["gate_proj", "down_proj", "up_proj"]
CASES = {
    # kind, keys, fine_tune_type, changed tensors
    "llama": ("llama", None, "lora", 14),
    "llama-dora": ("llama", None, "dora", 14),
    "head and embedding": ("llama", ["model.embed_tokens", "lm_head", "self_attn.q_proj"], "lora", 4),
    "embedding dora": ("llama", ["model.embed_tokens", "self_attn.q_proj"], "dora", 3),
    "tied embedding": ("tied", ["model.embed_tokens"], "lora", 1),
    "mixtral": ("mixtral", None, "lora", 2 * (4 + 1 + 3)),
    "mixtral experts": ("mixtral", [f"block_sparse_moe.switch_mlp.{part}" for part in EXPERTS], "lora", 6),
    "qwen2-moe": ("qwen2_moe", None, "lora", 2 * (4 + 1 + 3 + 3 + 1)),
    "full": ("llama", None, "full", 7 + 2),
    "full mixtral": ("mixtral", None, "full", 4 + 1 + 3 + 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_what_mlx_fuses(case: str, tmp_path: Path) -> None:
    kind, keys, tune, count = CASES[case]
    made = trained(tmp_path, kind, keys=keys, tune=tune)
    loratool.merge(made.base, made.adapter, tmp_path / "out")
    check(tmp_path / "out", made, count=count)


@pytest.mark.parametrize("kind", ["llama", "tied", "mixtral", "qwen2_moe"])
def test_a_merge_answers_as_the_adapted_model(kind: str, tmp_path: Path) -> None:
    keys = ["model.embed_tokens"] if kind == "tied" else None
    made = trained(tmp_path, kind, keys=keys)
    loratool.merge(made.base, made.adapter, tmp_path / "out")
    merged, plain = mlx_model(kind), mlx_model(kind)
    merged.load_weights(str(tmp_path / "out" / "model.safetensors"))
    plain.load_weights(str(made.base / "model.safetensors"))
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    want, got = np.array(made.model(tokens)), np.array(merged(tokens))
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    assert np.abs(np.array(plain(tokens)) - want).max() > 1e-2 * np.abs(want).max()


def test_the_hugging_face_base_takes_the_same_adapter(tmp_path: Path) -> None:
    """Trained on MLX, merged into transformers' own checkpoint: both answer alike."""
    torch.manual_seed(5)
    reference = llama(layers=2).eval()
    hf = save_base(reference, tmp_path / "hf")
    arguments = {**reference.config.to_dict(), "rope_theta": 10000.0}
    model = mlx_llama.Model(mlx_llama.ModelArgs.from_dict(arguments))
    model.load_weights(str(hf / "model.safetensors"))
    model.freeze()
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    linear_to_lora_layers(model, 2, parameters)
    fill(model, seed=6)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_config(
        {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}, adapter / "adapter_config.json"
    )
    mx.save_safetensors(str(adapter / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))

    loratool.merge(hf, adapter, tmp_path / "out")
    reference.load_state_dict(read(tmp_path / "out"))
    tokens = [[3, 1, 4, 1, 5, 9, 2, 6]]
    with torch.no_grad():
        got = reference(torch.tensor(tokens)).logits
    want = torch.from_numpy(np.array(model(mx.array(tokens))))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_stacked_experts_are_led_to_split_ones(tmp_path: Path) -> None:
    """A base as transformers saves it gets, expert by expert, what the base of mlx-lm gets as a stack."""
    made = trained(tmp_path, "mixtral")
    parts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def split(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in read(folder).items():
            prefix, stacked, rest = name.partition("switch_mlp.")
            part = parts.get(rest.split(".")[0], "")
            experts = {f"{prefix}experts.{e}.{part}.weight": matrix for e, matrix in enumerate(value)}
            found.update(experts if stacked else {name: value})
        return found

    (tmp_path / "hf").mkdir()
    save_file(own(split(made.base)), tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    loratool.merge(tmp_path / "hf", made.adapter, tmp_path / "out")
    loratool.merge(made.base, made.adapter, tmp_path / "stacked")
    found, wanted = read(tmp_path / "out"), split(tmp_path / "stacked")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] == value).all(), name


def test_what_the_trainer_leaves(tmp_path: Path) -> None:
    """The real training loop: the last adapter is the folder's, a numbered one is given by its name."""
    mx.random.seed(7)
    model = mlx_model("llama")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    mx.save_safetensors(str(base / "model.safetensors"), weights(model))
    model.freeze()
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    linear_to_lora_layers(model, 1, parameters)
    save_config(
        {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}, adapter / "adapter_config.json"
    )
    random = np.random.default_rng(8)
    data = [(random.integers(0, VOCAB, 12).tolist(), 0) for _ in range(4)]
    file = adapter / "adapters.safetensors"
    arguments = TrainingArgs(
        batch_size=2, iters=2, val_batches=1, steps_per_save=1, steps_per_report=1, adapter_file=str(file)
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(model, mlx.optimizers.Adam(1e-2), data, data, args=arguments)

    assert loratool.inspect(adapter).convention == "mlx"
    merged = {}
    for name in ("", "0000001_adapters.safetensors", "0000002_adapters.safetensors"):
        loratool.merge(base, adapter / name, tmp_path / f"out{name[:7]}")
        merged[name] = read(tmp_path / f"out{name[:7]}")
    # The second checkpoint and adapters.safetensors are one adapter; the first is another.
    assert not changed(merged[""], merged["0000002_adapters.safetensors"])
    assert len(changed(merged["0000001_adapters.safetensors"], merged[""])) == 7
    done = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(done))
    for name, value in state(model).items():
        assert_float32_close(merged[""][name], value, name=name)


def test_a_16_bit_base(tmp_path: Path) -> None:
    """MLX adds a delta that it has rounded; here the sum is rounded once, from the same factors."""
    made = trained(tmp_path, "llama", dtype=mx.bfloat16)
    loratool.merge(made.base, made.adapter, tmp_path / "out")
    got, before = read(tmp_path / "out"), read(made.base)
    factors = load_file(made.adapter / "adapters.safetensors")
    for name in changed(before, got):
        A, B = (factors[f"{name.removesuffix('weight')}lora_{part}"].double() for part in "ab")
        exact = before[name].double() + SCALE * (A @ B).T
        assert got[name].dtype == torch.bfloat16
        assert (got[name].double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
    assert len(changed(before, got)) == 14


def test_archives_of_numpy_are_read(tmp_path: Path) -> None:
    """mlx writes transposed arrays in Fortran order, and bfloat16 as two bytes without a type."""
    made = trained(tmp_path, "mixtral")
    arrays = mx.load(str(made.adapter / "adapters.safetensors"))
    names = sorted(arrays)
    # contiguous in the other order, for every other one
    arrays = {name: mx.array(value.T).T if names.index(name) % 2 else value for name, value in arrays.items()}
    (made.adapter / "adapters.safetensors").unlink()
    mx.savez(str(made.adapter / "adapters.npz"), **arrays)
    loratool.merge(made.base, made.adapter, tmp_path / "out")
    check(tmp_path / "out", made, count=16)

    halves = {name: value.astype(mx.bfloat16) for name, value in arrays.items()}
    mx.savez(str(made.adapter / "adapters.npz"), **halves)
    summary = loratool.inspect(made.adapter)
    assert set(summary.dtypes) == {"BF16"}
    mx.save_safetensors(str(tmp_path / "halves.safetensors"), halves)
    for item in loratool.load(made.adapter).updates:
        ref = item.update.components()["B"]
        want = load_file(tmp_path / "halves.safetensors")[ref.name]
        want = want if want.dim() == 3 else want.T
        assert torch.equal(ref.read(), want)


@pytest.mark.parametrize("quantise", [{"group_size": 32, "bits": 4}], ids=["4-bit"])
def test_a_quantised_base_is_refused_by_name(quantise: dict[str, int], tmp_path: Path) -> None:
    made = trained(tmp_path, "llama", keys=["mlp.down_proj"])
    model = mlx_nn.Sequential(mlx_nn.Linear(32, 16, bias=False))
    mlx_nn.quantize(model, **quantise)
    packed = {f"model.layers.0.mlp.down_proj.{name.split('.')[-1]}": v for name, v in weights(model).items()}
    mx.save_safetensors(
        str(made.base / "model.safetensors"), {**mx.load(str(made.base / "model.safetensors")), **packed}
    )
    with pytest.raises(loratool.LoratoolError, match=r"layers\.0\.mlp\.down_proj is quantised") as caught:
        loratool.merge(made.base, made.adapter, tmp_path / "out")
    assert caught.value.code == "E-QUANTISED"
    assert "--dequantize" in caught.value.hint


@pytest.mark.parametrize("tune", ["lora", "dora"])
def test_a_model_saved_with_its_wrappers(tune: str, tmp_path: Path) -> None:
    """`model.save_weights` on a model that was not fused: base and adapter in one file."""
    made = trained(tmp_path, "llama", keys=["model.embed_tokens", "self_attn.q_proj"], tune=tune)
    wrapped = tmp_path / "wrapped.safetensors"
    made.model.save_weights(str(wrapped))
    out, base = tmp_path / "a.lora.safetensors", tmp_path / "base-out"
    loratool.extract(wrapped, out, alpha=SCALE, scaling="alpha", base_out=base)
    assert not changed(read(made.base), read(base))
    assert sorted(read(base)) == sorted(read(made.base))
    loratool.merge(made.base, out, tmp_path / "out")
    check(tmp_path / "out", made, count=3)

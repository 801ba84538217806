"""mlx-lm itself: adapters of its trainer, and its own fuse and forward as the truth."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
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
from mlx_lm.models import qwen3_moe as mlx_qwen3_moe
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import save_config
from models import HIDDEN, VOCAB, State, assert_float32_close, changed, llama, mixtral, own, read, save_base
from safetensors.torch import load_file, save_file
from strategies import Maker, make_update
from test_maps import qwen3

import loratool
from loratool import Adapter, Target, Targeted
from loratool.conventions.checked import CHECKED

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
    save_file(made.fused, tmp_path / "fused.safetensors")
    report = loratool.verify(tmp_path / "fused.safetensors", made.base, made.adapter)
    assert report.answer, report.findings


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
    fused = {name: value.bfloat16() for name, value in made.fused.items()}
    save_file(fused, tmp_path / "fused.safetensors")
    report = loratool.verify(tmp_path / "fused.safetensors", made.base, made.adapter)
    assert report.answer
    assert {remark.word for remark in report.remarks} <= {"rounded-delta", "rounded-factors", "rounding"}


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


# --- what is written for it ---------------------------------------------------------------------

LAYERS = [f"model.layers.{n}." for n in range(2)]
LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEAR += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
TABLE = Target("model.embed_tokens.weight", (VOCAB, HIDDEN), layout="embedding")
Q, K = (Target(f"model.layers.{n}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)) for n in range(2))
DOWN = Target("model.layers.1.mlp.down_proj.weight", (HIDDEN, 24))
HEAD = Target("lm_head.weight", (VOCAB, HIDDEN))
STACK = Target("model.layers.1.block_sparse_moe.switch_mlp.up_proj.weight", (3, 24, HIDDEN))


def targeted(target: Target, seed: int, form: str = "lora", dtype: str = "F32", **options: Any) -> Targeted:
    return Targeted(target, make_update(form, target.region, Maker(seed, dtype, target.experts), **options))


def everywhere(form: str = "lora") -> list[Targeted]:
    sizes = dict(zip(LINEAR, [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)], strict=True))
    return [
        targeted(Target(f"{layer}{module}.weight", sizes[module]), n, form)
        for n, (layer, module) in enumerate((layer, module) for layer in LAYERS for module in LINEAR)
    ]


# kind, updates, num_layers and keys with the base (None: full names, as without it)
WRITTEN: dict[str, tuple[str, list[Targeted], tuple[int, list[str]] | None]] = {
    "all layers": ("llama", everywhere(), (2, sorted(LINEAR))),
    "all layers, dora": ("llama", everywhere("dora0-lora"), (2, sorted(LINEAR))),
    "the last layer": ("llama", [targeted(DOWN, 1)], (1, ["mlp.down_proj"])),
    "the first layer": ("llama", [targeted(Q, 1)], None),
    "other modules in each": ("llama", [targeted(Q, 1), targeted(DOWN, 2)], None),
    "other modules in each, dora": ("llama", [targeted(Q, 1, "dora0-lora"), targeted(DOWN, 2, "dora0-lora")], None),
    "beside the layers": (
        "llama",
        [targeted(TABLE, 1), targeted(HEAD, 2), targeted(Q, 3), targeted(K, 4)],
        (2, ["lm_head", "model.embed_tokens", "self_attn.q_proj"]),
    ),
    "only beside the layers": ("llama", [targeted(TABLE, 1), targeted(HEAD, 2)], None),
    "embedding, dora": ("llama", [targeted(TABLE, 1, "dora0-lora"), targeted(Q, 2, "dora0-lora")], None),
    "tied embedding": ("tied", [targeted(TABLE, 1)], None),
    "ranks and scales": (
        "llama",
        [
            targeted(Q, 1, rank=3, alpha=0.7),
            targeted(K, 2, rank=5, alpha=9.0),
            targeted(HEAD, 3, rule="none", alpha=-1.0),
        ],
        (2, ["lm_head", "self_attn.q_proj"]),
    ),
    "ranks and scales, dora": (
        "llama",
        [targeted(Q, 1, "dora0-lora", rank=3, alpha=0.7), targeted(K, 2, "dora0-lora", rank=5, alpha=9.0)],
        (2, ["self_attn.q_proj"]),
    ),
    "16 bits": ("llama", [targeted(DOWN, 1, dtype="BF16")], (1, ["mlp.down_proj"])),
    "64 bits": ("llama", [targeted(DOWN, 1, dtype="F64")], (1, ["mlp.down_proj"])),
    "rows, and two of one": (
        "llama",
        [targeted(replace(Q, rows=(3, 9)), 1, alpha=5.0), targeted(replace(Q, rows=(9, 16)), 2), targeted(Q, 3)],
        None,
    ),
    "stacked experts": (
        "mixtral",
        [targeted(replace(STACK, experts=3), 1), targeted(K, 2)],
        (1, ["block_sparse_moe.switch_mlp.up_proj", "self_attn.q_proj"]),
    ),
    "single experts": (
        "mixtral",
        [targeted(replace(STACK, expert=0), 1), targeted(replace(STACK, expert=2, rows=(5, 9)), 2, rank=3)],
        (1, ["block_sparse_moe.switch_mlp.up_proj"]),
    ),
    "a full fine-tune": (
        "mixtral",
        [targeted(Target("model.norm.weight", (HIDDEN,)), 1, "replace"), targeted(STACK, 2, "replace")],
        None,
    ),
}


def loaded(kind: str, weights: dict[str, Any], adapter: Path) -> Any:
    model = mlx_model(kind)
    model.load_weights([*weights.items()])
    load_adapters(model, str(adapter))
    return model


def fused(model: Any) -> State:
    done = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(done))
    return state(model)


def wrapped(model: Any) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "fuse")}


@pytest.mark.parametrize("with_base", [True, False], ids=["with its base", "alone"])
@pytest.mark.parametrize("case", WRITTEN)
def test_mlx_loads_what_was_written(case: str, with_base: bool, tmp_path: Path) -> None:
    kind, updates, keys = WRITTEN[case]
    mx.random.seed(3)
    before = weights(mlx_model(kind))
    base, out = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    mx.save_safetensors(str(base / "model.safetensors"), before, metadata={"format": "mlx"})
    adapter = Adapter(tuple(updates))
    loratool.convert(adapter, out, "mlx", base=base if with_base else None)
    loratool.merge(base, adapter, tmp_path / "merged")
    want = read(tmp_path / "merged")

    model = loaded(kind, before, out)
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    answer = np.array(model(tokens))
    full = {item.update.kind for item in updates} == {"replace"}
    assert wrapped(model) == (set() if full else {*adapter.targets()})  # and nothing else
    got = fused(model)
    assert changed(read(base), got) == {*adapter.targets()}
    for name, value in want.items():
        if case == "16 bits":  # mlx multiplies the factors in their own dtype
            assert (got[name] - value).abs().max() < 2.0**-6 * value.abs().max()
        else:
            assert_float32_close(got[name], value, name=name)
    merged = mlx_model(kind)
    merged.load_weights(str(tmp_path / "merged" / "model.safetensors"))
    plain = np.array(merged(tokens))
    assert np.abs(answer - plain).max() < (0.02 if case == "16 bits" else 1e-4) * np.abs(plain).max()

    config = json.loads((out / "adapter_config.json").read_text())
    if not full:
        modules = [name.removesuffix(".weight") for name in adapter.targets()]
        expected = keys if keys is not None and with_base else (-1, sorted(modules))
        assert (config["num_layers"], config["lora_parameters"]["keys"]) == expected


EXPERTS_OF_TRANSFORMERS: dict[str, tuple[Any, Any, tuple[str, ...], int]] = {
    # the model of transformers, the module of mlx-lm, what is trained, modules that are wrapped
    "mixtral": (
        mixtral, mlx_mixtral, ("experts.0.w1.weight", "experts.2.w2.weight", "q_proj.weight", "_moe.gate.weight"), 4,
    ),
    "qwen3-moe": (
        qwen3, mlx_qwen3_moe, ("experts.0.up_proj.weight", "experts.1.up_proj.weight", "1.mlp.gate.weight"), 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["lora", "loha"])
@pytest.mark.parametrize("kind", EXPERTS_OF_TRANSFORMERS)
def test_experts_of_transformers(kind: str, form: str, tmp_path: Path) -> None:
    """Trained on transformers' model, loaded by mlx-lm into the one that it makes of the same files; or baked."""
    make, module, trained_names, count = EXPERTS_OF_TRANSFORMERS[kind]
    torch.manual_seed(5)
    hf = save_base(make().eval(), tmp_path / "hf")
    items = []
    for seed, (name, value) in enumerate(read(hf).items()):
        if name.endswith(trained_names):
            items.append(targeted(Target(name, tuple(value.shape)), seed, form, alpha=1.0 + seed))
    assert len(items) == count + (kind == "qwen3-moe") * 2  # two experts of each of two layers are in one stack
    adapter = Adapter(tuple(items))
    loratool.convert(adapter, tmp_path / "adapter", "mlx", base=hf, bake=form == "loha")
    loratool.merge(hf, adapter, tmp_path / "merged")

    def made(folder: Path) -> Any:
        config = json.loads((folder / "config.json").read_text())
        model = module.Model(module.ModelArgs.from_dict({"rope_theta": 1e4, "num_experts": 4, **config}))
        model.load_weights([*model.sanitize(mx.load(str(folder / "model.safetensors"))).items()])
        return model

    model = made(hf)
    load_adapters(model, str(tmp_path / "adapter"))
    assert len(wrapped(model)) == (count if form == "lora" else 0)
    got, want = fused(model), state(made(tmp_path / "merged"))
    for name, value in want.items():
        assert_float32_close(got[name], value, name=name)
    assert len(changed(state(made(hf)), got)) == count


def test_the_families_are_those_that_are_claimed() -> None:
    made = {kind for kind, _, _ in WRITTEN.values()} - {"tied"} | {
        name.replace("-", "_") for name in EXPERTS_OF_TRANSFORMERS
    }
    assert made == {*CHECKED["mlx"].families}

"""diffusers: merging its adapters into its pipelines gives what its own `fuse_lora` gives, to float32 rounding."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.peers
diffusers = pytest.importorskip("diffusers")

from diffusers.loaders.single_file_utils import (  # noqa: E402
    convert_flux_transformer_checkpoint_to_diffusers as convert_flux,
)
from diffusers_cases import (  # noqa: E402
    FLUX_TARGETS,
    TEXT_TARGETS,
    UNET_TARGETS,
    below,
    flux,
    fused,
    load,
    middle,
    middle_text,
    oldest,
    oldest_text,
    quiet,
    stable_diffusion,
    states,
    trained,
    write,
)
from models import State  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import loratool  # noqa: E402

ATTENTION = ["to_q", "to_k", "to_out.0"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch)
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("pipelines")
        return {"sd": stable_diffusion(folder), "flux": flux(folder)}


def lora(targets: list[str], **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": targets, **options})


def assert_fused(base: Path, adapter: Path, out: Path, truth: dict[str, State] | None = None) -> None:
    """Every component of the merged pipeline is what diffusers makes of it, and every target did change."""
    truth = fused(load(base), adapter) if truth is None else truth
    loratool.merge(base, adapter, out)
    merged, before = states(load(out)), states(load(base))
    assert truth.keys() == merged.keys() == before.keys()
    count = 0
    for component, state in truth.items():
        assert state.keys() == merged[component].keys()
        for name, wanted in state.items():
            found = merged[component][name]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=f"{component}.{name}")
            count += not torch.equal(found, before[component][name])
    assert count == len(loratool.load(adapter).updates) > 0


def both(base: Path, unet: LoraConfig, text: LoraConfig) -> tuple[State, State]:
    pipeline = load(base)
    return trained(pipeline.unet, unet), trained(pipeline.text_encoder, text)


@pytest.mark.parametrize("rslora", [False, True])
def test_current_with_metadata(pipelines: dict[str, Path], tmp_path: Path, rslora: bool) -> None:
    """The config in the header decides: alpha, patterns, rsLoRA, each component its own."""
    patterns = {"rank_pattern": {"to_q": 2, "conv1": 3}, "alpha_pattern": {"to_out.0": 12, "proj_in": 1}}
    configs = {
        "unet": lora(UNET_TARGETS, lora_alpha=8, use_rslora=rslora, **patterns),
        "text_encoder": lora(TEXT_TARGETS, lora_alpha=2),
    }
    unet, text = both(pipelines["sd"], *configs.values())
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "a", unet_lora_layers=unet, text_encoder_lora_layers=text,
        **{f"{name}_lora_adapter_metadata": config.to_dict() for name, config in configs.items()},
    )  # fmt: skip
    assert_fused(pipelines["sd"], tmp_path / "a", tmp_path / "out")
    layers = {layer.target: layer for layer in loratool.inspect(tmp_path / "a").layers}
    assert layers["unet.mid_block.resnets.0.conv1.weight"].rank == 3
    root = 4**0.5 if rslora else 4
    assert layers["text_encoder.encoder.layers.0.mlp.fc1.weight"].scale == 0.5
    out_projection = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"
    assert layers[out_projection].scale == pytest.approx(12 / root)


@pytest.mark.parametrize("ranks", [({}, {}), ({"to_q": 2, "conv1": 6}, {"fc1": 3})], ids=["one", "many"])
def test_nothing_stored_means_scale_1(
    pipelines: dict[str, Path], tmp_path: Path, ranks: tuple[dict[str, int], dict[str, int]]
) -> None:
    configs = [
        lora(targets, rank_pattern=own) for targets, own in zip((UNET_TARGETS, TEXT_TARGETS), ranks, strict=True)
    ]
    unet, text = both(pipelines["sd"], *configs)
    adapter = write(tmp_path / "a", below("unet", unet) | below("text_encoder", text))
    assert_fused(pipelines["sd"], adapter, tmp_path / "out")
    assert {layer.scale for layer in loratool.inspect(adapter).layers} == {1.0}


@pytest.mark.parametrize("names", [(middle, middle_text), (oldest, oldest_text), (oldest, middle_text)])
def test_older_names(
    pipelines: dict[str, Path], tmp_path: Path, names: tuple[Callable[[str], str], Callable[[str], str]]
) -> None:
    unet, text = both(pipelines["sd"], lora(ATTENTION), lora(["q_proj", "out_proj"]))
    state = below("unet", unet, names[0]) | below("text_encoder", text, names[1])
    assert_fused(pipelines["sd"], write(tmp_path / "a", state), tmp_path / "out")


def test_mixed_generations(pipelines: dict[str, Path], tmp_path: Path) -> None:
    """What `convert_state_dict_to_diffusers` leaves: attention in the older names, everything else in PEFT's.

    diffusers' own loader looks at the first name only and then ignores the others, so the truth is the adapter before
    its names were mixed.
    """
    from diffusers.utils import convert_state_dict_to_diffusers

    unet, text = both(pipelines["sd"], lora(UNET_TARGETS), lora(TEXT_TARGETS))
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "a",
        unet_lora_layers=convert_state_dict_to_diffusers(unet),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(text),
    )
    names = loratool.checkpoint.open_checkpoint(tmp_path / "a").tensors
    assert any(".lora.down." in name for name in names)
    assert any(name.startswith("unet.") and ".lora_A." in name for name in names)
    truth = fused(load(pipelines["sd"]), below("unet", unet) | below("text_encoder", text))
    assert_fused(pipelines["sd"], tmp_path / "a", tmp_path / "out", truth)
    assert "unet has names of two generations" in str(loratool.inspect(tmp_path / "a").notes)


@pytest.mark.parametrize("stored", [False, True])
def test_dora_and_bias(pipelines: dict[str, Path], tmp_path: Path, stored: bool) -> None:
    """Linear and convolution magnitudes in the UNet, biases of B in the text encoder; told by tensors or a config."""
    configs = {
        "unet": lora(UNET_TARGETS, use_dora=True, lora_alpha=6 if stored else 4),
        "text_encoder": lora(TEXT_TARGETS, lora_bias=True, lora_alpha=6 if stored else 4),
    }
    unet, text = both(pipelines["sd"], *configs.values())
    assert any(tensor.dim() == 4 for name, tensor in unet.items() if "magnitude" in name)
    config = {f"{c}.{k}": v for c, one in configs.items() for k, v in one.to_dict().items()}
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    adapter = write(tmp_path / "a", below("unet", unet) | below("text_encoder", text), config if stored else None)
    assert_fused(pipelines["sd"], adapter, tmp_path / "out")
    kinds = [layer.kind for layer in loratool.inspect(adapter).layers]
    assert set(kinds) == {"dora", "lora", "add"}


def test_text_model_prefix(pipelines: dict[str, Path], tmp_path: Path) -> None:
    """Adapters of older transformers have `text_model.`, which newer text encoders lack."""
    _, text = both(pipelines["sd"], lora(["to_q"]), lora(TEXT_TARGETS))
    adapter = write(tmp_path / "a", below("text_encoder.text_model", text))
    assert_fused(pipelines["sd"], adapter, tmp_path / "out")


def test_one_model(pipelines: dict[str, Path], tmp_path: Path) -> None:
    """`save_lora_adapter` writes no component; it fits the model alone, and the pipeline."""
    unet = load(pipelines["sd"]).unet
    trained(unet, lora(UNET_TARGETS, lora_alpha=10))
    unet.save_lora_adapter(tmp_path / "a")
    truth = load(pipelines["sd"]).unet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth.load_lora_adapter(tmp_path / "a", prefix=None, use_safetensors=True)
    x, time, words = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted, before = truth(x, time, words).sample, load(pipelines["sd"]).unet(x, time, words).sample
    loratool.merge(pipelines["sd"] / "unet", tmp_path / "a", tmp_path / "unet")
    alone = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    loratool.merge(pipelines["sd"], tmp_path / "a", tmp_path / "whole")
    for merged in (alone, load(tmp_path / "whole").unet):
        with torch.no_grad():
            found = merged(x, time, words).sample
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, before, atol=1e-2)


def test_weight(pipelines: dict[str, Path], tmp_path: Path) -> None:
    unet, text = both(pipelines["sd"], lora(UNET_TARGETS), lora(TEXT_TARGETS))
    adapter = write(tmp_path / "a", below("unet", unet) | below("text_encoder", text))
    truth = fused(load(pipelines["sd"]), adapter, scale=0.25)
    loratool.merge(pipelines["sd"], [(adapter, 0.25)], tmp_path / "out")
    for component, state in states(load(tmp_path / "out")).items():
        for name, found in state.items():
            torch.testing.assert_close(found, truth[component][name], rtol=1e-5, atol=1e-6)


# --- Flux: alpha tensors, shards -------------------------------------------------------------------------------------


def flux_adapter(base: Path, folder: Path, alphas: Callable[[int], float] | None, norms: bool = False) -> Path:
    pipeline = load(base)
    layers = trained(pipeline.transformer, lora(FLUX_TARGETS))
    state = below("transformer", layers) | below("text_encoder", trained(pipeline.text_encoder, lora(TEXT_TARGETS)))
    if alphas is not None:
        modules = sorted(name.removesuffix(".lora_A.weight") for name in layers if name.endswith(".lora_A.weight"))
        state |= {f"transformer.{m}.alpha": torch.tensor(alphas(n)) for n, m in enumerate(modules)}
    if norms:
        name = "transformer_blocks.0.attn.norm_added_k.weight"
        state[f"transformer.{name}"] = torch.rand(16)
    return write(folder, state)


@pytest.mark.parametrize("alphas", [None, lambda n: 2.0, lambda n: 1.0 + n], ids=["none", "one", "many"])
def test_flux(pipelines: dict[str, Path], tmp_path: Path, alphas: Callable[[int], float] | None) -> None:
    base = pipelines["flux"]
    adapter = flux_adapter(base, tmp_path / "a", alphas)
    assert_fused(base, adapter, tmp_path / "out")
    assert (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors.index.json").read_bytes() == (
        base / "transformer/diffusion_pytorch_model.safetensors.index.json"
    ).read_bytes()
    scales = [layer.scale for layer in loratool.inspect(adapter).layers if layer.target.startswith("transformer.")]
    assert sorted(set(scales)) == sorted({(alphas or (lambda n: 4.0))(n) / 4 for n in range(len(scales))})


def test_some_alphas(pipelines: dict[str, Path], tmp_path: Path) -> None:
    """A module without alpha among those with one alpha gets theirs; among those with several, diffusers takes any."""
    base = pipelines["flux"]
    state = load_file(flux_adapter(base, tmp_path / "a", lambda n: 2.0) / "pytorch_lora_weights.safetensors")
    first, second, *_ = (name for name in state if name.endswith(".alpha"))
    del state[first]
    assert_fused(base, write(tmp_path / "one", state), tmp_path / "out")
    state[second] += 1
    with pytest.raises(loratool.LoratoolError, match="alpha") as caught:
        loratool.merge(base, write(tmp_path / "two", state), tmp_path / "out2")
    assert caught.value.code == "E-ALPHA"
    answered = loratool.load(tmp_path / "two", alpha=2, scaling="alpha/rank")
    assert not answered.unknown_scales()


def test_alpha_twice(pipelines: dict[str, Path], tmp_path: Path) -> None:
    base = pipelines["flux"]
    state = load_file(flux_adapter(base, tmp_path / "a", lambda n: 2.0) / "pytorch_lora_weights.safetensors")
    adapter = write(tmp_path / "both", state, {"transformer.r": 4, "transformer.lora_alpha": 2})
    with pytest.raises(ValueError, match="network_alphas"):
        load(base).load_lora_weights(adapter)
    with pytest.raises(loratool.LoratoolError, match="alpha is stored twice"):
        loratool.merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("other", ["unet", "text_encoder"])
def test_config_of_another_component(pipelines: dict[str, Path], tmp_path: Path, other: str) -> None:
    """diffusers fails on a component that the config says nothing about, so its scale is asked for."""
    unet, text = both(pipelines["sd"], lora(ATTENTION), lora(["q_proj"]))
    config = {f"{other}.r": 4, f"{other}.lora_alpha": 2, f"{other}.target_modules": [*ATTENTION, "q_proj"]}
    adapter = write(tmp_path / "a", below("unet", unet) | below("text_encoder", text), config)
    with pytest.raises((ValueError, KeyError), match=r"target_modules|model_type"):
        fused(load(pipelines["sd"]), adapter)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(pipelines["sd"], adapter, tmp_path / "out")
    assert caught.value.code == "E-ALPHA"


def test_flux_norms(pipelines: dict[str, Path], tmp_path: Path) -> None:
    """Control adapters replace norms. diffusers keeps them only while the adapter is loaded, so the truth is then."""
    base = pipelines["flux"]
    adapter = flux_adapter(base, tmp_path / "a", None, norms=True)
    pipeline = load(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(adapter)
    wanted = copy.deepcopy(pipeline.transformer.transformer_blocks[0].attn.norm_added_k.weight)
    assert not torch.equal(wanted, load(base).transformer.transformer_blocks[0].attn.norm_added_k.weight)
    loratool.merge(base, adapter, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out").transformer.transformer_blocks[0].attn.norm_added_k.weight, wanted)


def test_dtype_gives_a_right_index(pipelines: dict[str, Path], tmp_path: Path) -> None:
    adapter = flux_adapter(pipelines["flux"], tmp_path / "a", None)
    loratool.merge(pipelines["flux"], adapter, tmp_path / "out", dtype="bf16")
    folder = tmp_path / "out/transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    state = loaded.state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in state.values())


def test_undo(pipelines: dict[str, Path], tmp_path: Path) -> None:
    """A merged pipeline goes back, bit for bit, with the base and with the record."""
    base = pipelines["flux"]
    adapter = flux_adapter(base, tmp_path / "a", lambda n: 1.0 + n)
    loratool.merge(base, adapter, tmp_path / "out", undo=tmp_path / "undo.safetensors")
    for number, how in enumerate(({"base": base}, {"undo": tmp_path / "undo.safetensors"})):
        report = loratool.unmerge(tmp_path / "out", adapter, tmp_path / f"back{number}", **how)
        assert report.exact
        for path in base.rglob("*"):
            if path.is_file():
                other = tmp_path / f"back{number}" / path.relative_to(base)
                assert other.read_bytes() == path.read_bytes(), path


# --- Flux's original names, and XLabs' -------------------------------------------------------------------------------


class Original(State):
    """A checkpoint of Flux in its original names; it makes up every tensor that diffusers' conversion takes out of it.

    As many outputs as in the real model where the conversion splits them, and four inputs.
    """

    def __init__(self, tensors: State) -> None:
        super().__init__(tensors)
        self.taken: State = {}
        # By these names the conversion knows how many blocks there are, and that there is guidance.
        self.update(dict.fromkeys(("double_blocks.0.", "single_blocks.0.", "guidance_in."), torch.zeros(1)))

    def pop(self, name: str, *_: Any) -> torch.Tensor:  # type: ignore[override]
        module, _, last = name.rpartition(".")
        rows = {"qkv": 9216, "linear1": 21504}.get(module.rpartition(".")[2], 8)
        made = torch.randn(rows, 4) if last == "weight" else torch.randn(rows)
        self.taken[name] = self.get(name, made)
        return self.taken[name]

    def converted(self) -> State:
        return {name: tensor.clone() for name, tensor in convert_flux(self).items()}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("before", ["", "transformer."])
def test_original_names(tmp_path: Path, prefix: str, before: str) -> None:
    """Merged into the original and converted by diffusers, an adapter gives what it gives merged into the converted."""
    torch.manual_seed(0)
    original = Original({})
    base = original.converted()
    weights, state = dict(original.taken), {}
    for name, weight in original.taken.items():
        module, _, last = name.rpartition(".")
        if last == "weight":
            A, B = torch.randn(2, 4), torch.randn(len(weight), 2)
            state |= {f"{prefix}{module}.lora_A.weight": A, f"{prefix}{module}.lora_B.weight": B}
            weights[name] = weight + B @ A
        elif last == "scale":
            weights[name] = state[f"{prefix}{name}"] = torch.randn(len(weight))
        elif f"{prefix}{module}.lora_B.weight" in state:
            bias = state[f"{prefix}{module}.lora_B.bias"] = torch.randn(len(weight))
            weights[name] = weight + bias
    truth = Original(weights).converted()
    save_file({f"{before}{k}": v for k, v in base.items()}, tmp_path / "base.safetensors")
    save_file(state, tmp_path / "a.safetensors")
    report = loratool.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, wanted in truth.items():
        torch.testing.assert_close(merged[f"{before}{name}"], wanted, rtol=1e-5, atol=1e-5, msg=name)
    assert len(report.receipt.tensors) == len(base)


@pytest.mark.parametrize("before", ["", "transformer."])
def test_kohya_names_of_the_original(tmp_path: Path, before: str) -> None:
    """The same of sd-scripts' files: every module of the original, flattened, onto diffusers' model."""
    torch.manual_seed(0)
    original = Original({})
    base = original.converted()
    weights, state = dict(original.taken), {}
    for name, weight in original.taken.items():
        module, _, last = name.rpartition(".")
        if last == "weight":
            down, up = torch.randn(2, 4), torch.randn(len(weight), 2)
            flat = f"lora_unet_{module.replace('.', '_')}"
            state |= {
                f"{flat}.lora_down.weight": down,
                f"{flat}.lora_up.weight": up,
                f"{flat}.alpha": torch.tensor(1.0),
            }
            weights[name] = weight + 0.5 * up @ down
    truth = Original(weights).converted()
    save_file({f"{before}{k}": v for k, v in base.items()}, tmp_path / "base.safetensors")
    save_file(state, tmp_path / "a.safetensors")
    report = loratool.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, wanted in truth.items():
        torch.testing.assert_close(merged[f"{before}{name}"], wanted, rtol=1e-5, atol=1e-5, msg=name)
    assert len(report.receipt.tensors) == sum(
        name.endswith(".weight") and tensor.dim() == 2 for name, tensor in base.items()
    )


def test_xlabs(pipelines: dict[str, Path], tmp_path: Path) -> None:
    state: State = {}
    for block, into, out in (
        ("double_blocks.0.processor.qkv_lora1", 32, 96), ("double_blocks.0.processor.qkv_lora2", 32, 96),
        ("double_blocks.0.processor.proj_lora1", 32, 32), ("double_blocks.0.processor.proj_lora2", 32, 32),
        ("single_blocks.0.processor.qkv_lora", 32, 96), ("single_blocks.0.processor.proj_lora", 160, 32),
    ):  # fmt: skip
        state |= {f"{block}.down.weight": torch.randn(3, into), f"{block}.up.weight": torch.randn(out, 3)}
    base, adapter = pipelines["flux"], write(tmp_path / "a", state)
    truth = fused(load(base), adapter)
    loratool.merge(base, adapter, tmp_path / "out")
    merged, before = states(load(tmp_path / "out"))["transformer"], states(load(base))["transformer"]
    for name, wanted in truth["transformer"].items():
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-5, msg=name)
    assert sum(not torch.equal(merged[name], before[name]) for name in merged) == 6 + 2 + 3 + 1
    assert "which tensors of the base" in str(loratool.inspect(adapter).notes)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(96, 32)}, tmp_path / "original.safetensors")
    with pytest.raises(loratool.LoratoolError, match="diffusers' Flux only"):
        loratool.merge(tmp_path / "original.safetensors", adapter, tmp_path / "out2.safetensors")
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(5, 32)}, tmp_path / "other.safetensors")
    with pytest.raises(loratool.LoratoolError, match="has 96 outputs"):
        loratool.merge(tmp_path / "other.safetensors", adapter, tmp_path / "out2.safetensors")

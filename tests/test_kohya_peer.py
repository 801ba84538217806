"""diffusers reads kohya's files, too: what its own loader makes of one is the truth for a UNet in either spelling.

And of those that `convert --to kohya` writes: fused, they are what a merge of the original adapter is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import State, assert_float32_close, changed
from safetensors.torch import load_file, save_file
from strategies import Maker, make_update
from torch import nn

import loratool
from loratool import Adapter, Target, Targeted
from loratool.conventions import spellings

pytestmark = pytest.mark.peers
diffusers = pytest.importorskip("diffusers")

from diffusers_cases import flux, fused, load, quiet, stable_diffusion, states  # noqa: E402

PLACE = "model.diffusion_model."
COMMON: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 2
}  # fmt: skip
XL: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16,
}
LOADERS = {"sd": "StableDiffusionLoraLoaderMixin", "sdxl": "StableDiffusionXLLoraLoaderMixin"}


def unet(model: str) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        **COMMON, **(XL if model == "sdxl" else {"block_out_channels": (8, 8, 16, 16)})
    )


def original(state: State) -> State:
    """A UNet's tensors by the names of the original repositories, as single-file checkpoints have them."""
    found = {}
    for name, value in state.items():
        path, _, last = name.rpartition(".")
        others = [other.path for other in spellings.others(path)] or [path]
        behind = len(others) > 1 and any(
            key.startswith(f"{path.partition('.upsamplers')[0]}.attentions") for key in state
        )
        found[f"{PLACE}{others[behind]}.{last}"] = value
    return found


def back(state: State, model: nn.Module) -> State:
    """The same by diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return dict(convert_ldm_unet_checkpoint(dict(state), dict(model.config)))


def kohya(state: State, *, prefix: str = "") -> State:
    """Factors for attentions, projections and residual blocks, as sd-scripts (with conv_dim) saves them."""
    generator = torch.Generator().manual_seed(1)
    found: State = {}
    for name, W in state.items():
        path = name.removesuffix(".weight").removeprefix(prefix)
        if W.dim() < 2 or not any(part in path for part in ("attn", "proj_", "ff.", "conv1", "in_layers.2")):
            continue
        key, rank = f"lora_unet_{path.replace('.', '_')}", 3 if W.dim() == 2 else 2
        found[f"{key}.lora_down.weight"] = torch.randn(rank, *W.shape[1:], generator=generator)
        found[f"{key}.lora_up.weight"] = torch.randn(len(W), rank, *[1] * (W.dim() - 2), generator=generator)
        found[f"{key}.alpha"] = torch.tensor(0.5 * rank if W.dim() == 2 else 1.0)
    return found


@pytest.mark.parametrize("model", LOADERS)
def test_both_spellings_of_a_unet_are_those_of_diffusers(model: str) -> None:
    network = unet(model)
    state = network.state_dict()
    converted = back(original(state), network)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], value) for name, value in state.items())


@pytest.mark.parametrize("stored", ["diffusers", "original"])
@pytest.mark.parametrize("model", LOADERS)
def test_a_merge_is_what_diffusers_fuses(model: str, stored: str, tmp_path: Path) -> None:
    """SD 1 adapters have diffusers' names, SDXL ones the original; the base may have either."""
    network = unet(model)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    lora = kohya(original(state), prefix=PLACE) if model == "sdxl" else kohya(state)
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(state if stored == "diffusers" else original(state), tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    got = got if stored == "diffusers" else back(got, network)

    loader = getattr(diffusers.loaders, LOADERS[model])
    converted, alphas = loader.lora_state_dict(dict(lora), unet_config=network.config)[:2]
    loader.load_lora_into_unet(converted, network_alphas=alphas, unet=network)
    network.fuse_lora()
    fused = {n.replace(".base_layer", ""): v for n, v in network.state_dict().items() if ".lora_" not in n}
    assert got.keys() == fused.keys()
    assert changed(state, fused) == changed(state, got)
    assert len(changed(state, got)) == len(lora) // 3
    for name, value in fused.items():
        assert_float32_close(got[name], value, name=name)


def test_flux_as_diffusers_converts_it(tmp_path: Path) -> None:
    """Its converter folds alpha / rank into the factors and cuts the packed projections: the same deltas, stacked."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    generator = torch.Generator().manual_seed(1)
    dims = {"double_blocks.0.img_attn.qkv": (9216, 4), "single_blocks.0.linear1": (21504, 4),
            "double_blocks.0.txt_mlp.2": (5, 7)}  # fmt: skip
    base = {f"{path}.weight": torch.randn(shape, generator=generator) for path, shape in dims.items()}
    lora: State = {}
    for path, (out, into) in dims.items():
        key = f"lora_unet_{path.replace('.', '_')}"
        lora[f"{key}.lora_down.weight"] = torch.randn(2, into, generator=generator)
        lora[f"{key}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        lora[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(base, tmp_path / "base.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")

    theirs = _convert_kohya_flux_lora_to_diffusers(dict(lora))
    double, single = "transformer.transformer_blocks.0.", "transformer.single_transformer_blocks.0."
    parts = {
        "double_blocks.0.img_attn.qkv": [f"{double}attn.to_{name}" for name in "qkv"],
        "single_blocks.0.linear1": [*(f"{single}attn.to_{name}" for name in "qkv"), f"{single}proj_mlp"],
        "double_blocks.0.txt_mlp.2": [f"{double}ff_context.net.2"],
    }
    for path, names in parts.items():
        deltas = [theirs[f"{n}.lora_B.weight"].double() @ theirs[f"{n}.lora_A.weight"].double() for n in names]
        want = base[f"{path}.weight"].double() + torch.cat(deltas)
        assert_float32_close(got[f"{path}.weight"], want, name=path)


def test_openclip_as_diffusers_converts_it(tmp_path: Path) -> None:
    """SDXL's second text encoder lies in single files under OpenCLIP's names, query, key and value in one tensor."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=8, max_position_embeddings=6, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    place, generator = "conditioner.embedders.1.model.", torch.Generator().manual_seed(2)
    base, lora = {f"{place}text_projection": torch.randn(8, 8, generator=generator)}, {}
    for layer in range(2):
        block = f"{place}transformer.resblocks.{layer}."
        for name, shape in {"attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,), "attn.out_proj.weight": (8, 8),
                            "attn.out_proj.bias": (8,), "mlp.c_fc.weight": (12, 8), "mlp.c_fc.bias": (12,),
                            "mlp.c_proj.weight": (8, 12), "mlp.c_proj.bias": (8,), "ln_1.weight": (8,),
                            "ln_1.bias": (8,), "ln_2.weight": (8,), "ln_2.bias": (8,)}.items():  # fmt: skip
            base[block + name] = torch.randn(shape, generator=generator)
        for name, (out, into) in {**{f"self_attn.{n}_proj": (8, 8) for n in ("q", "k", "v", "out")},
                                  "mlp.fc1": (12, 8), "mlp.fc2": (8, 12)}.items():  # fmt: skip
            key = f"lora_te2_text_model_encoder_layers_{layer}_{name.replace('.', '_')}"
            lora[f"{key}.lora_down.weight"] = torch.randn(2, into, generator=generator)
            lora[f"{key}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
            lora[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(base, tmp_path / "base.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    got, encoder = load_file(tmp_path / "out.safetensors"), CLIPTextModelWithProjection(config)
    assert len(changed(base, got)) == 8
    before, after = (convert_open_clip_checkpoint(encoder, dict(state), prefix=place) for state in (base, got))
    modules = {name.removesuffix(".weight"): value for name, value in before.items() if name.endswith(".weight")}
    found = 0
    for key in {name.partition(".")[0] for name in lora}:
        (path,) = [p for p in modules if p.replace(".", "_").endswith(key.removeprefix("lora_te2_text_model_"))]
        up, down = (lora[f"{key}.lora_{side}.weight"].double() for side in ("up", "down"))
        assert_float32_close(after[f"{path}.weight"], modules[path].double() + 0.5 * up @ down, name=path)
        found += 1
    assert found == 12


# -- what convert writes ----------------------------------------------------------------------------------------------


def random_adapter(state: State, parts: tuple[str, ...]) -> Adapter:
    """LoRAs of many ranks, scales and rules; some with a core, of a range of rows, or two on one tensor."""
    items = []
    names = [name for name, W in state.items() if name.endswith(".weight") and any(part in name for part in parts)]
    for number, name in enumerate(names):
        shape, make = tuple(state[name].shape), Maker(number)
        rule, alpha = (("alpha/rank", 3.0), ("none", 0.3), ("alpha/sqrt(rank)", -1.5))[number % 3]
        target = Target(name, shape, (1, shape[0] // 2) if number % 5 == 1 else None)
        form = "lora-mid" if len(shape) == 4 and number % 2 else "lora"
        items.append(Targeted(target, make_update(form, target.region, make, number % 4 + 1, rule, alpha)))
        if number % 4 == 0:
            items.append(Targeted(Target(name, shape), make_update("lora", shape, make, 2, "alpha", 0.7)))
    assert len({item.target.name for item in items}) == len(names) > 0
    return Adapter(tuple(items))


@pytest.mark.parametrize("stored", ["diffusers", "original"])
@pytest.mark.parametrize("model", LOADERS)
def test_diffusers_fuses_what_was_written_for_a_unet(model: str, stored: str, tmp_path: Path) -> None:
    network = unet(model)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    base, out, file = (tmp_path / f"{name}.safetensors" for name in ("base", "out", "kohya"))
    save_file(state if stored == "diffusers" else original(state), base)
    made = random_adapter(load_file(base), ("attn", "proj_", "ff.", "conv1", "in_layers.2", "time_emb_proj", "op."))
    component = "unet" if stored == "diffusers" else ""
    report = loratool.convert(made, file, "kohya", base=base, as_component=component, uniform=True)
    assert not any("see --uniform" in note for note in report.notes)
    spelled = "lora_unet_input_blocks" if (model, stored) == ("sdxl", "original") else "lora_unet_down_blocks"
    assert any(key.startswith(spelled) for key in load_file(file))
    loratool.merge(base, made, out)
    want = load_file(out)
    want = want if stored == "diffusers" else back(want, network)

    loader = getattr(diffusers.loaders, LOADERS[model])
    converted, alphas = loader.lora_state_dict(load_file(file), unet_config=network.config)[:2]
    loader.load_lora_into_unet(converted, network_alphas=alphas, unet=network)
    network.fuse_lora()
    got = {n.replace(".base_layer", ""): v for n, v in network.state_dict().items() if ".lora_" not in n}
    assert changed(state, got) == changed(state, want)
    assert len(changed(state, got)) == len(made.targets())
    for name, value in want.items():
        assert_float32_close(got[name], value, name=name)


PIPELINES: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "sd": (stable_diffusion, ("unet.", "text_encoder."),
           ("to_q", "to_k", "to_out", "conv1", "proj_in", "ff.net.0", "time_emb_proj", "q_proj", "out_proj", "fc1")),
    # diffusers cuts a single block's attention by the sizes of the real Flux: see below.
    "flux": (flux, ("transformer.", "text_encoder."),
             ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k",
              "attn.to_out.0", "out_proj", "attn.add_k_proj", "ff.net", "ff_context.net.2", "norm1.linear",
              "norm1_context.linear", "transformer_blocks.0.proj_out", "transformer_blocks.0.norm.linear", "v_proj")),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_fuses_what_was_written_for_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    torch.manual_seed(0)
    make, components, parts = PIPELINES[name]
    base = make(tmp_path)
    pipeline = states(load(base))
    state = {f"{component[:-1]}.{key}": value for component in components
             for key, value in pipeline[component[:-1]].items()}  # fmt: skip
    made = random_adapter(state, parts)
    report = loratool.convert(made, tmp_path / "kohya.safetensors", "kohya", base=base, uniform=name == "sd")
    assert len(report.notes) >= len(components)
    loratool.merge(base, made, tmp_path / "merged")
    want, got = states(load(tmp_path / "merged")), fused(load(base), tmp_path / "kohya.safetensors")
    count = 0
    for component, tensors in want.items():
        for key, value in tensors.items():
            if value.is_floating_point():
                assert_float32_close(got[component][key], value, name=f"{component}.{key}")
            count += not torch.equal(value, pipeline[component][key])
    assert count == len(made.targets())


def test_diffusers_takes_one_alpha_for_the_attention_of_a_unet(tmp_path: Path) -> None:
    """Why `--uniform` is told of: alphas that differ are lost on the way through its names of attention processors."""
    network = unet("sd")
    save_file(network.state_dict(), tmp_path / "base.safetensors")
    made = random_adapter(network.state_dict(), ("attn1.to_q",))
    file = tmp_path / "kohya.safetensors"
    report = loratool.convert(made, file, "kohya", base=tmp_path / "base.safetensors", as_component="unet")
    assert any("see --uniform" in note for note in report.notes)
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    converted, alphas = loader.lora_state_dict(load_file(file), unet_config=network.config)[:2]
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):
        loader.load_lora_into_unet(converted, network_alphas=alphas, unet=network)


FLUX_SIZE = 3072
SINGLE = "single_transformer_blocks.37."
JOINED = {
    "all": {"attn.to_q": 2, "attn.to_k": 2, "attn.to_v": 2, "proj_mlp": 2},
    "of different ranks": {"attn.to_q": 1, "attn.to_v": 3, "proj_mlp": 2},
    "one alone": {"attn.to_v": 4},
    "the mlp alone": {"proj_mlp": 3},
}


@pytest.mark.parametrize("case", JOINED)
def test_a_single_block_of_flux_arrives_in_diffusers(case: str, tmp_path: Path) -> None:
    """Its factors are one module's in kohya's file, which diffusers cuts again by the sizes of the real Flux."""
    items, generator = [], torch.Generator().manual_seed(5)
    for number, (name, rank) in enumerate(JOINED[case].items()):
        shape = (FLUX_SIZE * (4 if name == "proj_mlp" else 1), FLUX_SIZE)
        update = make_update("lora", shape, Maker(number), rank, "none", (0.5, -2.0, 1.0, 0.3)[number])
        items.append(Targeted(Target(f"transformer.{SINGLE}{name}.weight", shape), update))
    report = loratool.convert(Adapter(tuple(items)), tmp_path / "kohya.safetensors", "kohya")
    assert any("told by its names alone" in note for note in report.notes)
    assert {key.split(".")[0] for key in load_file(tmp_path / "kohya.safetensors")} == {
        "lora_unet_single_blocks_37_linear1"
    }
    read = diffusers.loaders.lora_pipeline.FluxLoraLoaderMixin.lora_state_dict(tmp_path / "kohya.safetensors")
    x = torch.randn(FLUX_SIZE, 3, generator=generator).double()  # [in, 3]
    want = {item.target.name: item.update for item in items}
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        key = f"transformer.{SINGLE}{name}"
        got = read[f"{key}.lora_B.weight"].double() @ (read[f"{key}.lora_A.weight"].double() @ x)  # [out, 3]
        update = want.get(f"{key}.weight")
        if update is None:
            assert not got.any()
            continue
        A, B = (update.components()[part].read().double() for part in ("A", "B"))  # [rank, in], [out, rank]
        torch.testing.assert_close(got, update.scaling.factor * (B @ (A @ x)), rtol=1e-5, atol=1e-4)


def test_what_diffusers_leaves_out_of_a_file_for_flux_is_told(tmp_path: Path) -> None:
    updates = {"x_embedder": (6, 4), "norm_out.linear": (8, 4), f"{SINGLE}proj_out": (4, 8)}
    made = Adapter(tuple(
        Targeted(Target(f"transformer.{name}.weight", shape), make_update("lora", shape, Maker(1)))
        for name, shape in updates.items()
    ))  # fmt: skip
    report = loratool.convert(made, tmp_path / "kohya.safetensors", "kohya")
    assert any(
        "diffusers leaves lora_unet_x" in note or "diffusers leaves lora_unet_img_in" in note for note in report.notes
    )
    read = diffusers.loaders.lora_pipeline.FluxLoraLoaderMixin.lora_state_dict(tmp_path / "kohya.safetensors")
    assert {key for key in read if key.startswith("transformer.")} == {
        f"transformer.{SINGLE}proj_out.lora_{side}.weight" for side in "AB"
    }


@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["q_proj", "fc1"], ["q_proj", "out_proj"], ["fc1"]])
def test_what_diffusers_does_not_find_of_a_text_encoder_is_told(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(monkeypatch)
    torch.manual_seed(0)
    base = stable_diffusion(tmp_path)
    state = {f"text_encoder.{name}": value for name, value in states(load(base))["text_encoder"].items()}
    made = random_adapter(state, tuple(names))
    report = loratool.convert(made, tmp_path / "kohya.safetensors", "kohya", base=base, uniform=True)
    loratool.merge(base, made, tmp_path / "merged")
    want = states(load(tmp_path / "merged"))["text_encoder"]
    try:
        got = fused(load(base), tmp_path / "kohya.safetensors")["text_encoder"]
        arrives = all(torch.allclose(got[name], value, atol=1e-5) for name, value in want.items())
    except ValueError:
        arrives = False
    assert arrives != any("only where out_proj is in it" in note for note in report.notes)

"""Parts of adapters that trainers write beside plain factors: each against its formula, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Cli
from models import State, assert_rounded, changed
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.conventions import two_layouts, unknown_keys
from loratool.conventions.widened import LAYOUTS, _table

OUT, IN, RANK = 6, 4, 2
X = "blocks.0.attn.q"


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def factors(key: str, out: int = OUT, into: int = IN, names: str = "lora_down lora_up") -> State:
    down, up = names.split()
    return {f"{key}.{down}.weight": values(RANK, into), f"{key}.{up}.weight": values(out, RANK, seed=1)}


def product(lora: State, key: str, names: str = "lora_down lora_up") -> Tensor:
    down, up = (lora[f"{key}.{name}.weight"].double() for name in names.split())
    return up @ down  # [out, in]


def merged(base: State, lora: State, folder: Path, **options: object) -> State:
    save_file(base, folder / "base.safetensors")
    save_file(lora, folder / "lora.safetensors")
    loratool.merge(
        folder / "base.safetensors",
        folder / "lora.safetensors",
        folder / "out.safetensors",
        **options,  # type: ignore[arg-type]
    )
    return load_file(folder / "out.safetensors")


def refusal(base: State, lora: State, folder: Path, **options: object) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        merged(base, lora, folder, **options)
    assert not (folder / "out.safetensors").exists()
    return caught.value


# --- parameters and whole weights ---


@pytest.mark.parametrize("key", ["diffusion_model.blocks.0.diff_m", "diffusion_model.blocks.0.modulation.diff"])
@pytest.mark.parametrize("place", ["", "model.diffusion_model."])
def test_a_parameter_that_is_no_modules_weight(key: str, place: str, tmp_path: Path) -> None:
    base = {f"{place}{X}.weight": values(OUT, IN), f"{place}blocks.0.modulation": values(1, 6, IN, seed=2)}
    lora = {**factors(f"diffusion_model.{X}"), key: values(1, 6, IN, seed=3)}
    got = merged(base, lora, tmp_path)
    name = f"{place}blocks.0.modulation"
    assert_rounded(got[name], base[name].double() + lora[key].double(), name=name)
    assert changed(base, got) == {*base}


def test_a_difference_of_modulation_is_shown_without_a_base(tmp_path: Path) -> None:
    save_file({"lora_unet_blocks_0.diff_m": values(1, 6, IN)}, tmp_path / "a.safetensors")
    assert [layer.target for layer in loratool.inspect(tmp_path / "a.safetensors").layers] == [
        "lora_unet_blocks_0_modulation"
    ]


def test_a_weight_that_is_set(tmp_path: Path) -> None:
    base = {f"{X}.weight": values(OUT, IN), "blocks.0.norm.scale": values(IN)}
    lora = {"diffusion_model.blocks.0.norm.scale.set_weight": values(IN, seed=5)}
    got = merged(base, lora, tmp_path)
    assert torch.equal(got["blocks.0.norm.scale"], lora["diffusion_model.blocks.0.norm.scale.set_weight"])


# --- magnitudes ---

MAGNITUDES = {
    "ai-toolkit": ("diffusion_model.", "lora_A lora_B", "magnitude", (OUT,)),
    "kohya": ("lora_unet_", "lora_down lora_up", "lora_magnitude_vector", (OUT,)),
    "kohya, module": ("lora_unet_", "lora_down lora_up", "lora_magnitude_vector.weight", (OUT,)),
    "peft's factors": ("diffusion_model.", "lora_A lora_B", "dora_scale", (OUT, 1)),
    "pipeline": ("transformer.", "lora_A lora_B", "dora_scale", (OUT, 1)),
    "columns": ("unet.", "lora_down lora_up", "dora_scale", (1, IN)),
}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_a_magnitude_by_any_name(name: str, tmp_path: Path) -> None:
    prefix, names, part, shape = MAGNITUDES[name]
    key = prefix + (X.replace(".", "_") if prefix.endswith("_") else X)
    base = {f"{X}.weight": values(OUT, IN)}
    lora = {**factors(key, names=names), f"{key}.{part}": values(*shape, seed=4).abs() + 1}
    got = merged(base, lora, tmp_path)
    V = base[f"{X}.weight"].double() + product(lora, key, names)
    axis = 0 if shape == (1, IN) else 1
    magnitude = lora[f"{key}.{part}"].double().reshape(shape if len(shape) == 2 else (OUT, 1))
    assert_rounded(got[f"{X}.weight"], V / V.norm(dim=axis, keepdim=True) * magnitude)


def test_a_magnitude_under_the_name_with_dots_belongs_to_the_flattened_module(tmp_path: Path) -> None:
    """diffusers' script for kohya's names renames the factors and leaves the magnitude as it was."""
    flat = "lora_unet_" + X.replace(".", "_")
    lora = {**factors(flat), "lora_unet_blocks_0_attn.q.lora_magnitude_vector": torch.full((OUT,), 2.0)}
    got = merged({f"{X}.weight": values(OUT, IN)}, lora, tmp_path)
    assert torch.allclose(got[f"{X}.weight"].norm(dim=1), torch.full((OUT,), 2.0))


@pytest.mark.parametrize("shape", [(OUT + 1,), (IN,)])
def test_a_magnitude_of_another_length_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    lora = {**factors(f"diffusion_model.{X}"), f"diffusion_model.{X}.magnitude": torch.ones(shape)}
    assert refusal({f"{X}.weight": values(OUT, IN)}, lora, tmp_path).code == "E-SHAPE"


def test_two_magnitudes_are_refused(tmp_path: Path) -> None:
    key = f"diffusion_model.{X}"
    lora = {**factors(key), f"{key}.magnitude": torch.ones(OUT), f"{key}.dora_scale": torch.ones(OUT, 1)}
    assert refusal({f"{X}.weight": values(OUT, IN)}, lora, tmp_path).code == "E-DUPLICATE"


# --- factors of diffusers' names beside differences ---


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_lora_a_and_b_beside_differences(prefix: str, tmp_path: Path) -> None:
    base = {f"{X}.weight": values(OUT, IN), f"{X}.bias": values(OUT), "blocks.0.norm.weight": values(IN)}
    lora = {
        **factors(prefix + X, names="lora_A lora_B"),
        f"{prefix}{X}.diff_b": values(OUT, seed=3),
        f"{prefix}blocks.0.norm.diff": values(IN, seed=3),
    }
    got = merged(base, lora, tmp_path)
    assert_rounded(got[f"{X}.weight"], base[f"{X}.weight"].double() + product(lora, prefix + X, "lora_A lora_B"))
    assert_rounded(got[f"{X}.bias"], base[f"{X}.bias"].double() + lora[f"{prefix}{X}.diff_b"].double())
    norm = "blocks.0.norm"
    assert_rounded(got[f"{norm}.weight"], base[f"{norm}.weight"].double() + lora[f"{prefix}{norm}.diff"].double())


@pytest.mark.parametrize("head", ["", "_", "model_diffusion_model_"])
@pytest.mark.parametrize("place", ["", "model.diffusion_model."])
def test_heads_between_the_prefix_and_the_module(head: str, place: str, tmp_path: Path) -> None:
    base = {f"{place}{X}.weight": values(OUT, IN)}
    key = f"lora_unet_{head}{X.replace('.', '_')}"
    got = merged(base, factors(key), tmp_path)
    assert_rounded(got[f"{place}{X}.weight"], base[f"{place}{X}.weight"].double() + product(factors(key), key))


COMPONENTS = {
    "unet.": "model.diffusion_model.",
    "transformer.": "model.diffusion_model.",
    "text_encoder.": "conditioner.embedders.0.transformer.",
    "text_encoders.clip_l.transformer.": "text_encoders.clip_l.transformer.",
}


@pytest.mark.parametrize("prefix", COMPONENTS)
def test_components_with_dots_lie_where_the_base_has_them(prefix: str, tmp_path: Path) -> None:
    base = {f"{COMPONENTS[prefix]}{X}.weight": values(OUT, IN), "other.q.weight": values(OUT, IN)}
    got = merged(base, factors(prefix + X), tmp_path)
    assert changed(base, got) == {f"{COMPONENTS[prefix]}{X}.weight"}


# --- eight bits ---


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_adapter_in_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    key, base = f"lora_unet_{X.replace('.', '_')}", {f"{X}.weight": values(OUT, IN)}
    lora = {name: value.to(dtype) for name, value in factors(key).items()} | {
        f"{key}.alpha": torch.tensor(1.0).to(dtype)
    }
    got = merged(base, lora, tmp_path)
    assert_rounded(got[f"{X}.weight"], base[f"{X}.weight"].double() + product(lora, key) / RANK)
    summary = loratool.inspect(tmp_path / "lora.safetensors")
    assert [layer.scale for layer in summary.layers] == [0.5]
    assert any("8-bit" in note for note in summary.notes)


def test_a_scale_beside_fp8_factors_is_not_passed_over(tmp_path: Path) -> None:
    key = f"lora_unet_{X.replace('.', '_')}"
    lora = {name: value.to(torch.float8_e4m3fn) for name, value in factors(key).items()}
    lora |= {f"{key}.lora_down.weight_scale": torch.tensor(0.5)}
    error = refusal({f"{X}.weight": values(OUT, IN)}, lora, tmp_path)
    assert error.code == "E-UNSUPPORTED"
    assert "weight_scale" in error.message


@pytest.mark.parametrize(("name", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)])
def test_every_code_is_widened_to_the_number_it_stands_for(name: str, dtype: torch.dtype) -> None:
    assert name in LAYOUTS
    wide = torch.frombuffer(bytearray(b"".join(_table(name))), dtype=torch.bfloat16)
    assert torch.equal(
        wide.nan_to_num(nan=-1.0, posinf=7e30, neginf=-7e30),
        torch.arange(256, dtype=torch.uint8)
        .view(dtype)
        .to(torch.bfloat16)
        .nan_to_num(nan=-1.0, posinf=7e30, neginf=-7e30),
    )


# --- more inputs ---

WIDE = {
    "diffusers": ("x_embedder", "transformer.x_embedder", "lora_A lora_B"),
    "original": ("img_in", "diffusion_model.img_in", "lora_down lora_up"),
    "flattened": ("img_in", "lora_unet_img_in", "lora_down lora_up"),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_control_adapter_pads_the_first_layer_if_that_is_allowed(name: str, weight: float, tmp_path: Path) -> None:
    module, key, names = WIDE[name]
    base = {f"{module}.weight": values(OUT, IN).bfloat16(), "blocks.0.q.weight": values(OUT, IN).bfloat16()}
    lora = factors(key, into=2 * IN, names=names)
    if name == "original":
        lora[f"{key}.reshape_weight"] = torch.tensor([OUT, 2 * IN])
    error = refusal(base, lora, tmp_path)
    assert (error.code, "--allow-new" in error.hint) == ("E-TARGET", True)
    loratool.merge(
        tmp_path / "base.safetensors",
        [(tmp_path / "lora.safetensors", weight)],
        tmp_path / "out.safetensors",
        allow_new=True,
    )
    padded = torch.cat([base[f"{module}.weight"].double(), torch.zeros(OUT, IN)], dim=1)
    got = load_file(tmp_path / "out.safetensors")
    assert_rounded(got[f"{module}.weight"], padded + weight * product(lora, key, names))


def test_a_layer_in_the_middle_is_never_padded(tmp_path: Path) -> None:
    lora = factors(f"diffusion_model.{X}", into=2 * IN)
    error = refusal({f"{X}.weight": values(OUT, IN)}, lora, tmp_path, allow_new=True)
    assert error.code == "E-SHAPE"


def test_a_shape_that_contradicts_the_factors_is_refused(tmp_path: Path) -> None:
    lora = {**factors("diffusion_model.img_in"), "diffusion_model.img_in.reshape_weight": torch.tensor([OUT, 2 * IN])}
    assert refusal({"img_in.weight": values(OUT, IN)}, lora, tmp_path).code == "E-SHAPE"


# --- refused by name ---

METHODS = {
    "oft_unet_q.oft_blocks": "OFT",
    "oft_unet_q.oft_blocks.0": "OFT",
    "lora_unet_q.oft_R.weight": "OFT",
}


@pytest.mark.parametrize("key", METHODS)
def test_rotations_are_refused_by_name(key: str, tmp_path: Path) -> None:
    lora = {key: values(2, 3, 3), f"{key.partition('.')[0]}.alpha": torch.tensor(1e-3)}
    error = refusal({"q.weight": values(OUT, IN)}, lora, tmp_path)
    assert error.code == "E-UNSUPPORTED"
    assert METHODS[key] in error.message


def test_bundled_embeddings_are_left_out_where_that_is_said(cli: Cli, tmp_path: Path) -> None:
    base = {f"{X}.weight": values(OUT, IN)}
    key = f"lora_unet_{X.replace('.', '_')}"
    lora = {**factors(key), "bundle_emb.my word.clip_l": values(2, 3)}
    error = refusal(base, lora, tmp_path)
    assert "my word" in error.message
    assert "--skip 'bundle_emb.*'" in error.hint
    line = ("merge", tmp_path / "base.safetensors", tmp_path / "lora.safetensors", "-o", tmp_path / "out.safetensors")
    result = cli(*line, "--skip", "bundle_emb.*")
    assert result.code == 0, result.err
    assert "left out" in result.out
    assert_rounded(
        load_file(tmp_path / "out.safetensors")[f"{X}.weight"], base[f"{X}.weight"].double() + product(lora, key)
    )


def test_the_hint_for_modules_that_the_base_lacks_can_be_followed(cli: Cli, tmp_path: Path) -> None:
    base = {f"blocks.{n}.q.weight": values(OUT, IN) for n in range(2)}
    lora = {
        k: v for n in range(2) for m in ("q", "k_img") for k, v in factors(f"diffusion_model.blocks.{n}.{m}").items()
    }
    error = refusal(base, lora, tmp_path)
    assert len(error.problems) == 1, "one for all layers"
    pattern = error.hint.rpartition("--skip '")[2].partition("'")[0]
    line = ("merge", tmp_path / "base.safetensors", tmp_path / "lora.safetensors", "-o", tmp_path / "out.safetensors")
    assert cli(*line, "--skip", pattern).code == 0


def test_unknown_tensors_are_told_by_kind() -> None:
    keys = ["x.0.strange", "x.1.strange", "bundle_emb.a.clip_l", "x.0.odd.weight"]
    problems = [*unknown_keys.refusals(keys, "file")]
    assert len(problems) == 3
    assert {problem.hint.rpartition("--skip '")[2].partition("'")[0] for problem in problems[1:]} == {
        "*.strange",
        "*.odd.weight",
    }


def test_an_alpha_that_whole_lokr_factors_do_not_use_is_said(tmp_path: Path) -> None:
    """LyCORIS and ComfyUI load such a file at 1, whatever its trainer meant: the note says how to have the other."""
    lora = {
        "lora_unet_q.lokr_w1": values(2, 2),
        "lora_unet_q.lokr_w2": values(3, 2),
        "lora_unet_q.alpha": torch.ones(()),
    }
    for dim, said in (("32", True), ("1", False), ("Dynamic", False)):
        save_file(lora, tmp_path / "a.safetensors", {"ss_network_dim": dim, "ss_network_module": "lycoris.kohya"})
        found = loratool.inspect(tmp_path / "a.safetensors")
        assert any("ADAPTER@0.03125" in note for note in found.notes) == said
        assert [layer.scale for layer in found.layers] == [1.0]


# --- two layouts ---


def test_the_other_layout_of_a_denoiser_is_named(tmp_path: Path) -> None:
    base = {
        "double_blocks.0.img_attn.qkv.weight": values(3 * OUT, IN),
        "single_blocks.0.linear1.weight": values(OUT, IN),
    }
    for key in ("transformer.transformer_blocks.0.attn.to_q", "lora_transformer_transformer_blocks_0_attn_to_q"):
        names = "lora_A lora_B" if "." in key else "lora_down lora_up"
        error = refusal(base, factors(key, names=names), tmp_path)
        assert error.code == "E-TARGET"
        assert "diffusers' version" in error.hint


def test_a_unets_transformer_blocks_are_no_layout() -> None:
    assert not two_layouts.hint(["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"], ["double_blocks.0.x"])


@pytest.mark.parametrize("part", ["diff_b", "magnitude", "dora_scale"])
def test_rows_of_fused_layers_are_parted_with_them(part: str, tmp_path: Path) -> None:
    """Flux's original names onto diffusers': what has a row per output goes with its rows."""
    target = "single_transformer_blocks.0"
    rows = {"attn.to_q": 3, "attn.to_k": 3, "attn.to_v": 3, "proj_mlp": 5}
    base = {f"{target}.{name}.weight": values(count, IN, seed=count) for name, count in rows.items()}
    base |= {f"{target}.{name}.bias": values(count, seed=count) for name, count in rows.items()}
    key = "lora_unet_single_blocks_0_linear1"
    value = values(14, 1, seed=9).abs() + 1 if part == "dora_scale" else values(14, seed=9).abs() + 1
    lora = {**factors(key, out=14), f"{key}.{part}": value}
    got, start = merged(base, lora, tmp_path), 0
    for name, count in rows.items():
        mine = slice(start, start + count)
        V = base[f"{target}.{name}.weight"].double() + product(lora, key)[mine]
        if part == "diff_b":
            assert_rounded(got[f"{target}.{name}.bias"], base[f"{target}.{name}.bias"].double() + value[mine].double())
        else:
            V = V / V.norm(dim=1, keepdim=True) * value[mine].double().reshape(-1, 1)
        assert_rounded(got[f"{target}.{name}.weight"], V)
        start += count

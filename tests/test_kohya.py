"""kohya's files: flattened names, found in any base that has the modules, in either of Stable Diffusion's spellings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from models import State, assert_rounded, assert_same_bits, changed
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import conventions
from loratool.checkpoint import open_checkpoint
from loratool.conventions import flattened, spellings
from loratool.tensors import TensorRef

UNET = {
    "down_blocks.0.attentions.0.proj_in": (8, 6, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "down_blocks.0.resnets.0.conv1": (8, 4, 3, 3),
    "conv_in": (4, 3, 3, 3),
}
CLIP = {f"text_model.encoder.layers.0.self_attn.{name}_proj": (6, 6) for name in ("q", "k", "v", "out")} | {
    "text_model.encoder.layers.0.mlp.fc1": (12, 6)
}


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def flat(prefix: str, path: str) -> str:
    return f"{prefix}{path.replace('.', '_')}"


def factors(key: str, shape: tuple[int, ...], *, rank: int = 2, alpha: float | None = 3.0, seed: int = 0) -> State:
    """What sd-scripts saves for one module."""
    out, *into = shape
    made = {
        f"{key}.lora_down.weight": values(rank, *into, seed=seed),
        f"{key}.lora_up.weight": values(out, rank, *[1] * (len(into) - 1), seed=seed + 1),
    }
    return made if alpha is None else {**made, f"{key}.alpha": torch.tensor(alpha)}


def adapter(modules: dict[str, tuple[int, ...]], prefix: str, **options: float) -> State:
    found: State = {}
    for number, (path, shape) in enumerate(modules.items()):
        found |= factors(flat(prefix, path), shape, seed=10 * number, **options)  # type: ignore[arg-type]
    return found


def delta(state: State, key: str, shape: tuple[int, ...]) -> Tensor:
    """alpha / rank * (up @ down), in float64."""
    down, up = (state[f"{key}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
    alpha = state.get(f"{key}.alpha")
    return (1.0 if alpha is None else float(alpha) / len(down)) * (up @ down).reshape(shape)


def base_of(modules: dict[str, tuple[int, ...]], place: str = "") -> State:
    state = {f"{place}{path}.weight": values(*shape, seed=7) for path, shape in modules.items()}
    return state | {f"{place}{path}.bias": values(shape[0], seed=8) for path, shape in modules.items()}


def saved(state: State, file: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file(state, file, metadata)
    return file


def merged(base: State, lora: State, folder: Path, **options: object) -> State:
    saved(base, folder / "base.safetensors")
    saved(lora, folder / "lora.safetensors")
    loratool.merge(
        folder / "base.safetensors",
        folder / "lora.safetensors",
        folder / "out.safetensors",
        **options,  # type: ignore[arg-type]
    )
    return load_file(folder / "out.safetensors")


def refused(base: State, lora: State, folder: Path, **options: object) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        merged(base, lora, folder, **options)
    assert not (folder / "out.safetensors").exists()
    return caught.value


def check(got: State, base: State, lora: State, modules: dict[str, str]) -> None:
    """`modules`: key of the adapter -> tensor of the base. Nothing else changed."""
    assert changed(base, got) == set(modules.values())
    for key, name in modules.items():
        assert_rounded(got[name], base[name].double() + delta(lora, key, base[name].shape), name=name)


# --- names and scale ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "model.diffusion_model.", "some.wrapper."])
@pytest.mark.parametrize("alpha", [3.0, 0.5, -1.0, None])
def test_modules_are_found_wherever_the_base_has_them(place: str, alpha: float | None, tmp_path: Path) -> None:
    base, lora = base_of(UNET, place), adapter(UNET, "lora_unet_", alpha=alpha)  # type: ignore[arg-type]
    base["first_stage_model.decoder.conv_in.weight"] = values(2, 2)
    got = merged(base, lora, tmp_path)
    check(got, base, lora, {flat("lora_unet_", path): f"{place}{path}.weight" for path in UNET})


def test_without_alpha_the_scale_is_one_and_a_note_says_so(tmp_path: Path) -> None:
    file = saved(adapter(UNET, "lora_unet_", alpha=None), tmp_path / "lora.safetensors")  # type: ignore[arg-type]
    summary = loratool.inspect(file)
    assert {layer.scale for layer in summary.layers} == {1.0}
    assert any("no alpha in the file" in note and "4 modules" in note for note in summary.notes)


def test_factors_of_a_1x1_convolution_fit_a_linear_layer_and_the_other_way_round(tmp_path: Path) -> None:
    base = {"a.proj_in.weight": values(4, 6), "b.proj_in.weight": values(4, 6, 1, 1)}
    lora = factors("lora_unet_a_proj_in", (4, 6, 1, 1)) | factors("lora_unet_b_proj_in", (4, 6), seed=3)
    got = merged(base, lora, tmp_path)
    check(got, base, lora, {f"lora_unet_{name}_proj_in": f"{name}.proj_in.weight" for name in "ab"})


def test_dots_stay_where_comfyui_keeps_them(tmp_path: Path) -> None:
    """Dotted names are exact, so that names which flatten alike can be told apart."""
    base = {f"model.diffusion_model.{path}.weight": values(4, 6) for path in ("a.b_c", "a_b.c")}
    lora = factors("diffusion_model.a.b_c", (4, 6))
    got = merged(base, lora, tmp_path)
    check(got, base, lora, {"diffusion_model.a.b_c": "model.diffusion_model.a.b_c.weight"})


def test_peft_names_of_the_factors_count_behind_a_flattened_name(tmp_path: Path) -> None:
    base, lora = base_of(UNET), adapter(UNET, "lora_transformer_")
    renamed = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in lora.items()}
    assert conventions.choose(open_checkpoint(saved(renamed, tmp_path / "x.safetensors"))).NAME == "kohya"
    got = merged(base, renamed, tmp_path)
    check(got, base, lora, {flat("lora_transformer_", path): f"{path}.weight" for path in UNET})


def test_two_names_that_flatten_alike_are_refused_with_both(tmp_path: Path) -> None:
    base = {"a.b_c.weight": values(4, 6), "a_b.c.weight": values(4, 6)}
    error = refused(base, factors("lora_unet_a_b_c", (4, 6)), tmp_path)
    assert error.code == "E-AMBIGUOUS"
    assert "could be any of a.b_c, a_b.c of the base" in error.message


NAMES = st.lists(
    st.text(alphabet="ab_.", min_size=1, max_size=7).filter(lambda s: ".." not in s and s[0] != "." and s[-1] != "."),
    min_size=1, max_size=6, unique=True,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(names=NAMES, data=st.data())
def test_a_name_is_found_or_known_to_be_ambiguous(
    names: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chosen = data.draw(st.sampled_from(names))
    state = {f"{name}.weight": torch.ones(2, 3) for name in names}
    source = saved(factors(flat("lora_unet_", chosen), (2, 3)), tmp_path_factory.mktemp("x") / "lora.safetensors")
    base = {name: TensorRef.of(value, name) for name, value in state.items()}
    twins = [name for name in names if name.replace(".", "_") == chosen.replace(".", "_")]
    from loratool.conventions import kohya
    from loratool.conventions.choices import Choices

    if len(twins) > 1:
        with pytest.raises(loratool.LoratoolError, match="E-AMBIGUOUS"):
            kohya.read(open_checkpoint(source), Choices(), base)
    else:
        found = kohya.read(open_checkpoint(source), Choices(), base)
        assert [item.target.name for item in found.updates] == [f"{chosen}.weight"]


def test_every_spelling_of_a_block_is_undone_by_the_other(tmp_path: Path) -> None:
    paths = [
        "input_blocks.1.0.in_layers.2", "input_blocks.4.1.transformer_blocks.0.attn2.to_k", "input_blocks.3.0.op",
        "middle_block.0.emb_layers.1", "middle_block.1.proj_in", "middle_block.2.out_layers.3", "out.0", "out.2",
        "output_blocks.5.0.skip_connection", "output_blocks.8.1.norm", "time_embed.2", "label_emb.0.0",
        "input_blocks.0.0", "output_blocks.2.1.conv", "output_blocks.5.2.conv",
    ]  # fmt: skip
    for path in paths:
        (other,) = spellings.others(f"model.{path}")
        assert f"model.{path}" in [back.path for back in spellings.others(other.path)], path


@pytest.mark.parametrize("original", [True, False])
def test_a_base_in_the_other_spelling(original: bool, tmp_path: Path) -> None:
    theirs = ["input_blocks.4.1.proj_in", "middle_block.2.out_layers.3", "output_blocks.5.2.conv"]
    ours = ["down_blocks.1.attentions.0.proj_in", "mid_block.resnets.1.conv2", "up_blocks.1.upsamplers.0.conv"]
    stored, trained = (theirs, ours) if original else (ours, theirs)
    base = base_of(dict.fromkeys(stored, (4, 6)))
    lora = adapter(dict.fromkeys(trained, (4, 6)), "lora_unet_")
    got = merged(base, lora, tmp_path)
    pairs = zip(trained, stored, strict=True)
    check(got, base, lora, {flat("lora_unet_", path): f"{name}.weight" for path, name in pairs})


def test_openclip_keeps_query_key_and_value_in_one_tensor(tmp_path: Path) -> None:
    place, block = "conditioner.embedders.1.model.", "transformer.resblocks.0."
    base = {
        f"{place}{block}attn.in_proj_weight": values(18, 6),
        f"{place}{block}attn.out_proj.weight": values(6, 6),
        f"{place}{block}mlp.c_fc.weight": values(12, 6),
    }
    lora = adapter(CLIP, "lora_te2_")
    got = merged(base, lora, tmp_path)
    layer = "lora_te2_text_model_encoder_layers_0_"
    stacked = torch.cat([delta(lora, f"{layer}self_attn_{name}_proj", (6, 6)) for name in "qkv"])
    name = f"{place}{block}attn.in_proj_weight"
    assert_rounded(got[name], base[name].double() + stacked)
    name = f"{place}{block}mlp.c_fc.weight"
    assert_rounded(got[name], base[name].double() + delta(lora, f"{layer}mlp_fc1", (12, 6)))
    assert len(changed(base, got)) == 3


def test_transformers_5_has_no_text_model_level(tmp_path: Path) -> None:
    base = base_of({path.removeprefix("text_model."): shape for path, shape in CLIP.items()})
    lora = adapter(CLIP, "lora_te_")
    got = merged(base, lora, tmp_path)
    check(got, base, lora, {flat("lora_te_", p): f"{p.removeprefix('text_model.')}.weight" for p in CLIP})


def test_split_qkv_is_scaled_as_its_loaders_do(tmp_path: Path) -> None:
    """Three modules of rank 2, stacked: down [6, in], up block-diagonal, alpha 4; the scale is 4 / 6."""
    key, parts = "lora_unet_double_blocks_0_img_attn_qkv", [values(8, 2, seed=n) for n in range(3)]
    lora = {
        f"{key}.lora_down.weight": values(6, 8),
        f"{key}.lora_up.weight": torch.block_diag(*parts),
        f"{key}.alpha": torch.tensor(4.0),
    }
    base = {"double_blocks.0.img_attn.qkv.weight": values(24, 8)}
    got = merged(base, lora, tmp_path)
    want = base["double_blocks.0.img_attn.qkv.weight"].double() + 4 / 6 * (
        torch.block_diag(*parts).double() @ lora[f"{key}.lora_down.weight"].double()
    )
    assert_rounded(got["double_blocks.0.img_attn.qkv.weight"], want)
    args = {"ss_network_args": json.dumps({"split_qkv": "True"})}
    (noted,) = (
        note for note in loratool.inspect(saved(lora, tmp_path / "n.safetensors", args)).notes if "split_qkv" in note
    )
    assert "alpha / (rank of q, k and v together)" in noted


# --- components -----------------------------------------------------------------------------------


def pipeline_lora() -> State:
    return adapter(UNET, "lora_unet_") | adapter(CLIP, "lora_te1_") | adapter(CLIP, "lora_te2_", alpha=5.0)


def sdxl() -> State:
    clip_g = {f"text_encoders.clip_g.transformer.{path}": shape for path, shape in CLIP.items()}
    clip_l = {f"text_encoders.clip_l.transformer.{path}": shape for path, shape in CLIP.items()}
    return base_of(UNET, "model.diffusion_model.") | base_of(clip_g) | base_of(clip_l)


def test_text_encoders_that_look_alike_have_their_known_places(tmp_path: Path) -> None:
    base, lora = sdxl(), pipeline_lora()
    got = merged(base, lora, tmp_path)
    where = {flat("lora_unet_", p): f"model.diffusion_model.{p}.weight" for p in UNET}
    where |= {flat("lora_te1_", p): f"text_encoders.clip_l.transformer.{p}.weight" for p in CLIP}
    where |= {flat("lora_te2_", p): f"text_encoders.clip_g.transformer.{p}.weight" for p in CLIP}
    check(got, base, lora, where)


def test_half_an_adapter_is_never_merged_unasked(tmp_path: Path) -> None:
    base, lora = base_of(UNET), adapter(UNET, "lora_unet_") | adapter(CLIP, "lora_te_")
    error = refused(base, lora, tmp_path)
    assert [problem.code for problem in error.problems] == ["E-TARGET"]
    assert error.message == "the base has none of the 5 modules of component te; it has those of unet (4 modules)"
    assert error.hint == "--component unet merges that alone"
    got = merged(base, lora, tmp_path, component="unet")
    check(got, base, lora, {flat("lora_unet_", path): f"{path}.weight" for path in UNET})


def test_a_component_goes_in_and_out_again_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    base = saved(base_of(UNET), tmp_path / "base.safetensors")
    lora = saved(pipeline_lora(), tmp_path / "lora.safetensors")
    out, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    assert cli("merge", base, lora, "-o", out).code == 2
    assert cli("merge", base, lora, "-o", out, "--component", "unet").code == 0
    assert cli("unmerge", out, lora, "-o", back, "--base", base, "--component", "unet").code == 0
    assert_same_bits(load_file(back), load_file(base))
    shown = cli("inspect", lora, "--base", base, "--component", "unet", "--json").json
    assert len(shown["fit"]["touched"]) == len(UNET)
    assert any("left out, as asked for: te1, te2" in note for note in shown["notes"])


def test_a_component_that_is_not_there_is_no_choice(tmp_path: Path) -> None:
    error = refused(base_of(UNET), adapter(UNET, "lora_unet_"), tmp_path, component=["unet", "te3"])
    assert error.code == "E-OPTION"
    assert error.message == "it has no component 'te3', only unet"


def test_a_bare_text_encoder_could_be_either(tmp_path: Path) -> None:
    lora = adapter(CLIP, "lora_te1_") | adapter(CLIP, "lora_te2_")
    error = refused(base_of(CLIP), lora, tmp_path)
    assert error.code == "E-AMBIGUOUS"
    assert "te1 and te2 both fit it" in error.message
    assert "--component te1" in error.hint
    got = merged(base_of(CLIP), lora, tmp_path, component="te2")
    check(got, base_of(CLIP), lora, {flat("lora_te2_", path): f"{path}.weight" for path in CLIP})


def test_two_places_that_fit_alike_are_refused(tmp_path: Path) -> None:
    base = base_of(UNET, "first.") | base_of(UNET, "second.")
    error = refused(base, adapter(UNET, "lora_unet_"), tmp_path)
    assert error.code == "E-AMBIGUOUS"
    assert "'first.', 'second.'" in error.message


def test_modules_that_the_base_lacks_are_named_with_near_names(tmp_path: Path) -> None:
    modules = {**UNET, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_x": (8, 8)}
    error = refused(base_of(UNET), adapter(modules, "lora_unet_"), tmp_path)
    assert [problem.code for problem in error.problems] == ["E-TARGET"]
    assert "attn1.to_q.weight" in error.hint


def test_another_model_is_no_base(tmp_path: Path) -> None:
    error = refused({"layers.0.weight": values(3, 3)}, adapter(UNET, "lora_unet_"), tmp_path)
    assert error.code == "E-TARGET"
    assert error.message == "the base has none of the 4 modules of component unet"
    assert error.hint == "is this the adapter's base?"


# --- refusals -------------------------------------------------------------------------------------

GOOD = factors("lora_unet_conv_in", (4, 3, 3, 3))
DOWN, UP, ALPHA = (f"lora_unet_conv_in.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
BAD: dict[str, tuple[State, str, str]] = {
    "no-up": ({DOWN: GOOD[DOWN]}, "E-COMPONENTS", "has no lora_up"),
    "no-down": ({UP: GOOD[UP]}, "E-COMPONENTS", "has no lora_down"),
    "ranks": ({**GOOD, UP: values(4, 3, 1, 1)}, "E-SHAPE", "differ in rank"),
    "flat-down": ({**GOOD, DOWN: values(2)}, "E-SHAPE", "must be"),
    "empty": ({**GOOD, DOWN: torch.zeros(0, 3, 3, 3), UP: torch.zeros(4, 0, 1, 1)}, "E-SHAPE", "must be"),
    "kernel": ({**GOOD, DOWN: values(2, 3, 5, 5)}, "E-SHAPE", "the base has [4, 3, 3, 3]"),
    "wide": ({**GOOD, UP: values(8, 2, 1, 1)}, "E-SHAPE", "make [8, 3, 3, 3], the base has [4, 3, 3, 3]"),
    "alpha-0": ({**GOOD, ALPHA: torch.tensor(0.0)}, "E-SCALE", "alpha is 0"),
    "alpha-nan": ({**GOOD, ALPHA: torch.tensor(float("nan"))}, "E-SCALE", "not finite"),
    "alpha-many": ({**GOOD, ALPHA: torch.ones(2)}, "E-SHAPE", "must be one number"),
    "alpha-bool": ({**GOOD, ALPHA: torch.tensor(True)}, "E-SHAPE", "must be one number"),
    "stray": ({**GOOD, "lora_unet_conv_in.extra": values(2)}, "E-UNSUPPORTED", "no part of an adapter"),
    "twice": ({**GOOD, "lora_unet_conv_in.lora_A.weight": values(2, 3, 3, 3)}, "E-DUPLICATE", "same part"),
    "padded": (
        {**GOOD, "lora_unet_conv_in.reshape_weight": torch.tensor([4, 3])},
        "E-SHAPE",
        "the shape of a weight",
    ),
    "integers": ({**GOOD, DOWN: torch.ones(2, 3, 3, 3, dtype=torch.int64)}, "E-DTYPE", "I64"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    lora, code, message = BAD[name]
    error = refused(base_of(UNET), lora, tmp_path)
    assert code in {problem.code for problem in error.problems}
    assert message in str(error)
    assert "lora.safetensors" in str(error)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    lora = adapter(UNET, "lora_unet_")
    lora.pop(flat("lora_unet_", "conv_in") + ".lora_up.weight")
    lora[flat("lora_unet_", "down_blocks.0.resnets.0.conv1") + ".alpha"] = torch.tensor(0.0)
    assert [p.code for p in refused(base_of(UNET), lora, tmp_path).problems] == ["E-COMPONENTS", "E-SCALE"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 2.0}, "the file says alpha itself"),
        ({"scaling": "alpha/rank"}, "no alpha is open"),
        ({"adapter": "x"}, "means nothing"),
        ({"layout": {"*": "in_out"}}, "means nothing"),
    ],
)
def test_options_that_it_has_no_use_for_are_mistakes(options: dict[str, object], match: str, tmp_path: Path) -> None:
    file = saved(GOOD, tmp_path / "lora.safetensors")
    with pytest.raises(loratool.LoratoolError, match=match) as caught:
        loratool.load(file, **options)  # type: ignore[arg-type]
    assert caught.value.code == "E-OPTION"


def test_without_its_base_it_can_be_seen_but_not_saved(tmp_path: Path) -> None:
    lora = adapter(UNET, "lora_unet_")
    file = saved(lora, tmp_path / "lora.safetensors", {"ss_sd_model_name": "sd15.safetensors", "ss_network_args": "{"})
    loaded = loratool.load(file)
    assert loaded.base.name == "sd15.safetensors"
    with pytest.raises(loratool.LoratoolError, match="only the base can tell"):
        loratool.save(loaded, tmp_path / "x.lora.safetensors")
    base = saved(base_of(UNET), tmp_path / "base.safetensors")
    loratool.save(loratool.load(file, base=base), tmp_path / "x.lora.safetensors")
    assert loratool.validate(tmp_path / "x.lora.safetensors") == []
    loratool.merge(base, tmp_path / "x.lora.safetensors", tmp_path / "out.safetensors")
    check(load_file(tmp_path / "out.safetensors"), load_file(base), lora,
          {flat("lora_unet_", path): f"{path}.weight" for path in UNET})  # fmt: skip


# --- detection and inspection ---------------------------------------------------------------------

OTHERS: dict[str, list[str]] = {
    "checkpoint": ["model.layers.0.self_attn.q_proj.weight", "diffusion_model.out.2.weight", "x.alpha", "x.diff"],
    "single-file": ["model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "first_stage_model.x.weight"],
    "peft": ["base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"],
    "peft-loha": ["base_model.model.a.hada_w1_a", "base_model.model.a.lokr_w1"],
    "peft-wrapped": ["a.lora_A.default.weight", "a.lora_B.default.weight", "a.base_layer.weight"],
    "plain": ["a.linear.weight", "a.lora.A", "a.lora.B"],
    "loralib": ["a.lora_A", "a.lora_B", "a.weight"],
    "litgpt": ["transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"],
    "diffusers": ["unet.a.to_q.lora_A.weight", "transformer.a.to_q.lora_B.weight", "unet.a.alpha"],
    "diffusers-middle": ["unet.a.to_q.lora.down.weight", "text_encoder.a.q_proj.lora_linear_layer.up.weight"],
    "diffusers-old": ["a.attn1.processor.to_q_lora.down.weight", "a.attn1.processor.to_q_lora.up.weight"],
    "ai-toolkit": ["diffusion_model.a.lora_A.weight", "diffusion_model.a.lora_B.weight"],
    "torchtune": ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"],
    "mlx": ["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"],
    "megatron": ["a.adapter.linear_in.weight", "a.adapter.linear_out.weight"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_conventions_are_not_taken(name: str, tmp_path: Path) -> None:
    source = open_checkpoint(saved({key: torch.ones(2, 2) for key in OTHERS[name]}, tmp_path / "x.safetensors"))
    names = {convention.NAME for convention in conventions.matching(source)}
    assert not names & {"kohya", "lycoris"}


def test_a_native_file_is_native_whatever_its_targets_are_called(tmp_path: Path) -> None:
    base = saved(base_of(UNET), tmp_path / "base.safetensors")
    lora = saved(adapter(UNET, "lora_unet_"), tmp_path / "lora.safetensors")
    loratool.save(loratool.load(lora, base=base), tmp_path / "x.safetensors")
    assert [c.NAME for c in conventions.matching(open_checkpoint(tmp_path / "x.safetensors"))] == ["native"]


def test_inspect_shows_ranks_and_scales_and_imports_no_torch(tmp_path: Path) -> None:
    lora = adapter(UNET, "lora_unet_") | factors("lora_te_text_model_x", (6, 6), rank=4, alpha=1.0)
    file = saved({k: v.half() for k, v in lora.items()}, tmp_path / "lora.safetensors")
    summary = loratool.inspect(file)
    assert (summary.convention, summary.what, len(summary.layers)) == ("kohya", "adapter", 5)
    assert {(layer.rank, layer.alpha, layer.scale) for layer in summary.layers} == {(2, 3.0, 1.5), (4, 1.0, 0.25)}
    assert {"unet: 4 modules", "te: 1 modules"} <= set(summary.notes)
    assert "lora_unet_down_blocks_*_resnets_*_conv1.weight" in {group.pattern for group in summary.groups}
    code = "import sys, loratool; loratool.inspect(sys.argv[1]); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(loratool.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, env=environment)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
)
@pytest.mark.parametrize("value", [1.0, -3.0, 16.0, 0.0])
def test_alpha_of_every_dtype_is_read(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    file = saved(
        {"x": torch.tensor(value, dtype=dtype), "y": torch.tensor([value], dtype=dtype)}, tmp_path / "x.safetensors"
    )
    for ref in open_checkpoint(file).tensors.values():
        assert flattened.number(ref) == value


def test_a_pickle_is_as_good(tmp_path: Path) -> None:
    base, lora = base_of(UNET), adapter(UNET, "lora_unet_")
    torch.save(lora, tmp_path / "lora.pt")
    saved(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lora.pt", tmp_path / "out.safetensors")
    check(load_file(tmp_path / "out.safetensors"), base, lora,
          {flat("lora_unet_", path): f"{path}.weight" for path in UNET})  # fmt: skip


FLUX_QKV, FLUX_LAST = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_final_layer_adaLN_modulation_1"
FLUX_PARTS = [f"transformer_blocks.0.attn.to_{name}.weight" for name in "qkv"]


def test_flux_in_diffusers_names(tmp_path: Path) -> None:
    """One module of the original is three of diffusers', or one whose halves are swapped."""
    base = {name: values(8, 4, seed=n) for n, name in enumerate(FLUX_PARTS)} | {"norm_out.linear.weight": values(6, 4)}
    lora = {}
    for key, rows in ((FLUX_QKV, 24), (FLUX_LAST, 6)):
        lora |= {f"{key}.lora_down.weight": values(2, 4), f"{key}.lora_up.weight": values(rows, 2, seed=5)}
        lora |= {f"{key}.alpha": torch.tensor(4.0)}
    got = merged(base, lora, tmp_path)
    deltas = {
        key: 2 * lora[f"{key}.lora_up.weight"].double() @ lora[f"{key}.lora_down.weight"].double()
        for key in (FLUX_QKV, FLUX_LAST)
    }
    for name, change in zip(FLUX_PARTS, deltas[FLUX_QKV].chunk(3), strict=True):
        assert_rounded(got[name], base[name].double() + change)
    swapped = torch.cat(deltas[FLUX_LAST].chunk(2)[::-1])
    assert_rounded(got["norm_out.linear.weight"], base["norm_out.linear.weight"].double() + swapped)


@pytest.mark.parametrize(
    ("parts", "shape", "why"),
    [
        ({"lora_down.weight": (2, 4), "lora_up.weight": (20, 2)}, (8, 4), "has 20 outputs"),
        ({"hada_w1_a": (24, 2), "hada_w1_b": (2, 4), "hada_w2_a": (24, 2), "hada_w2_b": (2, 4)}, (8, 4),
         "can not be parted so"),
    ],
    ids=["rows", "loha"],
)  # fmt: skip
def test_flux_that_does_not_fit_diffusers(
    parts: dict[str, tuple[int, int]], shape: tuple[int, int], why: str, tmp_path: Path
) -> None:
    base = {name: values(*shape) for name in FLUX_PARTS}
    with pytest.raises(loratool.LoratoolError) as caught:
        merged(base, {f"{FLUX_QKV}.{part}": values(*size) for part, size in parts.items()}, tmp_path)
    assert why in str(caught.value)

"""Written for kohya and LyCORIS: every delta arrives, under keys that lead back to its tensor and to no other one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from hypothesis import given
from models import State
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import FORMS, Case, Maker, base_for, cases, make_update, same_bits, tensors_of
from torch import Tensor
from writer_cases import said

import loratool
from loratool import Adapter, Target, Targeted
from loratool.updates import Add, Replace, Update

# -- tools ------------------------------------------------------------------------------------------------------------


def region_of(update: Update) -> tuple[int, ...]:
    parts = update.components()
    if isinstance(update, Replace | Add):
        return parts["value"].shape
    return (parts["B"].shape[0], *parts["A"].shape[1:])


def adapter_of(updates: Mapping[str, Update | list[tuple[Target, Update]]]) -> Adapter:
    """An adapter of updates by tensor name, of whole tensors where no target is given."""
    items = []
    for name, update in updates.items():
        for target, one in update if isinstance(update, list) else [(Target("", region_of(update)), update)]:
            items.append(Targeted(replace(target, name=name), one))
    return Adapter(tuple(items))


def lora(seed: int = 0, shape: tuple[int, ...] = (6, 4), rank: int = 2, **options: Any) -> Any:
    return make_update("lora", shape, Maker(seed, options.pop("dtype", "F32")), rank, **options)


def of(form: str, shape: tuple[int, ...] = (6, 4), **options: Any) -> list[tuple[Target, Update]]:
    return [(Target("", shape), make_update(form, shape, Maker(7), **options))]


def saved(state: State, file: Path) -> Path:
    save_file(state, file)
    return file


def merged(base: Path, adapter: Adapter | Path, **options: Any) -> State:
    with tempfile.TemporaryDirectory() as folder:
        loratool.merge(base, adapter, Path(folder, "out"), allow_unchanged=True, **options)
        return tensors_of(Path(folder, "out"))


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def components(adapter: Adapter) -> list[tuple[Target, float, State]]:
    return sorted(
        [
            (item.target, item.update.scaling.factor, {n: r.read() for n, r in item.update.components().items()})
            for item in adapter.updates
            if item.update.scaling
        ],
        key=lambda entry: entry[0].name,
    )


def assert_same_updates(got: Adapter, want: Adapter) -> None:
    """Target, scale and factors, bit for bit."""
    one, two = components(got), components(want)
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    assert all(same_bits(a[2], b[2]) for a, b in zip(one, two, strict=True))


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value.is_floating_point() and value.numel():
            eps = max(torch.finfo(value.dtype).eps, 2.0**-23)
            bound = 4 * eps * float(value.double().abs().max() + 1)
            assert float((got[name].double() - value.double()).abs().max()) <= bound, name
        else:
            assert torch.equal(got[name], value)


def refused(adapter: Adapter, folder: Path, to: str = "kohya", **options: Any) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.convert(adapter, folder / "refused.safetensors", to, **options)
    assert not (folder / "refused.safetensors").exists()
    return caught.value


def base_file(adapter: Adapter, folder: Path) -> Path:
    return saved(base_for(adapter, 3, ["F32"]), folder / "base.safetensors")


# -- keys and metadata ------------------------------------------------------------------------------------------------

UNET = {
    "down_blocks.0.attentions.0.proj_in.weight": lora(1, (8, 6, 1, 1), rank=3, alpha=6.0),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": lora(2, (8, 8), rank=2, alpha=4.0),
    "down_blocks.0.resnets.0.conv1.weight": lora(3, (8, 4, 3, 3), rank=2, alpha=4.0, dtype="BF16"),
}


def test_the_files_keys_are_those_of_sd_scripts(tmp_path: Path) -> None:
    made = adapter_of(UNET)
    report = loratool.convert(made, tmp_path / "x.safetensors", "kohya", as_component="unet")
    state = load_file(tmp_path / "x.safetensors")
    block = "lora_unet_down_blocks_0_"
    shapes = {
        "attentions_0_proj_in": ([3, 6, 1, 1], [8, 3, 1, 1]),
        "attentions_0_transformer_blocks_0_attn1_to_q": ([2, 8], [8, 2]),
        "resnets_0_conv1": ([2, 4, 3, 3], [8, 2, 1, 1]),
    }
    keys = {f"{block}{m}.{part}" for m in shapes for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert state.keys() == keys
    for module, (down, up) in shapes.items():
        assert [*state[f"{block}{module}.lora_down.weight"].shape] == down
        assert [*state[f"{block}{module}.lora_up.weight"].shape] == up
    alpha = state[f"{block}attentions_0_proj_in.alpha"]
    assert (alpha.dtype, alpha.shape, float(alpha)) == (torch.float32, (), 6.0)
    assert state[f"{block}resnets_0_conv1.lora_up.weight"].dtype == torch.bfloat16
    assert metadata(tmp_path / "x.safetensors") == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
    }
    several = "diffusers reads one alpha for UNets' attention and one for a text encoder: see --uniform"
    assert said(report) == ("unet: 3 modules, called lora_unet_...", several)


@pytest.mark.parametrize("to", ["kohya", "lycoris"])
def test_uniform_is_one_rank_and_one_alpha(to: str, tmp_path: Path) -> None:
    made = adapter_of({f"unet.{name}": update for name, update in UNET.items()} | {
        "unet.a.weight": [(Target("", (8, 4)), lora(6, (8, 4), rank=2)), (Target("", (8, 4), (2, 5)), lora(7, (3, 4)))],
    })  # fmt: skip
    base, out = base_file(made, tmp_path), tmp_path / "x.safetensors"
    report = loratool.convert(made, out, to, base=base, uniform=True)
    state = load_file(out)
    assert {len(value) for key, value in state.items() if key.endswith("lora_down.weight")} == {4}
    assert {float(value) for key, value in state.items() if key.endswith("alpha")} == {8.0}
    assert (metadata(out)["ss_network_dim"], metadata(out)["ss_network_alpha"]) == ("4", "8.0")
    assert any(note.startswith("one rank, 4, and one scale, 2") for note in report.notes)
    assert_close(merged(base, out), merged(base, made))


def test_one_rank_and_alpha_are_told(tmp_path: Path) -> None:
    made = replace(adapter_of({"a.weight": lora(alpha=8.0, rank=4)}), base=loratool.BaseIdentity("sd15"))
    loratool.convert(made, tmp_path / "x.safetensors", "kohya", as_component="te2")
    told = metadata(tmp_path / "x.safetensors")
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_sd_model_name"]) == ("4", "8.0", "sd15")


@pytest.mark.parametrize("to", ["kohya", "lycoris"])
def test_nothing_is_folded_that_fits(to: str, tmp_path: Path) -> None:
    """Native, there and back: the same factors bit for bit, whatever their dtype, rank and scale."""
    made = adapter_of({**UNET, "mid_block.x.weight": lora(4, rule="none", alpha=0.5, rank=3, dtype="F16"),
                       "mid_block.y.weight": lora(5, rule="alpha/sqrt(rank)", alpha=2.0, rank=4)})  # fmt: skip
    base = base_file(made, tmp_path)
    loratool.convert(made, tmp_path / "x.safetensors", to, as_component="unet", base=base)
    assert loratool.inspect(tmp_path / "x.safetensors").convention == to
    loratool.convert(tmp_path / "x.safetensors", tmp_path / "back.safetensors", "native", base=base)
    assert_same_updates(loratool.load(tmp_path / "back.safetensors"), made)
    loratool.convert(tmp_path / "x.safetensors", tmp_path / "again.safetensors", to, as_component="unet", base=base)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("scale", "alpha", "told"),
    [(0.1, None, True), (0.0, 2.0, False), (1e-300, 2.0, False), (0.75, 1.5, False), (-3.0, 6.0, False)],
)
def test_alpha_is_a_number_that_readers_take(scale: float, alpha: float | None, told: bool, tmp_path: Path) -> None:
    """0 would be the rank for some of them, float32 has no 1e-300, and diffusers never ends on some negative ones."""
    made = adapter_of({"a.weight": lora(rule="none", alpha=scale)})
    base = base_file(made, tmp_path)
    report = loratool.convert(made, tmp_path / "x.safetensors", "kohya", as_component="unet", base=base)
    stored = float(load_file(tmp_path / "x.safetensors")["lora_unet_a.alpha"])
    assert stored == (float(torch.tensor(0.2)) if alpha is None else alpha)
    assert any("rounded to float32" in note for note in report.notes) == told
    assert_close(merged(base, tmp_path / "x.safetensors"), merged(base, made))


# -- components -------------------------------------------------------------------------------------------------------


def component_keys(adapter: Adapter, folder: Path, to: str = "kohya", **options: Any) -> set[str]:
    out = Path(tempfile.mkdtemp(dir=folder), "x.safetensors")
    loratool.convert(adapter, out, to, **options)
    return {key.partition(".")[0] for key in load_file(out)}


@pytest.mark.parametrize(
    ("name", "option", "key"),
    [
        ("unet.a.b.weight", "", "lora_unet_a_b"),
        ("transformer.a.b.weight", "", "lora_transformer_a_b"),
        ("transformer.a.b.weight", "unet", "lora_unet_a_b"),
        ("text_encoder.a.b.weight", "te1", "lora_te1_a_b"),
        ("text_encoder_2.a.b.weight", "", "lora_te2_a_b"),
        ("model.diffusion_model.a.b.weight", "", "lora_unet_a_b"),
        ("cond_stage_model.transformer.text_model.a.weight", "", "lora_te_text_model_a"),
        ("conditioner.embedders.0.transformer.text_model.a.weight", "", "lora_te1_text_model_a"),
        ("text_encoders.t5xxl.transformer.encoder.a.weight", "", "lora_te3_encoder_a"),
        ("a.b.weight", "prior", "lora_prior_unet_a_b"),
        ("unet.a.weight", "te1", "lora_te1_unet_a"),
    ],
)
def test_the_component_is_where_checkpoints_keep_it(name: str, option: str, key: str, tmp_path: Path) -> None:
    made = adapter_of({name: lora()})
    base = base_file(made, tmp_path)
    assert component_keys(made, tmp_path, as_component=option) == {key}
    assert component_keys(made, tmp_path, as_component=option, base=base) == {key}


PIPELINES: dict[str, dict[str, tuple[str, str]]] = {
    "sd": {"unet": ("UNet2DConditionModel", "unet"), "text_encoder": ("CLIPTextModel", "te")},
    "sdxl": {
        "unet": ("UNet2DConditionModel", "unet"),
        "text_encoder": ("CLIPTextModel", "te1"),
        "text_encoder_2": ("CLIPTextModelWithProjection", "te2"),
    },
    "flux": {
        "transformer": ("FluxTransformer2DModel", "transformer"),
        "text_encoder": ("CLIPTextModel", "te1"),
        "text_encoder_2": ("T5EncoderModel", "te3"),
    },
    "sd3": {
        "text_encoder": ("CLIPTextModelWithProjection", "te1"),
        "text_encoder_2": ("CLIPTextModelWithProjection", "te2"),
        "text_encoder_3": ("T5EncoderModel", "te3"),
    },
}


def pipeline(folder: Path, classes: Mapping[str, str], extra: Mapping[str, Any] | None = None) -> Path:
    for name, kind in classes.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        save_file({f"{kind}.a.weight": torch.ones(6, 4)}, folder / name / "model.safetensors")
    index = {name: ["library", kind] for name, kind in classes.items()} | dict(extra or {})
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_says_which_component_is_which(name: str, tmp_path: Path) -> None:
    classes = {component: kind for component, (kind, _) in PIPELINES[name].items()}
    made = adapter_of({f"{component}.{kind}.a.weight": lora() for component, kind in classes.items()})
    base = pipeline(tmp_path / "base", classes)
    wanted = {f"lora_{prefix}_{kind}_a" for kind, prefix in PIPELINES[name].values()}
    assert component_keys(made, tmp_path, base=base) == wanted


def test_an_encoder_that_was_left_out_counts(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", {"text_encoder": "C"}, {"text_encoder_2": [None, None]})
    assert component_keys(adapter_of({"text_encoder.C.a.weight": lora()}), tmp_path, base=base) == {"lora_te1_C_a"}


@pytest.mark.parametrize(
    ("kind", "key"), [("UNet2DConditionModel", "lora_unet_a"), ("FluxTransformer2DModel", "lora_transformer_a")]
)
def test_a_model_says_what_it_is(kind: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"_class_name": kind}))
    save_file({"a.weight": torch.ones(6, 4)}, tmp_path / "base/model.safetensors")
    assert component_keys(adapter_of({"a.weight": lora()}), tmp_path, base=tmp_path / "base") == {key}


def test_a_component_that_nothing_tells_is_asked_for(tmp_path: Path) -> None:
    error = refused(adapter_of({"a.weight": lora()}), tmp_path)
    assert "which part of a pipeline they belong to" in error.message
    assert "--as: unet, transformer, te, te1, te2, te3, prior, prior-te" in error.hint
    assert "--as: te, te1; or" in refused(adapter_of({"text_encoder.a.weight": lora()}), tmp_path).hint
    unknown = refused(adapter_of({"a.weight": lora()}), tmp_path, as_component="model")
    assert unknown.code == "E-OPTION"
    assert "'model'" in unknown.message
    assert component_keys(adapter_of({"a.b.weight": lora()}), tmp_path, "lycoris", as_component="model") == {
        "lycoris_a_b"
    }


def test_a_pipeline_has_parts_that_its_files_have_not(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", {"unet": "U", "vae": "V"})
    made = adapter_of({"vae.V.a.weight": lora(), "unet.U.a.weight": lora()})
    error = refused(made, tmp_path, base=base)
    assert "vae.V.a.weight: its files have no name for a pipeline's vae" in error.message
    assert len(error.problems) == 1
    assert component_keys(adapter_of({"unet.U.a.weight": lora()}), tmp_path, base=base) == {"lora_unet_U_a"}
    alone = adapter_of({"vae.V.a.weight": lora()})
    assert component_keys(alone, tmp_path, base=base, as_component="prior") == {"lora_prior_unet_V_a"}


def test_one_component_is_asked_for_and_there_are_two(tmp_path: Path) -> None:
    error = refused(adapter_of({"unet.a.weight": lora(), "b.weight": lora()}), tmp_path, as_component="unet")
    assert "several components, and --as unet names a single one" in error.message


# -- names ------------------------------------------------------------------------------------------------------------

SPELLED = {
    "model.diffusion_model.input_blocks.4.1.proj_in.weight": "lora_unet_down_blocks_1_attentions_0_proj_in",
    "unet.input_blocks.0.0.weight": "lora_unet_conv_in",
    "unet.up_blocks.0.upsamplers.0.conv.weight": "lora_unet_up_blocks_0_upsamplers_0_conv",
    "unet.some.out.0.weight": "lora_unet_some_out_0",
    "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight": "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight": "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc.weight":
        "lora_te2_text_model_encoder_layers_3_mlp_fc1",
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLED)
def test_names_are_spelled_as_sd_scripts_has_them(name: str, tmp_path: Path) -> None:
    made = adapter_of({name: lora()})
    base = base_file(made, tmp_path)
    assert component_keys(made, tmp_path) == {SPELLED[name]}
    assert component_keys(made, tmp_path, base=base) == {SPELLED[name]}


def test_the_unet_of_sdxl_keeps_its_original_names(tmp_path: Path) -> None:
    name = "model.diffusion_model.input_blocks.4.1.proj_in"
    made = adapter_of({f"{name}.weight": lora()})
    state = {f"{name}.weight": torch.ones(6, 4), "model.diffusion_model.label_emb.0.0.weight": torch.ones(2, 2)}
    base = saved(state, tmp_path / "base.safetensors")
    assert component_keys(made, tmp_path, base=base) == {"lora_unet_input_blocks_4_1_proj_in"}


ATTENTION = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
PACKED: dict[str, list[tuple[Target, Update]]] = {
    "one": [(Target("", (12, 4)), lora(1, (12, 4)))],
    "several": [(Target("", (12, 4)), lora(1, (12, 4))), (Target("", (12, 4)), lora(2, (12, 4), rank=3, alpha=1.0))],
    "query and value": [
        (Target("", (12, 4), (0, 4)), lora(1, (4, 4))),
        (Target("", (12, 4), (8, 12)), lora(2, (4, 4))),
    ],
    "other rows": [(Target("", (12, 4), (2, 9)), lora(1, (7, 4)))],
}  # fmt: skip
PACKED_LYCORIS: dict[str, list[tuple[Target, Update]]] = {
    **PACKED,
    "loha": of("loha", (12, 4)),
    "dora": of("dora0-lora", (12, 4)),
    "dora of keys": [(Target("", (12, 4), (4, 8)), make_update("dora1-lokr", (4, 4), Maker(1)))],
    "difference": of("add", (12, 4)),
    "difference of rows": [(Target("", (12, 4), (3, 5)), make_update("add", (2, 4), Maker(1)))],
    "replaced": of("replace", (12, 4)),
    "mixed": [
        (Target("", (12, 4), (0, 4)), make_update("lokr", (4, 4), Maker(1))),
        (Target("", (12, 4), (8, 12)), make_update("replace", (4, 4), Maker(2))),
    ],
}


@pytest.mark.parametrize(
    ("case", "to"), [(case, "kohya") for case in PACKED] + [(case, "lycoris") for case in PACKED_LYCORIS]
)
def test_query_key_and_value_of_one_tensor_are_modules_of_their_own(case: str, to: str, tmp_path: Path) -> None:
    made = adapter_of({ATTENTION: PACKED_LYCORIS[case]})
    base = base_file(made, tmp_path)
    out = tmp_path / "x.safetensors"
    loratool.convert(made, out, to, base=base)
    wanted = {"query and value": "qv", "dora of keys": "k", "difference of rows": "qk", "mixed": "qv"}.get(case, "qkv")
    keys = {key.partition(".")[0] for key in load_file(out)}
    assert keys == {f"lora_te2_text_model_encoder_layers_0_self_attn_{letter}_proj" for letter in wanted}
    assert_close(merged(base, out), merged(base, made))


def test_names_that_flatten_alike_are_refused_with_both(tmp_path: Path) -> None:
    made = adapter_of({"unet.a.b_c.weight": lora(), "unet.a_b.c.weight": lora(1), "unet.d.weight": lora(2)})
    error = refused(made, tmp_path)
    assert "unet.a.b_c and unet.a_b.c are one name when flattened" in error.message
    assert "unet.d" not in error.message
    assert "--bake" not in error.hint
    one = adapter_of({"a.b_c.weight": lora(), "d.weight": lora(1)})
    base = saved({f"{n}.weight": torch.ones(6, 4) for n in ("a.b_c", "a_b.c", "d")}, tmp_path / "base.safetensors")
    error = refused(one, tmp_path, base=base, as_component="unet")
    assert "the lora updates of a.b_c.weight: a.b_c and a_b.c are one name when flattened" in error.message


def test_a_bias_is_found_by_the_weight_beside_it(tmp_path: Path) -> None:
    base = saved({"unet.a.bias": torch.ones(6), "unet.b.weight": torch.ones(6, 4)}, tmp_path / "base.safetensors")
    made = adapter_of({"unet.a.bias": of("add", (6,)), "unet.b.weight": lora()})
    error = refused(made, tmp_path, "lycoris", base=base)
    assert "unet.a.bias: the base has no weight beside it" in error.message
    assert "unet.b" not in error.message


def test_a_module_that_a_reader_would_look_for_elsewhere(tmp_path: Path) -> None:
    base = saved({f"{n}.weight": torch.ones(6, 4) for n in ("x.a", "y.a")}, tmp_path / "base.safetensors")
    for to in ("kohya", "lycoris"):
        made = adapter_of({"x.a.weight": lora()})
        assert component_keys(made, tmp_path, to, base=base, as_component="unet") == {"lora_unet_x_a"}
    name = "model.diffusion_model.a.weight"
    base = saved({name: torch.ones(6, 4), "a.weight": torch.ones(6, 4)}, tmp_path / "b.safetensors")
    error = refused(adapter_of({name: lora()}), tmp_path, base=base)
    assert "a reader would take '' or 'model.diffusion_model.' for the place of unet" in error.message


# -- what does not fit ------------------------------------------------------------------------------------------------

ROWS = Target("", (6, 4), rows=(0, 3))
STACK = Target("", (3, 6, 4), experts=3)
STACKED = make_update("lora", (6, 4), Maker(1, "F32", 3))
KOHYA: dict[str, tuple[dict[str, Any], str, str]] = {
    "dora": ({"unet.a.weight": of("dora0-lora")}, "no dora update", "--to lycoris holds it"),
    "loha": ({"unet.a.weight": of("loha")}, "no loha update", "--to lycoris holds it"),
    "difference": ({"unet.a.bias": of("add", (6,))}, "no add update", "--to lycoris holds it"),
    "replaced": ({"unet.a.weight": of("replace")}, "no replace update", "--to lycoris --base BASE holds it"),
    "rows": ({"unet.a.weight": of("replace_rows")}, "no replace_rows update", "--bake holds the whole tensor"),
    "embedding": ({"unet.a.weight": [(Target("", (6, 4), layout="embedding"), lora())]}, "not embeddings", ""),
    "in_out": ({"unet.a.weight": [(Target("", (6, 4), layout="in_out"), lora())]}, "not matrices stored [in, out]", ""),
    "experts": ({"unet.a.weight": [(STACK, STACKED)]}, "not stacks of experts", ""),
    "parameter": ({"unet.a.gate_up": lora()}, "neither the weight nor the bias", ""),
    "alone": ({"weight": lora()}, "neither the weight nor the bias", ""),
    "scale": ({"unet.a.weight": lora(rule="none", alpha=2e38)}, "more than float32 holds", ""),
    "odd rows": ({ATTENTION: lora(shape=(7, 4))}, "no query, key and value", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", KOHYA)
def test_what_kohya_can_not_hold(case: str, tmp_path: Path) -> None:
    updates, why, helps = KOHYA[case]
    error = refused(adapter_of({**updates, "unet.fine.weight": lora()}), tmp_path)
    assert isinstance(error, loratool.Unsupported)
    assert why in error.message
    assert error.message.startswith("kohya can not hold")
    assert error.hint == helps or (helps and helps in error.hint)
    assert "--bake --base BASE" not in error.hint, "there are no whole tensors in its files"


def test_all_misfits_are_named_at_once(tmp_path: Path) -> None:
    error = refused(adapter_of({f"unet.{n}.weight": of(n) for n in ("loha", "lokr", "add")}), tmp_path)
    assert len(error.problems) == 3


LYCORIS: dict[str, dict[str, Any]] = {
    "rows of a table": {"unet.a.weight": of("replace_rows")},
    "embedding": {"unet.a.weight": [(Target("", (6, 4), layout="embedding"), lora())]},
    "two kinds": {"unet.a.weight": [*of("loha"), *of("lora")]},
    "replaced and lora": {"unet.a.weight": [*of("replace"), *of("lora")]},
    "dora of rows": {"unet.a.weight": [(ROWS, make_update("dora0-lora", (3, 4), Maker(1)))]},
    "lokr of rows": {"unet.a.weight": [(ROWS, make_update("lokr", (3, 4), Maker(1)))]},
    "dora of packed inputs": {ATTENTION: of("dora1-lora", (12, 4))},
    "lokr of packed": {ATTENTION: of("lokr", (12, 4))},
    "experts": {"unet.a.weight": [(STACK, STACKED)]},
    "one expert": {"unet.a.weight": [(replace(STACK, experts=None, expert=1), of("replace")[0][1])]},
}  # fmt: skip


@pytest.mark.parametrize("case", LYCORIS)
def test_what_lycoris_can_not_hold_is_baked(case: str, tmp_path: Path) -> None:
    made = adapter_of({**LYCORIS[case], "unet.fine.weight": lora()})
    assert "--bake --base BASE" in refused(made, tmp_path, "lycoris").hint
    base = base_file(made, tmp_path)
    report = loratool.convert(made, tmp_path / "x.safetensors", "lycoris", base=base, bake=True)
    assert len(report.baked) == 1
    assert any("1 replaced tensors are stored as differences" in note for note in report.notes)
    assert_close(merged(base, tmp_path / "x.safetensors"), merged(base, made))


def test_a_replacement_needs_the_base_it_replaces(tmp_path: Path) -> None:
    made = adapter_of({"unet.a.weight": of("replace"), "unet.b.weight": lora()})
    error = refused(made, tmp_path, "lycoris")
    assert "--base BASE" in error.hint
    assert "--bake" not in error.hint
    other = {"unet.a.weight": torch.ones(5, 4), "unet.b.weight": torch.ones(6, 4)}
    error = refused(made, tmp_path, "lycoris", base=saved(other, tmp_path / "base.safetensors"))
    assert "another shape than the base's" in error.message


# -- every kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 2)])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "replace_rows"])
def test_lycoris_holds_every_kind(form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    made = adapter_of({"a.b.weight": of(form, shape, rank=2), "a.b.bias": of("add", (6,)), "n.weight": of("add", (5,)),
                       "n.bias": of("add", (5,))})  # fmt: skip
    base = base_file(made, tmp_path)
    out, again = tmp_path / "x.safetensors", tmp_path / "again.safetensors"
    report = loratool.convert(made, out, "lycoris", base=base, as_component="model")
    assert_close(merged(base, out), merged(base, made))
    state = load_file(out)
    assert {"lycoris_n.w_norm", "lycoris_n.b_norm", "lycoris_a_b.diff_b"} <= state.keys()
    assert any("biases have no difference" in note for note in report.notes) == (form not in ("add", "replace"))
    assert any("per output only" in note for note in report.notes) == form.startswith("dora1")
    # What it reads, it writes again.
    loratool.convert(out, again, "lycoris", base=base, as_component="model")
    assert again.read_bytes() == out.read_bytes()


def renamed(case: Case) -> tuple[Adapter, State]:
    """The same under names of modules, without the layouts that no base of these files has."""
    items = [
        replace(i, target=replace(i.target, name=f"unet.{i.target.name}", layout="")) for i in case.adapter.updates
    ]
    return Adapter(tuple(items)), {f"unet.{name}": value for name, value in case.base.items()}


@given(cases(("lora", "lora-mid"), base_dtypes=("F32", "BF16")))
def test_kohya_holds_every_lora(case: Case) -> None:
    """Of ranges of rows, several of one tensor: of all but experts."""
    adapter, state = renamed(case)
    with tempfile.TemporaryDirectory() as folder:
        base, out = saved(state, Path(folder, "base.safetensors")), Path(folder, "x.safetensors")
        if any(item.target.stacked for item in adapter.updates):
            with pytest.raises(loratool.Unsupported, match="stacks of experts"):
                loratool.convert(adapter, out, "kohya", base=base)
            return
        loratool.convert(adapter, out, "kohya", base=base)
        assert_close(merged(base, out), merged(base, adapter))


@given(cases(base_dtypes=("F32", "BF16")))
def test_lycoris_holds_whatever_there_is_or_holds_it_baked(case: Case) -> None:
    adapter, state = renamed(case)
    with tempfile.TemporaryDirectory() as folder:
        base, out = saved(state, Path(folder, "base.safetensors")), Path(folder, "x.safetensors")
        try:
            loratool.convert(adapter, out, "lycoris", base=base)
        except loratool.Unsupported:
            loratool.convert(adapter, out, "lycoris", base=base, bake=True)
        assert_close(merged(base, out), merged(base, adapter))


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_takes_the_component(cli: Cli, tmp_path: Path) -> None:
    loratool.save(adapter_of({"a.weight": lora()}), tmp_path / "a.lora.safetensors")
    out = tmp_path / "x.safetensors"
    report = cli("convert", tmp_path / "a.lora.safetensors", "--to", "kohya", "--as", "te1", "-o", out, "--json").json
    assert (report["to"], report["updates"]) == ("kohya", 1)
    assert report["notes"][0] == "te1: 1 modules, called lora_te1_..."
    assert {key.partition(".")[0] for key in load_file(out)} == {"lora_te1_a"}
    result = cli("convert", tmp_path / "a.lora.safetensors", "--to", "kohya", "-o", tmp_path / "y.safetensors")
    assert result.code == 2
    assert "say it with --as" in result.err


# -- Flux -------------------------------------------------------------------------------------------------------------

_D = 4  # of a tiny Flux, whose single blocks have an MLP of 4 * _D
_DOUBLE, _SINGLE = "transformer_blocks.0.", "single_transformer_blocks.1."
FLUX = {
    **{f"{_DOUBLE}attn.{name}": (_D, _D) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"{_DOUBLE}attn.{name}": (_D, _D) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
    f"{_DOUBLE}ff.net.0.proj": (4 * _D, _D), f"{_DOUBLE}ff_context.net.2": (_D, 4 * _D),
    f"{_DOUBLE}norm1.linear": (6 * _D, _D),
    **{f"{_SINGLE}attn.{name}": (_D, _D) for name in ("to_q", "to_k", "to_v")},
    f"{_SINGLE}proj_mlp": (4 * _D, _D), f"{_SINGLE}proj_out": (_D, 5 * _D), f"{_SINGLE}norm.linear": (3 * _D, _D),
    "norm_out.linear": (2 * _D, _D), "proj_out": (6, _D), "x_embedder": (_D, 6),
}  # fmt: skip
FLUX_TARGETS = {
    "all": list(FLUX),
    "one of three": [f"{_DOUBLE}attn.to_k", f"{_SINGLE}proj_mlp"],
    "halves that change places": ["norm_out.linear", f"{_SINGLE}proj_out"],
}


def flux_base(folder: Path, kind: str = "FluxTransformer2DModel") -> Path:
    folder.mkdir()
    state = {f"{name}.weight": torch.randn(shape) for name, shape in FLUX.items()}
    saved(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": kind}))
    return folder


def flux_adapter(names: list[str]) -> Adapter:
    """Of several ranks and scales; of a range of rows as well."""
    made: dict[str, list[tuple[Target, Update]]] = {}
    for number, name in enumerate(names):
        shape = FLUX[name]
        whole = lora(number, shape, 1 + number % 3, alpha=0.5 + number)
        part = lora(number + 50, (2, shape[1]), 2, alpha=3.0)
        made[f"{name}.weight"] = [(Target("", shape), whole), (Target("", shape, (1, 3)), part)]
    return adapter_of(made)


@pytest.mark.parametrize("to", ["kohya", "lycoris"])
@pytest.mark.parametrize("case", FLUX_TARGETS)
def test_flux_goes_by_the_originals_names_and_back(case: str, to: str, tmp_path: Path) -> None:
    base, made = flux_base(tmp_path / "base"), flux_adapter(FLUX_TARGETS[case])
    loratool.convert(made, tmp_path / "x.safetensors", to, base=base)
    modules = {key.partition(".")[0] for key in load_file(tmp_path / "x.safetensors")}
    original = (
        "lora_unet_double_blocks_0_",
        "lora_unet_single_blocks_1_",
        "lora_unet_final_layer_",
        "lora_unet_img_in",
    )
    assert all(module.startswith(original) for module in modules)
    assert_close(merged(base, tmp_path / "x.safetensors"), merged(base, made))


def test_flux_halves_are_stored_in_the_originals_order(tmp_path: Path) -> None:
    made = adapter_of({"norm_out.linear.weight": lora(1, (8, 4)), f"{_SINGLE}proj_out.weight": lora(2, (4, 20))})
    loratool.convert(made, tmp_path / "x.safetensors", "kohya")
    up = load_file(tmp_path / "x.safetensors")["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]  # [out, rank]
    B = next(item.update for item in made.updates if item.target.name.startswith("norm_out")).components()["B"].read()
    assert torch.equal(up, torch.cat([B[4:], B[:4]]))


def test_names_that_several_models_have_are_not_guessed(tmp_path: Path) -> None:
    """SD 3 and others have double blocks so, too; and what holds more blocks than Flux is none."""
    double = adapter_of({f"{_DOUBLE}attn.to_q.weight": lora(1, (4, 4))})
    error = refused(double, tmp_path, as_component="unet")
    assert "Flux, SD 3 and others have such names" in str(error)
    assert "--base BASE" in error.hint
    deep = adapter_of({f"single_transformer_blocks.{n}.attn.to_q.weight": lora(n, (4, 4)) for n in (0, 39)})
    assert "Flux, SD 3 and others have such names" in str(refused(deep, tmp_path, as_component="unet"))
    other = flux_base(tmp_path / "base", "SD3Transformer2DModel")
    report = loratool.convert(double, tmp_path / "sd3.safetensors", "kohya", base=other)
    assert {key.partition(".")[0] for key in load_file(tmp_path / "sd3.safetensors")} == {
        "lora_transformer_transformer_blocks_0_attn_to_q"
    }
    assert any("SD3Transformer2DModel is not tested" in note for note in report.notes)


@pytest.mark.parametrize("to", ["kohya", "lycoris"])
def test_what_can_not_be_joined_is_refused(to: str, tmp_path: Path) -> None:
    base = flux_base(tmp_path / "base")
    made = adapter_of({f"{_DOUBLE}attn.to_q.weight": of("loha", (4, 4))})
    error = refused(made, tmp_path, to, base=base)
    assert "only LoRAs can be joined so" in str(error)
    assert "--as model" in error.hint
    loratool.convert(made, tmp_path / "own.safetensors", "lycoris", base=base, as_component="model")
    assert_close(merged(base, tmp_path / "own.safetensors"), merged(base, made))

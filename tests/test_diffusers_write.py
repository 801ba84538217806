"""Writing diffusers' adapters: names, components, the header's config, and what is refused; without diffusers."""

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
from hypothesis import assume, given
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import Case, Maker, cases, make_update, same_bits, tensors_of
from torch import Tensor
from writer_cases import said

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.updates import Add, Replace, Scaling, Update

FILE = "pytorch_lora_weights.safetensors"
State = dict[str, Tensor]
Q, OUT = "unet.mid_block.attn1.to_q.weight", "unet.mid_block.attn1.to_out.0.weight"
CONV = "unet.conv_in.weight"
TEXT = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.weight"
FC = "text_encoder.text_model.encoder.layers.1.mlp.fc1.weight"
NORM = "transformer.transformer_blocks.0.attn.norm_q.weight"
FLUX = "transformer.transformer_blocks.0.attn.to_q.weight"


def update(
    form: str = "lora", shape: tuple[int, ...] = (6, 4), seed: int = 1, dtype: str = "F32", **options: Any
) -> Any:
    return make_update(form, shape, Maker(seed, dtype), **options)


def adapter_of(*items: tuple[str, Update] | tuple[Target, Update]) -> Adapter:
    made = []
    for target, one in items:
        if isinstance(target, str):
            parts = one.components()
            shape = parts["B"].shape[:1] + parts["A"].shape[1:] if "A" in parts else (6, 4)
            target = Target(target, parts["value"].shape if "value" in parts else shape)
        made.append(Targeted(target, one))
    return Adapter(tuple(made))


def written(folder: Path) -> tuple[State, dict[str, Any]]:
    """The tensors, and the LoraConfigs of the header as one flat document."""
    assert [file.name for file in folder.iterdir()] == [FILE]
    with safe_open(folder / FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    document = json.loads(metadata["lora_adapter_metadata"])
    assert isinstance(document, dict)
    return load_file(folder / FILE), document


def convert(adapter: Adapter | Path, tmp_path: Path, **options: Any) -> tuple[State, dict[str, Any]]:
    loratool.convert(adapter, tmp_path / "out", "diffusers", **options)
    return written(tmp_path / "out")


def pipeline(folder: Path, kind: str, **components: tuple[dict[str, Any], State]) -> Path:
    """A pipeline's folder: each component with its config and its tensors."""
    folder.mkdir()
    index = {"_class_name": kind} | {name: ["diffusers", "Model"] for name in components}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, (config, state) in components.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(state, folder / name / "model.safetensors")
    return folder


def ones(*names: str, shape: tuple[int, ...] = (6, 4)) -> State:
    return {name.partition(".")[2]: torch.ones(shape) for name in names}


UNET = {"_class_name": "UNet2DConditionModel"}

# -- what is in the file ----------------------------------------------------------------------------------------------


def test_the_keys_and_the_config(tmp_path: Path) -> None:
    made = adapter_of(
        (Q, update(rank=2, alpha=4.0)),
        (OUT, update(rank=3, alpha=6.0, dtype="BF16")),
        (CONV, update(shape=(6, 4, 3, 3), rank=2, alpha=1.0)),
        (TEXT, update(rank=2, rule="alpha/sqrt(rank)", alpha=5.0)),
    )
    state, config = convert(made, tmp_path)
    text = TEXT.removesuffix(".weight")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == {
        "unet.mid_block.attn1.to_q.lora_A.weight": (2, 4),
        "unet.mid_block.attn1.to_q.lora_B.weight": (6, 2),
        "unet.mid_block.attn1.to_out.0.lora_A.weight": (3, 4),
        "unet.mid_block.attn1.to_out.0.lora_B.weight": (6, 3),
        "unet.conv_in.lora_A.weight": (2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": (6, 2, 1, 1),
        f"{text}.lora_A.weight": (2, 4),
        f"{text}.lora_B.weight": (6, 2),
    }
    assert config == {
        "unet.peft_type": "LORA",
        "unet.r": 2,
        "unet.lora_alpha": 1,
        "unet.rank_pattern": {r"^mid_block\.attn1\.to_out\.0": 3},
        "unet.alpha_pattern": {r"^mid_block\.attn1\.to_out\.0": 6, r"^mid_block\.attn1\.to_q": 4},
        "unet.use_rslora": False,
        "unet.use_dora": False,
        "unet.target_modules": ["conv_in", "mid_block.attn1.to_out.0", "mid_block.attn1.to_q"],
        "text_encoder.peft_type": "LORA",
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 5,
        "text_encoder.use_rslora": True,
        "text_encoder.use_dora": False,
        "text_encoder.target_modules": ["encoder.layers.1.self_attn.q_proj"],
    }


def test_dora_and_biases(tmp_path: Path) -> None:
    bias = FC.removesuffix("weight") + "bias"
    made = adapter_of(
        (Q, update("dora0-lora")),
        (CONV, update("lora", (6, 4, 3, 3))),
        (TEXT, update(rank=2, alpha=4.0)),
        (FC, update(rank=2, alpha=4.0)),
        (bias, update("add", (6,), alpha=1.0)),
    )
    items = {item.target.name: item for item in made.updates}
    items[Q] = replace(items[Q], target=Target(Q, (6, 4)))
    items[CONV] = Targeted(Target(CONV, (6, 4, 3, 3)), update("dora0-lora", (6, 4, 3, 3)))
    state, config = convert(Adapter(tuple(items.values())), tmp_path)
    assert state["unet.mid_block.attn1.to_q.lora_magnitude_vector"].shape == (6,)
    assert state["unet.conv_in.lora_magnitude_vector"].shape == (1, 6, 1, 1)
    assert config["unet.use_dora"] is True
    assert config["text_encoder.use_dora"] is False
    assert config["text_encoder.lora_bias"] is True
    assert "unet.lora_bias" not in config
    value = made.updates[-1].update.components()["value"].read()
    assert torch.equal(state[f"{FC.removesuffix('.weight')}.lora_B.bias"], value / 2)
    assert torch.equal(state[f"{TEXT.removesuffix('.weight')}.lora_B.bias"], torch.zeros(6))


def test_the_config_fits_text_encoders_of_older_and_newer_names(tmp_path: Path) -> None:
    """diffusers drops `text_model.` from the tensors' names where the model has none, not from the config."""
    made = adapter_of(
        (TEXT, update(rank=2, alpha=4.0)), (FC, update(rank=3, alpha=5.0)), (FC.replace("fc1", "fc2"), update())
    )
    _, config = convert(made, tmp_path)
    assert config["text_encoder.rank_pattern"] == {r"^(text_model\.)?encoder\.layers\.1\.mlp\.fc1": 3}
    targets = config["text_encoder.target_modules"]
    assert targets == [f"encoder.layers.1.{name}" for name in ("mlp.fc1", "mlp.fc2", "self_attn.q_proj")]


def test_a_text_encoder_without_attention_has_the_names_before_pefts(tmp_path: Path) -> None:
    """Of the others diffusers says "Could not automatically infer state dict type"."""
    state, _ = convert(adapter_of((FC, update())), tmp_path)
    module = FC.removesuffix(".weight")
    assert state.keys() == {f"{module}.lora_linear_layer.{side}.weight" for side in ("down", "up")}


def test_a_text_encoders_magnitude_has_the_ending_that_transformers_looks_for(tmp_path: Path) -> None:
    dora = update("dora0-lora")
    state, _ = convert(adapter_of((Target(TEXT, (6, 4)), dora)), tmp_path)
    name = f"{TEXT.removesuffix('.weight')}.lora_magnitude_vector.weight"
    assert torch.equal(state[name], dora.magnitude.read())


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.to_q", "b.to_q", "b.to_k"], ["to_q"]),
        (["a.to_q", "b.to_q", "c.to_q"], ["a.to_q", "b.to_q"]),
        (["a.to_q", "b.to_q", "x.a.to_q"], r"a\.to_q|b\.to_q"),
        (["a.to_q", "b.to_q", "x.to_q.to_q"], ["a.to_q", "b.to_q"]),
    ],
)
def test_target_modules_are_those_of_the_base(names: list[str], wanted: object, tmp_path: Path) -> None:
    base = pipeline(
        tmp_path / "base", "StableDiffusionPipeline", unet=(UNET, ones(*(f"unet.{n}.weight" for n in names)))
    )
    made = adapter_of(("unet.a.to_q.weight", update()), ("unet.b.to_q.weight", update()))
    assert convert(made, tmp_path, base=base)[1]["unet.target_modules"] == wanted


def test_a_number_is_no_target_module(tmp_path: Path) -> None:
    """It would hit modules without tensors as well, such as the Dropout of another list."""
    state = ones("unet.a.to_out.0.weight", "unet.b.to_out.0.weight", "unet.q.weight")
    base = pipeline(tmp_path / "base", "StableDiffusionPipeline", unet=(UNET, state))
    made = adapter_of(("unet.a.to_out.0.weight", update()), ("unet.b.to_out.0.weight", update()))
    assert convert(made, tmp_path, base=base)[1]["unet.target_modules"] == ["a.to_out.0", "b.to_out.0"]


# -- round trips ------------------------------------------------------------------------------------------------------


def test_nothing_is_folded_that_fits(tmp_path: Path) -> None:
    made = adapter_of(
        (Q, update("dora0-lora", rank=2, alpha=6.0)),
        (OUT, update("dora0-lora", rank=3, rule="none", alpha=0.3, dtype="F16")),
        (TEXT, update(rank=1, alpha=-1.0, dtype="BF16")),
        (FC, update(rank=2, rule="alpha", alpha=5.0)),
        (Target("text_encoder_2.embed.token.weight", (6, 4), layout="embedding"), update("dora1-lora", rank=2)),
        ("text_encoder_2.embed.q_proj.weight", update("dora0-lora", rank=2)),
        (Target("prior.embed.weight", (6, 4), layout="embedding"), update(rank=2)),
        (FLUX, update(rank=2, rule="alpha/sqrt(rank)", alpha=3.0)),
        (NORM, Replace(TensorRef.of(torch.rand(4)))),
    )
    loratool.convert(made, tmp_path / "a", "diffusers")
    loratool.convert(tmp_path / "a", tmp_path / "back.safetensors", "native")
    back = loratool.load(tmp_path / "back.safetensors").targets()
    assert back.keys() == made.targets().keys()
    for name, (item,) in made.targets().items():
        again = back[name][0]
        assert again.target == item.target
        assert again.update.kind == item.update.kind
        if item.update.scaling is not None:
            assert again.update.scaling is not None
            assert again.update.scaling.scale == item.update.scaling.scale
        one, two = item.update.components(), again.update.components()
        assert same_bits({k: r.read() for k, r in one.items()}, {k: r.read() for k, r in two.items()}), name
    loratool.convert(tmp_path / "a", tmp_path / "b", "diffusers")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


@pytest.mark.parametrize(
    ("down", "up", "text_down"),
    [
        ("mid_block.attn1.processor.to_q_lora.down", "mid_block.attn1.processor.to_q_lora.up", "to_q_lora"),
        ("mid_block.attn1.to_q.lora.down", "mid_block.attn1.to_q.lora.up", "q_proj.lora_linear_layer"),
    ],
    ids=["oldest", "middle"],
)
def test_older_generations_become_the_current_one(down: str, up: str, text_down: str, tmp_path: Path) -> None:
    A, B, attention = torch.randn(2, 4), torch.randn(6, 2), TEXT.removesuffix(".q_proj.weight")
    state = {
        f"unet.{down}.weight": A, f"unet.{up}.weight": B,
        f"{attention}.{text_down}.down.weight": A.clone(), f"{attention}.{text_down}.up.weight": B.clone(),
    }  # fmt: skip
    save_file(state, tmp_path / "old.safetensors")
    found, config = convert(tmp_path / "old.safetensors", tmp_path)
    for module in (Q.removesuffix(".weight"), TEXT.removesuffix(".weight")):
        assert torch.equal(found.pop(f"{module}.lora_A.weight"), A)
        assert torch.equal(found.pop(f"{module}.lora_B.weight"), B)
    assert not found
    assert config["unet.lora_alpha"] == config["unet.r"] == 2


@given(cases(("lora", "lora-mid", "dora0-lora"), base_dtypes=("F32",)))
def test_whatever_fits_arrives(case: Case) -> None:
    """Ranges of rows, several LoRAs of one tensor, cores of convolutions: the merged model is the same."""
    items = [
        replace(i, target=replace(i.target, name=f"unet.{i.target.name.replace('.weight', '.fc.weight')}", layout=""))
        for i in case.adapter.updates
    ]
    kinds = {item.update.kind for item in items}
    assume(all(not item.target.stacked and len(item.target.shape) < 6 for item in items) and len(kinds) == 1)
    assume("dora" not in kinds or all(item.target.covers_all for item in items))
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder, "base.safetensors"), Path(folder, "out")
        save_file({f"unet.{n.replace('.weight', '.fc.weight')}": value for n, value in case.base.items()}, base)
        loratool.convert(Adapter(tuple(items)), out, "diffusers")
        got, want = merged(base, out), merged(base, Adapter(tuple(items)))
        for name, value in want.items():
            bound = 2.0**-21 * float(value.double().abs().sum() + 1)
            torch.testing.assert_close(got[name], value, rtol=0, atol=bound, msg=name)


def merged(base: Path, adapter: Path | Adapter) -> State:
    with tempfile.TemporaryDirectory() as folder:
        loratool.merge(base, adapter, Path(folder, "out.safetensors"))
        return tensors_of(Path(folder, "out.safetensors"))


# -- components -------------------------------------------------------------------------------------------------------

BARE = adapter_of(("mid_block.attn1.to_q.weight", update()))


@pytest.mark.parametrize("name", ["unet", "transformer_2", "text_encoder"])
def test_as_names_the_component(name: str, tmp_path: Path) -> None:
    module = "encoder.q_proj" if name == "text_encoder" else "blocks.0.to_q"
    state, config = convert(adapter_of((f"{module}.weight", update())), tmp_path, as_component=name)
    assert state.keys() == {f"{name}.{module}.lora_{side}.weight" for side in "AB"}
    assert {key.partition(".")[0] for key in config} == {name}


@pytest.mark.parametrize(
    ("folder", "config", "wanted"),
    [
        ("x", UNET, "unet"),
        ("x", {"_class_name": "SD3Transformer2DModel"}, "transformer"),
        ("x", {"_class_name": "AutoencoderKL"}, ""),
        ("x", {"architectures": ["CLIPTextModel"]}, ""),
        ("pipe/transformer_2", {"_class_name": "WanTransformer3DModel"}, "transformer_2"),
        ("pipe/text_encoder_2", {"architectures": ["CLIPTextModel"]}, "text_encoder_2"),
        ("pipe/vae", {"_class_name": "AutoencoderKL"}, ""),
    ],
)
def test_a_base_of_one_model_says_its_component(
    folder: str, config: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    made = adapter_of(("blocks.0.linear.weight", update()))
    state = {"blocks.0.linear.weight": torch.ones(6, 4)}
    name = folder.rpartition("/")[2]
    path = pipeline(tmp_path / "pipe", "WanPipeline", **{name: (config, state)}) / name
    if folder == name:
        path = path.rename(tmp_path / name)
    if wanted:
        found, _ = convert(made, tmp_path, base=path)
        assert {key.partition(".")[0] for key in found} == {wanted}
    else:
        assert "--as" in refused(made, tmp_path, base=path).hint


def test_what_one_model_says_of_its_tensors_counts(tmp_path: Path) -> None:
    """JoyImage's transformer in diffusers has `double_blocks`; they are the original's name in Flux alone."""
    name = "double_blocks.0.img_attn.qkv"
    made = adapter_of((f"{name}.weight", update()))
    assert "names of the original model" in str(refused(made, tmp_path, as_component="transformer"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(json.dumps({"_class_name": "OtherTransformer3DModel"}))
    save_file({f"{name}.weight": torch.ones(6, 4)}, tmp_path / "x" / "model.safetensors")
    state, _ = convert(made, tmp_path, base=tmp_path / "x")
    assert f"transformer.{name}.lora_A.weight" in state


# -- what does not fit ------------------------------------------------------------------------------------------------


def refused(adapter: Adapter, tmp_path: Path, **options: Any) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.convert(adapter, tmp_path / "refused", "diffusers", **options)
    assert not (tmp_path / "refused").exists()
    assert "--bake" not in caught.value.hint
    return caught.value


BIAS = FC.removesuffix("weight") + "bias"
REFUSED: dict[str, tuple[Adapter, str]] = {
    "loha": (adapter_of((Target(Q, (6, 4)), update("loha"))), "no loha update"),
    "lokr": (adapter_of((Target(Q, (6, 4)), update("lokr"))), "no lokr update"),
    "whole": (adapter_of((OUT, update()), (Q, update("replace"))), "no whole tensors"),
    "norm of a unet": (
        adapter_of((Q, update()), ("unet.x.norm_q.weight", update("replace", (6,)))),
        "no whole tensors",
    ),
    "rows": (adapter_of((Target(Q, (6, 4)), update("replace_rows"))), "no whole tensors"),
    "norms alone": (adapter_of((NORM, Replace(TensorRef.of(torch.rand(4))))), "not whole tensors alone"),
    "difference": (adapter_of((Q, update()), (OUT, update("add"))), "bias of a LoRA layer"),
    "lone bias": (adapter_of((TEXT, update()), (BIAS, update("add", (6,)))), "bias of a LoRA layer"),
    "bias beside dora": (
        adapter_of((Target(FC, (6, 4)), update("dora0-lora")), (BIAS, update("add", (6,)))),
        "bias of a LoRA layer",
    ),
    "experts": (adapter_of((Target(Q, (3, 6, 4), expert=1), update())), "stacked experts"),
    "conv1d": (adapter_of((Target(Q, (6, 4), layout="in_out"), update())), "a Conv1D"),
    "dimensions": (adapter_of((CONV, update(shape=(2, 2, 1, 1, 1, 1)))), "so many dimensions"),
    "parameter": (adapter_of(("unet.pos_embed", update())), "has no layer for it"),
    "another name": (
        adapter_of((FC.replace("fc1", "to_q"), update()), (TEXT, update())),
        "its name means another module",
    ),
    "lora inside lora": (
        adapter_of((Q, update()), (Q.replace("weight", "a.weight"), update())),
        "inside another module",
    ),
    "embedding alone": (
        adapter_of((Target("text_encoder.emb.weight", (6, 4), layout="embedding"), update())),
        "by embeddings alone",
    ),
    "dora of rows": (adapter_of((Target(Q, (6, 4), rows=(0, 3)), update("dora0-lora", (3, 4)))), "whole layers only"),
    "dora of the other axis": (adapter_of((Target(Q, (6, 4)), update("dora1-lora"))), "another axis"),
    "dora beside lora": (
        adapter_of((Q, update()), (CONV, update()), (Target(OUT, (6, 4)), update("dora0-lora"))),
        "2 others are LoRA without",
    ),
    "no component": (BARE, "to which component"),
    "a vae beside": (adapter_of((Q, update()), ("vae.decoder.to_q.weight", update())), "loads adapters into unet"),
    "third text encoder": (
        adapter_of(("text_encoder_3.block.0.q_proj.weight", update())),
        "takes no adapter of its text_encoder_3",
    ),
    "ldm names": (adapter_of(("unet.input_blocks.1.0.to_q.weight", update())), "names of the original model"),
    "flux names": (adapter_of(("transformer.single_blocks.1.linear1.weight", update())), "names of the original model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_diffusers_can_not_hold(case: str, tmp_path: Path) -> None:
    adapter, why = REFUSED[case]
    error = refused(adapter, tmp_path)
    assert isinstance(error, loratool.Unsupported)
    assert error.message.startswith("diffusers can not hold the ")
    assert why in error.message
    assert any(name in error.message for name in adapter.targets())


def test_all_are_named_at_once(tmp_path: Path) -> None:
    made = adapter_of(
        (Target(Q, (6, 4)), update("loha")), (OUT, update()), (CONV, update("replace")), ("vae.q.weight", update())
    )
    messages = [problem.message for problem in refused(made, tmp_path).problems]
    assert len(messages) == 3
    assert any(Q in message and "loha updates" in message for message in messages)


@pytest.mark.parametrize(
    ("adapter", "component", "why"),
    [
        (BARE, "te1", "it knows no component 'te1'"),
        (adapter_of((Q, update())), "transformer", "--as says transformer"),
    ],
)
def test_a_component_that_can_not_be(adapter: Adapter, component: str, why: str, tmp_path: Path) -> None:
    error = refused(adapter, tmp_path, as_component=component)
    assert why in error.message
    assert "--as" in error.hint


def test_the_component_that_it_is_already(tmp_path: Path) -> None:
    assert (
        f"{Q.removesuffix('.weight')}.lora_A.weight"
        in convert(adapter_of((Q, update())), tmp_path, as_component="unet")[0]
    )


@pytest.mark.parametrize(
    ("kind", "name", "fits"),
    [
        ("StableDiffusionXLPipeline", "text_encoder_2", True),
        ("StableDiffusion3Pipeline", "text_encoder_2", True),
        ("StableDiffusionPipeline", "text_encoder_2", False),
        ("FluxPipeline", "text_encoder_2", False),
        ("FluxPipeline", "text_encoder", True),
        ("Flux2Pipeline", "text_encoder", False),
        ("NewPipeline", "text_encoder_2", True),
    ],
)
def test_text_encoders_that_the_loader_takes(kind: str, name: str, fits: bool, tmp_path: Path) -> None:
    """It leaves the others out without a word."""
    base = pipeline(tmp_path / "base", kind, **{name: ({"architectures": ["X"]}, ones("x.l.q_proj.weight"))})
    made = adapter_of((f"{name}.l.q_proj.weight", update()))
    if fits:
        report = loratool.convert(made, tmp_path / "out", "diffusers", base=base)
        assert any("not every pipeline" in note for note in report.notes) == (kind == "NewPipeline")
    else:
        assert f"takes no adapter of its {name}" in refused(made, tmp_path, base=base).message


def test_a_bias_needs_one_in_every_layer(tmp_path: Path) -> None:
    """lora_bias is for all layers, and PEFT fuses not even zeros into a layer without a bias."""
    names = ["l.q_proj.weight", "l.k_proj.weight"]
    state: State = {name: torch.ones(6, 4) for name in names} | {"l.q_proj.bias": torch.ones(6)}
    made = adapter_of(
        *((f"text_encoder.{name}", update()) for name in names),
        ("text_encoder.l.q_proj.bias", Add(TensorRef.of(torch.ones(6)), Scaling(scale=1.0))),
    )
    config: dict[str, Any] = {"architectures": ["CLIPTextModel"]}
    base = pipeline(tmp_path / "base", "StableDiffusionPipeline", text_encoder=(config, state))
    assert "where every layer with LoRA has a bias" in refused(made, tmp_path, base=base).message
    whole = state | {"l.k_proj.bias": torch.ones(6)}
    base = pipeline(tmp_path / "whole", "StableDiffusionPipeline", text_encoder=(config, whole))
    assert "text_encoder.l.k_proj.lora_B.bias" in convert(made, tmp_path, base=base)[0]


@pytest.mark.parametrize(("kind", "fits"), [("FluxTransformer2DModel", True), ("SD3Transformer2DModel", False)])
def test_norms_are_for_flux(kind: str, fits: bool, tmp_path: Path) -> None:
    state = ones(FLUX) | ones(NORM, shape=(4,))
    base = pipeline(tmp_path / "base", "NewPipeline", transformer=({"_class_name": kind}, state))
    made = adapter_of((FLUX, update()), (NORM, Replace(TensorRef.of(torch.rand(4)))))
    if fits:
        found, config = convert(made, tmp_path, base=base)
        assert torch.equal(found[NORM], made.updates[1].update.components()["value"].read())
        assert config["transformer.target_modules"] == ["to_q"]
    else:
        assert "apart from the norms of Flux" in refused(made, tmp_path, base=base).message


# -- notes, the command, and embeddings that are read -----------------------------------------------------------------


def test_notes(tmp_path: Path) -> None:
    made = adapter_of((TEXT, update()), (TEXT, update(rank=3)), (FLUX, update()), (NORM, update("replace", (4,))))
    notes = said(loratool.convert(made, tmp_path / "out", "diffusers"))
    assert [note.split(":")[0].split(" are ")[0] for note in notes] == [
        "1 tensors had several LoRAs",
        "not every pipeline loads an adapter into text_encoder",
        "1 norms",
    ]
    assert not said(loratool.convert(adapter_of((Q, update())), tmp_path / "other", "diffusers"))


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    loratool.save(BARE, tmp_path / "a.lora.safetensors")
    given = ("convert", tmp_path / "a.lora.safetensors", "--to", "diffusers", "-o", tmp_path / "out")
    assert cli(*given).code == 2
    report = cli(*given, "--as", "unet", "--json").json
    assert (report["to"], report["updates"]) == ("diffusers", 1)
    assert [Path(file).name for file in report["files"]] == [FILE]
    text = cli("inspect", tmp_path / "out", "--json").json
    assert [layer["target"] for layer in text["layers"]] == [Q]


E, D = "text_encoder.emb.lora_embedding_A", "text_encoder.emb.lora_embedding_B"
BAD_EMBEDDINGS: dict[str, tuple[Mapping[str, tuple[int, ...]], str]] = {
    "no B": ({E: (2, 6)}, "an embedding has lora_embedding_A and lora_embedding_B"),
    "linear as well": ({E: (2, 6), D: (4, 2), "text_encoder.emb.lora_A.weight": (2, 4)}, "an embedding has"),
    "ranks differ": ({E: (2, 6), D: (4, 3)}, "they must be [rank, tokens] and [dim, rank]"),
}


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
def test_embeddings_that_are_none(case: str, tmp_path: Path) -> None:
    shapes, why = BAD_EMBEDDINGS[case]
    other = {f"text_encoder.q_proj.lora_{side}.weight": (2, 2) for side in "AB"}
    save_file({name: torch.ones(shape) for name, shape in {**shapes, **other}.items()}, tmp_path / FILE)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.load(tmp_path / FILE)
    assert why in str(caught.value)

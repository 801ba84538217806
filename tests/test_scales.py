"""Where an adapter says how strong it is: every place is read, and none is believed against another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft_cases
import pytest
import torch
from conftest import Cli, Kit
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.conventions import peft_config, peft_fields

State = dict[str, Tensor]
RANK, ALPHA = 4, 6
Q, K = "blocks.0.q", "blocks.1.k"
TEXT = "text_encoder.layers.0.q_proj"


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def values(*shape: int) -> Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) / 64


def pair(module: str, down: str = "lora_A.weight", up: str = "lora_B.weight", rank: int = RANK) -> State:
    return {f"{module}.{down}": values(rank, 5), f"{module}.{up}": values(6, rank)}


def turned(module: str, down: str, up: str) -> State:
    return {f"{module}.{down}": values(5, RANK), f"{module}.{up}": values(RANK, 6)}


DOWN = ("lora_down.weight", "lora_up.weight")
# A file of each convention that keeps no alpha of its own.
FILES: dict[str, State] = {
    "peft": pair(f"base_model.model.{Q}"),
    "peft, bare": pair("model.layers.0.q_proj"),
    "peft-wrapped": pair(Q, "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": pair(f"unet.{Q}"),
    "diffusers, ComfyUI's names": pair(f"diffusion_model.{Q}"),
    "diffusers, middle": pair(f"transformer.{Q}", "lora.down.weight", "lora.up.weight"),
    "kohya": pair("lora_unet_blocks_0_q", *DOWN),
    "kohya, no prefix": pair(Q, *DOWN),
    "lycoris": {
        f"lycoris_blocks_0_q.{name}": values(*shape)
        for name, shape in {"hada_w1_a": (6, 4), "hada_w1_b": (4, 5), "hada_w2_a": (6, 4), "hada_w2_b": (4, 5)}.items()
    },
    "loralib": pair(Q, "lora_A", "lora_B"),
    "torchtune": pair("layers.0.attn.q_proj", "lora_a.weight", "lora_b.weight"),
    "mlx": turned("model.layers.0.q_proj", "lora_a", "lora_b"),
    "megatron": pair(
        "decoder.layers.0.self_attention.linear_proj", "adapter.linear_in.weight", "adapter.linear_out.weight"
    ),
    "litgpt": pair("transformer.h.0.attn.proj", "lora_A", "lora_B")
    | {"transformer.h.0.attn.proj.linear.weight": values(6, 5)},
}
SPELLINGS = ["lora_alpha", "alpha", "network_alpha", "ss_network_alpha"]


def written(path: Path, state: State, metadata: Mapping[str, str] | None = None) -> Path:
    save_file(state, path, {"format": "pt", **(metadata or {})})
    return path


def scales(path: Path, **options: Any) -> set[float | None]:
    """What the updates of a file are multiplied by, seen without its base."""
    return {layer.scale for layer in loratool.inspect(path, **options).layers}


def refused(path: Path, **options: Any) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.load(path, **options)
    return caught.value


# --- the header ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("convention", FILES)
def test_an_alpha_in_the_header_is_the_alpha(convention: str, spelling: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", FILES[convention], {spelling: str(ALPHA), "ss_network_dim": str(RANK)})
    summary = loratool.inspect(path)
    assert summary.convention == convention.partition(",")[0]
    assert {layer.scale for layer in summary.layers} == {ALPHA / RANK}
    assert f"alpha is {ALPHA}, from {spelling} in the header" in summary.notes


@pytest.mark.parametrize("convention", FILES)
def test_an_alpha_beside_the_headers_is_refused(convention: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", FILES[convention], {"lora_alpha": str(ALPHA)})
    error = refused(path, alpha=8, scaling="alpha/rank")
    assert error.code == "E-OPTION"
    assert "--alpha 8 is given, and the file says alpha itself: 6 (lora_alpha in the header)" in error.message
    assert refused(path, scaling="alpha/rank").code == "E-OPTION"


def test_only_the_rule_is_asked_for_where_an_alpha_could_mean_two_things(tmp_path: Path) -> None:
    """LLMs from scratch: alpha in one edition, alpha/rank in the next."""
    state = {f"{Q}.linear.weight": values(6, 5), f"{Q}.lora.A": values(5, RANK), f"{Q}.lora.B": values(RANK, 6)}
    path = written(tmp_path / "a.safetensors", state, {"lora_alpha": str(ALPHA)})
    assert scales(path) == {None}
    assert scales(path, scaling="alpha") == {ALPHA}
    assert scales(path, scaling="alpha/rank") == {ALPHA / RANK}
    assert scales(path, scaling="alpha/rank", alpha=ALPHA) == {ALPHA / RANK}
    error = refused(path, scaling="alpha/rank", alpha=8)
    assert (error.code, "the file says alpha itself: 6" in error.message) == ("E-OPTION", True)


@pytest.mark.parametrize(
    "spelling", ["transformer.lora_alpha", "unet_lora_alpha", "denoiser.alpha", "model.network_alpha"]
)
@pytest.mark.parametrize("names", ["transformer.", "diffusion_model.", ""])
def test_an_alpha_of_the_one_component_goes_by_any_of_its_names(spelling: str, names: str, tmp_path: Path) -> None:
    state = pair(f"{names}{Q}", *DOWN)
    assert scales(written(tmp_path / "a.safetensors", state, {spelling: str(ALPHA)})) == {ALPHA / RANK}


@pytest.mark.parametrize("form", ["flat", "json", "nested"])
def test_each_component_has_its_own(form: str, tmp_path: Path) -> None:
    numbers = {"unet": {"r": RANK, "lora_alpha": 2}, "text_encoder": {"r": RANK, "lora_alpha": 12}}
    flat = {f"{part}.{name}": number for part, entries in numbers.items() for name, number in entries.items()}
    metadata = {
        "flat": {name: str(number) for name, number in flat.items()},
        "json": {"lora_adapter_metadata": json.dumps(flat)},
        "nested": {"lora_adapter_metadata": json.dumps(numbers)},
    }[form]
    path = written(tmp_path / "a.safetensors", pair(f"unet.{Q}") | pair(TEXT), metadata)
    found = {layer.target.partition(".")[0]: layer.scale for layer in loratool.inspect(path).layers}
    assert found == {"unet": 2 / RANK, "text_encoder": 12 / RANK}


def test_the_components_of_flattened_names_have_their_own(tmp_path: Path) -> None:
    state = pair("lora_unet_blocks_0_q", *DOWN) | pair("lora_te2_layers_0_q", *DOWN)
    path = written(
        tmp_path / "a.safetensors", state, {"transformer.lora_alpha": "2", "text_encoder_2.lora_alpha": "12"}
    )
    found = {layer.target[:9]: layer.scale for layer in loratool.inspect(path).layers}
    assert found == {"lora_unet": 2 / RANK, "lora_te2_": 12 / RANK}


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_alpha": "6", "use_rslora": "true"},
        {"ss_network_alpha": "6", "ss_network_args": '{"rs_lora": "True"}'},
        {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 6, "use_rslora": True})},
    ],
)
@pytest.mark.parametrize("convention", ["kohya", "diffusers", "peft"])
def test_rank_stabilised_scales(metadata: dict[str, str], convention: str, tmp_path: Path) -> None:
    assert scales(written(tmp_path / "a.safetensors", FILES[convention], metadata)) == {6 / RANK**0.5}


@pytest.mark.parametrize("value", ["Dynamic", "None", ""])
def test_what_says_nothing_leaves_the_rule_of_the_loaders(value: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", FILES["kohya"], {"ss_network_alpha": value, "ss_network_dim": value})
    assert scales(path) == {1}


def test_layers_with_numbers_of_their_own_are_not_guessed(tmp_path: Path) -> None:
    """`conv_alpha` is for convolutions: without alphas in the file, which layers the header's is for is not certain."""
    told = {"ss_network_alpha": "6", "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1"}'}
    for convention in ("kohya", "diffusers"):
        path = written(tmp_path / f"{convention}.safetensors", FILES[convention], told)
        assert scales(path) == {None}
        assert scales(path, alpha=6, scaling="alpha/rank") == {6 / RANK}


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ({"lora_alpha": "six"}, "E-CONFIG"),
        ({"lora_alpha": "nan"}, "E-CONFIG"),
        ({"lora_alpha": "6", "alpha_pattern": '{"q": 2}'}, "E-UNSUPPORTED"),
        ({"lora_adapter_metadata": "{"}, "E-CONFIG"),
        ({"lora_adapter_metadata": '{"r": 4, "lora_alpha": "6"}'}, "E-CONFIG"),
        ({"lora_adapter_metadata": '{"r": 4, "use_kasa": true}'}, "E-UNSUPPORTED"),
    ],
)
@pytest.mark.parametrize("convention", ["kohya", "diffusers", "peft", "lycoris"])
def test_a_header_that_can_not_be_followed(
    metadata: dict[str, str], code: str, convention: str, tmp_path: Path
) -> None:
    error = refused(written(tmp_path / "a.safetensors", FILES[convention], metadata))
    assert {problem.code for problem in error.problems} == {code}


# --- sources that contradict each other ------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["kohya", "diffusers"])
def test_an_alpha_tensor_against_the_header(convention: str, tmp_path: Path) -> None:
    module = min(FILES[convention]).partition(".lora")[0]
    path = written(
        tmp_path / "a.safetensors", {**FILES[convention], f"{module}.alpha": torch.tensor(2.0)}, {"lora_alpha": "6"}
    )
    error = refused(path)
    assert error.code == "E-SCALE"
    assert f"alpha is 2 ({module}.alpha) and 6 (lora_alpha in the header)" in error.message
    assert scales(path, alpha=6, scaling="alpha/rank") == {6 / RANK}, "the hint can be followed"
    assert scales(path, alpha=2, scaling="alpha/rank") == {2 / RANK}
    assert refused(path, alpha=3, scaling="alpha/rank").code == "E-SCALE"


def test_single_layers_may_have_an_alpha_of_their_own(tmp_path: Path) -> None:
    """Tensors say more than a header about the whole, as long as it is true of some layer."""
    state = pair(Q, *DOWN) | pair(K, *DOWN) | {f"{Q}.alpha": torch.tensor(6.0), f"{K}.alpha": torch.tensor(1.0)}
    told = {"ss_network_alpha": "6", "ss_network_dim": str(RANK)}
    assert scales(written(tmp_path / "a.safetensors", state, told)) == {6 / RANK, 1 / RANK}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_alpha_is_no_contradiction(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {**FILES["kohya"], "lora_unet_blocks_0_q.alpha": torch.tensor(1 / 3, dtype=dtype)}
    (scale,) = scales(written(tmp_path / "a.safetensors", state, {"ss_network_alpha": str(1 / 3)}))
    assert scale == float(torch.tensor(1 / 3, dtype=dtype)) / RANK


@pytest.mark.parametrize("other", ["alpha", "transformer.lora_alpha", "lora_adapter_metadata"])
def test_two_statements_of_one_header(other: str, tmp_path: Path) -> None:
    second = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2}) if "adapter" in other else "2"
    path = written(tmp_path / "a.safetensors", pair(f"transformer.{Q}"), {"lora_alpha": "6", other: second})
    error = refused(path)
    assert error.code == "E-SCALE"
    assert " 2 (" in error.message
    assert " 6 (lora_alpha in the header)" in error.message


def peft_folder(kit: Kit, metadata: Mapping[str, str] | None = None, **config: Any) -> Path:
    file = kit / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", **(metadata or {})})
    document = {**kit.json("adapter/adapter_config.json"), **config}
    kit.write("adapter/adapter_config.json", {name: value for name, value in document.items() if value is not ...})
    return kit / "adapter"


def test_a_config_against_the_header(kit: Kit) -> None:
    assert scales(peft_folder(kit, {"lora_alpha": "4", "r": "2"})) == {2}
    error = refused(peft_folder(kit, {"lora_alpha": "6"}))
    assert error.code == "E-SCALE"
    assert "alpha is 4 (lora_alpha of adapter_config.json) and 6 (lora_alpha in the header)" in error.message
    assert scales(peft_folder(kit, {"lora_alpha": "6"}, lora_alpha=...)) == {3}, "PEFT's default is no statement"


def test_the_same_alpha_by_another_rule_is_a_contradiction(kit: Kit) -> None:
    error = refused(peft_folder(kit, {"lora_alpha": "4"}, use_rslora=True))
    assert error.code == "E-SCALE"
    assert "by alpha/sqrt(rank), and by alpha/rank" in error.message


@pytest.mark.parametrize("convention", ["kohya", "diffusers", "lycoris", "peft", "peft-wrapped"])
def test_a_rank_in_the_header_against_the_factors(convention: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", FILES[convention], {"ss_network_alpha": "8", "ss_network_dim": "16"})
    error = refused(path)
    assert error.code == "E-RANK"
    assert "the rank is 16 (ss_network_dim in the header), and 4 in the factors" in error.message


# --- PEFT's config ---------------------------------------------------------------------------------------------------


def trained(folder: Path, **options: Any) -> Path:
    """An adapter that PEFT itself saved."""
    peft = peft_cases.peft()
    model = torch.nn.Sequential(torch.nn.Linear(5, 6, bias=False))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], **options))
    wrapped.save_pretrained(folder)
    return folder


def test_a_rank_in_the_config_against_the_factors_as_in_peft(tmp_path: Path) -> None:
    adapter = trained(tmp_path / "a", r=RANK, lora_alpha=8)
    config = adapter / "adapter_config.json"
    edited(config, r=8)
    peft = peft_cases.peft()
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(5, 6, bias=False)), adapter)
    error = refused(adapter)
    assert error.code == "E-RANK"
    assert "the rank is 8 (r of adapter_config.json), and 4 in the factors of 0" in error.message
    edited(config, r=RANK, rank_pattern={"0": 16})
    assert "16 (rank_pattern of adapter_config.json)" in refused(adapter).message
    edited(config, rank_pattern={"(0)": 16, "0": RANK})
    assert scales(adapter) == {8 / RANK}, "PEFT sorts patterns on saving: the second may have been the first"


def test_a_missing_alpha_is_said_in_inspect_and_merge(kit: Kit, cli: Cli) -> None:
    adapter = peft_folder(kit, lora_alpha=...)
    assert scales(adapter) == {8 / 2}
    note = "there is no lora_alpha of adapter_config.json: PEFT's default is taken, 8"
    assert note in cli("inspect", adapter).out
    assert note in cli("merge", kit / "base", adapter, "-o", kit / "out").out
    assert scales(adapter, alpha=6, scaling="alpha/rank") == {3}, "it is open"
    assert note not in cli("inspect", kit / "native.lora.safetensors").out


@pytest.mark.parametrize(("name", "value"), [("use_newthing", True), ("newthing_config", {"k": 1}), ("mode", "hyper")])
def test_an_unknown_field_that_is_not_at_rest_is_refused_by_name(name: str, value: Any, kit: Kit) -> None:
    error = refused(peft_folder(kit, **{name: value}))
    assert error.code == "E-UNSUPPORTED"
    assert f"{name} is {value!r}" in error.message


def test_fields_that_change_nothing_are_no_hindrance(kit: Kit) -> None:
    assert scales(peft_folder(kit, use_newthing=False, newthing=None, more={}, peft_version="0.99.0")) == {2}
    alpaca = {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False, "modules_to_save": None}
    assert scales(peft_folder(kit, **alpaca)) == {2}
    assert refused(peft_folder(kit, enable_lora=[True, False, True])).code == "E-UNSUPPORTED"


@pytest.mark.parametrize("kind", peft_config.KINDS)
def test_every_field_of_peft_is_known(kind: str) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    assert known <= peft_fields.OF_PEFT
    assert not peft_fields.OF_PEFT & peft_fields.HARMLESS


def test_whole_numbers_with_a_point_and_a_byte_order_mark(kit: Kit, tmp_path: Path) -> None:
    config = json.dumps(
        {**kit.json("adapter/adapter_config.json"), "r": 2.0, "lora_alpha": 4.0, "rank_pattern": {"x": 3.0}}
    )
    kit.write("adapter/adapter_config.json", "\ufeff" + config)
    assert scales(kit / "adapter") == {2}
    kit.write("base/config.json", "\ufeff" + '{"tie_word_embeddings": false}')
    loratool.merge(kit / "base", kit / "adapter", tmp_path / "out")
    assert refused(peft_like(kit, r=2.5)).code == "E-CONFIG"


def peft_like(kit: Kit, **config: Any) -> Path:
    kit.write("adapter/adapter_config.json", {"peft_type": "LORA", "lora_alpha": 4, "target_modules": ["q"], **config})
    return kit / "adapter"


def test_a_config_written_by_hand_needs_no_heads_of_the_base(tmp_path: Path) -> None:
    """It has the fields that torchtune's export has; only the type of the model is of interest then."""
    base = tmp_path / "base"
    base.mkdir()
    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    save_file({f"{name}.weight": values(6, 5) for name in names}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "bert"}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    state = {key: value for name in names for key, value in pair(f"base_model.model.{name}").items()}
    save_file(state, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    loratool.merge(base, adapter, tmp_path / "out")
    want = values(6, 5).double() + 2 * values(6, RANK).double() @ values(RANK, 5).double()
    for value in load_file(tmp_path / "out" / "model.safetensors").values():
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    error = refused(adapter, base=base)
    assert error.code == "E-UNSUPPORTED"
    assert "--from peft" in error.hint
    loratool.merge(base, adapter, tmp_path / "out2", convention="peft")
    edited(adapter / "adapter_config.json", bias="none")
    loratool.merge(base, adapter, tmp_path / "out3")


# --- bare factors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "transformer.h.0.attn.c_attn", "encoder.0.fc"])
def test_bare_factors_are_an_adapter_whose_scale_is_asked_for(module: str, tmp_path: Path, cli: Cli) -> None:
    path = written(tmp_path / "lora.safetensors", pair(module))
    shown = cli("inspect", path, "--json").json
    assert (shown["what"], shown["convention"], shown["layers"][0]["scale"]) == ("adapter", "peft", None)
    base = written(tmp_path / "base.safetensors", {f"{module}.weight": values(6, 5)})
    asked = cli("merge", base, path, "-o", tmp_path / "out.safetensors")
    assert "E-ALPHA" in asked.err
    given = ["--alpha", "8", "--scaling", "alpha/rank"]
    assert cli("merge", base, path, "-o", tmp_path / "out.safetensors", *given).code == 0
    want = values(6, 5).double() + 2 * values(6, RANK).double() @ values(RANK, 5).double()
    (value,) = load_file(tmp_path / "out.safetensors").values()
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)


def test_factors_among_the_weights_of_a_model_are_no_bare_adapter(tmp_path: Path) -> None:
    """Its other tensors would replace the base's."""
    path = written(tmp_path / "model.safetensors", pair("layers.0.q_proj") | {"layers.0.q_proj.weight": values(6, 5)})
    assert refused(path).code == "E-CONVENTION"


# --- alphas of some layers -------------------------------------------------------------------------------------------


@pytest.mark.peers
def test_no_alpha_is_a_scale_of_one_beside_others_as_diffusers_converts_it(tmp_path: Path) -> None:
    loaders = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

    names = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k")]
    state = {key: value for name in names for key, value in pair(f"diffusion_model.{name}").items()}
    state["diffusion_model.transformer_blocks.0.attn.to_q.alpha"] = torch.tensor(1.0)
    path = written(tmp_path / "lora.safetensors", state)
    base = written(tmp_path / "base.safetensors", {f"{name}.weight": torch.zeros(6, 5) for name in names})
    loratool.merge(base, path, tmp_path / "out.safetensors")
    judge = loaders._convert_non_diffusers_qwen_lora_to_diffusers(dict(state))
    for name, value in load_file(tmp_path / "out.safetensors").items():
        module = f"transformer.{name.removesuffix('.weight')}"
        want = judge[f"{module}.lora_B.weight"].double() @ judge[f"{module}.lora_A.weight"].double()
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)


# --- options for what is not open ------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 4},
    "scaling": {"scaling": "alpha/rank"},
    "layout": {"layout": {"*nothing*": "in_out"}},
    "component": {"component": "te"},
    "adapter": {"adapter": "nobody"},
    "enable_lora": {"enable_lora": "101"},
    "already_merged": {"already_merged": True},
}


@pytest.mark.parametrize("option", [*OPTIONS, "config", "from"])
@pytest.mark.parametrize("name", ["adapter", "native.lora.safetensors"])
def test_an_adapter_that_says_everything_takes_no_answers(name: str, option: str, kit: Kit) -> None:
    given = OPTIONS.get(option) or {"config": kit / "adapter" / "adapter_config.json"}
    error = refused(kit / name, **({"convention": "kohya"} if option == "from" else given))
    assert error.code == "E-OPTION"
    assert f"--{option.replace('_', '-')}" in error.message or "'*nothing*'" in error.message


@pytest.mark.parametrize("option", OPTIONS)
def test_an_adapter_in_memory_takes_no_answers(option: str, kit: Kit) -> None:
    adapter = loratool.load(kit / "adapter", base=kit / "base")
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(kit / "base", adapter, kit / "out", **OPTIONS[option])
    assert caught.value.code == "E-OPTION"
    assert not (kit / "out").exists()


def test_a_component_that_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", pair(f"unet.{Q}") | pair(TEXT))
    error = refused(path, component="transformer")
    assert (error.code, "text_encoder, unet" in error.message) == ("E-OPTION", True)
    adapter = loratool.load(path, component="unet")
    assert [item.target.name for item in adapter.updates] == [f"unet.{Q}.weight"]
    assert any("left out, as asked for: text_encoder" in note for note in adapter.notes)


def test_an_adapter_name_that_is_not_there(kit: Kit) -> None:
    error = refused(kit / "peft.pth", adapter="nobody", alpha=4, scaling="alpha/rank")
    assert (error.code, error.hint) == ("E-ADAPTER", "it holds default")

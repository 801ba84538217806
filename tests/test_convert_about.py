"""What an adapter is for, and what travels beside its tensors: nothing of it is lost, and no path of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from models import State
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from writer_cases import WRITERS

import loratool
from loratool import Adapter, BaseIdentity, Target, Targeted, TensorRef
from loratool.gguf import read_gguf
from loratool.updates import Replace

PREFIX = "base_model.model."
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
# What PEFT writes, and what of it a conversion has no other place for.
OWN: dict[str, Any] = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "SEQ_2_SEQ_LM", "lora_dropout": 0.25,
    "base_model_name_or_path": "org/model", "revision": "abc123", "target_modules": ["v_proj", "q_proj"],
    "modules_to_save": ["norm"], "auto_mapping": None, "bias": "none",
}  # fmt: skip


def peft_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    state: State = {}
    for number, layer in enumerate(LAYERS):
        state[f"{PREFIX}{layer}.lora_A.weight"] = torch.arange(16.0).reshape(2, 8) + number
        state[f"{PREFIX}{layer}.lora_B.weight"] = torch.arange(12.0).reshape(6, 2) - number
    state[f"{PREFIX}model.norm.weight"] = torch.ones(8)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt", "ss_comment": "by hand"})
    (folder / "adapter_config.json").write_text(json.dumps({**OWN, **config}))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def entries(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


# -- PEFT's config ----------------------------------------------------------------------------------------------------

KEPT = ("task_type", "lora_dropout", "base_model_name_or_path", "revision", "auto_mapping")


@pytest.mark.parametrize("through", ["peft", "native"])
def test_pefts_own_config_survives(through: str, tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "source")
    if through == "native":
        loratool.convert(source, tmp_path / "a.lora.safetensors", "native")
        source = tmp_path / "a.lora.safetensors"
    report = loratool.convert(source, tmp_path / "out", "peft")
    config = config_of(tmp_path / "out")
    assert {key: config[key] for key in KEPT} == {key: OWN[key] for key in KEPT}
    assert (config["target_modules"], config["modules_to_save"]) == (["q_proj", "v_proj"], ["model.norm"])
    assert not any("null" in note for note in report.notes)
    assert entries(tmp_path / "out" / "adapter_model.safetensors")["ss_comment"] == "by hand"


def test_target_modules_that_say_more_are_not_kept(tmp_path: Path) -> None:
    narrow = peft_folder(tmp_path / "narrow", layers_to_transform=[0])
    loratool.convert(narrow, tmp_path / "a", "peft")
    assert config_of(tmp_path / "a")["target_modules"] == LAYERS
    loratool.convert(peft_folder(tmp_path / "wide"), tmp_path / "b", "peft", skip="*v_proj*")
    assert config_of(tmp_path / "b")["target_modules"] == LAYERS[:1]


@pytest.mark.parametrize("name", ["/home/somebody/base", "./base", "..\\base", "~/base", "a/b/c"])
def test_a_path_is_no_name_of_a_base(name: str, tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "source", base_model_name_or_path=name)
    report = loratool.convert(source, tmp_path / "out", "peft")
    assert (config_of(tmp_path / "out")["base_model_name_or_path"], config_of(tmp_path / "out")["revision"]) == (
        None,
        None,
    )
    assert any(repr(name) in note and "left out" in note for note in report.notes)
    assert any("--base-name" in note for note in report.notes)
    told = loratool.convert(
        source, tmp_path / "told", "peft", base_name="org/base", revision="v2", task_type="CAUSAL_LM"
    )
    config = config_of(tmp_path / "told")
    assert [config[key] for key in ("base_model_name_or_path", "revision", "task_type")] == [
        "org/base",
        "v2",
        "CAUSAL_LM",
    ]
    assert not any("null" in note for note in told.notes)


def test_a_name_that_is_a_folder_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    loratool.convert(peft_folder(tmp_path / "source", base_model_name_or_path="base"), tmp_path / "out", "peft")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] is None


@pytest.mark.parametrize("to", sorted(WRITERS.keys() - {"litgpt"}))  # which finds its base by its path
def test_no_path_of_this_machine_is_in_any_file(to: str, tmp_path: Path) -> None:
    case = WRITERS[to]()
    base = tmp_path / "secret" / "base"
    base.mkdir(parents=True)
    save_file(case.base, base / "model.safetensors")
    for name, content in case.beside.items():
        (base / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for number, adapter in enumerate(case.adapters):
        made = Adapter(adapter.updates, BaseIdentity(str(base)))
        report = loratool.convert(made, tmp_path / f"{number}{case.suffix}", to, base=base, **case.options)
        for file in report.files:
            assert b"secret" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"task_type": "CAUSAL"}, "--task-type takes CAUSAL_LM"),
        ({"base_name": "/here/base"}, "say the id"),
        ({"task_type": "SEQ_CLS"}, "leave --task-type out"),
    ],
)
def test_options_that_can_not_be(options: dict[str, str], hint: str, tmp_path: Path) -> None:
    with pytest.raises(loratool.ChoiceNeeded) as caught:
        loratool.convert(peft_folder(tmp_path / "source"), tmp_path / "out", "peft", **options)
    assert caught.value.problems[0].hint.startswith(hint)
    assert not (tmp_path / "out").exists()


def test_a_revision_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(loratool.ChoiceNeeded, match="no name of the base is known"):
        loratool.convert(
            peft_folder(tmp_path / "s", base_model_name_or_path=""), tmp_path / "out", "peft", revision="a"
        )


def test_a_classifiers_task_needs_its_head(tmp_path: Path) -> None:
    """PEFT looks for the head of a SEQ_CLS in the file, and fails where it is not."""
    headless = peft_folder(tmp_path / "headless", task_type="SEQ_CLS")
    report = loratool.convert(headless, tmp_path / "out", "peft")
    assert config_of(tmp_path / "out")["task_type"] is None
    assert any("has none: task_type is left out" in note for note in report.notes)
    head = Targeted(Target("score.weight", (3, 8)), Replace(TensorRef.of(torch.zeros(3, 8))))
    read = loratool.load(headless)
    whole = Adapter((*read.updates, head), read.base, info=read.info)
    loratool.convert(whole, tmp_path / "whole", "peft")
    assert config_of(tmp_path / "whole")["task_type"] == "SEQ_CLS"


def test_the_command_takes_them(cli: Cli, tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "source", base_model_name_or_path="/x", task_type=None)
    given = ("--task-type", "CAUSAL_LM", "--base-name", "org/base", "--revision", "r1")
    assert cli("convert", source, "--to", "peft", "-o", tmp_path / "out", *given).code == 0
    config = config_of(tmp_path / "out")
    assert (config["task_type"], config["base_model_name_or_path"], config["revision"]) == (
        "CAUSAL_LM",
        "org/base",
        "r1",
    )
    refused = cli("convert", source, "--to", "gguf", "-o", tmp_path / "x.gguf", "--task-type", "CAUSAL_LM")
    assert (refused.code, "--task-type means nothing to gguf" in refused.err) == (2, True)


# -- what lies beside -------------------------------------------------------------------------------------------------

CARD = "---\nlicense: apache-2.0\ninstance_prompt: 'a photo of sks'\ntags:\n- lora\n---\n# Card\n"
BESIDE = ("README.md", "LICENSE", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json")
TRAINERS = ("trainer_state.json", "training_args.bin", "optimizer.pt", "notes.txt")


def with_files(folder: Path) -> Path:
    for name in (*BESIDE, *TRAINERS):
        (folder / name).write_text(CARD if name == "README.md" else f"{{}} {name}")
    return folder


def test_tokenizer_card_and_licence_go_into_folders(tmp_path: Path) -> None:
    source = with_files(peft_folder(tmp_path / "source"))
    report = loratool.convert(source, tmp_path / "out", "peft")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *BESIDE, "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    for name in BESIDE:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert any("are copied as they are" in note for note in report.notes)


def test_a_single_file_has_no_place_for_them(tmp_path: Path) -> None:
    source = with_files(peft_folder(tmp_path / "source"))
    report = loratool.convert(source, tmp_path / "a.lora.safetensors", "native")
    assert any("README.md" in note and "is one file" in note for note in report.notes)
    info = loratool.load(tmp_path / "a.lora.safetensors").info
    assert (info["license"], info["triggers"]) == ("apache-2.0", ["a photo of sks"])


def kohya_file(file: Path) -> Path:
    key = "lora_unet_a_b"
    state = {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(6, 2)}
    header = {
        "ss_network_dim": "2", "ss_network_alpha": "4.0", "ss_network_args": "{}", "ss_tag_frequency": '{"a": 1}',
        "modelspec.license": "MIT", "modelspec.trigger_phrase": "sks, dog", "modelspec.hash_sha256": "0x12",
        "modelspec.title": "A dog", "sshs_model_hash": "12",
    }  # fmt: skip
    save_file({**state, f"{key}.alpha": torch.tensor(4.0)}, file, metadata=header)
    return file


def test_headers_survive_but_for_what_they_say_of_the_file(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "k.safetensors")
    save_file({"a.b.weight": torch.zeros(6, 8)}, tmp_path / "base.safetensors")
    base = {"base": tmp_path / "base.safetensors"}
    loratool.convert(source, tmp_path / "a.lora.safetensors", "native", **base)
    loratool.convert(tmp_path / "a.lora.safetensors", tmp_path / "peft", "peft")
    loratool.convert(tmp_path / "peft", tmp_path / "back.safetensors", "kohya", as_component="unet", **base)
    kept = {
        "ss_tag_frequency": '{"a": 1}', "modelspec.license": "MIT", "modelspec.trigger_phrase": "sks, dog",
        "modelspec.title": "A dog",
    }  # fmt: skip
    assert entries(tmp_path / "peft" / "adapter_model.safetensors") == {"format": "pt", **kept}
    written = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "4.0", "format": "pt"}
    assert entries(tmp_path / "back.safetensors") == {**kept, **written}
    assert loratool.load(tmp_path / "a.lora.safetensors").info["triggers"] == ["sks", "dog"]


def test_title_and_licence_go_into_gguf(tmp_path: Path) -> None:
    case = WRITERS["gguf"]()
    base = tmp_path / "base"
    base.mkdir()
    save_file(case.base, base / "model.safetensors")
    for name, content in case.beside.items():
        (base / name).write_text(content if isinstance(content, str) else json.dumps(content))
    info = {"title": "A dog", "license": "MIT", "authors": ["x", "y"], "triggers": ["sks"]}
    made = Adapter(case.adapters[0].updates, info=info, metadata={"ss_comment": "c"})
    report = loratool.convert(made, tmp_path / "a.gguf", "gguf", base=base)
    keys = read_gguf(tmp_path / "a.gguf").metadata
    assert [keys[f"general.{name}"] for name in ("name", "license", "author")] == ["A dog", "MIT", "x, y"]
    assert any("modelspec.trigger_phrase, ss_comment of its header" in note for note in report.notes)


# -- several models ---------------------------------------------------------------------------------------------------


def test_peft_gets_a_folder_for_each_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    index = {"_class_name": "StableDiffusionPipeline"}
    for component in ("unet", "text_encoder"):
        (base / component).mkdir()
        save_file({"block.q_proj.weight": torch.zeros(6, 8)}, base / component / "model.safetensors")
        (base / component / "config.json").write_text("{}")
        index[component] = ["diffusers", "Model"]  # type: ignore[assignment]
    (base / "model_index.json").write_text(json.dumps(index))
    state = {}
    for number, key in enumerate(("lora_unet_block_q_proj", "lora_te_block_q_proj")):
        state |= {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(6, 2) + number}
    save_file(state, tmp_path / "k.safetensors")
    report = loratool.convert(tmp_path / "k.safetensors", tmp_path / "out", "peft", base=base)
    found = {path.parent.name for path in report.files}
    assert found == {"unet", "text_encoder"}
    for component, up in (("unet", 1.0), ("text_encoder", 2.0)):
        stored = load_file(tmp_path / "out" / component / "adapter_model.safetensors")
        assert {*stored} == {f"{PREFIX}block.q_proj.lora_{side}.weight" for side in "AB"}
        assert float(stored[f"{PREFIX}block.q_proj.lora_B.weight"][0, 0]) == up
        assert config_of(tmp_path / "out" / component)["target_modules"] == ["q_proj"]
    assert any("a folder for each" in note for note in report.notes)

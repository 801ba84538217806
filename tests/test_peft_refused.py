"""Every method in PEFT's own list of them is read, or refused by its name, with the reason and what helps."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import peft
from safetensors.torch import save_file

import loratool
from loratool.conventions import peft_methods
from loratool.conventions.peft_config import KINDS

pytestmark = pytest.mark.heavy

TYPES = [kind.value for kind in peft().PeftType]
REFUSED = [kind for kind in TYPES if kind not in KINDS]


def mapping(name: str, kind: str) -> Any:
    """What PEFT's own tables have of a method: its tuner, the prefix of its parts."""
    return getattr(sys.modules["peft.mapping"], name).get(peft().PeftType(kind))


def mergeable(kind: str) -> bool:
    """Whether a tuner of PEFT's has layers that can be merged: not all refuse it in the same way."""
    tuner = mapping("PEFT_TYPE_TO_TUNER_MAPPING", kind)
    if not hasattr(tuner, "merge_and_unload"):
        return False
    layer = getattr(tuner, "tuner_layer_cls", None)
    classes = [
        one
        for module in [*sys.modules]
        if module.startswith(tuner.__module__.rpartition(".")[0] + ".layer")
        for _, one in inspect.getmembers(sys.modules[module], inspect.isclass)
        if isinstance(layer, type) and issubclass(one, layer)
    ]
    merges = [one.__dict__["merge"] for one in classes if "merge" in one.__dict__]
    return bool(merges) and not any("raise NotImplementedError" in inspect.getsource(merge) for merge in merges)


def test_every_peft_type_is_read_or_refused() -> None:
    assert {*KINDS} <= {*TYPES}
    assert len(REFUSED) > 35


def folder(kind: str, tmp_path: Path, tensors: dict[str, torch.Tensor] | None = None, **more: Any) -> Path:
    tmp_path.mkdir(exist_ok=True)
    save_file(tensors or {"prompt_embeddings": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **more}))
    return tmp_path


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_is_refused_by_its_method(kind: str, tmp_path: Path) -> None:
    """Whatever its tensors are called: even those of a LoRA, which would merge as one."""
    lora = {f"base_model.model.q.lora_{n}.weight": torch.ones(2, 2) for n in "AB"}
    for number, tensors in enumerate((None, lora)):
        adapter = folder(kind, tmp_path / str(number), tensors, r=2)
        with pytest.raises(loratool.Unsupported) as caught:
            loratool.load(adapter)
        found = loratool.inspect(adapter)
        assert not found.layers, "it is none of LoRA's"
        for (problem,) in (caught.value.problems, found.problems):
            assert problem.code == "E-UNSUPPORTED"
            assert problem.message.startswith(f"peft_type {kind} is not supported: ")
            assert ("merge_and_unload" in problem.hint) == mergeable(kind), "the help must help"
            assert "PEFT" in problem.hint


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind in peft_methods.METHODS])
def test_tensors_alone_tell_their_method(kind: str, tmp_path: Path) -> None:
    """Without the config, and in a wrapped checkpoint: one refusal for all modules of a method."""
    prefix = mapping("PEFT_TYPE_TO_PREFIX_MAPPING", kind)
    names = [f"base_model.model.l.{n}.q.{prefix}x" for n in range(12)]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    (problem,) = loratool.inspect(tmp_path / "x.safetensors", convention="peft").problems
    assert problem.message.startswith(f"{kind} is not supported: ")
    assert problem.message.endswith("it is in l.0.q, l.1.q, l.2.q and 9 more")
    state = {f"{name}.default": torch.ones(2, 2) for name in names}
    state |= {name.replace(f"{prefix}x", "base_layer.weight"): torch.ones(2, 2) for name in names}
    save_file(state, tmp_path / "wrapped.safetensors")
    (told,) = loratool.inspect(tmp_path / "wrapped.safetensors").problems
    assert told.message == problem.message
    with pytest.raises(loratool.Unsupported) as caught:
        loratool.load(tmp_path / "wrapped.safetensors")
    assert caught.value.message == problem.message


def test_all_methods_with_parts_of_their_own_are_known() -> None:
    without = {*peft_methods.PROMPTS, "XLORA"}  # XLORA's parts are LoRA's, and a classifier
    assert {*peft_methods.METHODS} - {*TYPES} == {"BONE"}
    assert {*REFUSED} - {*peft_methods.METHODS} == without
    for kind in {*peft_methods.METHODS} - {"BONE"}:
        assert mapping("PEFT_TYPE_TO_PREFIX_MAPPING", kind).startswith(f"{kind.lower()}_")


def test_a_variant_of_lora_is_refused_by_its_part(tmp_path: Path) -> None:
    names = [f"base_model.model.q.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_diag")]
    with pytest.raises(loratool.Unsupported, match=r"a variant of LoRA \(lora_diag\) is not supported: .*; it is in q"):
        loratool.load(folder("LORA", tmp_path, {name: torch.ones(2, 2) for name in names}, r=2))


def test_a_config_of_four_fields_may_be_torchtunes_until_it_is_said(tmp_path: Path) -> None:
    """On a Qwen base torchtune's export would be wrong. One refusal for all layers, PEFT's merge once it is said."""
    from models import assert_float32_close, fill, own, read, save_base
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **sizes, num_key_value_heads=2))
    fill(model, 1)
    base = save_base(model, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    few = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(few))
    with pytest.raises(loratool.LoratoolError, match="qwen2") as caught:
        loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert len(caught.value.problems) == 1
    assert "4 modules" in caught.value.message
    assert "--from peft" in caught.value.hint
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out", convention="peft")
    want = own(wrapped.merge_and_unload().state_dict())
    for name, value in read(tmp_path / "out").items():
        assert_float32_close(value, want[name], name=name)


def test_stacks_of_experts_with_a_shared_factor_can_be_left_out(tmp_path: Path) -> None:
    """As Tinker trains them: lora_A [1, rank, in] for all experts, lora_B [experts, out, rank]. The hint works."""
    name = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    tensors = {}
    for layer in range(2):
        tensors[name.format(layer, "mlp.experts.w1", "A")] = torch.ones(1, 2, 8)
        tensors[name.format(layer, "mlp.experts.w1", "B")] = torch.ones(4, 6, 2)
        tensors[name.format(layer, "q_proj", "A")] = torch.ones(2, 8)
        tensors[name.format(layer, "q_proj", "B")] = torch.ones(8, 2)
    adapter = folder("LORA", tmp_path / "adapter", tensors, r=2, lora_alpha=2)
    base = {f"model.layers.{layer}.q_proj.weight": torch.ones(8, 8) for layer in range(2)}
    save_file(base, tmp_path / "base.safetensors")
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors")
    assert caught.value.code == "E-SHAPE"
    pattern = caught.value.hint.split("'")[3]
    report = loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", skip=pattern)
    assert report.changed == 2

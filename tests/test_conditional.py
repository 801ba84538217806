"""Adapters that act on some inputs only: no merge takes them, every reader and writer keeps what they wait for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fill, llama, save_base
from peft_cases import peft
from safetensors.torch import load_file, save_file
from strategies import one

import loratool
from loratool import conventions
from loratool.cli import run
from loratool.format import content_digest

pytestmark = pytest.mark.heavy

NAME = "a.weight"
TOKENS = [3, 4]
WHENS: list[dict[str, Any]] = [{"tokens": TOKENS}, {"prompts": ["dream", "so"]}, {"routing": "a router in the model"}]


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def conditional(when: Mapping[str, Any]) -> loratool.Adapter:
    return replace(one("lora", (4, 3), name=NAME), when=when)


@pytest.mark.parametrize("when", WHENS)
def test_no_merge_takes_it(when: Mapping[str, Any], tmp_path: Path) -> None:
    save_file({NAME: torch.ones(4, 3)}, tmp_path / "base.safetensors")
    loratool.save(conditional(when), tmp_path / "a.lora.safetensors")
    assert loratool.validate(tmp_path / "a.lora.safetensors") == []
    model = torch.nn.Module()
    model.a = torch.nn.Linear(3, 4)
    files = (tmp_path / "base.safetensors", tmp_path / "a.lora.safetensors")
    for call in (
        lambda: loratool.merge(*files, tmp_path / "out.safetensors"),
        lambda: loratool.merge(files[0], [(files[1], 0)], tmp_path / "out.safetensors"),
        lambda: loratool.merge(files[0], conditional(when), tmp_path / "out.safetensors"),
        lambda: loratool.verify(files[0], files[0], [files[1]]),
        lambda: loratool.apply(model, files[1]),
        lambda: loratool.open_merged(*files),
    ):
        with pytest.raises(loratool.Mismatch) as caught:
            call()
        assert caught.value.code == "E-CONDITIONAL"
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("when", WHENS)
def test_a_native_file_keeps_it(when: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loratool.save(conditional(when), tmp_path / "a.lora.safetensors")
    loratool.convert(tmp_path / "a.lora.safetensors", tmp_path / "b.lora.safetensors", to="native")
    assert loratool.load(tmp_path / "b.lora.safetensors").when == when
    assert loratool.inspect(tmp_path / "b.lora.safetensors").when == when
    assert run(["inspect", str(tmp_path / "b.lora.safetensors")]) == 0
    assert "it can not be merged" in capsys.readouterr().out
    digests = {content_digest(conditional(other)) for other in (*WHENS, {}, {"tokens": [4, 3]})}
    assert len(digests) == len(WHENS) + 2


LOSING = [
    (to, when) for to, writer in conventions.writers().items() for when in WHENS if not {*when} <= {*writer.CONDITIONS}
]


@pytest.mark.parametrize(("to", "when"), LOSING)
def test_no_writer_drops_it(to: str, when: Mapping[str, Any], tmp_path: Path) -> None:
    """Without it, the adapter would always act."""
    loratool.save(conditional(when), tmp_path / "a.lora.safetensors")
    out = tmp_path / f"out{(*conventions.writers()[to].SUFFIXES, '')[0]}"
    with pytest.raises(loratool.Mismatch) as caught:
        loratool.convert(tmp_path / "a.lora.safetensors", out, to=to)
    assert caught.value.code == "E-CONDITIONAL"
    assert "--to native" in caught.value.problems[0].hint
    assert not out.exists()


def alora(tmp_path: Path, **more: Any) -> tuple[Path, Path, Any]:
    """A base, an activated LoRA as PEFT saves it, and PEFT's model."""
    torch.manual_seed(1)
    base = save_base(llama(), tmp_path / "base")
    config = peft().LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=TOKENS, task_type="CAUSAL_LM", **more
    )
    with quiet():
        model = peft().get_peft_model(llama(), config)
        fill(model, seed=3)
        model.save_pretrained(tmp_path / "alora")
    return base, tmp_path / "alora", model


def test_pefts_activated_lora_goes_there_and_back(tmp_path: Path) -> None:
    base, saved, _ = alora(tmp_path)
    assert loratool.load(saved).when == {"tokens": TOKENS}
    loratool.convert(saved, tmp_path / "a.lora.safetensors", to="native", base=base)
    loratool.convert(tmp_path / "a.lora.safetensors", tmp_path / "again", to="peft", base=base)
    import transformers

    said = []
    for folder in (saved, tmp_path / "again"):
        with quiet():
            bare = transformers.AutoModelForCausalLM.from_pretrained(base)
            model = peft().PeftModel.from_pretrained(bare, folder)
        assert model.peft_config["default"].alora_invocation_tokens == TOKENS
        inputs = {
            "input_ids": torch.tensor([[7, *TOKENS, 9, 5]]),
            "attention_mask": torch.ones(1, 5, dtype=torch.int64),
        }
        with torch.no_grad():
            said.append(model.eval()(**inputs).logits)
    assert torch.equal(*said)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (saved, tmp_path / "again"))
    assert before.keys() == after.keys()
    with pytest.raises(loratool.Mismatch) as caught:
        loratool.merge(base, saved, tmp_path / "out")
    assert caught.value.code == "E-CONDITIONAL"


def test_what_peft_would_always_let_act_is_not_written(tmp_path: Path) -> None:
    """PEFT activates LoRAs of linear layers; biases, whole tensors and DoRA would act on every input."""
    base, saved, _ = alora(tmp_path)
    adapter = loratool.load(saved, base=base)
    whole = loratool.Targeted(loratool.Target("model.norm.weight", (16,)), one("replace", (16,)).updates[0].update)
    mixed = replace(adapter, updates=(*adapter.updates, whole))
    with pytest.raises(loratool.Unsupported, match="always act"):
        loratool.convert(mixed, tmp_path / "out", to="peft", base=base)
    dora = one("dora0-lora", (16, 16), name="model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(loratool.Unsupported, match="always act"):
        loratool.convert(replace(dora, when={"tokens": TOKENS}), tmp_path / "out", to="peft", base=base)


def test_llama_cpps_activated_lora_goes_there_and_back(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    base, saved, _ = alora(tmp_path)
    loratool.convert(saved, tmp_path / "a.gguf", to="gguf", base=base)
    field = gguf.GGUFReader(tmp_path / "a.gguf").fields["adapter.alora.invocation_tokens"]
    assert field.contents() == TOKENS
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]  # as llama.cpp demands it
    assert loratool.load(tmp_path / "a.gguf", base=base).when == {"tokens": TOKENS}


@pytest.mark.parametrize("tokens", [[], [1.5], ["a"], [-1], [True], 3, "3"])
def test_other_tokens_than_numbers_are_refused(tokens: object, tmp_path: Path) -> None:
    _, saved, _ = alora(tmp_path)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": tokens}))
    with pytest.raises(loratool.InvalidFile, match="alora_invocation_tokens"):
        loratool.load(saved)

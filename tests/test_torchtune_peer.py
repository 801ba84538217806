"""torchtune itself: its modules make the adapters, its merge and its conversion to transformers are the truth."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import State, assert_float32_close, assert_rounded, changed, edit_json, own, read
from safetensors.torch import load_file, save_file
from strategies import Maker, make_update
from torch import Tensor, nn

import loratool
from loratool.conventions.checked import CHECKED

pytestmark = pytest.mark.peers


def torchtune(name: str) -> Any:
    """A module of torchtune, imported late and without what it warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"torchtune.{name}")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchtune.modules.peft", exc_type=ImportError)

HEADS, KV_HEADS, DIM, INNER, VOCAB = 4, 2, 24, 20, 30
ALPHA, RANK = 6, 3
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
CONFIG = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_size": DIM}


def model(family: str, dora: bool, rank: int = RANK, alpha: float = ALPHA) -> nn.Module:
    sizes = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "embed_dim": DIM,
        "max_seq_len": 16,
        "intermediate_dim": INNER,
        "lora_rank": rank,
        "lora_alpha": alpha,
        "use_dora": dora,
    }
    everything = {"lora_attn_modules": ATTENTION, "apply_lora_to_mlp": True}
    if family == "gemma2":
        build = torchtune("models.gemma2._component_builders").lora_gemma2
        return build(head_dim=8, hidden_capping_value=30.0, final_capping_value=30.0, sliding_window_size=8,
                     **everything, **sizes)  # fmt: skip
    build = getattr(torchtune(f"models.{family}._component_builders"), f"lora_{family}")
    return build(apply_lora_to_output=True, **everything, **sizes)


def to_transformers(family: str, state: State) -> State:
    """torchtune's own conversion, as its checkpointer calls it."""
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "dim": DIM}
    if family == "phi3":
        return own(torchtune("models.phi3._convert_weights").phi3_tune_to_hf(state))
    if family == "qwen2":
        return own(torchtune("models.qwen2._convert_weights").qwen2_tune_to_hf(state, **sizes))
    if family == "gemma2":
        return own(torchtune("models.gemma2._convert_weights").gemma2_tune_to_hf(state, head_dim=8, **sizes))
    return own(torchtune("models.convert_weights").tune_to_hf(state, **sizes))


class Made:
    """A model of torchtune with LoRA or DoRA, filled; its files, and what torchtune's own merge makes of them."""

    def __init__(self, family: str, dora: bool, folder: Path) -> None:
        torch.manual_seed(3)
        self.family, self.folder = family, folder
        self.model = model(family, dora).eval()
        for name, parameter in self.model.named_parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
            if name.endswith("magnitude"):
                parameter.data = parameter.data.abs() + 0.5
        peft = torchtune("modules.peft")
        self.wrapped = own(self.model.state_dict())
        self.adapter = own(peft.get_adapter_state_dict(self.wrapped))
        self.base = {name: value for name, value in self.wrapped.items() if name not in self.adapter}
        double = {name: value.double() for name, value in self.wrapped.items()}
        self.exact = peft.get_merged_lora_ckpt(double, rank=RANK, alpha=ALPHA)
        self.merged = peft.get_merged_lora_ckpt(copy.deepcopy(self.wrapped), rank=RANK, alpha=ALPHA)

    def epoch(self) -> Path:
        """The folder of an epoch, as FullModelHFCheckpointer.save_checkpoint(adapter_only=True) fills it."""
        folder = self.folder / "epoch_0"
        folder.mkdir()
        torch.save(self.adapter, folder / "adapter_model.pt")
        convert = torchtune("models.convert_weights")
        config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": [*ATTENTION, "w1", "w2", "w3", "output"]}
        document = convert.tune_to_peft_adapter_config({**config, "peft_type": "LORA"}, "some/base")
        (folder / "adapter_config.json").write_text(json.dumps(document))
        if self.family != "phi3":
            head_dim = 8 if self.family == "gemma2" else None
            sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "dim": DIM, "head_dim": head_dim}
            state = convert.tune_to_peft_adapter_weights(self.adapter, **sizes)
            save_file(own(state), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    def transformers_base(self) -> Path:
        folder = self.folder / "transformers"
        folder.mkdir()
        save_file(to_transformers(self.family, self.base), folder / "model.safetensors")
        family = {"llama3": "llama"}.get(self.family, self.family)
        head_dim = {"head_dim": 8} if family == "gemma2" else {}
        (folder / "config.json").write_text(json.dumps({"model_type": family, **CONFIG, **head_dim}))
        return folder

    def check(self, folder: Path, *, transformers: bool) -> None:
        got = read(folder)
        exact, merged, base = self.exact, self.merged, self.base
        if transformers:
            exact, merged, base = (to_transformers(self.family, state) for state in (exact, merged, base))
        assert sorted(got) == sorted(exact)
        assert changed(base, got) == changed(base, exact)
        stacked = transformers and self.family == "phi3"
        assert len(changed(base, got)) == (9 if stacked else 14 if self.family == "gemma2" else 15)
        for name, value in got.items():
            assert_rounded(value, exact[name], name=name)
            assert_float32_close(value, merged[name], name=name)


FAMILIES = ["llama3", "mistral", "gemma2", "qwen2", "phi3"]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merges_as_torchtune_does(family: str, dora: bool, tmp_path: Path) -> None:
    made = Made(family, dora, tmp_path)
    torch.save(made.wrapped, tmp_path / "wrapped.pt")
    out = tmp_path / "a.lora.safetensors"
    loratool.extract(tmp_path / "wrapped.pt", out, alpha=ALPHA, scaling="alpha/rank", base_out=tmp_path / "base")
    loratool.merge(tmp_path / "base", [out], tmp_path / "out")
    made.check(tmp_path / "out", transformers=False)

    epoch = made.epoch()
    loratool.merge(tmp_path / "base", [epoch / "adapter_model.pt"], tmp_path / "out2")
    made.check(tmp_path / "out2", transformers=False)
    loratool.merge(made.transformers_base(), [epoch / "adapter_model.pt"], tmp_path / "out3")
    made.check(tmp_path / "out3", transformers=True)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_merged_model_computes_what_the_wrapped_one_does(dora: bool, tmp_path: Path) -> None:
    """Its forward, which is what was trained."""
    made = Made("llama3", dora, tmp_path)
    with torch.no_grad():
        want = made.model(torch.arange(8).reshape(1, 8))
        torch.save(made.wrapped, tmp_path / "wrapped.pt")
        out = tmp_path / "a.lora.safetensors"
        loratool.extract(tmp_path / "wrapped.pt", out, alpha=ALPHA, scaling="alpha/rank", base_out=tmp_path / "base")
        loratool.merge(tmp_path / "base", [out], tmp_path / "out")
        plain = torchtune("models.llama3._component_builders").llama3(
            vocab_size=VOCAB, num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS, embed_dim=DIM, max_seq_len=16,
            intermediate_dim=INNER,
        )  # fmt: skip
        plain.load_state_dict(read(tmp_path / "out"))
        got = plain.eval()(torch.arange(8).reshape(1, 8))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


# --- what torchtune exports under PEFT's names ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma2"])
def test_its_peft_file_is_read_as_pefts(family: str, tmp_path: Path) -> None:
    made = Made(family, False, tmp_path)
    epoch, base = made.epoch(), made.transformers_base()
    summary = loratool.inspect(epoch / "adapter_model.safetensors", base=base)
    assert summary.convention == "peft"
    assert {(layer.rank, layer.alpha, layer.scale) for layer in summary.layers} == {(RANK, 6.0, 2.0)}
    for number, path in enumerate((epoch, epoch / "adapter_model.safetensors")):
        loratool.merge(base, [path], tmp_path / f"out-{number}")
        made.check(tmp_path / f"out-{number}", transformers=True)


def test_the_dora_it_exports_contradicts_itself(tmp_path: Path) -> None:
    """B's rows are reordered, the magnitudes' are not: merged as it is, q_proj and k_proj are wrong."""
    made = Made("llama3", True, tmp_path)
    epoch, base = made.epoch(), made.transformers_base()
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(base, [epoch / "adapter_model.safetensors"], tmp_path / "out")
    assert {problem.code for problem in caught.value.problems} == {"E-UNSUPPORTED"}
    assert "4 modules" in str(caught.value)  # q and k of two layers
    assert "adapter_model.pt" in caught.value.hint
    # The same file with a config of PEFT's own is taken at its word, and shows that the refusal is right.
    config = json.loads((epoch / "adapter_config.json").read_text())
    (epoch / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    loratool.merge(base, [epoch / "adapter_model.safetensors"], tmp_path / "out")
    got, want = read(tmp_path / "out"), to_transformers("llama3", made.exact)
    wrong = {name for name, value in got.items() if not torch.allclose(value.double(), want[name], atol=1e-5)}
    layers = "model.layers.{}.self_attn.{}_proj.weight"
    assert wrong == {layers.format(layer, part) for layer in (0, 1) for part in "qk"}


def test_its_dora_without_q_and_k_is_read(tmp_path: Path) -> None:
    """No `use_dora` is in the config: the magnitudes themselves say what it is."""
    made = Made("llama3", True, tmp_path)
    epoch, base = made.epoch(), made.transformers_base()
    file = epoch / "adapter_model.safetensors"
    kept = {n: v for n, v in load_file(file).items() if ".q_proj." not in n and ".k_proj." not in n}
    save_file(kept, file)
    loratool.merge(base, [file], tmp_path / "out")
    got, want, before = read(tmp_path / "out"), to_transformers("llama3", made.exact), read(base)
    assert len(changed(before, got)) == 11
    for name in changed(before, got):
        assert_rounded(got[name], want[name], name=name)
    assert {layer.kind for layer in loratool.inspect(file).layers} == {"dora"}


def test_the_rows_it_exports_for_qwen_are_refused(tmp_path: Path) -> None:
    made = Made("qwen2", False, tmp_path)
    epoch, base = made.epoch(), made.transformers_base()
    with pytest.raises(loratool.LoratoolError, match="qwen2") as caught:
        loratool.merge(base, [epoch / "adapter_model.safetensors"], tmp_path / "out")
    assert "4 modules" in str(caught.value)
    loratool.merge(base, [epoch / "adapter_model.safetensors"], tmp_path / "out", convention="peft")
    got, want = read(tmp_path / "out"), to_transformers("qwen2", made.exact)
    wrong = {name for name, value in got.items() if not torch.allclose(value.double(), want[name], atol=1e-5)}
    assert len(wrong) == 4


# --- what is written for it -----------------------------------------------------------------------------------------

MODEL_TYPES = {"llama3": "LLAMA3", "mistral": "MISTRAL", "gemma2": "GEMMA2", "qwen2": "QWEN2", "phi3": "PHI3_MINI"}


def checkpoint(family: str, base: Path, run: Path, *, resume: bool = False) -> dict[str, State]:
    """What the recipes load: a base with transformers' names, under torchtune's; and the adapter of the last epoch.

    With that they also load where the optimiser was, which is in no adapter.
    """
    if resume:
        (run / "recipe_state").mkdir()
        torch.save({}, run / "recipe_state" / "recipe_state.pt")
    checkpointer = torchtune("training").FullModelHFCheckpointer(
        checkpoint_dir=str(base), checkpoint_files=["model.safetensors"], model_type=MODEL_TYPES[family],
        output_dir=str(run), should_load_recipe_state=resume,
    )  # fmt: skip
    loaded = checkpointer.load_checkpoint()
    assert isinstance(loaded, dict)
    return loaded


def resumed(family: str, dora: bool, base: Path, run: Path) -> nn.Module:
    """A model with the written adapter in it, set up as torchtune's LoRA recipes do; they accept no missing key."""
    config = json.loads((run / "epoch_0" / "adapter_config.json").read_text())
    built = model(family, dora, config["r"], config["lora_alpha"])
    loaded = checkpoint(family, base, run, resume=True)
    peft, state = torchtune("modules.peft"), loaded["adapter"]
    assert {*state} == {*peft.get_adapter_params(built)}
    base_missing, base_unexpected = built.load_state_dict(loaded["model"], strict=False)
    lora_missing, lora_unexpected = built.load_state_dict(state, strict=False)
    peft.validate_missing_and_unexpected_for_lora(
        lora_attn_modules=[*ATTENTION], apply_lora_to_mlp=True, apply_lora_to_output=family != "gemma2",
        base_missing=base_missing, base_unexpected=base_unexpected,
        lora_missing=lora_missing, lora_unexpected=lora_unexpected,
    )  # fmt: skip
    return built.eval()


def trained(base: State, form: str, names: list[str]) -> loratool.Adapter:
    """An adapter of some tensors of a base, with more than one rank and scale in it."""
    items = []
    for n, name in enumerate(names):
        shape = tuple(base[name].shape)
        update = make_update(form, shape, Maker(n), rank=2 + n % 2, alpha=6.0)
        items.append(loratool.Targeted(loratool.Target(name, shape), update))
    return loratool.Adapter(tuple(items))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_torchtune_goes_on_from_what_was_written(family: str, dora: bool, tmp_path: Path) -> None:
    """Its merge and its forward are those of the original adapter in transformers' base."""
    made = Made(family, dora, tmp_path)
    base, before = made.transformers_base(), to_transformers(family, made.base)
    edit_json(base / "config.json", tie_word_embeddings=False)
    names = [name for name in before if name.endswith(("_proj.weight", "lm_head.weight"))]
    adapter = trained(before, "dora0-lora" if dora else "lora", names)
    (tmp_path / "run").mkdir()
    report = loratool.convert(adapter, tmp_path / "run" / "epoch_0", "torchtune", base=base)
    loratool.merge(base, adapter, tmp_path / "merged")
    got = resumed(family, dora, base, tmp_path / "run")

    written = json.loads((tmp_path / "run" / "epoch_0" / "adapter_config.json").read_text())
    state = own(got.state_dict())
    merged = torchtune("modules.peft").get_merged_lora_ckpt(state, rank=written["r"], alpha=written["lora_alpha"])
    ours = read(tmp_path / "merged")
    assert len(changed(before, ours)) == len(names) == (9 if family == "phi3" else 14 if family == "gemma2" else 15)
    for name, value in to_transformers(family, merged).items():
        assert_float32_close(ours[name], value, name=name)

    plain, untouched = model(family, False).eval(), model(family, False).eval()  # B is zeros in a new LoRA layer
    plain.load_state_dict(checkpoint(family, tmp_path / "merged", tmp_path / "other")["model"], strict=False)
    untouched.load_state_dict(checkpoint(family, base, tmp_path / "other")["model"], strict=False)
    tokens, models = torch.arange(8).reshape(1, 8), (got, plain, untouched)

    def logits() -> list[Tensor]:
        with torch.no_grad():
            return [each(tokens) for each in models]

    def apart(one: Tensor, two: Tensor) -> float:
        return float((one - two).abs().max() / two.abs().max())

    biased = dora and family == "qwen2"
    assert any("multiplies the bias of 6 DoRA layers" in note for note in report.notes) == biased
    if biased:  # torchtune's forward is not that of its own merge
        theirs, wanted, _ = logits()
        assert apart(theirs, wanted) > 1e-2
        for parameter in (p for each in models for n, p in each.named_parameters() if n.endswith(".bias")):
            parameter.data.zero_()
    theirs, wanted, without = logits()
    assert apart(theirs, wanted) < 1e-4
    assert apart(theirs, without) > 1e-2


@pytest.mark.parametrize("family", ["llama3", "phi3"])
def test_torchtune_goes_on_from_a_few_layers(family: str, tmp_path: Path) -> None:
    """Its recipes want LoRA on the same modules of every layer: zeros fill the others."""
    made = Made(family, False, tmp_path)
    base, before = made.transformers_base(), to_transformers(family, made.base)
    edit_json(base / "config.json", tie_word_embeddings=False)
    ends = ("down_proj.weight", "o_proj.weight", "q_proj.weight", "qkv_proj.weight", "k_proj.weight", "v_proj.weight")
    names = [name for name in before if ".1." in name and name.endswith(ends)] + ["lm_head.weight"]
    adapter = trained(before, "lora", names)
    (tmp_path / "run").mkdir()
    loratool.convert(adapter, tmp_path / "run" / "epoch_0", "torchtune", base=base)
    loratool.merge(base, adapter, tmp_path / "merged")
    got = own(resumed(family, False, base, tmp_path / "run").state_dict())
    config = json.loads((tmp_path / "run" / "epoch_0" / "adapter_config.json").read_text())
    merged = torchtune("modules.peft").get_merged_lora_ckpt(got, rank=config["r"], alpha=config["lora_alpha"])
    ours = read(tmp_path / "merged")
    assert sorted(changed(before, ours)) == sorted(names)
    for name, value in to_transformers(family, merged).items():
        assert_float32_close(ours[name], value, name=name)


def test_the_config_is_as_torchtune_writes_it(tmp_path: Path) -> None:
    made = Made("llama3", False, tmp_path)
    epoch = made.epoch()
    loratool.convert(epoch / "adapter_model.pt", tmp_path / "again", "torchtune")
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in (epoch, tmp_path / "again"))
    assert ours == {**theirs, "target_modules": sorted(theirs["target_modules"])}
    state = torch.load(tmp_path / "again" / "adapter_model.pt", weights_only=True)
    assert sorted(state) == sorted(made.adapter)
    assert all(torch.equal(value, made.adapter[name]) for name, value in state.items())


def test_the_families_are_those_that_are_claimed() -> None:
    assert {{"llama3": "llama"}.get(family, family) for family in FAMILIES} == {*CHECKED["torchtune"].families}

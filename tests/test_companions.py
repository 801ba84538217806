"""What a merged folder has beside its weights is what transformers loads: config, labels, tokenizer, chat template.

The truth is PEFT's live model, and the tokenizer that was trained with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, Kit, tree
from models import HIDDEN, VOCAB, bert, edit_json, fill, llama, save_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool.configs import Editor, Weights
from loratool.errors import InvalidFile, Mismatch
from loratool.layout import NewTensor
from loratool.tensors import TensorRef

IDS = torch.tensor([[1, 5, 9, 7]])
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity(logging.CRITICAL)
    return


def tokenizer(*new: str, template: str | None = None, eos: str = "t2") -> Any:
    """A tokenizer of VOCAB words, and of others that are added to them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="t0", eos_token=eos)
    fast.add_tokens([*new])
    fast.chat_template = template
    return fast


def trained(model: nn.Module, folder: Path, **values: Any) -> nn.Module:
    """A model with PEFT's LoRA, every trained parameter moved; its adapter is saved."""
    import peft

    modules = {"target_modules": ["q_proj", "v_proj"], **values}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **modules))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(str(folder))
    return wrapped.eval()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found = model(ids)
        return found[0] if not hasattr(found, "logits") else found.logits


def assert_loads(cls: Any, folder: Path, live: Any, ids: Tensor = IDS) -> Any:
    """transformers loads the folder as it is, nothing missing, to the live model's logits."""
    loaded, told = cls.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    torch.testing.assert_close(logits(loaded.eval(), ids), logits(live, ids), rtol=1e-5, atol=1e-5)
    return loaded


def base_folder(folder: Path, *, tied: bool = False) -> Path:
    model = llama(tied=tied)
    fill(model, 1)
    save_base(model, folder)
    tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# the base\n")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder(tmp_path / "base")


def grown(folder: Path, base: Path, *, save_tokenizer: bool = True, **values: Any) -> nn.Module:
    """An adapter with three more tokens and a chat template, as TRL and axolotl save it."""
    from transformers import AutoModelForCausalLM

    words = tokenizer("<|user|>", "<|assistant|>", "<|end|>", template=TEMPLATE, eos="<|end|>")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    live = trained(model, folder, **values)
    if save_tokenizer:
        words.save_pretrained(folder)
    return live


# --- the vocabulary, its tokenizer, and the way back -----------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_loads_with_its_tokenizer(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = base_folder(tmp_path / "base", tied=tied)
    live = grown(tmp_path / "adapter", base)
    report = loratool.merge(base, tmp_path / "adapter", tmp_path / "out", allow_new=True)
    loaded = assert_loads(AutoModelForCausalLM, tmp_path / "out", live, torch.tensor([[1, 5, VOCAB + 2, 7]]))
    assert loaded.config.vocab_size == VOCAB + 3
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("t1 <|end|> <|user|>").input_ids == [1, VOCAB, VOCAB + 1]
    assert words.eos_token == "<|end|>"
    assert words.apply_chat_template([{"role": "user", "content": "t1"}], tokenize=False) == "<|user|>t1"
    assert f"config.json: vocab_size {VOCAB} -> {VOCAB + 3}" in report.plan.notes
    document = report.to_json()
    edit = {"file": "config.json", "key": "vocab_size", "from": str(VOCAB), "to": str(VOCAB + 3)}
    assert edit in document["config_edits"]
    assert document["tokenizer_from"] == "adapter"


def test_a_tied_base_with_both_trained_gets_a_head_of_its_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = base_folder(tmp_path / "base", tied=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    live = trained(model, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    report = loratool.merge(base, tmp_path / "adapter", tmp_path / "out", allow_new=True)
    assert "config.json: tie_word_embeddings true -> false" in report.plan.notes
    assert_loads(AutoModelForCausalLM, tmp_path / "out", live)


def test_a_head_that_was_trained_apart_from_its_embedding_is_untied(tmp_path: Path) -> None:
    """A checkpoint that stores both and ties them: the trained head is what the loader has to take."""
    from transformers import AutoModelForCausalLM

    base = base_folder(tmp_path / "base", tied=True)
    state = load_file(base / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    save_file({**state, "lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base)
    live = trained(model, tmp_path / "adapter", modules_to_save=["lm_head"])
    report = loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert "config.json: tie_word_embeddings true -> false" in report.plan.notes
    assert_loads(AutoModelForCausalLM, tmp_path / "out", live)


@pytest.mark.parametrize("way", ["base", "undo", "neither"])
def test_unmerge_takes_config_tokenizer_and_card_back(base: Path, tmp_path: Path, way: str) -> None:
    adapter, out, record = tmp_path / "adapter", tmp_path / "out", tmp_path / "undo.safetensors"
    if way == "neither":  # nothing is exact without a base or a record; a resized table can not even be subtracted
        trained(llama(), adapter)
        tokenizer("<new>").save_pretrained(adapter)
        edit_json(base / "config.json", vocab_size=VOCAB + 1)
        loratool.merge(base, adapter, out, dtype="bf16")
    else:
        grown(adapter, base)
        loratool.merge(base, adapter, out, allow_new=True, undo=record if way == "undo" else None)
    options: dict[str, Any] = {"base": {"base": base}, "undo": {"undo": record}, "neither": {}}[way]
    loratool.unmerge(out, adapter, tmp_path / "back", **options)
    before, after = tree(base), tree(tmp_path / "back")
    if way == "neither":
        before.pop("model.safetensors")
        after.pop("model.safetensors")
    assert after == before


def test_a_tokenizer_too_large_for_a_receipt_stays_whole_and_is_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool import companions

    monkeypatch.setattr(companions, "KEPT", (base / "config.json").stat().st_size)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    grown(adapter, base)
    loratool.merge(base, adapter, out, allow_new=True, undo=tmp_path / "undo.safetensors")
    report = loratool.unmerge(out, adapter, tmp_path / "back", undo=tmp_path / "undo.safetensors")
    assert any("tokenizer.json" in note and "--base BASE" in note for note in report.plan.notes)
    before, merged, after = tree(base), tree(out), tree(tmp_path / "back")
    assert after["config.json"] == before["config.json"]
    assert after["README.md"] == before["README.md"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert after[name] == merged[name]
    loratool.unmerge(out, adapter, tmp_path / "exact", base=base)
    assert tree(tmp_path / "exact") == before


def test_a_config_that_was_edited_since_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    grown(tmp_path / "adapter", base)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out", allow_new=True)
    edit_json(tmp_path / "out" / "config.json", mine=True)
    report = loratool.unmerge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", base=base)
    assert "config.json is not what the merge wrote: it stays as it is" in report.plan.notes
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mine"] is True


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "", ".", "a\\b", "c:evil"])
def test_a_receipt_names_files_of_its_folder_only(kit: Kit, name: str) -> None:
    from loratool import receipt

    kit.write("base/README.md", "# base")
    loratool.merge(kit / "base", kit / "adapter", kit / "carded")
    document = kit.json("carded/loratool_receipt.json")
    for entry in ({name: document["replaced"]["README.md"]}, {"a": {**document["replaced"]["README.md"], "now": name}}):
        content = {key: value for key, value in document.items() if key != "digest"} | {"replaced": entry}
        kit.write("carded/loratool_receipt.json", {**content, "digest": receipt._digest(content)})
        with pytest.raises(InvalidFile) as caught:
            loratool.unmerge(kit / "carded", kit / "adapter", kit / "back", base=kit / "base")
        assert caught.value.code == "E-RECEIPT"
        assert not (kit / "back").exists()


# --- which tokenizer -------------------------------------------------------------------------------------------------


def plain(folder: Path, base: Path, words: Any) -> Path:
    """An adapter of the base as it is, with a tokenizer beside it."""
    from transformers import AutoModelForCausalLM

    trained(AutoModelForCausalLM.from_pretrained(base), folder)
    words.save_pretrained(folder)
    return folder


def tokenizer_files(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(folder).items() if "token" in name or "template" in name}


def test_the_same_tokenizer_saved_in_another_way_leaves_the_base_s_as_it_is(base: Path, tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter", base, tokenizer())
    edit_json(adapter / "tokenizer_config.json", model_max_length=77, padding_side="left")
    (adapter / "tokenizer.json").write_text(json.dumps(json.loads((adapter / "tokenizer.json").read_text())))
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(base)
    assert report.to_json()["tokenizer_from"] is None


@pytest.mark.parametrize(
    ("words", "why"),
    [({"template": TEMPLATE}, "chat template"), ({"eos": "t3"}, "eos_token")],
)
def test_another_chat_template_or_end_comes_from_the_adapter(
    base: Path, tmp_path: Path, words: dict[str, str], why: str
) -> None:
    adapter = plain(tmp_path / "adapter", base, tokenizer(**words))
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(adapter)
    assert any(why in note for note in report.plan.notes)
    loratool.merge(base, adapter, tmp_path / "same", tokenizer_from="base")
    assert tokenizer_files(tmp_path / "same") == tokenizer_files(base)


def test_a_chat_template_alone_is_added_to_the_base_s_tokenizer(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    adapter = plain(tmp_path / "adapter", base, tokenizer())
    for name in tokenizer_files(adapter):
        (adapter / name).unlink()
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    loratool.merge(base, adapter, tmp_path / "out")
    assert tokenizer_files(tmp_path / "out").items() >= tokenizer_files(base).items()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE


def test_tokenizers_that_differ_are_asked_for(base: Path, tmp_path: Path, cli: Cli) -> None:
    one = plain(tmp_path / "one", base, tokenizer(template=TEMPLATE))
    two = plain(tmp_path / "two", base, tokenizer(template=TEMPLATE + "!"))
    for options in ([], ["--tokenizer-from", "adapter"]):
        refused = cli("merge", base, one, two, "-o", tmp_path / "out", *options)
        assert refused.code == 2
        assert "E-TOKENIZER" in refused.err
        assert "one and two" in refused.err
        assert "--tokenizer-from base" in refused.err
        assert not (tmp_path / "out").exists()
    for number, (given, expected) in enumerate(((two, two), ("base", base))):
        out = tmp_path / f"out{number}"
        assert cli("merge", base, one, two, "-o", out, "--tokenizer-from", given).code == 0
        assert tokenizer_files(out) == tokenizer_files(expected)


def test_tokens_without_rows_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter", base, tokenizer("<new>"))
    with pytest.raises(Mismatch, match=f"'<new>' with number {VOCAB}") as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert caught.value.code == "E-TOKENIZER"
    assert "--tokenizer-from base" in caught.value.hint
    loratool.merge(base, adapter, tmp_path / "out", tokenizer_from="base")
    assert tokenizer_files(tmp_path / "out") == tokenizer_files(base)


def test_new_rows_without_a_token_are_told_of(base: Path, tmp_path: Path) -> None:
    grown(tmp_path / "adapter", base, save_tokenizer=False)
    report = loratool.merge(base, tmp_path / "adapter", tmp_path / "out", allow_new=True)
    assert any("no token of the tokenizer is in them: --tokenizer-from FOLDER" in note for note in report.plan.notes)


@pytest.mark.parametrize("given", ["adapter", "nowhere"])
def test_a_tokenizer_that_is_not_there_is_refused(kit: Kit, given: str) -> None:
    with pytest.raises(Mismatch) as caught:
        loratool.merge(kit / "base", kit / "adapter", kit / "out", tokenizer_from=given)
    assert caught.value.code == "E-TOKENIZER"
    with pytest.raises(Mismatch) as caught:
        loratool.merge(kit / "base/model.safetensors", kit / "adapter", kit / "o.safetensors", tokenizer_from="base")
    assert caught.value.code == "E-OPTION"


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "labels"), [("SEQ_CLS", 1), ("SEQ_CLS", 3), ("TOKEN_CLS", 5)])
def test_a_causal_base_with_a_classifier_s_head_loads_as_the_classifier(
    base: Path, tmp_path: Path, task: str, labels: int
) -> None:
    import transformers

    name = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}[task]
    cls = getattr(transformers, f"LlamaFor{name}")
    live = trained(cls.from_pretrained(base, num_labels=labels), tmp_path / "adapter", task_type=task)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out", allow_new=True)
    loaded = assert_loads(getattr(transformers, f"AutoModelFor{name}"), tmp_path / "out", live)
    assert loaded.config.num_labels == labels
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [f"LlamaFor{name}"]


def test_bert_with_named_labels_has_their_names(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    fresh = bert()
    fill(fresh, 1)
    save_base(fresh, tmp_path / "base")
    names = {0: "bad", 1: "fair", 2: "good"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", id2label=names)
    model.config.save_pretrained(tmp_path / "adapter")
    live = trained(model, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query", "value"])
    report = loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_new=True)
    loaded = assert_loads(AutoModelForSequenceClassification, tmp_path / "out", live)
    assert loaded.config.id2label == names
    assert not any("what its 3 labels" in note for note in report.plan.notes)


def test_a_native_adapter_still_says_what_was_trained(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification, LlamaForTokenClassification

    model = LlamaForTokenClassification.from_pretrained(base, num_labels=5)
    live = trained(model, tmp_path / "adapter", task_type="TOKEN_CLS")
    loratool.convert(tmp_path / "adapter", tmp_path / "a.lora.safetensors", "native", base=base)
    loratool.merge(base, tmp_path / "a.lora.safetensors", tmp_path / "out", allow_new=True)
    assert_loads(AutoModelForTokenClassification, tmp_path / "out", live)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForTokenClassification"]


def test_a_class_that_nothing_names_is_left_and_told_of(base: Path, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    trained(LlamaForSequenceClassification.from_pretrained(base, num_labels=3), tmp_path / "a", task_type="SEQ_CLS")
    adapter = replace(loratool.load(tmp_path / "a", base=base), info={})
    report = loratool.merge(base, adapter, tmp_path / "out", allow_new=True)
    assert any("LlamaForCausalLM" in note and "architectures" in note for note in report.plan.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert len(config["id2label"]) == 3


def test_an_embedding_that_outgrows_its_head_is_refused(base: Path, tmp_path: Path) -> None:
    grown(tmp_path / "adapter", base)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "lm_head" not in name}, path)
    with pytest.raises(Mismatch, match=f"lm_head.weight has {VOCAB} rows, and the vocabulary {VOCAB + 3}"):
        loratool.merge(base, tmp_path / "adapter", tmp_path / "out", allow_new=True)


# --- dtypes and configs inside others --------------------------------------------------------------------------------


def llava() -> nn.Module:
    import transformers as t

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = t.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    vision_config = t.CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=8)
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=vision_config, text_config=text, image_token_index=VOCAB - 1)
    )


def test_a_config_inside_another_is_edited_where_the_value_stands(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    fresh = llava()
    fill(fresh, 1)
    save_base(fresh, tmp_path / "base", names="memory")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    live = trained(model, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    report = loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_new=True)
    assert f"config.json: text_config.vocab_size {VOCAB} -> {VOCAB + 4}" in report.plan.notes
    assert_loads(LlavaForConditionalGeneration, tmp_path / "out", live)
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", allow_new=True, dtype="bf16")
    half = LlavaForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert {half.config.dtype, half.config.text_config.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_is_what_loads(base: Path, tmp_path: Path, key: str) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    (base / "config.json").write_text(json.dumps({**config, key: "float32"}))
    trained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    report = loratool.merge(base, tmp_path / "adapter", tmp_path / "out", dtype="fp16")
    assert f'config.json: {key} "float32" -> "float16"' in report.plan.notes
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16


@pytest.mark.peers
def test_a_first_layer_with_more_inputs_is_that_of_the_config() -> None:
    flux = pytest.importorskip("diffusers").FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    sizes |= {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4)}
    base = flux(in_channels=4, **sizes)
    config = {key: value for key, value in base.config.items() if not key.startswith("_")}
    first = base.state_dict()["x_embedder.weight"]
    wide = torch.cat([first, torch.zeros_like(first)], dim=1)
    refs = {name: TensorRef.of(value, name) for name, value in base.state_dict().items()}
    new = NewTensor("x_embedder.weight", None, "F32", (*wide.shape,), original=refs["x_embedder.weight"])
    editor = Editor(config, Weights(refs, {"x_embedder.weight": new}, {}))
    assert editor.edit()
    assert {edit.key: edit.after for edit in editor.edits} == {"in_channels": 8, "out_channels": 4}
    model = flux.from_config(editor.config)
    model.load_state_dict({**base.state_dict(), "x_embedder.weight": wide})


def test_repeated_layers_are_counted(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fresh = llama(layers=2)
    fill(fresh, 1)
    save_base(fresh, tmp_path / "base")
    live = trained(fresh, tmp_path / "adapter", layer_replication=[[0, 2], [1, 2]])
    report = loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", allow_new=True)
    assert "config.json: num_hidden_layers 2 -> 3" in report.plan.notes
    assert_loads(AutoModelForCausalLM, tmp_path / "out", live)


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_base_s_card_is_kept_apart(kit: Kit) -> None:
    kit.write("base/README.md", "# base")
    report = loratool.merge(kit / "base", kit / "adapter", kit / "out")
    assert not (kit / "out" / "README.md").exists()
    assert (kit / "out" / "README.base.md").read_text() == "# base"
    assert any("README.base.md" in note for note in report.plan.notes)
    loratool.unmerge(kit / "out", kit / "adapter", kit / "back")
    assert (kit / "back" / "README.md").read_text() == "# base"
    assert not (kit / "back" / "README.base.md").exists()


def test_a_card_that_lies_apart_already_stays(kit: Kit) -> None:
    kit.write("base/README.base.md", "# older")
    kit.write("base/README.md", "# base")
    loratool.merge(kit / "base", kit / "adapter", kit / "out")
    names = {path.name: path.read_text() for path in (kit / "out").glob("README*")}
    assert names == {"README.base.md": "# older", "README.base.2.md": "# base"}
    loratool.unmerge(kit / "out", kit / "adapter", kit / "back")
    names = {path.name: path.read_text() for path in (kit / "back").glob("README*")}
    assert names == {"README.base.md": "# older", "README.md": "# base"}


def test_a_config_that_fits_already_keeps_its_bytes(kit: Kit) -> None:
    kit.write("base/config.json", '{"vocab_size":   7}')
    loratool.merge(kit / "base", kit / "adapter", kit / "out")
    assert (kit / "out" / "config.json").read_text() == '{"vocab_size":   7}'
    assert "replaced" not in kit.json("out/loratool_receipt.json")

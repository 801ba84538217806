"""Trained weights that lie beside an adapter's file are merged with it; a trainer's own files are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import PREFIX, Cli, Kit
from models import fill, llama, save_base
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import Mismatch

NORM = torch.tensor([1.0, 2.0, 3.0, 4.0])


def beside(kit: Kit, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    """The kit's adapter with another file in its folder."""
    path = kit / "adapter" / name
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path.parent


def merged(kit: Kit, adapter: Path, **options: object) -> dict[str, torch.Tensor]:
    loratool.merge(kit / "base", adapter, kit / "out", **options)  # type: ignore[arg-type]
    return load_file(kit / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("non_lora_trainables.bin", f"{PREFIX}norm.weight"),
        ("non_lora_trainables.bin", f"{PREFIX}norm.modules_to_save.default.weight"),
        ("non_lora_state_dict.bin", f"{PREFIX}norm.base_layer.weight"),
        ("trainable_params.bin", "norm.weight"),
        ("vit.safetensors", "norm.weight"),
        ("anything.pt", f"module.{PREFIX}norm.weight"),
        ("anything.pth", "model.norm.weight"),
    ],
)
def test_a_whole_tensor_beside_the_adapter_replaces_the_bases(kit: Kit, name: str, key: str) -> None:
    got = merged(kit, beside(kit, name, {key: NORM}))
    assert torch.equal(got.pop("norm.weight"), NORM)
    expected = load_file(kit / "merged" / "model.safetensors")
    assert all(torch.equal(expected[other], value) for other, value in got.items())


def test_what_lies_beside_is_named_and_part_of_every_verb(kit: Kit, cli: Cli) -> None:
    adapter, base = beside(kit, "vit.safetensors", {"norm.weight": NORM}), kit / "base"
    assert "vit.safetensors lies beside it and is part of it: 1 tensor, norm.weight" in cli("inspect", adapter).out
    assert cli("merge", base, adapter, "-o", kit / "out").code == 0
    assert cli("verify", kit / "out", adapter, "--base", base).code == 0
    assert cli("verify", kit / "merged", adapter, "--base", base).code == 1
    assert cli("unmerge", kit / "out", adapter, "--base", base, "-o", kit / "back").code == 0
    assert cli("convert", adapter, "--to", "native", "--base", base, "-o", kit / "n.lora.safetensors").code == 0
    assert {item.target.name for item in loratool.load(kit / "n.lora.safetensors").updates} == {
        "l.0.q.weight",
        "norm.weight",
    }


def test_the_file_by_peft_s_name_is_the_folder(kit: Kit) -> None:
    folder = beside(kit, "vit.safetensors", {"norm.weight": NORM})
    assert torch.equal(merged(kit, folder / "adapter_model.safetensors")["norm.weight"], NORM)


def test_a_file_by_any_other_name_lies_among_strangers(kit: Kit) -> None:
    beside(kit, "vit.safetensors", {"norm.weight": NORM})
    shutil.copy(kit / "native.lora.safetensors", kit / "adapter")
    got = merged(kit, kit / "adapter" / "native.lora.safetensors")
    assert not torch.equal(got["norm.weight"], NORM)


def test_an_adapter_in_a_pickle_is_not_hidden_by_safetensors_beside_it(kit: Kit) -> None:
    folder = beside(kit, "vit.safetensors", {"norm.weight": NORM})
    save_file({"l.0.v.weight": torch.ones(3, 4)}, folder / "projector.safetensors")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    got = merged(kit, folder)
    assert torch.equal(got["norm.weight"], NORM)
    assert torch.equal(got["l.0.v.weight"], torch.ones(3, 4))
    assert not torch.equal(got["l.0.q.weight"], load_file(kit / "base" / "model.safetensors")["l.0.q.weight"])


def test_a_head_that_the_base_lacks_is_refused_by_the_name_of_its_file(kit: Kit, cli: Cli) -> None:
    head = {"v_head.summary.weight": torch.ones(1, 4), "v_head.summary.bias": torch.zeros(1)}
    folder = beside(kit, "value_head.safetensors", head)
    refused = cli("merge", kit / "base", folder, "-o", kit / "out")
    assert refused.code == 2
    assert not (kit / "out").exists()
    assert "adapter: value_head.safetensors" in refused.err
    assert "v_head.summary.bias" in refused.err
    assert "--allow-new" in refused.err
    assert "--skip 'value_head.safetensors'" in refused.err
    skipped = cli("merge", kit / "base", folder, "-o", kit / "out", "--skip", "value_head.safetensors")
    assert skipped.code == 0
    assert "left out, as --skip says: value_head.safetensors" in skipped.out + skipped.err
    assert load_file(kit / "out" / "model.safetensors").keys() == load_file(kit / "base" / "model.safetensors").keys()
    assert cli("merge", kit / "base", folder, "-o", kit / "new", "--allow-new").code == 0
    new = load_file(kit / "new" / "model.safetensors")
    assert all(torch.equal(new[name], value) for name, value in head.items())


@pytest.mark.parametrize("allow_new", [False, True])
def test_rows_for_new_tokens_without_their_place_are_refused(kit: Kit, allow_new: bool) -> None:
    folder = beside(kit, "new_embeddings.safetensors", {"input_embeddings": torch.ones(2, 4)})
    with pytest.raises(Mismatch) as caught:
        merged(kit, folder, allow_new=allow_new)
    assert caught.value.code == "E-BESIDE"
    assert "--skip 'new_embeddings.safetensors'" in caught.value.hint
    assert merged(kit, folder, skip="new_embeddings.*").keys() == load_file(kit / "base" / "model.safetensors").keys()


def test_a_file_that_can_not_be_read_is_refused_by_name(kit: Kit, cli: Cli) -> None:
    (kit / "adapter" / "projector.safetensors").write_bytes(b"not weights")
    torch.save({"model": kit}, kit / "adapter" / "model_and_all.pt")
    refused = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out", "--json")
    problems = {Path(problem["where"]).name: problem for problem in refused.json["problems"]}
    assert refused.code == 2
    assert set(problems) == {"projector.safetensors", "model_and_all.pt"}
    assert all(p["code"] == "E-BESIDE" and p["hint"] == f"--skip '{n}' leaves it out" for n, p in problems.items())
    shown = cli("inspect", kit / "adapter")
    assert shown.code == 0
    assert all(f"--skip '{name}'" in shown.out for name in problems)
    skips = ["--skip", "projector.safetensors", "--skip", "model_*.pt"]
    assert cli("merge", kit / "base", kit / "adapter", "-o", kit / "out", *skips).code == 0


def test_a_model_or_another_adapter_beside_it_is_not_read(kit: Kit) -> None:
    folder = beside(kit, "anything.pt", load_file(kit / "base" / "model.safetensors"))
    shutil.copy(kit / "native.lora.safetensors", folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    adapter = loratool.load(folder)
    assert [item.target.name for item in adapter.updates] == ["l.0.q.weight"]
    assert {note.split()[0] for note in adapter.notes} == {"anything.pt", "native.lora.safetensors"}


def test_no_shard_of_a_model_beside_it_is_read(kit: Kit, cli: Cli) -> None:
    """Also none that holds nothing of what the adapter changes: another base's norm must not replace this one's."""
    state = load_file(kit / "base" / "model.safetensors")
    other = {"norm.weight": state.pop("norm.weight") + 1}
    mixed = kit / "mixed"
    shutil.copytree(kit / "adapter", mixed)
    weight_map = dict.fromkeys(state, "model-00001-of-00002.safetensors") | {
        "norm.weight": "model-00002-of-00002.safetensors"
    }
    save_file(state, mixed / "model-00001-of-00002.safetensors")
    save_file(other, mixed / "model-00002-of-00002.safetensors")
    kit.write("mixed/model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    code, _, text = cli("merge", kit / "base", mixed, "-o", kit / "out")
    assert (code, "E-CONVENTION" in text) == (2, True)
    adapter = mixed / "adapter_model.safetensors"
    assert str(adapter) in text
    report = loratool.merge(kit / "base", adapter, kit / "out")
    assert any("model-*-of-00002.safetensors beside it" in note for note in report.plan.notes)
    got, expected = (load_file(kit / name / "model.safetensors") for name in ("out", "merged"))
    assert all(torch.equal(expected[name], value) for name, value in got.items())


def test_a_tensor_that_both_files_have_is_one_update_and_two_values_are_refused(kit: Kit) -> None:
    path = kit / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), f"{PREFIX}norm.weight": NORM}, path)
    folder = beside(kit, "non_lora_trainables.bin", {f"{PREFIX}norm.weight": NORM})
    assert torch.equal(merged(kit, folder)["norm.weight"], NORM)
    beside(kit, "non_lora_trainables.bin", {f"{PREFIX}norm.weight": NORM + 1})
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(kit / "base", folder, kit / "other")
    assert caught.value.code == "E-OVERLAP"


def test_patterns_choose_among_the_keys_of_a_file_beside(kit: Kit) -> None:
    folder = beside(kit, "vit.safetensors", {"norm.weight": NORM, "l.0.v.weight": torch.ones(3, 4)})
    for number, options in enumerate(({"skip": "l.0.v.*"}, {"only": ["norm.weight", "l.0.q.weight"]})):
        out = kit / f"out{number}"
        loratool.merge(kit / "base", folder, out, **options)  # type: ignore[arg-type]
        got = load_file(out / "model.safetensors")
        assert torch.equal(got["norm.weight"], NORM)
        assert not torch.equal(got["l.0.v.weight"], torch.ones(3, 4))


def test_the_second_file_alone_leads_to_the_adapter(kit: Kit, cli: Cli) -> None:
    folder = beside(kit, "vit.safetensors", {"norm.weight": NORM})
    refused = cli("merge", kit / "base", folder / "vit.safetensors", "-o", kit / "out")
    assert refused.code == 2
    assert f"give the adapter that it lies beside, {folder}" in refused.err


def test_llava_s_two_files_give_the_live_model(tmp_path: Path) -> None:
    """What LLaVA's train.py saves: PEFT's adapter, and every other parameter that was trained, by its live name."""
    import peft
    from transformers import AutoModelForCausalLM

    base = llama(layers=2)
    fill(base, 1)
    save_base(base, tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name or "norm" in name or "mlp" in name}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.requires_grad_(True)
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    rest = {name: p.detach() for name, p in model.named_parameters() if "lora_" not in name and p.requires_grad}
    torch.save(rest, tmp_path / "adapter" / "non_lora_trainables.bin")
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_real_trainer_s_checkpoint_is_its_adapter(tmp_path: Path, cli: Cli) -> None:
    import peft
    from transformers import Trainer, TrainingArguments

    base = llama()
    fill(base, 1)
    save_base(base, tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    data = [{"input_ids": torch.tensor([1, 5, 9]), "labels": torch.tensor([1, 5, 9])}] * 2
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()  # type: ignore[arg-type]
    checkpoint = tmp_path / "run" / "checkpoint-1"
    names = {path.name for path in checkpoint.iterdir()}
    assert names >= {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    shown = cli("inspect", checkpoint)
    assert shown.code == 0
    assert "optimizer.pt" in shown.out
    merged = cli("merge", tmp_path / "base", checkpoint, "-o", tmp_path / "out", "--json")
    assert merged.code == 0
    assert merged.json["tensors_changed"] == 1


# --- folders below ---------------------------------------------------------------------------------------------------


def below(kit: Kit, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    (kit / "adapter" / name).parent.mkdir(parents=True, exist_ok=True)
    return beside(kit, name, tensors) and kit / "adapter"


@pytest.mark.parametrize("name", ["value_head/model.safetensors", "2_Dense/pytorch_model.bin", "a/b/vit.safetensors"])
def test_trained_weights_below_the_adapter_are_refused_by_name(kit: Kit, cli: Cli, name: str) -> None:
    adapter = below(kit, name, {"summary.weight": NORM})
    (adapter / name).with_name("config.json").write_text('{"in_features": 4}')
    assert name in cli("inspect", adapter).out
    said = cli("merge", kit / "base", adapter, "-o", kit / "out")
    assert said.code == 2
    assert "error[E-BESIDE]" in said.err
    assert f"{name} lies below the adapter" in said.err
    assert f"--skip '{name}' leaves it out" in said.err
    skipped = cli("merge", kit / "base", adapter, "-o", kit / "out", "--skip", name)
    assert skipped.code == 0
    assert f"below it lie, and are not read with it: {name} (left out, as --skip says)" in skipped.out
    assert same(kit / "out", kit / "merged")


def same(one: Path, other: Path) -> bool:
    got, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def test_other_adapters_and_models_below_are_named(kit: Kit, cli: Cli) -> None:
    shutil.copytree(kit / "adapter", kit / "sales")
    shutil.copytree(kit / "sales", kit / "adapter" / "sales")
    shutil.copytree(kit / "base", kit / "adapter" / "merged")
    (kit / "adapter" / "torn").mkdir()
    (kit / "adapter" / "torn" / "x.safetensors").write_bytes(b"x")
    said = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out")
    assert said.code == 0, said.err
    for words in (
        "sales/adapter_model.safetensors (adapters of their own)",
        "merged/model.safetensors (models)",
        "torn/x.safetensors (not readable)",
    ):
        assert words in said.out
        assert words in cli("inspect", kit / "adapter").out
    assert same(kit / "out", kit / "merged")


def test_a_trainers_folders_below_are_not_worth_a_word(kit: Kit, cli: Cli) -> None:
    for place in ("checkpoint-500", "global_step500", "pytorch_model_fsdp_0", "runs/a", ".cache/x"):
        below(kit, f"{place}/model.safetensors", {"other.weight": NORM})
    below(kit, "state/optimizer.bin", {"other.weight": NORM})
    said = cli("merge", kit / "base", kit / "adapter", "-o", kit / "out")
    assert said.code == 0, said.err
    assert "below it" not in said.out + cli("inspect", kit / "adapter").out


def test_what_lies_below_a_single_file_is_none_of_its_business(kit: Kit, cli: Cli) -> None:
    (kit / "value_head").mkdir()
    save_file({"summary.weight": NORM}, kit / "value_head" / "model.safetensors")
    shutil.copy(kit / "adapter" / "adapter_model.safetensors", kit / "mine.safetensors")
    config = ("--config", kit / "adapter" / "adapter_config.json")
    assert cli("merge", kit / "base", kit / "mine.safetensors", "-o", kit / "out", *config).code == 0

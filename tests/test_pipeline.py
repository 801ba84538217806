"""Pipelines of several components: one merge changes those that an adapter touches, and takes over all the rest."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Cli, tree
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.checkpoint import open_checkpoint

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
State = dict[str, Tensor]


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """unet/ in two shards, text_encoder/ and text_encoder_2/ with the same names inside, a pickled safety_checker/, a
    vae/ with a variant, folders without weights, and a file of another format at the top."""
    folder = tmp_path / "base"
    for name in ("unet", "text_encoder", "text_encoder_2", "vae", "safety_checker", "scheduler", "extra"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(f'{{"of": "{name}"}}\n')
    a, b = {"a.weight": values(6, 4, seed=1), "n.bias": values(3, seed=2)}, {"b.weight": values(8, 6, seed=3)}
    for state, shard in ((a, SHARDS[0]), (b, SHARDS[1])):
        save_file(state, folder / "unet" / shard, {"format": "pt"})
    weight_map = dict.fromkeys(a, SHARDS[0]) | dict.fromkeys(b, SHARDS[1])
    size = sum(4 * tensor.numel() for tensor in (a | b).values())
    (folder / "unet" / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        save_file({"fc.weight": values(5, 5, seed=10 + number)}, folder / name / "model.safetensors", {"format": "pt"})
    vae = {"conv.weight": values(4, 4, seed=4)}
    save_file(vae, folder / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    save_file({"conv.weight": vae["conv.weight"].half()}, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    torch.save({"head.weight": values(2, 2, seed=5)}, folder / "safety_checker" / "pytorch_model.bin")
    save_file({"x.weight": values(2, 2, seed=6)}, folder / "extra" / "model.safetensors")
    (folder / "whole.ckpt").write_bytes(b"all of it once more")
    (folder / "README.md").write_text("about\n")
    names = ("unet", "text_encoder", "text_encoder_2", "vae", "safety_checker", "scheduler")
    index = {"_class_name": "P", "image_encoder": [None, None], "force_zeros": True} | {n: ["d", "C"] for n in names}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def adapter(folder: Path, **targets: tuple[int, int]) -> Path:
    """A LoRA of rank 2 for tensors [out, in] of components, named COMPONENT__MODULE."""
    state: State = {}
    for number, (target, (out, into)) in enumerate(targets.items()):
        name = target.replace("__", ".")
        state[f"{name}.lora_A.weight"] = values(2, into, seed=100 + number)
        state[f"{name}.lora_B.weight"] = values(out, 2, seed=200 + number)
    path = folder / f"{'-'.join(targets)}.safetensors"
    save_file(state, path)
    return path


def delta(path: Path, module: str) -> Tensor:
    state = load_file(path)
    return (state[f"{module}.lora_B.weight"].double() @ state[f"{module}.lora_A.weight"].double()).float()


def test_touched_components_change_and_all_else_stays(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path, unet__b=(8, 6), text_encoder_2__fc=(5, 5))
    report = loratool.merge(base, path, tmp_path / "out")
    before, after = tree(base), tree(tmp_path / "out")
    changed = {"unet/" + SHARDS[1], "text_encoder_2/model.safetensors"}
    assert {name for name in before if after.get(name) != before[name]} == changed | {"whole.ckpt", "README.md"}
    assert after.keys() - before.keys() == {"loratool_receipt.json", "README.base.md"}
    assert after["README.base.md"] == before["README.md"]
    for module, file in (("unet.b", f"unet/{SHARDS[1]}"), ("text_encoder_2.fc", "text_encoder_2/model.safetensors")):
        name = module.partition(".")[2] + ".weight"
        found, old = load_file(tmp_path / "out" / file)[name], load_file(base / file)[name]
        torch.testing.assert_close(found, old + delta(path, module), rtol=1e-6, atol=1e-6)
    assert report.receipt.tensors.keys() == {"unet.b.weight", "text_encoder_2.fc.weight"}
    assert any("whole.ckpt" in note for note in report.plan.notes)


def test_stale_variants_of_a_changed_component_go(base: Path, tmp_path: Path) -> None:
    report = loratool.merge(base, adapter(tmp_path, unet__a=(6, 4)), tmp_path / "one")
    assert (tmp_path / "one/vae/diffusion_pytorch_model.fp16.safetensors").exists()
    assert not any("fp16" in note for note in report.plan.notes)
    variant = base / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    variant.write_text("{}")
    (base / "unet" / "diffusion_pytorch_model.onnx").write_bytes(b"old")
    report = loratool.merge(base, adapter(tmp_path, unet__a=(6, 4)), tmp_path / "two")
    assert not (tmp_path / "two/unet" / variant.name).exists()
    assert not (tmp_path / "two/unet/diffusion_pytorch_model.onnx").exists()
    assert any("unet/diffusion_pytorch_model.onnx" in note for note in report.plan.notes)


def test_a_pickled_component_becomes_safetensors_only_when_it_changes(base: Path, tmp_path: Path) -> None:
    old = torch.load(base / "safety_checker/pytorch_model.bin")["head.weight"]
    (base / "safety_checker").rename(base / "prior")  # a component that adapters are for
    text = (base / "model_index.json").read_text().replace("safety_checker", "prior")
    (base / "model_index.json").write_text(text)
    path = adapter(tmp_path, prior__head=(2, 2))
    loratool.merge(base, path, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out/prior").iterdir()) == ["config.json", "model.safetensors"]
    found = load_file(tmp_path / "out/prior/model.safetensors")["head.weight"]
    torch.testing.assert_close(found, old + delta(path, "prior.head"))


@pytest.mark.parametrize("how", ["base", "undo"])
def test_unmerge_restores_every_byte(base: Path, tmp_path: Path, how: str) -> None:
    path = adapter(tmp_path, unet__a=(6, 4), text_encoder__fc=(5, 5), text_encoder_2__fc=(5, 5))
    loratool.merge(base, path, tmp_path / "out", undo=tmp_path / "record")
    given = {"base": base} if how == "base" else {"undo": tmp_path / "record"}
    report = loratool.unmerge(tmp_path / "out", path, tmp_path / "back", **given)
    assert (report.restored, report.total) == (3, 3)
    before = tree(base)
    del before["whole.ckpt"]  # the merge had left it out
    assert tree(tmp_path / "back") == before


def test_the_indexes_follow_their_own_components(base: Path, tmp_path: Path) -> None:
    """Untouched to the byte where they still hold; counted again where sizes change."""
    path = adapter(tmp_path, unet__a=(6, 4))
    loratool.merge(base, path, tmp_path / "same")
    assert (tmp_path / "same/unet" / INDEX).read_bytes() == (base / "unet" / INDEX).read_bytes()
    loratool.merge(base, path, tmp_path / "half", dtype="fp16")
    index = json.loads((tmp_path / "half/unet" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * (24 + 3 + 48)
    assert index["weight_map"] == {"a.weight": SHARDS[0], "b.weight": SHARDS[1], "n.bias": SHARDS[0]}
    assert open_checkpoint(tmp_path / "half").tensors["vae.conv.weight"].dtype == "F16"


def test_new_tensors_go_to_their_component(base: Path, tmp_path: Path) -> None:
    state = {"transformer_blocks.0.norm_q.weight": torch.ones(3)} | load_file(adapter(tmp_path, unet__a=(6, 4)))
    state["unet.transformer_blocks.0.norm_q.weight"] = state.pop("transformer_blocks.0.norm_q.weight")
    save_file(state, tmp_path / "new.safetensors")
    with pytest.raises(loratool.LoratoolError, match="the base has no unet"):
        loratool.merge(base, tmp_path / "new.safetensors", tmp_path / "out")
    loratool.merge(base, tmp_path / "new.safetensors", tmp_path / "out", allow_new=True)
    index = json.loads((tmp_path / "out/unet" / INDEX).read_text())
    assert index["weight_map"]["transformer_blocks.0.norm_q.weight"] == SHARDS[1]
    assert "transformer_blocks.0.norm_q.weight" in load_file(tmp_path / "out/unet" / SHARDS[1])
    loratool.unmerge(tmp_path / "out", tmp_path / "new.safetensors", tmp_path / "back", base=base)
    back, before = open_checkpoint(tmp_path / "back").tensors, open_checkpoint(base).tensors
    assert {name: ref.digest() for name, ref in back.items()} == {name: ref.digest() for name, ref in before.items()}


def test_links(base: Path, tmp_path: Path) -> None:
    loratool.merge(base, adapter(tmp_path, unet__a=(6, 4)), tmp_path / "out", link=True)
    for name, linked in ((SHARDS[0], False), (SHARDS[1], True)):
        assert (tmp_path / "out/unet" / name).samefile(base / "unet" / name) is linked
    assert (tmp_path / "out/vae/diffusion_pytorch_model.safetensors").samefile(
        base / "vae/diffusion_pytorch_model.safetensors"
    )


KILLED = """
import os, signal, sys, loratool
def stop(step):
    if step.done > step.total - 40:
        os.kill(os.getpid(), signal.SIGKILL)
loratool.merge(sys.argv[1], sys.argv[2], sys.argv[3], threads=1, progress=stop, resume=True)
"""


def test_resume(base: Path, tmp_path: Path) -> None:
    """Files of one name in two folders are kept apart, also by a run that kept them and was killed as well."""
    path = adapter(tmp_path, unet__a=(6, 4), text_encoder__fc=(5, 5), text_encoder_2__fc=(5, 5))
    arguments = [sys.executable, "-c", KILLED, str(base), str(path), str(tmp_path / "out")]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    (scratch,) = tmp_path.glob(".out.partial-*")
    kept = {file.stat().st_ino for file in scratch.glob("out/text*/model.safetensors")}
    assert len(kept) == 2
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    loratool.merge(base, path, tmp_path / "out", resume=True)
    assert {file.stat().st_ino for file in (tmp_path / "out").glob("text*/model.safetensors")} == kept
    loratool.merge(base, path, tmp_path / "again")
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_inspect(base: Path, tmp_path: Path, cli: Cli) -> None:
    shown = loratool.inspect(base)
    assert (shown.title, shown.files, shown.tensors) == ("checkpoint: diffusers pipeline", 6, 7)
    assert shown.parameters == 24 + 3 + 48 + 25 + 25 + 16 + 4
    assert "component unet: 3 tensors with 75 parameters in 2 files" in shown.notes
    result = cli("inspect", base)
    assert result.code == 0
    assert "component text_encoder_2: 1 tensors" in result.out
    loratool.merge(base, adapter(tmp_path, unet__a=(6, 4)), tmp_path / "out")
    assert loratool.inspect(tmp_path / "out").title == "merged checkpoint: diffusers pipeline"


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(base: Path, adapter: Path) -> loratool.LoratoolError:
    before = tree(base.parent)
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(base, adapter, base.parent / "out")
    assert tree(base.parent) == before
    return caught.value


def test_a_merged_component_is_not_merged_again(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path, unet__a=(6, 4))
    loratool.merge(base / "unet", path, tmp_path / "unet")
    for file in (tmp_path / "unet").iterdir():
        file.replace(base / "unet" / file.name)
    error = refused(base, path)
    assert (error.code, error.where) == ("E-MERGED", str(base / "unet"))


@pytest.mark.parametrize("name", ["../out", "a/b", "", "unet "])
def test_components_are_folders_of_the_pipeline(base: Path, tmp_path: Path, name: str) -> None:
    (base / "model_index.json").write_text(json.dumps({name: ["d", "C"]}))
    assert refused(base, adapter(tmp_path, unet__a=(6, 4))).code == "E-INDEX"


def test_a_broken_pipeline(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path, unet__a=(6, 4))
    (base / "unet/config.json").unlink()
    assert "no config.json" in refused(base, path).message
    (base / "unet/config.json").write_text("{}")
    (base / "unet" / SHARDS[1]).unlink()
    assert refused(base, path).code == "E-INDEX"
    (base / "model_index.json").write_text('{"scheduler": ["d", "C"]}')
    assert "no component" in refused(base, path).message
    (base / "model_index.json").write_text("[]")
    assert refused(base, path).code == "E-JSON"
    (base / "model_index.json").write_text('{"unet": ["d", "C"]}')
    (base / "unet/model_index.json").write_text("{}")
    assert "itself a pipeline" in refused(base, path).message


def test_a_missing_component_is_named(base: Path, tmp_path: Path) -> None:
    """Never matched to another one, however alike they are: transformer_2 is not transformer."""
    error = refused(base, adapter(tmp_path, text_encoder_3__fc=(5, 5)))
    assert error.code == "E-TARGET"
    assert "text_encoder_3.fc.weight" in error.message


# --- parts in a native file ------------------------------------------------------------------------------------------


def parts_of(path: Path) -> dict[tuple[str, str], str]:
    """Of a native file: the (part, target) of its updates, and the first name of a tensor."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    updates = json.loads(header["__metadata__"]["loratool"])["updates"]
    return {(entry.get("part", ""), entry["target"]): min(header) for entry in updates}


def test_a_native_adapter_says_which_component_its_tensors_lie_in(base: Path, tmp_path: Path) -> None:
    """Two text encoders have tensors of the same names: the file keeps them apart, and merges as its source does."""
    path = adapter(tmp_path, unet__b=(8, 6), text_encoder__fc=(5, 5), text_encoder_2__fc=(5, 5))
    loratool.convert(path, tmp_path / "a.lora.safetensors", to="native", base=base)
    assert loratool.validate(tmp_path / "a.lora.safetensors") == []
    found = {("unet", "b.weight"), ("text_encoder", "fc.weight"), ("text_encoder_2", "fc.weight")}
    assert parts_of(tmp_path / "a.lora.safetensors").keys() == found
    assert {"fc.weight.0.A", "fc.weight.1.A", "b.weight.0.A"} <= load_file(tmp_path / "a.lora.safetensors").keys()
    for source, out in ((path, "one"), (tmp_path / "a.lora.safetensors", "two")):
        loratool.merge(base, source, tmp_path / out)
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert {name for name in one if one[name] != two[name]} == {"loratool_receipt.json"}
    digests = [json.loads((tmp_path / out / "loratool_receipt.json").read_text()) for out in ("one", "two")]
    assert len({receipt["adapters"][0]["digest"] for receipt in digests}) == 1  # naming the part changes nothing
    loratool.unmerge(tmp_path / "two", path, tmp_path / "back", base=base)
    loratool.convert(tmp_path / "a.lora.safetensors", tmp_path / "d", to="diffusers", base=base)
    (file,) = (tmp_path / "d").iterdir()
    assert {name.partition(".")[0] for name in load_file(file)} == {"unet", "text_encoder", "text_encoder_2"}


def test_an_adapter_of_one_part_fits_that_component_alone(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path, text_encoder_2__fc=(5, 5))
    loratool.convert(path, tmp_path / "a.lora.safetensors", to="native", base=base)
    alone = base / "text_encoder_2" / "model.safetensors"
    report = loratool.merge(alone, tmp_path / "a.lora.safetensors", tmp_path / "out.safetensors")
    assert any("for the text_encoder_2 of a pipeline" in note for note in report.plan.notes)
    found = load_file(tmp_path / "out.safetensors")["fc.weight"]
    torch.testing.assert_close(found, load_file(alone)["fc.weight"] + delta(path, "text_encoder_2.fc"))
    both = adapter(tmp_path, text_encoder__fc=(5, 5), text_encoder_2__fc=(5, 5))
    loratool.convert(both, tmp_path / "both.lora.safetensors", to="native", base=base)
    with pytest.raises(loratool.Mismatch) as caught:  # which of the two is it?
        loratool.merge(alone, tmp_path / "both.lora.safetensors", tmp_path / "other.safetensors")
    assert {problem.code for problem in caught.value.problems} == {"E-TARGET"}

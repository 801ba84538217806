"""A path that is near what was meant: what lies there is named, with what to give or to do instead."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import Cli, Kit

import loratool


def refused(cli: Cli, path: Path) -> str:
    result = cli("inspect", path)
    assert (result.code, result.out) == (2, "")
    assert cli("merge", path.parent / "base", path, "-o", path.parent / "out").code == 2
    return result.err


def test_adapters_below_a_folder_are_named_by_their_paths(kit: Kit, cli: Cli) -> None:
    for place in ("named/sales", "named/support", "out/run/checkpoint-500"):
        shutil.copytree(kit / "adapter", kit / place)
    text = refused(cli, kit / "named")
    assert f"give one of them: {kit / 'named' / 'sales'}, {kit / 'named' / 'support'}" in text
    assert str(kit / "out" / "run" / "checkpoint-500") in refused(cli, kit / "out")


def test_a_trainers_folder_is_not_its_training_arguments(kit: Kit, cli: Cli) -> None:
    shutil.copytree(kit / "adapter", kit / "trainer" / "checkpoint-500")
    torch.save({"a": 1}, kit / "trainer" / "training_args.bin")
    torch.save({"a": torch.ones(1)}, kit / "trainer" / "checkpoint-500" / "optimizer.pt")
    assert str(kit / "trainer" / "checkpoint-500") in refused(cli, kit / "trainer")
    assert len(loratool.load(kit / "trainer" / "checkpoint-500", base=kit / "base").updates) == 1


def test_the_root_of_a_hub_cache_names_its_snapshot(kit: Kit, cli: Cli) -> None:
    snapshot = kit / "models--org--model" / "snapshots" / ("a" * 40)
    shutil.copytree(kit / "base", snapshot)
    assert f"weights lie below it, give one of them: {snapshot}" in refused(cli, kit / "models--org--model")


def test_numbered_adapters_alone_are_still_read(kit: Kit) -> None:
    (kit / "mlx").mkdir()
    shutil.copy(kit / "native.lora.safetensors", kit / "mlx" / "0000100_adapters.safetensors")
    assert len(loratool.load(kit / "mlx").updates) == 1


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"__0_0.distcp": b"", "__1_0.distcp": b""}, ["torch.distributed.checkpoint", "without its .metadata"]),
        (
            {"run/pytorch_model_fsdp_0/.metadata": b"", "run/pytorch_model_fsdp_0/__0_0.distcp": b""},
            ["weights lie below it", "pytorch_model_fsdp_0"],
        ),
        ({".metadata": b"", "__0_0.distcp": b"", "common.pt": b""}, ["Megatron torch_dist", "export it"]),
        (
            {
                "model_world_size_2_rank_0.pt": b"",
                "model_world_size_2_rank_1.pt": b"",
                "extra_state_world_size_2_rank_0.pt": b"",
            },
            ["files of 2 ranks", "full_state_dict=True", "verl.model_merger"],
        ),
        (
            {
                "model_world_size_1_rank_0.pt": b"",
                "optim_world_size_1_rank_0.pt": b"",
                "lora_adapter/adapter_model.safetensors": b"",
            },
            ["lora_adapter", "files of 1 rank,"],
        ),
        (
            {f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt": b"" for kind in ("model", "optim")},
            ["a step of DeepSpeed ZeRO", "zero_to_fp32.py . OUT, in the folder above it"],
        ),
        ({"zero_to_fp32.py": b"", "latest": b"global_step500"}, ["ZeRO", "zero_to_fp32.py . OUT"]),
        ({"README.md": b""}, ["no weights", "check the path"]),
    ],
)
def test_checkpoints_in_pieces_are_named(kit: Kit, cli: Cli, files: dict[str, bytes], words: list[str]) -> None:
    for name, content in files.items():
        kit.write(f"place/{name}", content)
    text = refused(cli, kit / "place")
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\n",
            ["Git LFS", "git lfs pull"],
        ),
        ("model.safetensors", b"/annex/objects/SHA256E-s1--1.safetensors\n", ["git-annex", "git annex get"]),
        ("model.nemo", b"x", ["NeMo", "unpack"]),
        ("model.onnx", b"x", ["ONNX", "exported from"]),
    ],
)
def test_files_that_stand_for_others_are_named(kit: Kit, cli: Cli, name: str, content: bytes, words: list[str]) -> None:
    text = refused(cli, kit.write(name, content))
    assert all(word in text for word in words), text


def test_a_link_of_git_annex_without_its_content(kit: Kit, cli: Cli) -> None:
    (kit / "model.safetensors").symlink_to("../.git/annex/objects/xx/SHA256E-s1.safetensors")
    assert "git annex get" in refused(cli, kit / "model.safetensors")

"""The options that say what an adapter's file leaves open: every command that reads one takes them all."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import torch
from conftest import PREFIX, Cli, Kit
from safetensors.torch import load_file, save_file

import loratool
from loratool.cli import cli as group
from loratool.cli.options import READING
from loratool.errors import ChoiceNeeded, Unsupported


@pytest.mark.parametrize("name", ["merge", "verify", "unmerge", "inspect", "extract", "convert"])
def test_every_command_that_reads_an_adapter_takes_the_reading_options(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    assert {param.name for param in command.params} >= set(READING)


def test_a_misspelt_option_of_the_library_is_a_type_error(kit: Kit) -> None:
    with pytest.raises(TypeError, match="'aplha'"):
        loratool.load(kit / "adapter", aplha=4)  # type: ignore[call-arg]


def test_a_wrapped_checkpoint_is_merged_verified_and_unmerged_with_its_alpha(kit: Kit, cli: Cli) -> None:
    base, wrapped = kit / "base", kit / "plain.pth"
    given = ["--alpha", "4", "--scaling", "alpha/rank"]
    assert cli("merge", base, wrapped, "-o", kit / "out", *given).code == 0
    expected = load_file(kit / "merged" / "model.safetensors")
    assert all(torch.equal(expected[name], t) for name, t in load_file(kit / "out" / "model.safetensors").items())
    assert cli("verify", kit / "out", wrapped, "--base", base, *given).code == 0
    assert cli("unmerge", kit / "out", wrapped, "--base", base, "-o", kit / "back", *given).code == 0
    assert cli("verify", kit / "out", wrapped, "--base", base, "--alpha", "8", "--scaling", "alpha/rank").code == 1


def with_stranger(kit: Kit) -> Path:
    """The kit's PEFT adapter with a second layer, and a tensor that no reader knows."""
    path = kit / "adapter" / "adapter_model.safetensors"
    extra = {f"{PREFIX}l.0.v.lora_A.weight": torch.ones(2, 4), f"{PREFIX}l.0.v.lora_B.weight": torch.ones(3, 2)}
    save_file({**load_file(path), **extra, "bundle_emb.x.string_to_param": torch.ones(2, 4)}, path)
    return kit / "adapter"


def test_skip_leaves_out_what_no_reader_knows_and_says_so(kit: Kit) -> None:
    adapter = loratool.load(with_stranger(kit), skip="bundle_emb.*", base=kit / "base")
    assert [item.target.name for item in adapter.updates] == ["l.0.q.weight", "l.0.v.weight"]
    assert any("bundle_emb.x.string_to_param" in note for note in adapter.notes)


@pytest.mark.parametrize("only", ["l.0.v.weight", f"{PREFIX}l.0.v.*"])
def test_only_takes_targets_and_keys(kit: Kit, only: str) -> None:
    adapter = loratool.load(with_stranger(kit), only=only, skip="bundle_emb.*", base=kit / "base")
    assert [item.target.name for item in adapter.updates] == ["l.0.v.weight"]
    assert any("l.0.q" in note for note in adapter.notes)


@pytest.mark.parametrize(
    "options", [{"only": "*nothing*"}, {"skip": "*nothing*"}, {"skip": "*"}, {"only": "*.q.lora_A*"}]
)
def test_patterns_that_match_nothing_or_leave_nothing_or_half_a_layer_are_refused(
    kit: Kit, options: dict[str, str]
) -> None:
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.load(kit / "adapter", base=kit / "base", **options)  # type: ignore[arg-type]
    assert caught.value.code in ("E-OPTION", "E-COMPONENTS")


def test_no_pattern_takes_the_scale_from_the_layer_it_belongs_to(tmp_path: Path) -> None:
    factors = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(6, 2), "alpha": torch.tensor(1.0)}
    path = tmp_path / "kohya.safetensors"
    save_file({f"lora_unet_l_0_q.{part}": value for part, value in factors.items()}, path)
    with pytest.raises(ChoiceNeeded, match="would mean something else"):
        loratool.load(path, skip="*.alpha")
    adapter = loratool.load(path, only="*.lora_*")
    assert adapter.updates[0].update.scaling is not None
    assert adapter.updates[0].update.scaling.scale == 0.5  # the alpha came along


def test_a_pattern_has_to_match_in_one_of_several_adapters(kit: Kit, cli: Cli) -> None:
    native = kit / "native.lora.safetensors"
    path = with_stranger(kit)
    assert cli("merge", kit / "base", native, path, "-o", kit / "out", "--skip", "bundle_emb.*").code == 0
    refused = cli("merge", kit / "base", native, path, "-o", kit / "out2", "--skip", "bundle_emb.*", "--skip", "x*")
    assert refused.code == 2
    assert "'x*' of --skip matches no key and no target" in refused.err


def test_extract_with_a_base_binds_an_adapter_that_holds_none(kit: Kit) -> None:
    report = loratool.extract(kit / "adapter", kit / "bound.lora.safetensors", base=kit / "base")
    assert set(report.adapter.base.tensors) == {"l.0.q.weight"}
    changed = load_file(kit / "base" / "model.safetensors")
    changed["l.0.q.weight"] += 1
    (kit / "other").mkdir()
    save_file(changed, kit / "other" / "model.safetensors")
    with pytest.raises(loratool.Mismatch, match="E-BASE-MISMATCH"):
        loratool.merge(kit / "other", kit / "bound.lora.safetensors", kit / "out")
    with pytest.raises(ChoiceNeeded, match="in the file itself"):
        loratool.extract(kit / "plain.pth", kit / "x.safetensors", base=kit / "base", alpha=4, scaling="alpha/rank")
    with pytest.raises(Unsupported, match="no base weights"):
        loratool.extract(kit / "adapter", kit / "x.safetensors")

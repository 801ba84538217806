"""`inspect` where a look is needed most: it shows what is there, what has no place and why, and what lies beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import save_file
from test_json_schemas import is_valid

import loratool
from loratool import partial, summary

State = dict[str, torch.Tensor]
R, OUT, IN = 2, 6, 4


def pair(module: str, rank: int = R) -> State:
    return {f"{module}.lora_A.weight": torch.ones(rank, IN), f"{module}.lora_B.weight": torch.ones(OUT, rank)}


def peft(folder: Path, tensors: State, **config: Any) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    document = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def flat(path: Path, tensors: State) -> Path:
    save_file(tensors, path)
    return path


def layers(found: loratool.Summary) -> list[tuple[str, int | None, float | None]]:
    return [(layer.target, layer.rank, layer.scale) for layer in found.layers]


# Files that nothing can merge: what is shown all the same, how many tensors have no place, and the code of the reason.
KOHYA = {"lora_unet_a.lora_down.weight": torch.ones(R, IN), "lora_unet_a.lora_up.weight": torch.ones(OUT, R)}
BROKEN: dict[str, tuple[State, int, str]] = {
    "unknown": ({"lora_unet_b.strange": torch.ones(3)}, 1, "E-UNSUPPORTED"),
    "rotation": (
        {"lora_unet_b.oft_blocks": torch.ones(2, 3, 3), "lora_unet_b.alpha": torch.ones(())},
        2,
        "E-UNSUPPORTED",
    ),
    "half": ({"lora_unet_b.lora_up.weight": torch.ones(OUT, R)}, 1, "E-COMPONENTS"),
    "three dimensions": (
        {"lora_unet_b.lora_down.weight": torch.ones(5, R, IN), "lora_unet_b.lora_up.weight": torch.ones(5, OUT, R)},
        2,
        "E-SHAPE",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_module_that_can_not_be_read_hides_no_other(name: str, cli: Cli, tmp_path: Path) -> None:
    tensors, count, code = BROKEN[name]
    path = flat(tmp_path / "a.safetensors", KOHYA | tensors)
    found = loratool.inspect(path)
    assert layers(found) == [("lora_unet_a.weight", R, 1.0)]
    assert {tensor.name for tensor in found.unplaced} == {*tensors}
    assert len(found.unplaced) == count
    assert [problem.code for problem in found.problems] == [code]
    result = cli("inspect", path)
    assert result.code == 0
    for text in ("lora_unet_a.weight", f"problem[{code}]", "not placed", "lora_unet_b"):
        assert text in result.out, text


def test_nothing_of_it_can_be_read(cli: Cli, tmp_path: Path) -> None:
    found = loratool.inspect(flat(tmp_path / "a.safetensors", {"oft_unet_a.oft_blocks.0": torch.ones(2, 3, 3)}))
    assert (found.layers, len(found.unplaced), len(found.problems)) == ((), 1, 1)
    assert "OFT" in found.problems[0].message
    assert cli("inspect", tmp_path / "a.safetensors").code == 0


def test_a_sound_adapter_has_none_of_it(tmp_path: Path) -> None:
    found = loratool.inspect(peft(tmp_path / "a", pair("q")))
    assert (found.problems, found.unplaced, found.adapters) == ((), (), ())


def test_a_configuration_that_can_not_be_read_hides_no_ranks(tmp_path: Path) -> None:
    """Its scales are then nobody's: no number is better than the wrong one."""
    found = loratool.inspect(peft(tmp_path / "a", pair("q"), r="two"))
    assert layers(found) == [("q.weight", R, None)]
    assert [problem.code for problem in found.problems] == ["E-CONFIG"]
    assert any("not known" in note for note in found.notes)


def test_a_wrong_pair_of_factors_is_told_with_its_reason(tmp_path: Path) -> None:
    found = loratool.inspect(peft(tmp_path / "a", pair("q") | {"v.lora_A.weight": torch.ones(R, IN)}))
    assert [layer.target for layer in found.layers] == ["q.weight"]
    assert [tensor.name for tensor in found.unplaced] == ["base_model.model.v.lora_A.weight"]


def test_several_adapters_are_all_shown(cli: Cli, tmp_path: Path) -> None:
    base = {"a.q.base_layer.weight": torch.ones(OUT, IN)}
    several = {
        f"a.q.lora_{side}.{name}.weight": torch.ones(*((rank, IN) if side == "A" else (OUT, rank)))
        for name, rank in (("one", 1), ("two", 2))
        for side in "AB"
    }
    path = flat(tmp_path / "model.safetensors", {f"base_model.model.{k}": v for k, v in (base | several).items()})
    found = loratool.inspect(path)
    assert found.what == "wrapped checkpoint"
    assert found.adapters == ("one", "two")
    assert [(layer.adapter, layer.rank) for layer in found.layers] == [("one", 1), ("two", 2)]
    assert [(group.adapter, group.rank) for group in found.groups] == [("one", "1"), ("two", "2")]
    result = cli("inspect", path, "--layers")
    assert "adapter" in result.out
    assert "--adapter NAME" in result.out
    assert loratool.inspect(path, adapter="two").adapters == ()
    with pytest.raises(loratool.LoratoolError, match="no adapter 'three'"):
        loratool.inspect(path, adapter="three")


def test_more_than_one_convention_is_said_and_shown(tmp_path: Path) -> None:
    tensors = {f"unet.{name}": value for name, value in pair("q").items()} | {"unet.q.dora_scale": torch.ones(OUT, 1)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4}'})
    found = loratool.inspect(tmp_path / "a.safetensors")
    assert [problem.code for problem in found.problems] == ["E-AMBIGUOUS"]
    assert found.layers


def test_a_base_that_does_not_fit_hides_no_adapter(tmp_path: Path) -> None:
    save_file({"other.weight": torch.ones(OUT, IN)}, tmp_path / "base.safetensors")
    found = loratool.inspect(flat(tmp_path / "a.safetensors", KOHYA), base=tmp_path / "base.safetensors")
    assert [layer.target for layer in found.layers] == ["lora_unet_a.weight"]
    assert [problem.code for problem in found.problems] == ["E-TARGET"]


def test_an_option_that_means_nothing_is_still_a_mistake(tmp_path: Path) -> None:
    path = flat(tmp_path / "a.safetensors", KOHYA)
    with pytest.raises(loratool.LoratoolError, match="no component"):
        loratool.inspect(path, component="te9")


def test_many_modules_take_few_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thousand modules of which one is broken: found by halves, not one by one."""
    tensors = {f"lora_unet_m{n}.{part}": value for n in range(1000) for part, value in (
        ("lora_down.weight", torch.ones(1, 1)), ("lora_up.weight", torch.ones(1, 1)))}  # fmt: skip
    path = flat(tmp_path / "a.safetensors", tensors | {"lora_unet_x.strange": torch.ones(1)})
    reads, only = 0, partial._only

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal reads
        reads += 1
        return only(*args, **kwargs)

    monkeypatch.setattr(partial, "_only", counted)
    found = loratool.inspect(path)
    assert len(found.layers) == 1000
    assert reads < 40


def test_a_quantised_base_says_how(cli: Cli, tmp_path: Path) -> None:
    base = {
        "a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(1, 1),
        "b.qweight": torch.ones(2, 4, dtype=torch.int32),
        "b.scales": torch.ones(1, 4),
        "b.qzeros": torch.ones(1, 1, dtype=torch.int32),
    }
    found = loratool.inspect(flat(tmp_path / "base.safetensors", base))
    assert sum(found.quantised.values()) == 2
    assert any("8 bits" in method for method in found.quantised)
    assert any("AWQ" in method for method in found.quantised)
    assert "quantised" in cli("inspect", tmp_path / "base.safetensors").out
    fit = loratool.inspect(peft(tmp_path / "a", pair("q")), base=tmp_path / "base.safetensors").fit
    assert fit is not None
    assert fit.quantised == found.quantised


def test_what_lies_beside_is_named(cli: Cli, tmp_path: Path) -> None:
    folder = peft(tmp_path / "a", pair("q"))
    for name in ("README.md", "tokenizer.json", "optimizer.pt", "odd.xyz"):
        (folder / name).write_bytes(b"")
    found = loratool.inspect(folder)
    assert {file.name: file.what for file in found.beside} == {
        "README.md": "text",
        "adapter_config.json": "configuration",
        "odd.xyz": "other",
        "optimizer.pt": "the trainer's own",
        "tokenizer.json": "tokenizer",
    }
    assert "tokenizer.json" in cli("inspect", folder).out
    assert loratool.inspect(flat(tmp_path / "alone.safetensors", KOHYA)).beside == ()


@pytest.mark.parametrize("name", BROKEN)
def test_its_document_follows_the_schema(name: str, cli: Cli, tmp_path: Path) -> None:
    path = flat(tmp_path / "a.safetensors", KOHYA | BROKEN[name][0])
    document = json.loads(cli("inspect", path, "--json").out)
    assert is_valid(document, closed=True)
    assert document["problems"]
    assert document["unplaced"]
    assert document.keys() >= set(summary.Summary.__dataclass_fields__)

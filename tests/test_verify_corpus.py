"""The corpus of `verify`: every fault has its name, and nothing that is right is called wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import llama, own, read, save_base
from safetensors.torch import save_file
from verify_corpus import DTYPES, FAULTS, RIGHT, UNTOLD, Fault, Right, World, ask, judged

import loratool


@pytest.fixture(params=[*DTYPES])
def world(request: pytest.FixtureRequest) -> World:
    return World(DTYPES[request.param])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_has_its_name(fault: Fault, world: World, tmp_path: Path) -> None:
    assert judged(fault, ask(world, fault.make(world), tmp_path)) == ""


@pytest.mark.parametrize("right", RIGHT, ids=lambda right: right.name)
def test_what_is_right_is_right(right: Right, world: World, tmp_path: Path) -> None:
    report = ask(world, right.make(world), tmp_path)
    assert (report.verdict, report.findings) == ("yes", ())
    assert {remark.word for remark in report.remarks} <= {*right.remark.split()}
    for adapter, applied in zip(report.adapters, report.applied, strict=True):
        assert applied.weight == pytest.approx(adapter.weight, rel=1e-3)


@pytest.mark.parametrize("case", UNTOLD, ids=lambda case: case.name)
def test_what_nothing_can_tell(case: Right, world: World, tmp_path: Path) -> None:
    """In float32 some numbers of the base are so small that the change shows; there the answer is another one."""
    report = ask(world, case.make(world), tmp_path)
    if world.dtype == torch.float32:
        words = {finding.word for finding in report.findings}
        expected = {"times 0": {"missing"}, "times 1": set()}.get(case.name[-7:], {"indistinct"})
        assert words == expected
        return
    assert (report.verdict, report.answer, report.to_json()["verdict"]) == ("can-not-tell", False, "can-not-tell")
    assert (report.applied[0].told, report.applied[0].weight) == (False, None)
    assert any("nothing there tells right from wrong" in note for note in report.notes)


ORDERS = [["one"], ["one", "two"], ["two", "one"], ["three", "one", "two"]]


# -- PEFT's own merges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
@pytest.mark.parametrize("autocast", [True, False], ids=["float32 factors", "factors in the dtype"])
@pytest.mark.parametrize("dtype", [*DTYPES])
def test_peft_merges_adapters_one_after_the_other(dtype: str, autocast: bool, names: list[str], tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(3)
    model = llama(layers=2).to(DTYPES[dtype])
    save_base(model, tmp_path / "base")
    options = {"autocast_adapter_dtype": autocast}
    for n, name in enumerate(sorted(names)):
        config = LoraConfig(r=4, lora_alpha=6 + n, target_modules=["q_proj", "v_proj", "down_proj"])
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, **options)
        else:
            model = get_peft_model(model, config, adapter_name=name, **options)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapters")
    merged = own(model.merge_and_unload(adapter_names=names).state_dict())
    (tmp_path / "merged").mkdir()
    save_file({name: merged[name] for name in read(tmp_path / "base")}, tmp_path / "merged" / "model.safetensors")
    asked = [tmp_path / "adapters" / name for name in sorted(names)]
    report = loratool.verify(tmp_path / "merged", tmp_path / "base", asked)
    assert (report.verdict, report.findings) == ("yes", ())
    assert {remark.word for remark in report.remarks} <= {"sequential", "rounded-delta", "rounded-factors", "rounding"}
    left_out = loratool.verify(
        tmp_path / "merged", tmp_path / "base", [(asked[0], 1.0), *[(p, 0.9) for p in asked[1:]]]
    )
    assert left_out.answer == (len(asked) == 1)
    half = loratool.verify(tmp_path / "merged", tmp_path / "base", [(path, 0.5) for path in asked])
    assert {finding.word for finding in half.findings} == {"scale"}

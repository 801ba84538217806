"""Conversions: every delta arrives, PEFT loads what was written for it, and what does not fit is refused or baked."""

from __future__ import annotations

import errno
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from conftest import Cli, Kit, tree
from hypothesis import assume, given
from models import State, assert_float32_close, llama, read
from peft_cases import CASES, LINEAR, Built, build, merge_with_peft, peft, row
from peft_cases import Case as PeftCase
from safetensors.torch import load_file, save_file
from strategies import Case, Maker, base_for, cases, make_update, tensors_of
from torch import Tensor, nn

import loratool
from loratool import Adapter, Target, Targeted, TensorRef, conventions
from loratool.bundle import Safetensors, document
from loratool.updates import Add, Lora, Replace, Scaling, Update

# -- tools ------------------------------------------------------------------------------------------------------------


def adapter_of(**updates: Update | list[tuple[Target, Update]]) -> Adapter:
    """An adapter of whole-tensor updates by name; ``__`` stands for a dot."""
    items = []
    for key, update in updates.items():
        name = key.replace("__", ".")
        for target, one in update if isinstance(update, list) else [(Target(name, region_of(update)), update)]:
            items.append(Targeted(replace(target, name=name), one))
    return Adapter(tuple(items))


def region_of(update: Update) -> tuple[int, ...]:
    parts = update.components()
    if isinstance(update, Replace | Add):
        return parts["value"].shape
    return (parts["B"].shape[0], *parts["A"].shape[1:])


def lora(seed: int = 0, shape: tuple[int, ...] = (6, 4), rank: int = 2, **options: Any) -> Any:
    return make_update("lora", shape, Maker(seed, options.pop("dtype", "F32")), rank, **options)


def update_of(form: str, shape: tuple[int, ...] = (6, 4), **options: Any) -> Any:
    return make_update(form, shape, Maker(7), **options)


def peft_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config, dict)
    return config


def components(adapter: Adapter) -> dict[str, tuple[object, list[Tensor]]]:
    return {
        item.target.name: (item.update.scaling, [ref.read() for ref in item.update.components().values()])
        for item in adapter.updates
    }


def refused(adapter: Adapter, tmp_path: Path, to: str = "peft", **options: Any) -> loratool.LoratoolError:
    writer = conventions.writers().get(to)
    suffix = (*writer.SUFFIXES, "")[0] if writer else ""
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.convert(adapter, tmp_path / f"refused{suffix}", to, **options)
    assert not [*tmp_path.glob("refused*")]
    assert not [*tmp_path.glob(".*partial*")]
    return caught.value


# -- round trips ------------------------------------------------------------------------------------------------------


def test_nothing_is_folded_that_fits(tmp_path: Path) -> None:
    """Native to PEFT and back: the same factors bit for bit, whatever their dtype, rank, scale and rule."""
    made = adapter_of(
        layers__0__q__weight=lora(1, rank=2, alpha=6.0),
        layers__0__v__weight=lora(2, (3, 4), rank=3, alpha=-1.0, dtype="BF16"),
        layers__1__q__weight=lora(3, rank=1, rule="none", alpha=0.1, dtype="F16"),
        layers__1__conv__weight=lora(4, (5, 3, 2, 2), rank=2, rule="alpha", alpha=5.0),
        layers__1__norm__weight=update_of("replace", (6,)),
        layers__10__q__weight=lora(5, rank=2, alpha=6.0),
    )
    loratool.convert(made, tmp_path / "peft", "peft")
    loratool.convert(tmp_path / "peft", tmp_path / "back.safetensors", "native")
    back = loratool.load(tmp_path / "back.safetensors")
    assert back.targets().keys() == made.targets().keys()
    assert [*back.targets()][-1] == "layers.10.q.weight"
    one, two = components(made), components(back)
    for name, (scaling, tensors) in one.items():
        if isinstance(scaling, Scaling):
            assert isinstance(two[name][0], Scaling)
            assert two[name][0].scale == scaling.scale  # type: ignore[union-attr]
        for a, b in zip(tensors, two[name][1], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_the_config_names_every_layer_alone(tmp_path: Path) -> None:
    made = adapter_of(
        l__1__q__weight=lora(1, rank=2, alpha=4.0),
        l__2__q__weight=lora(2, rank=2, alpha=4.0),
        l__11__q__weight=lora(3, rank=3, alpha=9.0),
    )
    report = loratool.convert(made, tmp_path / "peft", "peft")
    config = peft_config(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {r"^l\.11\.q": 3}
    assert config["alpha_pattern"] == {r"^l\.11\.q": 9}
    assert config["target_modules"] == ["l.1.q", "l.2.q", "l.11.q"]
    assert any("--uniform" in note for note in report.notes)
    assert {file.name for file in report.files} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        (["a.q.weight", "b.q.weight", "b.v.weight"], ["q"]),
        (["a.q.weight", "b.q.weight", "c.q.weight"], ["a.q", "b.q"]),
        (["a.q.weight", "b.q.weight", "x.a.q.weight"], r"a\.q|b\.q"),
        (["a.q.weight", "b.q.weight", "q.c.weight"], ["a.q", "b.q"]),
    ],
)
def test_target_modules_are_short_where_the_base_allows_it(base: list[str], wanted: object, tmp_path: Path) -> None:
    save_file({name: torch.ones(6, 4) for name in base}, tmp_path / "base.safetensors")
    made = adapter_of(a__q__weight=lora(1), b__q__weight=lora(2))
    loratool.convert(made, tmp_path / "peft", "peft", base=tmp_path / "base.safetensors")
    assert peft_config(tmp_path / "peft")["target_modules"] == wanted


def written_for(base: State, made: Adapter, tmp_path: Path) -> tuple[State, dict[str, Any]]:
    """What is in the folder for an adapter of this base: tensors without the prefix, and the config."""
    save_file(base, tmp_path / "base.safetensors")
    loratool.convert(made, tmp_path / "peft", "peft", base=tmp_path / "base.safetensors")
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): value for name, value in state.items()}, peft_config(
        tmp_path / "peft"
    )


def test_a_saved_module_is_saved_whole(tmp_path: Path) -> None:
    """PEFT fails on a module of `modules_to_save` that lacks one of its tensors."""
    base = {"q.weight": torch.ones(6, 4), "norm.weight": torch.ones(6), "norm.bias": torch.arange(6.0)}
    made = adapter_of(q__weight=lora(), norm__weight=update_of("replace", (6,)))
    state, config = written_for(base, made, tmp_path)
    assert config["modules_to_save"] == ["norm"]
    assert torch.equal(state["norm.bias"], base["norm.bias"])


def test_a_module_whose_name_ends_another_is_not_in_modules_to_save(tmp_path: Path) -> None:
    """PEFT matches the ends of names, so `classifier` would be `pre_classifier`, whose tensors are not there."""
    names = ("classifier", "pre_classifier", "q")
    base = {f"{name}.weight": torch.ones(6, 4) for name in names}
    made = adapter_of(q__weight=lora(), classifier__weight=update_of("replace"))
    state, config = written_for(base, made, tmp_path)
    assert config["modules_to_save"] is None
    assert state.keys() == {"q.lora_A.weight", "q.lora_B.weight", "classifier.weight"}


def test_a_bias_counts_with_its_layers_scale(tmp_path: Path) -> None:
    base = {name: torch.ones(6, 4) for name in ("q.weight", "k.weight")} | {"q.bias": torch.ones(6)}
    bias = update_of("add", (6,), alpha=1.0)
    made = adapter_of(q__weight=lora(rank=2, alpha=4.0), k__weight=lora(rank=2, alpha=4.0), q__bias=bias)
    state, config = written_for(base, made, tmp_path)
    assert config["lora_bias"] is True
    assert torch.equal(state["q.lora_B.bias"], bias.value.read() / 2)
    assert torch.equal(state["k.lora_B.bias"], torch.zeros(6))


def merged(base: Path, adapter: object, **options: Any) -> State:
    with tempfile.TemporaryDirectory() as folder:
        loratool.merge(base, adapter, Path(folder, "out.safetensors"), allow_unchanged=True, **options)  # type: ignore[arg-type]
        return tensors_of(Path(folder, "out.safetensors"))


def assert_same_model(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value.is_floating_point() and value.numel():
            eps = max(torch.finfo(value.dtype).eps, 2.0**-23)
            bound = 4 * eps * float(value.double().abs().max() + 1)
            assert float((got[name].double() - value.double()).abs().max()) <= bound, name
        else:
            assert torch.equal(got[name], value)


@given(cases(base_dtypes=("F32", "BF16")))
def test_whatever_is_in_it_arrives(case: Case) -> None:
    """Any adapter: PEFT holds it, or holds it baked; the merged model is the same, to rounding of a folded scale."""
    renamed = {name: name.replace(".weight", ".fc.weight") for name in case.touched}
    items = [replace(i, target=replace(i.target, name=renamed[i.target.name])) for i in case.adapter.updates]
    adapter = Adapter(tuple(items))
    state = {renamed.get(name, name): value for name, value in case.base.items()}
    layouts = {item.target.name.removesuffix(".weight"): item.target.layout for item in items}
    layout = {module: "in_out" if kind == "in_out" else "out_in" for module, kind in layouts.items()}
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder, "base.safetensors"), Path(folder, "out")
        save_file(state, base)
        want = merged(base, adapter)
        try:
            report = loratool.convert(adapter, out, "peft", base=base)
        except loratool.Unsupported:
            report = loratool.convert(adapter, out, "peft", base=base, bake=True)
            assert report.baked
        loras = {module: kind for module, kind in layout.items() if f"{module}." in str(_lora_keys(out))}
        got = merged(base, loratool.load(out, base=base, layout=loras))
        assert_same_model(got, want)


@given(cases(("lora", "lora-mid"), base_dtypes=("F32",)))
def test_peft_holds_every_lora(case: Case) -> None:
    """Of ranges of rows, of single experts, several of one tensor: nothing needs baking."""
    items = [
        replace(item, target=replace(item.target, name=item.target.name.replace(".weight", ".fc.weight"), layout=""))
        for item in case.adapter.updates
    ]
    assume(all(len(item.target.matrix) == 2 or not item.target.stacked for item in items))
    with tempfile.TemporaryDirectory() as folder:
        loratool.convert(Adapter(tuple(items)), Path(folder, "out"), "peft")
        base = Path(folder, "base.safetensors")
        save_file({name.replace(".weight", ".fc.weight"): value for name, value in case.base.items()}, base)
        assert_same_model(merged(base, Path(folder, "out")), merged(base, Adapter(tuple(items))))


def _lora_keys(folder: Path) -> list[str]:
    keys = [name.removeprefix("base_model.model.") for name in load_file(folder / "adapter_model.safetensors")]
    return [key for key in keys if ".lora_" in key]


@given(cases(base_dtypes=("F32",)))
def test_native_keeps_everything(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.safetensors")
        loratool.convert(case.adapter, out, "native")
        again = loratool.load(out)
        assert loratool.validate(out) == []
        assert again.updates == loratool.load(out).updates
        assert [item.target for item in again.updates] == [item.target for item in case.adapter.updates]
        one, two = components(case.adapter), components(again)
        assert str(one) == str(two)


def test_native_is_what_save_writes(kit: Kit, tmp_path: Path) -> None:
    loratool.convert(kit / "adapter", tmp_path / "one.safetensors", "native", base=kit / "base")
    written = loratool.load(tmp_path / "one.safetensors")
    assert written.provenance["convention"] == "peft"
    loratool.save(written, tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_an_unknown_alpha_is_asked_for(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(loratool.Mismatch, match="alpha is not stored") as caught:
        loratool.convert(kit / "plain.pth", tmp_path / "out", "peft")
    assert "--scaling" in caught.value.hint
    loratool.convert(kit / "plain.pth", tmp_path / "out", "peft", alpha=4, scaling="alpha/rank")
    assert_same_model(merged(kit / "base/model.safetensors", tmp_path / "out"), tensors_of(kit / "merged"))


# -- uniform ----------------------------------------------------------------------------------------------------------


def test_uniform_is_one_rank_and_one_alpha(tmp_path: Path) -> None:
    made = adapter_of(
        a__weight=lora(1, rank=2, alpha=4.0),
        b__weight=lora(2, rank=4, alpha=8.0, dtype="BF16"),
        c__weight=lora(3, rank=1, alpha=6.0),
        d__weight=lora(4, rank=2, rule="alpha/sqrt(rank)", alpha=2.0),
    )
    base = tmp_path / "base.safetensors"
    save_file(base_for(made, 1, ["F32"]), base)
    report = loratool.convert(made, tmp_path / "peft", "peft", uniform=True)
    config = peft_config(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, False)
    assert "rank_pattern" not in config
    assert "alpha_pattern" not in config
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in state.items() if "lora_A" in name} == {4}
    assert state["base_model.model.b.lora_B.weight"].dtype == torch.bfloat16
    assert any(note.startswith("one rank, 4, and one scale, 2") for note in report.notes)
    assert not any("--uniform" in note for note in report.notes)
    assert_same_model(merged(base, tmp_path / "peft"), merged(base, made))


# -- what does not fit ------------------------------------------------------------------------------------------------

ROWS = Target("", (6, 4), rows=(0, 3))
STACK = (3, 6, 4)
MISFITS: dict[str, tuple[Adapter, str]] = {
    "loha": (adapter_of(a__weight=lora(), b__weight=[(Target("", (6, 4)), update_of("loha"))]), "no loha update"),
    "lokr": (adapter_of(a__weight=lora(), b__weight=[(Target("", (6, 4)), update_of("lokr"))]), "no lokr update"),
    "dora of loha": (adapter_of(b__weight=[(Target("", (6, 4)), update_of("dora0-loha"))]), "on LoRA only"),
    "dora of rows": (adapter_of(b__weight=[(ROWS, update_of("dora0-lora", (3, 4)))]), "whole layers only"),
    "dora of the other axis": (adapter_of(b__weight=[(Target("", (6, 4)), update_of("dora1-lora"))]), "another axis"),
    "dora beside lora": (
        adapter_of(a__weight=lora(), c__weight=lora(), b__weight=[(Target("", (6, 4)), update_of("dora0-lora"))]),
        "2 others are LoRA without",
    ),
    "lora beside dora": (
        adapter_of(
            b__weight=lora(),
            c__weight=[(Target("", (6, 4)), update_of("dora0-lora"))],
            d__weight=[(Target("", (6, 4)), update_of("dora0-lora"))],
        ),
        "2 others are DoRA",
    ),
    "difference of a weight": (adapter_of(a__weight=lora(), b__weight=update_of("add")), "a stored difference"),
    "difference of a lone bias": (adapter_of(a__weight=lora(), b__bias=update_of("add", (6,))), "lora_bias"),
    "bias beside an embedding": (
        adapter_of(a__weight=[(Target("", (6, 4), layout="embedding"), lora())], b__weight=lora(),
                   b__bias=update_of("add", (6,))),
        "lora_bias",
    ),
    "replaced rows of a range": (adapter_of(b__weight=[(ROWS, update_of("replace", (3, 4)))]), "whole tensors only"),
    "rows of a convolution": (
        adapter_of(b__weight=[(Target("", (6, 4, 3)), update_of("replace_rows", (6, 4, 3)))]),
        "single rows of embeddings",
    ),
    "rows and lora": (
        adapter_of(b__weight=[(Target("", (6, 4)), update_of("replace_rows")), (Target("", (6, 4)), lora())]),
        "not both",
    ),
    "a parameter of the model": (adapter_of(weight=lora()), "of the model itself"),
    "attention": (adapter_of(b__in_proj_weight=lora()), "MultiheadAttention"),
    "three parameters of a module": (
        adapter_of(
            b__w1=[(Target("", STACK, expert=0), lora())],
            b__v1=[(Target("", STACK, expert=0), lora())],
            b__w2=[(Target("", STACK, expert=0), lora())],
        ),
        "the order in which PEFT wraps",
    ),
    "lora inside lora": (adapter_of(a__weight=lora(), a__b__weight=lora()), "inside another module"),
    "dora of experts": (
        adapter_of(b__gate_up=[(Target("", STACK, experts=3), make_update("dora0-lora", (6, 4), Maker(1, "F32", 3)))]),
        "whole layers only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_peft_can_not_hold(case: str, tmp_path: Path) -> None:
    """Refused by name, with what helps; and what helps, helps."""
    adapter, why = MISFITS[case]
    error = refused(adapter, tmp_path)
    assert isinstance(error, loratool.Unsupported)
    assert why in str(error)
    assert "peft can not hold the " in error.message
    assert "--bake --base BASE" in error.hint
    base = tmp_path / "base.safetensors"
    save_file(base_for(adapter, 3, ["F32"]), base)
    report = loratool.convert(adapter, tmp_path / "peft", "peft", base=base, bake=True)
    assert report.baked
    assert set(report.baked) <= {item.target.name for item in adapter.updates}
    want, got = merged(base, adapter), merged(base, tmp_path / "peft")
    assert_same_model(got, want)
    for name in report.baked:
        assert torch.equal(got[name], want[name]), "what was baked has the bits of a merge"


def test_all_misfits_are_named_at_once(tmp_path: Path) -> None:
    updates = {f"l{n}__weight": [(Target("", (6, 4)), update_of("loha"))] for n in range(5)}
    error = refused(adapter_of(a__weight=lora(), **updates, b__weight=update_of("add")), tmp_path)
    assert len(error.problems) == 2
    assert "l0.weight, l1.weight, l2.weight and 2 more" in error.message
    assert "loha updates" in error.message
    assert "add updates of b.weight" in error.problems[1].message


def test_baking_needs_the_base(kit: Kit, tmp_path: Path) -> None:
    dora = adapter_of(l__0__q__weight=[(Target("", (6, 4)), update_of("dora0-loha"))])
    error = refused(dora, tmp_path, bake=True)
    assert error.code == "E-OPTION"
    assert "--base" in error.hint
    report = loratool.convert(dora, tmp_path / "out", "peft", base=kit / "base", bake=True)
    assert report.baked == ("l.0.q.weight",)
    assert any("baked in" in note for note in report.notes)


def test_baking_leaves_what_fits(kit: Kit, tmp_path: Path) -> None:
    loratool.convert(kit / "adapter", tmp_path / "one", "peft", base=kit / "base", bake=True)
    loratool.convert(kit / "adapter", tmp_path / "two", "peft", base=kit / "base")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert peft_config(tmp_path / "one")["modules_to_save"] is None


@pytest.mark.parametrize(
    ("adapter", "code"),
    [
        (adapter_of(l__0__k__weight=lora()), "E-TARGET"),
        (adapter_of(l__0__q__weight=lora(shape=(6, 5))), "E-SHAPE"),
        (adapter_of(l__0__q__weight=Lora(*lora().components().values(), Scaling("alpha/rank", 9, 1.0, 1.0))), "E-RANK"),
        (Adapter(()), "E-LIMIT"),
        (Adapter(adapter_of(a__weight=lora()).updates, doubts=("which way round",)), "E-LAYOUT"),
    ],
    ids=["no such target", "another shape", "a false rank", "empty", "in doubt"],
)
def test_an_adapter_that_does_not_fit(adapter: Adapter, code: str, kit: Kit, tmp_path: Path) -> None:
    assert refused(adapter, tmp_path, base=kit / "base").code == code


def test_whole_tensors_that_are_the_bases_own_are_left_out(tmp_path: Path) -> None:
    """PEFT saves a head or an embedding whole where it has LoRA, and most layouts hold no whole tensors."""
    base = {"head.weight": torch.randn(6, 4), "other.weight": torch.randn(6, 4)}
    save_file(base, tmp_path / "base.safetensors")
    whole = Replace(TensorRef.of(base["head.weight"].clone()))
    made = adapter_of(head__weight=[(Target("", (6, 4)), whole), (Target("", (6, 4)), lora(1))])
    options: dict[str, Any] = {"base": tmp_path / "base.safetensors", "as_component": "unet"}
    report = loratool.convert(made, tmp_path / "out.safetensors", "kohya", **options)
    assert "head.weight: whole tensors that are the base's own are left out" in report.notes
    back = loratool.load(tmp_path / "out.safetensors", base=tmp_path / "base.safetensors")
    assert [item.update.kind for item in back.updates] == ["lora"]
    other = adapter_of(head__weight=[(Target("", (6, 4)), Replace(TensorRef.of(base["head.weight"] + 1)))])
    assert "replace updates of head.weight" in refused(other, tmp_path, to="kohya", **options).message
    alone = adapter_of(head__weight=[(Target("", (6, 4)), whole)])
    assert "nothing is left to write" in refused(alone, tmp_path, to="kohya", **options).message


def test_options_that_mean_nothing(kit: Kit, tmp_path: Path) -> None:
    made = adapter_of(a__weight=lora())
    assert "where it is loaded" in refused(made, tmp_path, alpha=3).hint
    error = refused(made, tmp_path, to="plain")
    assert error.message == "plain can be read, not written"
    assert "native, peft" in error.hint
    component = refused(made, tmp_path, to="native", as_component="unet")
    assert component.message == "--as means nothing to native"
    assert "no convention 'nonsense'" in refused(made, tmp_path, to="nonsense").message
    with pytest.raises(loratool.OutputRefused) as wrong:
        loratool.convert(made, tmp_path / "name", "native")
    assert wrong.value.code == "E-OUTPUT"
    assert "name.safetensors" in wrong.value.hint


def test_writers_are_those_with_the_verbs() -> None:
    wanted = {"native", "peft", "kohya", "lycoris", "diffusers", "litgpt", "torchtune", "mlx", "gguf"}
    assert conventions.writers().keys() == wanted
    for convention in conventions.CONVENTIONS:
        assert hasattr(convention, "write") == (convention.NAME in conventions.writers())


# -- whole or not at all ----------------------------------------------------------------------------------------------


def test_an_output_that_exists_stays(kit: Kit, tmp_path: Path) -> None:
    for name in ("folder", "file.safetensors"):
        path = tmp_path / name
        if not path.suffix:
            path.mkdir()
        (path if path.suffix else path / "notes").write_text("mine")
        with pytest.raises(loratool.OutputRefused, match="exists already"):
            loratool.convert(kit / "adapter", path, "native" if path.suffix else "peft")
    assert (tmp_path / "file.safetensors").read_text() == "mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes"]


@pytest.mark.parametrize("to", ["peft", "native"])
def test_a_full_disk_leaves_nothing(to: str, kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Safetensors, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Safetensors, "write", fail)
    before = tree(tmp_path)
    with pytest.raises(loratool.OutputRefused, match="No space left") as caught:
        loratool.convert(kit / "adapter", tmp_path / ("out" if to == "peft" else "out.safetensors"), to)
    assert caught.value.code == "E-DISK"
    assert tree(tmp_path) == before


def test_a_source_that_changes_meanwhile_is_noticed(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Safetensors.write
    source = kit / "native.lora.safetensors"

    def meddle(self: Safetensors, file: BinaryIO) -> None:
        write(self, file)
        source.write_bytes(source.read_bytes())

    monkeypatch.setattr(Safetensors, "write", meddle)
    with pytest.raises(loratool.InvalidFile, match="changed while it was read"):
        loratool.convert(source, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_read_back_does_not_leave(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer's mistake is a bug that shows here, not at the user's."""

    def lossy(self: Safetensors, file: BinaryIO) -> None:
        file.write(write_of({name: ref for name, ref in self.tensors.items() if "norm" not in name}))

    def write_of(tensors: Mapping[str, TensorRef]) -> bytes:
        with tempfile.TemporaryFile() as file:
            original(Safetensors(tensors), file)
            file.seek(0)
            return file.read()

    original = Safetensors.write
    monkeypatch.setattr(Safetensors, "write", lossy)
    made = adapter_of(a__weight=lora(), norm__weight=update_of("replace", (6,)))
    with pytest.raises(AssertionError, match=r"lacks norm\.weight"):
        loratool.convert(made, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


# -- containers -------------------------------------------------------------------------------------------------------


def test_the_size_of_safetensors_is_known_before(tmp_path: Path) -> None:
    content = Safetensors({"b": TensorRef.of(torch.ones(3, dtype=torch.float16)), "a": TensorRef.of(torch.eye(2))})
    with (tmp_path / "x.safetensors").open("wb") as file:
        content.write(file)
    assert (tmp_path / "x.safetensors").stat().st_size == content.nbytes
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.eye(2))


def test_json_is_strict() -> None:
    assert json.loads(document({"é": [1, None]}).data) == {"é": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        document({"a": float("nan")})


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(kit: Kit, cli: Cli, tmp_path: Path) -> None:
    result = cli("convert", kit / "adapter", "--to", "native", "-o", tmp_path / "a.safetensors", "--base", kit / "base")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("a.safetensors: 1 update, 20 parameters, from peft to native\n")
    report = cli(
        "convert", tmp_path / "a.safetensors", "--to", "peft", "-o", tmp_path / "b", "--uniform", "--json"
    ).json
    assert report["schema"] == "loratool.convert/1"
    assert (report["convention"], report["to"], report["updates"]) == ("native", "peft", 1)
    assert [Path(file).name for file in report["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    assert cli("convert", tmp_path / "b", "--to", "peft", "-o", tmp_path / "c", "--quiet").out == ""


def test_the_command_lists_what_can_be_written(kit: Kit, cli: Cli, tmp_path: Path) -> None:
    result = cli("convert", kit / "adapter", "--to", "plain", "-o", tmp_path / "x")
    assert result.code == 2
    assert "'native', 'peft'" in result.err
    assert "[native|peft|" in cli("convert", "--help").out


def test_a_refusal_has_exit_code_2(kit: Kit, cli: Cli, tmp_path: Path) -> None:
    mixed = adapter_of(a__weight=[(Target("", (6, 4)), update_of("lokr"))], b__weight=lora())
    loratool.save(mixed, tmp_path / "mixed.safetensors")
    result = cli("convert", tmp_path / "mixed.safetensors", "--to", "peft", "-o", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error[E-UNSUPPORTED]: peft can not hold the lokr updates of a.weight")


# -- PEFT loads it ----------------------------------------------------------------------------------------------------

heavy = pytest.mark.heavy
LOADED = [case for case in CASES if case.adapter_dtype is None and case.name != "net-attention"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PeftCase], Built]:
    done: dict[str, Built] = {}

    def get(case: PeftCase) -> Built:
        if case.name not in done:
            done[case.name] = build(case, tmp_path_factory.mktemp(case.name))
        return done[case.name]

    return get


def base_model(case: PeftCase) -> nn.Module:
    """The base as `peft_cases.build` makes it."""
    torch.manual_seed(11)
    model = case.model()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.to(case.base_dtype).eval()


HARMLESS = (
    "is_gradient_checkpointing",  # PEFT asks transformers by an old name
    "fan_in_fan_out is set to True but",  # where Conv1D and Linear mix, PEFT corrects its one flag per layer
    "pattern keys did not match any targeted module",  # PEFT looks among modules only; parameters do get theirs
    "`tie_word_embeddings=True`",
)


def loaded_by_peft(case: PeftCase, folder: Path) -> nn.Module:
    """The base with the adapter, and no warning: PEFT warns of missing keys where others would fail."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft().PeftModel.from_pretrained(base_model(case), folder)
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if not any(known in text for known in HARMLESS)], said
    assert isinstance(model, nn.Module)
    return model.eval()


def quietly_merged(model: nn.Module) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return merge_with_peft(model)


def assert_merges_alike(got: State, made: Built) -> None:
    for name, value in made.merged.items():
        if value.dtype == torch.float32:
            assert_float32_close(got[name], value, name=name)
        else:
            assert torch.equal(got[name], value), name


@heavy
@pytest.mark.parametrize("case", LOADED, ids=str)
def test_peft_loads_and_merges_what_was_written(
    case: PeftCase, built: Callable[[PeftCase], Built], tmp_path: Path
) -> None:
    made = built(case)
    native = tmp_path / "adapter.lora.safetensors"
    loratool.convert(made.adapter, native, "native", base=made.base)
    loratool.convert(native, tmp_path / "with", "peft", base=made.base)
    loratool.convert(native, tmp_path / "without", "peft")
    for folder in (tmp_path / "with", tmp_path / "without"):
        assert_merges_alike(quietly_merged(loaded_by_peft(case, folder)), made)
        out = tmp_path / f"merged-{folder.name}"
        loratool.merge(made.base, folder, out)
        want = merged_folder(made, native, tmp_path)
        assert_same_bits_of(read(out), want)


def merged_folder(made: Built, adapter: Path, tmp_path: Path) -> State:
    if not (tmp_path / "want").exists():
        loratool.merge(made.base, adapter, tmp_path / "want")
    return read(tmp_path / "want")


def assert_same_bits_of(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


FORWARD = [
    "llama-both-patterns", "llama-rslora", "llama-dora", "llama-tokens", "gpt2", "gpt2-flag-wrong-dora",
    "bert-classifier", "bert-embeddings", "bert-lora-bias", "mixtral", "mixtral-patterns", "gpt-oss",
]  # fmt: skip


@heavy
@pytest.mark.parametrize("name", FORWARD)
def test_pefts_forward_is_that_of_our_merge(name: str, built: Callable[[PeftCase], Built], tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    made = built(case)
    loratool.convert(made.adapter, tmp_path / "native.safetensors", "native", base=made.base)
    loratool.convert(tmp_path / "native.safetensors", tmp_path / "peft", "peft", base=made.base)
    loratool.merge(made.base, tmp_path / "native.safetensors", tmp_path / "merged")
    plain = base_model(case)
    tokens = torch.tensor([[1, 7, 30, 4, 9, 2]])
    with torch.no_grad():
        base = plain(tokens).logits
        adapted = loaded_by_peft(case, tmp_path / "peft")(tokens).logits
        missing = plain.load_state_dict(read(tmp_path / "merged"), strict=False).missing_keys
        assert all(key.endswith("lm_head.weight") for key in missing)
        ours = plain(tokens).logits
    moved, apart = float((base - ours).abs().max()), float((adapted - ours).abs().max())
    assert apart < min(moved / 50, 2e-5 * max(1.0, float(ours.abs().max())))


@heavy
def test_peft_loads_uniform_ranks_and_scales(tmp_path: Path) -> None:
    case = row("uniform", llama, 7, target_modules=LINEAR, rank_pattern={"q_proj": 2, "v_proj": 7},
               alpha_pattern={"k_proj": 20}, use_rslora=True)  # fmt: skip
    made = build(case, tmp_path)
    loratool.convert(made.adapter, tmp_path / "out", "peft", base=made.base, uniform=True)
    config = peft_config(tmp_path / "out")
    assert config["target_modules"] == sorted(LINEAR)
    assert config["r"] == 7
    assert not config.get("rank_pattern")
    model = loaded_by_peft(case, tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    assert len(layers) == 7
    assert len({(module.r["default"], module.scaling["default"]) for module in layers}) == 1
    assert_merges_alike(quietly_merged(model), made)


@heavy
def test_peft_loads_what_was_baked(tmp_path: Path) -> None:
    """A LoHa, a LoKr, ranges of rows and torch's attention in the model of a PEFT case."""
    case = row("baked", llama, 0, target_modules=LINEAR)
    made = build(case, tmp_path)
    state = read(made.base)
    make = Maker(4)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    shapes = [tuple(state[name].shape) for name in names]
    half = shapes[2][0] // 2
    adapter = Adapter((
        Targeted(Target(names[0], shapes[0]), make_update("loha", shapes[0], make)),
        Targeted(Target(names[1], shapes[1]), make_update("lokr", shapes[1], make)),
        Targeted(Target(names[2], shapes[2], (0, half)), make_update("lora", (half, shapes[2][1]), make, 2)),
        Targeted(Target(names[2], shapes[2], (half, 2 * half)), make_update("lora", (half, shapes[2][1]), make, 3)),
        Targeted(Target(names[3], shapes[3]), make_update("lora", shapes[3], make)),
        Targeted(Target(names[3], shapes[3]), make_update("lora", shapes[3], make, 3, "alpha", 0.3)),
    ))  # fmt: skip
    report = loratool.convert(adapter, tmp_path / "out", "peft", base=made.base, bake=True)
    assert report.baked == (names[0], names[1])
    assert (
        peft_config(tmp_path / "out")["modules_to_save"] == [name.removesuffix(".weight") for name in names[:2]][::-1]
    )
    loratool.merge(made.base, adapter, tmp_path / "ours")
    got, want = quietly_merged(loaded_by_peft(case, tmp_path / "out")), read(tmp_path / "ours")
    for name in want:
        assert_float32_close(got[name], want[name], name=name)
    assert all(not torch.equal(state[name], want[name]) for name in names)


@heavy
def test_peft_loads_an_adapter_of_whole_tensors_only(tmp_path: Path) -> None:
    case = row("whole", llama, 0, target_modules=LINEAR)
    made = build(case, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    shape = tuple(read(made.base)[name].shape)
    adapter = Adapter((Targeted(Target(name, shape), make_update("dora0-loha", shape, Maker(5))),))
    loratool.convert(adapter, tmp_path / "out", "peft", base=made.base, bake=True)
    loratool.merge(made.base, adapter, tmp_path / "ours")
    got, want = quietly_merged(loaded_by_peft(case, tmp_path / "out")), read(tmp_path / "ours")
    assert torch.equal(got[name], want[name])

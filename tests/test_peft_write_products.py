"""LoHa and LoKr written as PEFT's own adapters: the config leads PEFT to the shapes in the file, the merges agree."""

from __future__ import annotations

import importlib
import itertools
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from hypothesis import given
from models import State, assert_float32_close, assert_rounded, own, read
from peft_cases import merge_with_peft, peft
from safetensors.torch import load_file, save_file
from strategies import Case, Maker, base_for, cases, make_update
from test_peft_methods import LAYERS, METHODS, Made, Shapes
from torch import Tensor, nn

import loratool
from loratool import Adapter, Target, Targeted, TensorRef
from loratool.conventions.peft_lokr import cut_in_two
from loratool.updates import Add, Lokr, Replace, Scaling, Update

# -- adapters ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A layer of every class that PEFT has LoHa and LoKr for, and what else an adapter may change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 18)
        self.wide = nn.Linear(20, 30)
        self.conv1 = nn.Conv1d(6, 8, 3)
        self.conv2 = nn.Conv2d(6, 8, (3, 2))
        self.point2 = nn.Conv2d(6, 8, 1)
        self.norm = nn.LayerNorm(18)
        self.head = nn.Linear(4, 3)


def net() -> Net:
    torch.manual_seed(3)
    model = Net()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    return model.eval()


SHAPES = {name: tuple(value.shape) for name, value in Net().state_dict().items()}
MAKE = Maker(5)


def values(*shape: int) -> TensorRef:
    return MAKE(*shape)


def loha(layer: str, rank: int, *, core: bool = False, **scale: Any) -> Any:
    return make_update("loha-mid" if core else "loha", SHAPES[f"{layer}.weight"], MAKE, rank, **scale)


def lokr(layer: str, a: int, c: int, left: int = 0, right: int = 0, *, core: bool = False, alpha: float = 3.0) -> Lokr:
    """w1 [a, c]; `left` and `right` are the ranks of its two factors, 0 where they are whole."""
    out, columns, *kernel = SHAPES[f"{layer}.weight"]
    b, d = out // a, columns // c
    parts: dict[str, TensorRef] = {"B1": values(a, left), "A1": values(left, c)} if left else {"w1": values(a, c)}
    if core:
        parts |= {"B2": values(b, right), "A2": values(right, d), "mid2": values(right, right, *kernel)}
    else:
        second = {"B2": values(b, right), "A2": values(right, d, *kernel)}
        parts |= second if right else {"w2": values(b, d, *kernel)}
    rank = left or right
    return Lokr(Scaling.by("alpha/rank", alpha, rank) if rank else Scaling(scale=alpha), **parts)


def adapter(updates: Mapping[str, Update]) -> Adapter:
    """Updates by layer, or by tensor where a name has a dot in it."""
    named = {name if "." in name else f"{name}.weight": update for name, update in updates.items()}
    return Adapter(tuple(Targeted(Target(name, SHAPES[name]), update) for name, update in named.items()))


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config, dict)
    return config


def keys_of(folder: Path) -> dict[str, tuple[int, ...]]:
    state = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tuple(value.shape) for name, value in state.items()}


LOHA: dict[str, tuple[dict[str, Update], dict[str, Any]]] = {
    "plain": (
        {name: loha(name, 2) for name in ("fc", "conv1", "conv2", "point2")},
        {"r": 2, "alpha": 3, "rank_pattern": {}, "alpha_pattern": {}, "use_effective_conv2d": False},
    ),
    "patterns": (
        {"fc": loha("fc", 2), "wide": loha("wide", 5), "conv1": loha("conv1", 2, alpha=-0.1)},
        {"r": 2, "alpha": 3, "rank_pattern": {"^wide": 5}, "alpha_pattern": {"^conv1": -0.1}},
    ),
    "scales": (
        {
            "fc": loha("fc", 2, rule="none", alpha=0.7),
            "conv2": loha("conv2", 3, rule="alpha/sqrt(rank)"),
            "point2": loha("point2", 2, rule="alpha", alpha=0.25),
        },
        {"r": 2, "alpha_pattern": {"^conv2": 3 * 3**0.5, "^point2": 0.5}},
    ),
    "cores": (
        {"fc": loha("fc", 2), "conv1": loha("conv1", 2, core=True), "conv2": loha("conv2", 3, core=True)},
        {"use_effective_conv2d": True},
    ),
    "cores in some": (
        {"conv1": loha("conv1", 2), "conv2": loha("conv2", 2, core=True)},
        {"use_effective_conv2d": False},
    ),
    "cores without a kernel": (
        {"fc": loha("fc", 2, core=True), "point2": loha("point2", 2, core=True)},
        {"use_effective_conv2d": False},
    ),
    "whole tensors": (
        {"fc": loha("fc", 2), "norm": Replace(values(18)), "head.bias": Replace(values(3))},
        {"modules_to_save": ["norm"]},
    ),
}
LOKR: dict[str, tuple[dict[str, Update], dict[str, Any]]] = {
    "right": (
        {"fc": lokr("fc", 3, 3, 0, 2), "conv2": lokr("conv2", 2, 2, 0, 1), "conv1": lokr("conv1", 2, 2, 0, 1)},
        {"decompose_both": False, "decompose_factor": -1, "r": 1, "rank_pattern": {"^fc": 2}},
    ),
    "whole": (
        {"fc": lokr("fc", 3, 3), "conv2": lokr("conv2", 2, 2), "point2": lokr("point2", 2, 2, alpha=0.3)},
        {"decompose_both": False, "r": 3, "alpha": 9, "rank_pattern": {}, "alpha_pattern": {"^point2": 0.3 * 3}},
    ),
    "both": (
        {"fc": lokr("fc", 3, 3, 1, 1), "wide": lokr("wide", 5, 4, 2, 2), "conv2": lokr("conv2", 2, 2, 0, 1)},
        {"decompose_both": True},
    ),
    "left": (
        {"wide": lokr("wide", 10, 10, 4, 0), "fc": lokr("fc", 3, 3)},
        {"decompose_both": True, "decompose_factor": 10},
    ),
    "left, padded": ({"wide": lokr("wide", 10, 10, 1, 0)}, {"r": 2, "decompose_both": True, "decompose_factor": 10}),
    "right, padded": (
        {"wide": lokr("wide", 5, 5, 1, 1), "fc": lokr("fc", 3, 3, 0, 1)},
        {"decompose_both": True, "decompose_factor": 5, "rank_pattern": {"^fc": 2}}
    ),
    "factor": (
        {"fc": lokr("fc", 2, 2, 0, 3), "wide": lokr("wide", 2, 2, 0, 5), "conv2": lokr("conv2", 2, 2)},
        {"decompose_factor": 2},
    ),
    "cores": (
        {"conv1": lokr("conv1", 2, 2, 0, 1, core=True), "conv2": lokr("conv2", 2, 2, 0, 1, core=True)},
        {"use_effective_conv2d": True},
    ),
    "cores in some": (
        {"conv1": lokr("conv1", 2, 2, 0, 1), "conv2": lokr("conv2", 2, 2, 0, 1, core=True)},
        {"use_effective_conv2d": False},
    ),
    "cores without a kernel": ({"fc": lokr("fc", 3, 3, 0, 2, core=True)}, {"use_effective_conv2d": False}),
    "a right rank too large": ({"fc": lokr("fc", 3, 3, 0, 5)}, {"decompose_both": False}),
    "a left rank too large": ({"fc": lokr("fc", 3, 3, 2, 2)}, {"decompose_both": False}),
    "a core of a rank too large": ({"conv2": lokr("conv2", 2, 2, 0, 3, core=True)}, {}),
    "whole tensors": (
        {"fc": lokr("fc", 3, 3, 0, 2), "norm": Replace(values(18)), "norm.bias": Replace(values(18))},
        {"modules_to_save": ["norm"]},
    ),
}  # fmt: skip
CASES = {**{f"loha {name}": case for name, case in LOHA.items()}, **{f"lokr {name}": c for name, c in LOKR.items()}}
MULTIPLIED = ("in some", "without a kernel", "too large")  # cores and factors that PEFT can not hold as they are


def merged(adapter: Adapter | Path, folder: Path, state: Mapping[str, Tensor]) -> State:
    with tempfile.TemporaryDirectory(dir=folder) as room:
        save_file(dict(state), Path(room, "base.safetensors"))
        loratool.merge(Path(room, "base.safetensors"), adapter, Path(room, "out.safetensors"))
        return load_file(Path(room, "out.safetensors"))


# -- without PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_config_and_the_deltas(name: str, tmp_path: Path) -> None:
    updates, wanted = CASES[name]
    made, state = adapter(updates), own(net().state_dict())
    save_file(state, tmp_path / "base.safetensors")
    report = loratool.convert(made, tmp_path / "peft", "peft", base=tmp_path / "base.safetensors")
    config = config_of(tmp_path / "peft")
    assert config["peft_type"] == name[:4].upper()
    assert {key: config[key] for key in wanted} == wanted
    assert any(note.startswith("vLLM") for note in report.notes)
    assert any("multiplied" in note for note in report.notes) == any(part in name for part in MULTIPLIED)
    got, want = merged(tmp_path / "peft", tmp_path, state), merged(made, tmp_path, state)
    for tensor, value in want.items():
        assert_float32_close(got[tensor], value, name=tensor)
    assert {tensor for tensor in want if not torch.equal(want[tensor], state[tensor])} == made.targets().keys()


@pytest.mark.parametrize("name", [name for name in CASES if not any(part in name for part in MULTIPLIED)])
def test_what_fits_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    """Native to PEFT and back: the same factors, but for the zeros of padding, and the very same scale."""
    made = adapter(CASES[name][0])
    save_file(own(net().state_dict()), tmp_path / "base.safetensors")
    loratool.convert(made, tmp_path / "peft", "peft", base=tmp_path / "base.safetensors")
    loratool.convert(tmp_path / "peft", tmp_path / "a.safetensors", "native", base=tmp_path / "base.safetensors")
    back = loratool.load(tmp_path / "a.safetensors").targets()
    for target, (item,) in made.targets().items():
        again = back[target][0].update
        assert again.kind == item.update.kind
        if item.update.scaling is not None:
            assert again.scaling is not None
            assert again.scaling.scale == item.update.scaling.scale
        assert again.components().keys() == item.update.components().keys()
        for part, ref in item.update.components().items():
            value, other = ref.read(), again.components()[part].read()
            kept = other[tuple(slice(size) for size in value.shape)]
            assert torch.equal(kept, value), (target, part)
            assert int(other.count_nonzero()) == int(value.count_nonzero())


def test_the_keys_are_pefts(tmp_path: Path) -> None:
    loratool.convert(adapter({"fc": loha("fc", 2), "conv1": loha("conv1", 2, core=True)}), tmp_path / "loha", "peft")
    assert keys_of(tmp_path / "loha") == {
        "fc.hada_w1_a": (18, 2), "fc.hada_w1_b": (2, 12), "fc.hada_w2_a": (18, 2), "fc.hada_w2_b": (2, 12),
        "conv1.hada_w1_a": (2, 8), "conv1.hada_w1_b": (2, 6), "conv1.hada_t1": (2, 2, 3, 1),
        "conv1.hada_w2_a": (2, 8), "conv1.hada_w2_b": (2, 6), "conv1.hada_t2": (2, 2, 3, 1),
    }  # fmt: skip
    updates = {
        "fc": lokr("fc", 3, 3, 1, 1),
        "conv2": lokr("conv2", 2, 2, 0, 1, core=True),
        "point2": lokr("point2", 2, 2),
    }
    loratool.convert(adapter(updates), tmp_path / "lokr", "peft")
    assert keys_of(tmp_path / "lokr") == {
        "fc.lokr_w1_a": (3, 1), "fc.lokr_w1_b": (1, 3), "fc.lokr_w2_a": (6, 1), "fc.lokr_w2_b": (1, 4),
        "conv2.lokr_w1": (2, 2), "conv2.lokr_w2_a": (1, 4), "conv2.lokr_w2_b": (1, 3), "conv2.lokr_t2": (1, 1, 3, 2),
        "point2.lokr_w1": (2, 2), "point2.lokr_w2": (4, 3, 1, 1),
    }  # fmt: skip


def targeted(update: Update, **options: Any) -> Adapter:
    """One update of `fc`, and one of `wide` that fits."""
    other = loha("wide", 2) if update.kind == "loha" else lokr("wide", 5, 4, 0, 1)
    shape = options.pop("shape", SHAPES["fc.weight"])
    target = Target(options.pop("name", "fc.weight"), shape, **options)
    return Adapter((Targeted(target, update), *adapter({"wide": other}).updates))


ADD = Add(values(18), Scaling(scale=1.0))
MISFITS: dict[str, tuple[Adapter, str]] = {
    "a bias": (Adapter((*adapter({"fc": loha("fc", 2)}).updates, *adapter({"fc.bias": ADD}).updates)), "no add update"),
    "rows": (targeted(make_update("loha", (6, 12), MAKE), rows=(0, 6)), "of whole layers only"),
    "an expert": (targeted(make_update("lokr", (6, 12), MAKE), shape=(3, 6, 12), expert=1), "of whole layers only"),
    "a table": (targeted(loha("fc", 2), layout="embedding"), "Linear, Conv1d and Conv2d layers only"),
    "a Conv1D": (targeted(loha("fc", 2), layout="in_out"), "Linear, Conv1d and Conv2d layers only"),
    "a parameter": (targeted(loha("fc", 2), name="fc.table"), "Linear, Conv1d and Conv2d layers only"),
    "five dimensions": (
        targeted(make_update("loha", (4, 3, 2, 2, 2), MAKE), shape=(4, 3, 2, 2, 2)), "Linear, Conv1d and Conv2d",
    ),
    "two of one layer": (
        Adapter((*adapter({"fc": loha("fc", 2)}).updates, *adapter({"fc": loha("fc", 1)}).updates)),
        "one LoHa per layer",
    ),
    "inside": (targeted(loha("fc", 2), name="wide.inner.weight"), "inside another module"),
    "another cut": (
        adapter({"fc": lokr("fc", 2, 3, 0, 1), "wide": lokr("wide", 5, 4), "conv2": lokr("conv2", 2, 2)}),
        "one decompose_factor for all",
    ),
    "a whole w2 of a 1-d convolution": (adapter({"conv1": lokr("conv1", 2, 2)}), "in another order"),
    "a large rank of a 1-d convolution": (adapter({"conv1": lokr("conv1", 2, 2, 0, 3)}), "in another order"),
    "a replaced expert": (
        Adapter((
            *adapter({"fc": loha("fc", 2)}).updates,
            Targeted(Target("e.w", (3, 2, 2), expert=1), Replace(values(2, 2))),
        )),
        "whole tensors only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_or_baked(name: str, tmp_path: Path) -> None:
    made, why = MISFITS[name]
    with pytest.raises(loratool.Unsupported) as caught:
        loratool.convert(made, tmp_path / "peft", "peft")
    assert why in str(caught.value)
    assert "--bake --base BASE" in caught.value.hint
    assert not (tmp_path / "peft").exists()
    state = base_for(made, 3, ["F32"])
    save_file(state, tmp_path / "base.safetensors")
    report = loratool.convert(made, tmp_path / "peft", "peft", base=tmp_path / "base.safetensors", bake=True)
    assert report.baked
    assert {*report.baked} != made.targets().keys() or len(made.targets()) == 1, "what fits is left as it is"
    got, want = merged(tmp_path / "peft", tmp_path, state), merged(made, tmp_path, state)
    for tensor, value in want.items():
        if value.is_floating_point() and value.numel():
            assert_float32_close(got[tensor], value, name=tensor)


def test_beside_lora_they_stay_misfits(tmp_path: Path) -> None:
    lora = make_update("lora", SHAPES["fc.weight"], MAKE)
    for other in (loha("wide", 2), lokr("wide", 5, 4)):
        with pytest.raises(loratool.Unsupported, match=f"has no {other.kind} update") as caught:
            loratool.convert(adapter({"fc": lora, "wide": other}), tmp_path / "peft", "peft")
        assert "--bake" in caught.value.hint
    with pytest.raises(loratool.Unsupported, match="has no "):
        loratool.convert(adapter({"fc": loha("fc", 2), "wide": lokr("wide", 5, 4)}), tmp_path / "peft", "peft")


@given(cases(("loha", "loha-mid", "lokr", "lokr-left", "lokr-right", "lokr-both", "lokr-mid"), ("F32",), whole=True))
def test_whatever_is_in_it_arrives(case: Case) -> None:
    items = [
        replace(item, target=replace(item.target, name=item.target.name.replace(".weight", ".fc.weight"), layout=""))
        for item in case.adapter.updates
    ]
    made, state = Adapter(tuple(items)), {k.replace(".weight", ".fc.weight"): v for k, v in case.base.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(state, folder / "base.safetensors")
        try:
            loratool.convert(made, folder / "peft", "peft", base=folder / "base.safetensors")
        except loratool.Unsupported:
            loratool.convert(made, folder / "peft", "peft", base=folder / "base.safetensors", bake=True)
        got, want = merged(folder / "peft", folder, state), merged(made, folder, state)
        for tensor, value in want.items():
            if value.is_floating_point() and value.numel():
                size = float(value.abs().max()) + 1
                assert_rounded(got[tensor], value.double(), name=tensor, scale=2.0**28 * size)


def test_the_command_says_what_it_wrote(cli: Cli, tmp_path: Path) -> None:
    loratool.save(adapter({"fc": lokr("fc", 3, 3, 0, 5)}), tmp_path / "a.safetensors")
    report = cli(
        "convert", tmp_path / "a.safetensors", "--to", "peft", "-o", tmp_path / "b", "--uniform", "--json"
    ).json
    assert (report["to"], report["updates"], report["baked"]) == ("peft", 1, [])
    assert any("no LoRA update" in note for note in report["notes"])
    assert any("1 factors of low rank are written whole" in note for note in report["notes"])
    summary = cli("inspect", tmp_path / "b", "--json").json
    assert summary["convention"] == "peft"


# -- with PEFT --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _cores_that_torch_can_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13's kron fails on what PEFT's einsum returns for kernels with a dimension of 1: copied, it works."""
    layer = importlib.import_module("peft.tuners.lokr.layer")
    make = layer.make_weight_cp
    monkeypatch.setattr(layer, "make_weight_cp", lambda *a: make(*a).clone(memory_format=torch.contiguous_format))


def loaded(folder: Path, model: nn.Module | None = None) -> Any:
    """The network with the adapter. PEFT warns of keys that are missing: that is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft().PeftModel.from_pretrained(model or net(), folder).eval()


@pytest.mark.heavy
@pytest.mark.usefixtures("_cores_that_torch_can_multiply")
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_peft_loads_and_merges_what_was_written(name: str, with_base: bool, tmp_path: Path) -> None:
    made, state = adapter(CASES[name][0]), own(net().state_dict())
    save_file(state, tmp_path / "base.safetensors")
    options = {"base": tmp_path / "base.safetensors"} if with_base else {}
    loratool.convert(made, tmp_path / "peft", "peft", **options)
    model = loaded(tmp_path / "peft")
    assert type(model.base_model).__name__ == {"loha": "LoHaModel", "lokr": "LoKrModel"}[name[:4]]
    got, want = merge_with_peft(model), merged(made, tmp_path, state)
    assert got.keys() == want.keys()
    for tensor, value in want.items():
        assert_float32_close(got[tensor], value, name=tensor)


@pytest.mark.heavy
@pytest.mark.usefixtures("_cores_that_torch_can_multiply")
@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("lo")])
def test_what_peft_trained_is_written_for_it_again(name: str, tmp_path: Path) -> None:
    """All its options, by way of the native format. A 1-d convolution's whole w2 is the one thing that can not go."""
    layers = [layer for layer in LAYERS if name.startswith("loha") or layer not in ("conv1", "point1")]
    made = Made(name, tmp_path, target_modules=layers)
    loratool.convert(made.adapter, tmp_path / "a.safetensors", "native", base=made.base)
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft", base=made.base)
    model = Shapes()
    model.load_state_dict(read(made.base))
    one, two = merge_with_peft(loaded(tmp_path / "peft", model)), merge_with_peft(made.model)
    for tensor, value in two.items():
        assert_float32_close(one[tensor], value, name=tensor)
    assert keys_of(tmp_path / "peft") == keys_of(made.adapter)


@pytest.mark.heavy
def test_a_layer_that_is_replaced_and_trained(tmp_path: Path) -> None:
    """The new weight goes under the wrapper's base layer, and PEFT adds its delta to that."""
    made = Adapter(
        tuple(adapter({"fc.weight": Replace(values(18, 12))}).updates + adapter({"fc": loha("fc", 2)}).updates)
    )
    state = own(net().state_dict())
    loratool.convert(made, tmp_path / "peft", "peft")
    assert "fc.base_layer.weight" in keys_of(tmp_path / "peft")
    got, want = merge_with_peft(loaded(tmp_path / "peft")), merged(made, tmp_path, state)
    for tensor, value in want.items():
        assert_float32_close(got[tensor], value, name=tensor)


@pytest.mark.heavy
def test_dimensions_are_cut_as_peft_cuts_them() -> None:
    cut = importlib.import_module("peft.tuners.lokr.layer").factorization
    for size, factor in itertools.product([*range(1, 130), 768, 1024, 3072, 4096, 11008], [-1, *range(1, 40), 64, 100]):
        assert cut_in_two(size, factor) == cut(size, factor), (size, factor)

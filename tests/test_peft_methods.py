"""PEFT's other methods: LoHa, LoKr, AdaLoRA, replicated layers; and the versions of it that order experts differently.

PEFT's own merge, in float64, is the truth; the forward is, where the two could differ.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft_cases
import pytest
import torch
from models import State, assert_rounded, assert_same_bits, bert, changed, fill, gpt2, llama, own, read, save_base
from peft_cases import merge_with_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool

pytestmark = pytest.mark.heavy


class Shapes(nn.Module):
    """A linear layer, and convolutions of one and two dimensions, one of them in groups, one with a kernel of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 18)
        self.narrow = nn.Linear(6, 4)
        self.conv1 = nn.Conv1d(6, 8, 3)
        self.point1 = nn.Conv1d(6, 8, 1)
        self.conv2 = nn.Conv2d(6, 8, (3, 2))
        self.thin2 = nn.Conv2d(6, 8, (3, 1))
        self.point2 = nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv2d(12, 8, 3, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


LAYERS = ["fc", "narrow", "conv1", "point1", "conv2", "thin2", "point2", "grouped"]
LINEAR2D = ["fc", "narrow", "conv2", "point2"]  # what AdaLoRA can do
LOHA: dict[str, dict[str, Any]] = {
    "loha": {},
    "loha-tucker": {"use_effective_conv2d": True},
    "loha-patterns": {"rank_pattern": {"fc": 2, "conv.": 8}, "alpha_pattern": {"conv2": 9, "narrow": 1}},
    "loha-head": {"modules_to_save": ["head"]},
}
LOKR: dict[str, dict[str, Any]] = {
    "lokr": {},  # at this rank nearly all factors are whole
    "lokr-low-rank": {"r": 1},
    "lokr-both-low-rank": {"r": 1, "decompose_both": True},
    "lokr-tucker": {"r": 1, "use_effective_conv2d": True},
    "lokr-tucker-both": {"r": 1, "use_effective_conv2d": True, "decompose_both": True, "decompose_factor": 6},
    "lokr-left": {"r": 2, "decompose_both": True, "decompose_factor": 6},
    "lokr-factor": {"decompose_factor": 2},
    "lokr-patterns": {"rank_pattern": {"fc": 2, "point.": 5}, "alpha_pattern": {"conv2": 9, "narrow": 1}},
    "lokr-lycoris": {"init_weights": "lycoris"},
}
ADALORA: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 5, "lora_alpha": 6},
    "adalora-alpha-0": {"init_r": 5, "lora_alpha": 0},  # PEFT then takes the rank
    "adalora-bias": {"bias": "lora_only", "lora_alpha": 6},
    "adalora-pattern-ignored": {"init_r": 3, "lora_alpha": 6, "alpha_pattern": {"fc": 90}},
}
METHODS = {**LOHA, **LOKR, **ADALORA}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _cores_that_torch_can_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13's kron fails on what PEFT's einsum returns for kernels with a dimension of 1: copied, it works."""
    layer = importlib.import_module("peft.tuners.lokr.layer")
    make = layer.make_weight_cp
    monkeypatch.setattr(layer, "make_weight_cp", lambda *a: make(*a).clone(memory_format=torch.contiguous_format))


class Made:
    """A wrapped model with values in its factors, saved in every form, and PEFT's merge of it."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> None:
        torch.manual_seed(7)
        peft = peft_cases.peft()
        options = {**METHODS[name], **more}
        net = Shapes().to(dtype)
        self.folder = folder
        self.base = save_base(net, folder / "base", names="memory")
        kind = name.partition("-")[0]
        if kind == "adalora":
            config = peft.AdaLoraConfig(target_modules=LINEAR2D, total_step=100, **options)
        else:
            config_class = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind]
            config = config_class(**{"target_modules": LAYERS, "r": 4, "alpha": 6, **options})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = peft.get_peft_model(net, config)
            fill(self.model, seed=4)
            for parameter, value in self.model.named_parameters():
                if ".ranknum." in parameter:  # PEFT 0.21 leaves it trainable where it casts the factors
                    value.data.fill_(options.get("init_r", 12))
            self.model.save_pretrained(folder / "adapter")
        self.adapter = folder / "adapter"
        self.wrapped = own(self.model.state_dict())

    @property
    def exact(self) -> State:
        return merge_with_peft(copy.deepcopy(self.model).double())

    def check(self, adapter: Path, out: Path) -> None:
        loratool.merge(self.base, [adapter], out)
        got, base, exact = read(out), read(self.base), self.exact
        assert sorted(got) == sorted(exact)
        assert changed(base, got) == changed(base, exact)
        assert changed(base, got)
        for name, value in got.items():
            assert_rounded(value, exact[name], name=name)
        loratool.unmerge(out, [adapter], out.with_name("back"), base=self.base)
        assert_same_bits(read(out.with_name("back")), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["folder", "native", "wrapped"])
@pytest.mark.parametrize("name", METHODS)
def test_merges_as_peft_does(name: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = Made(name, tmp_path, dtype)
    adapter = made.adapter
    if form == "native":
        adapter = tmp_path / "a.lora.safetensors"
        loratool.save(loratool.load(made.adapter, base=made.base), adapter)
    elif form == "wrapped":
        adapter = tmp_path / "a.lora.safetensors"
        torch.save(made.wrapped, tmp_path / "wrapped.pth")
        config = made.adapter / "adapter_config.json"
        loratool.extract(tmp_path / "wrapped.pth", adapter, config=config, base_out=tmp_path / "base-out")
        biased = "bias" in name
        in_place = {n for n in read(made.base) if n.endswith(".bias") and n.partition(".")[0] in LINEAR2D}
        assert_same_bits(read(tmp_path / "base-out"), read(made.base), skip=frozenset(in_place if biased else ()))
    if form != "folder":
        assert loratool.validate(adapter) == []
    made.check(adapter, tmp_path / "out")


@pytest.mark.parametrize("name", ["loha-tucker", "lokr", "lokr-tucker-both", "adalora"])
def test_the_forward_agrees(name: str, tmp_path: Path) -> None:
    """What was trained is what the forward computes; every layer is called alone."""
    made = Made(name, tmp_path)
    loratool.merge(made.base, [made.adapter], tmp_path / "out")
    merged = Shapes()
    merged.load_state_dict(read(tmp_path / "out"))
    generator = torch.Generator().manual_seed(1)
    inputs = {"fc": (2, 12), "narrow": (2, 6), "conv1": (1, 6, 7), "point1": (1, 6, 4), "conv2": (1, 6, 5, 5),
              "thin2": (1, 6, 5, 5), "point2": (1, 6, 3, 3), "grouped": (1, 12, 5, 5)}  # fmt: skip
    for layer in LINEAR2D if name == "adalora" else LAYERS:
        x = torch.randn(inputs[layer], generator=generator)
        with torch.no_grad():
            want = made.model.base_model.model.get_submodule(layer).eval()(x)
            got = merged.get_submodule(layer)(x)
            plain = nn.Module.get_submodule(Shapes(), layer)(x)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5), layer
        assert not torch.allclose(plain, want, rtol=1e-2), layer


def test_the_rows_cover_every_form_of_lokr(tmp_path: Path) -> None:
    """Each way to store a factor is met above: otherwise the tests prove less than they say."""
    seen = set()
    for name in LOKR:
        state = load_file(Made(name, tmp_path / name).adapter / "adapter_model.safetensors")
        for module in LAYERS:
            parts = {key.rpartition(".")[2] for key in state if f".{module}." in key}
            rank = max((state[key].dim() for key in state if f".{module}.lokr_w2" in key), default=0)
            seen.add((*sorted(parts), rank))
    whole, low = ("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")
    for left in (whole, low):
        assert (*left, "lokr_w2", 2) in seen
        assert (*left, "lokr_w2_a", "lokr_w2_b", 2) in seen
        assert (*sorted((*left, "lokr_t2", "lokr_w2_a", "lokr_w2_b")), 2) in seen
    assert {(*whole, "lokr_w2", 3), (*whole, "lokr_w2", 4), (*low, "lokr_w2", 3)} <= seen, seen


# --- AdaLoRA's ranks ------------------------------------------------------------------------------------------------


def pruned_adalora(folder: Path) -> tuple[nn.Module, Path]:
    """Trained for real, so that ranks are given up: `update_and_allocate` masks, saving prunes."""
    peft = peft_cases.peft()
    torch.manual_seed(2)
    net = Shapes()
    base = save_base(net, folder / "base", names="memory")
    config = peft.AdaLoraConfig(target_modules=["fc", "narrow", "head"], init_r=6, target_r=1, lora_alpha=5, tinit=2,
                                tfinal=4, total_step=20, deltaT=1, beta1=0.5, beta2=0.5)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        fill(model, seed=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(18):
            inner = model.base_model.model
            loss = inner.fc(torch.randn(4, 12)).square().sum()
            loss = loss + inner.head(inner.narrow(torch.randn(4, 6))).square().sum()
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.save_pretrained(folder / "adapter")
    return model, base


def test_ranks_that_training_gave_up_are_gone(tmp_path: Path) -> None:
    model, base = pruned_adalora(tmp_path)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {key.split(".")[2]: len(value) for key, value in state.items() if key.endswith("lora_E")}
    assert min(ranks.values()) < 6, ranks
    exact = merge_with_peft(copy.deepcopy(model).double())
    report = loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    for name, value in read(tmp_path / "out").items():
        assert_rounded(value, exact[name], name=name)
    layers = {layer.target.partition(".")[0]: layer for layer in loratool.inspect(tmp_path / "adapter").layers}
    assert {name: layer.rank for name, layer in layers.items()} == {name: rank for name, rank in ranks.items() if rank}
    assert {layer.scale for layer in layers.values()} == {5 / (6 + 1e-5)}  # of the ranks it started with
    assert sum("left no rank" in note for note in report.plan.notes) == sum(rank == 0 for rank in ranks.values())


@pytest.mark.parametrize("again", [False, True], ids=["trained", "loaded"])
def test_a_wrapped_adalora_knows_its_first_rank(again: bool, tmp_path: Path) -> None:
    """Without a config its `ranknum` says it; a loaded model's factors have fewer ranks than that."""
    model, base = pruned_adalora(tmp_path)
    if again:
        net = Shapes()
        net.load_state_dict(read(base))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft_cases.peft().PeftModel.from_pretrained(net, tmp_path / "adapter")
    exact = merge_with_peft(copy.deepcopy(model).double())
    torch.save(model.state_dict(), tmp_path / "wrapped.pth")
    out = tmp_path / "a.lora.safetensors"
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(tmp_path / "wrapped.pth", out)
    assert caught.value.code == "E-ALPHA"
    loratool.extract(tmp_path / "wrapped.pth", out, alpha=5, scaling="alpha/rank", base_out=tmp_path / "base-out")
    assert_same_bits(read(tmp_path / "base-out"), read(base))
    loratool.merge(base, [out], tmp_path / "out")
    for name, value in read(tmp_path / "out").items():
        assert_rounded(value, exact[name], name=name)


def test_adalora_on_conv1d(tmp_path: Path) -> None:
    peft = peft_cases.peft()
    torch.manual_seed(5)
    model = gpt2()
    base = save_base(model, tmp_path / "base")
    config = peft.AdaLoraConfig(target_modules=["c_attn", "c_proj"], init_r=3, total_step=10, fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        fill(wrapped, seed=3)
        wrapped.save_pretrained(tmp_path / "adapter")
    exact = merge_with_peft(wrapped.double())
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    got = read(tmp_path / "out")
    assert len(changed(read(base), got)) == 6
    for name, value in got.items():
        assert_rounded(value, exact[name], name=name)


def test_a_wrapped_ranknum_counts_more_than_the_config(tmp_path: Path) -> None:
    """It is what the forward divides by, and PEFT 0.21 lets it be trained beside bfloat16 weights."""
    made = Made("adalora", tmp_path)
    for name, parameter in made.model.named_parameters():
        if ".ranknum." in name:
            parameter.data.fill_(3.5)
    torch.save(made.model.state_dict(), tmp_path / "wrapped.pth")
    config = made.adapter / "adapter_config.json"
    loratool.extract(tmp_path / "wrapped.pth", tmp_path / "a.lora.safetensors", config=config)
    made.check(tmp_path / "a.lora.safetensors", tmp_path / "out")


# --- several adapters in one checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_one_of_several_adapters(kind: str, tmp_path: Path) -> None:
    peft = peft_cases.peft()
    torch.manual_seed(6)
    net = Shapes()
    base = save_base(net, tmp_path / "base", names="memory")
    config = getattr(peft, kind)
    model = peft.get_peft_model(net, config(r=2, alpha=3, target_modules=["fc", "conv2"]))
    model.add_adapter("second", config(r=4, alpha=9, target_modules=["fc", "conv1"], use_effective_conv2d=True))
    for seed, name in enumerate(("default", "second")):
        model.set_adapter(name)
        fill(model, seed=seed)
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "wrapped.pth")
    with pytest.raises(loratool.LoratoolError, match="default, second"):
        loratool.load(tmp_path / "wrapped.pth")
    assert loratool.inspect(tmp_path / "wrapped.pth").adapters == ("default", "second")
    for name, folder in (("default", tmp_path / "saved"), ("second", tmp_path / "saved" / "second")):
        out = tmp_path / f"{name}.lora.safetensors"
        loratool.extract(
            tmp_path / "wrapped.pth", out, adapter=name, config=folder / "adapter_config.json",
            base_out=tmp_path / f"base-{name}",
        )  # fmt: skip
        assert_same_bits(read(tmp_path / f"base-{name}"), read(base))
        exact = merge_with_peft(copy.deepcopy(model).double(), [name])
        for number, source in enumerate((out, folder)):
            loratool.merge(base, [source], tmp_path / f"out-{name}-{number}")
            for tensor, value in read(tmp_path / f"out-{name}-{number}").items():
                assert_rounded(value, exact[tensor], name=tensor)


def test_adapters_of_several_methods_in_one_model(tmp_path: Path) -> None:
    """PEFT's mixed models wrap a layer once per method."""
    peft = peft_cases.peft()
    torch.manual_seed(8)
    net = Shapes()
    base = save_base(net, tmp_path / "base", names="memory")
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc"]), mixed=True)
    model.add_adapter("hada", peft.LoHaConfig(r=4, alpha=5, target_modules=["fc", "narrow"]))
    model.set_adapter(["default", "hada"])
    fill(model, seed=2)
    torch.save(model.state_dict(), tmp_path / "wrapped.pth")
    for name in ("default", "hada"):
        model.set_adapter([name])
        exact = merge_with_peft(copy.deepcopy(model).double(), [name])
        out = tmp_path / f"{name}.lora.safetensors"
        alpha = {"default": 3, "hada": 5}[name]
        loratool.extract(
            tmp_path / "wrapped.pth", out, adapter=name, alpha=alpha, scaling="alpha/rank",
            base_out=tmp_path / f"base-{name}",
        )  # fmt: skip
        assert_same_bits(read(tmp_path / f"base-{name}"), read(base))
        loratool.merge(base, [out], tmp_path / f"out-{name}")
        for tensor, value in read(tmp_path / f"out-{name}").items():
            assert_rounded(value, exact[tensor], name=tensor)


# --- replicated layers ----------------------------------------------------------------------------------------------

MAPS = {"llama": [[0, 2], [1, 2]], "llama-long": [[0, 1], [0, 2], [0, 2]], "bert": [[0, 1], [0, 1]]}


def replicated(name: str, folder: Path, **config: Any) -> tuple[nn.Module, Path]:
    peft = peft_cases.peft()
    torch.manual_seed(9)
    model = bert() if name == "bert" else llama(layers=2)
    base = save_base(model, folder / "base")
    targets = ["query", "dense"] if name == "bert" else ["q_proj", "down_proj"]
    options = {"r": 2, "lora_alpha": 3, "target_modules": targets, "layer_replication": MAPS[name], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
        fill(wrapped, seed=5)
        wrapped.save_pretrained(folder / "adapter")
    return wrapped, base


def unshared(wrapped: nn.Module) -> nn.Module:
    """A copy whose repeated layers have weights of their own: merging in place would add to the shared ones twice."""
    wrapped = copy.deepcopy(wrapped).double()
    for module in wrapped.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return wrapped


@pytest.mark.parametrize("form", ["folder", "native", "wrapped"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_replicated_layers_are_written(name: str, dora: bool, form: str, tmp_path: Path) -> None:
    wrapped, base = replicated(name, tmp_path, use_dora=dora)
    exact = merge_with_peft(unshared(wrapped))
    adapter, target = tmp_path / "adapter", base
    if form == "native":
        adapter = tmp_path / "a.lora.safetensors"
        loratool.save(loratool.load(tmp_path / "adapter", base=base), adapter)
        assert loratool.validate(adapter) == []
    elif form == "wrapped":  # its base has the repeated layers already
        adapter, target = tmp_path / "a.lora.safetensors", tmp_path / "base-out"
        torch.save(wrapped.state_dict(), tmp_path / "wrapped.pth")
        config = tmp_path / "adapter" / "adapter_config.json"
        loratool.extract(tmp_path / "wrapped.pth", adapter, config=config, base_out=target)
    if form != "wrapped":
        with pytest.raises(loratool.LoratoolError) as caught:
            loratool.merge(target, [adapter], tmp_path / "out")
        assert "--allow-new" in caught.value.hint
    report = loratool.merge(target, [adapter], tmp_path / "out", allow_new=form != "wrapped")
    got = read(tmp_path / "out")
    assert len(got) > len(read(base))
    for tensor, value in got.items():
        assert_rounded(value, exact[tensor], name=tensor)
    assert set(got) == {tensor for tensor in exact if tensor in got}
    if form == "folder":
        assert any("layer_replication" in note for note in report.plan.notes)


def test_a_base_that_was_replicated_before_is_taken_as_it_is(tmp_path: Path) -> None:
    wrapped, base = replicated("llama", tmp_path)
    exact = merge_with_peft(unshared(wrapped))
    state = read(base)
    state |= {name.replace(".1.", ".2."): value.clone() for name, value in state.items() if ".layers.1." in name}
    (tmp_path / "grown").mkdir()
    save_file(state, tmp_path / "grown" / "model.safetensors")
    loratool.merge(tmp_path / "grown", [tmp_path / "adapter"], tmp_path / "out")
    for tensor, value in read(tmp_path / "out").items():
        assert_rounded(value, exact[tensor], name=tensor)


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([[0, 3]], "names layer 2, the base has 2 layers"),
        ([[0, 1]], "model.layers.1 would have to go"),
        ([[1, 1]], "not a list of"),
        ([[0, "1"]], "not a list of"),
        ("yes", "not a list of"),
    ],
)
def test_replications_that_can_not_be_are_refused(ranges: Any, words: str, tmp_path: Path) -> None:
    _, base = replicated("llama", tmp_path)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layer_replication": ranges}))
    with pytest.raises(loratool.LoratoolError, match=words):
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out", allow_new=True)


def test_replicated_layers_need_the_base(tmp_path: Path) -> None:
    replicated("llama", tmp_path)
    adapter = loratool.load(tmp_path / "adapter")
    assert any("layer_replication" in doubt for doubt in adapter.doubts)
    with pytest.raises(loratool.LoratoolError):
        loratool.save(adapter, tmp_path / "a.lora.safetensors")


# --- experts, by the version of PEFT that wrote them ----------------------------------------------------------------

EXPERTS, SIDE, RANK = 3, 6, 2


def expert_files(folder: Path, first: bool, *, transposed: bool, version: str | None, sides: tuple[int, int]) -> State:
    """A base and an adapter of one stacked parameter as ParamWrapper writes it; what PEFT's einsum makes of them.

    `first`: A belongs to the parameter's dimension 1, B to 2. The formulas are those of the versions' get_delta_weight.
    """
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(EXPERTS, *sides, generator=generator)
    a, b = sides if first else sides[::-1]
    A, B = (torch.randn(*shape, generator=generator) for shape in ((RANK * EXPERTS, a), (b, RANK * EXPERTS)))
    state = {"mlp.experts.down_proj": W, "mlp.router.weight": torch.ones(2, 2)}
    if transposed:
        state["mlp.experts.down_proj_bias"] = torch.ones(EXPERTS, sides[1])
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    save_file(state, folder / "base" / "model.safetensors")
    prefix = "base_model.model.mlp.experts.lora"
    save_file({f"{prefix}_A.weight": A, f"{prefix}_B.weight": B}, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_parameters": ["mlp.experts.down_proj"]}
    config |= {} if version is None else {"peft_version": version}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    A3, B3 = A.double().reshape(EXPERTS, RANK, a), B.double().reshape(b, RANK, EXPERTS)
    delta = torch.einsum("ore,eri->eio" if first else "ore,eri->eoi", B3, A3)
    return {**state, "mlp.experts.down_proj": W.double() + 3 * delta}


# (version in the config, transposed experts) -> whether A has the parameter's first dimension
VERSIONS = {
    (None, False): True,  # 0.17 did not write its version
    (None, True): True,
    ("0.18.0", False): True,
    ("0.18.1", True): True,
    ("0.19.0", False): True,
    ("0.19.0", True): False,
    ("0.19.1", False): False,
    ("0.19.1", True): True,
    ("0.21.2", False): False,
    ("0.21.2", True): True,
}


@pytest.mark.parametrize(("version", "transposed"), VERSIONS, ids=str)
def test_square_experts_go_by_the_version_of_peft(version: str | None, transposed: bool, tmp_path: Path) -> None:
    first = VERSIONS[version, transposed]
    want = expert_files(tmp_path, first, transposed=transposed, version=version, sides=(SIDE, SIDE))
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    name = "mlp.experts.down_proj"
    assert_rounded(read(tmp_path / "out")[name], want[name], name=name)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("version", [None, "0.18.0", "0.19.0", "0.21.2", "0.19.1.dev0"])
def test_experts_that_are_not_square_show_their_sides(first: bool, version: str | None, tmp_path: Path) -> None:
    want = expert_files(tmp_path, first, transposed=False, version=version, sides=(4, 6))
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    name = "mlp.experts.down_proj"
    assert_rounded(read(tmp_path / "out")[name], want[name], name=name)


@pytest.mark.parametrize("first", [False, True])
def test_a_development_version_is_asked_about(first: bool, tmp_path: Path) -> None:
    want = expert_files(tmp_path, first, transposed=False, version="0.19.1.dev0", sides=(SIDE, SIDE))
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert caught.value.code == "E-LAYOUT"
    assert "--layout" in caught.value.hint
    layout = {"*down_proj": "in_out" if first else "out_in"}
    adapter = loratool.load(tmp_path / "adapter", base=tmp_path / "base", layout=layout)
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")
    name = "mlp.experts.down_proj"
    assert_rounded(read(tmp_path / "out")[name], want[name], name=name)


# --- torch's attention ----------------------------------------------------------------------------------------------


def test_attention_s_forward_counts_out_proj_twice(tmp_path: Path) -> None:
    """PEFT's merge does it, and so does its forward: with one delta the outputs would differ."""
    peft = peft_cases.peft()
    torch.manual_seed(3)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.mha(x, x, x)[0]

    net = Attention().eval()
    base = save_base(net, tmp_path / "base", names="memory")
    model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["mha"])).eval()
    fill(model, seed=1)
    model.save_pretrained(tmp_path / "adapter")
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        want, before = model(x), net(x)
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
        net.load_state_dict(read(tmp_path / "out"))
        assert torch.allclose(net(x), want, atol=1e-5)
    assert not torch.allclose(before, want, atol=1e-2)


# --- refusals -------------------------------------------------------------------------------------------------------


def edited(made: Made, change: Mapping[str, Tensor | None], **config: Any) -> Path:
    """The saved adapter with other tensors, and another config."""
    file, prefix = made.adapter / "adapter_model.safetensors", "base_model.model."
    state = load_file(file) | {f"{prefix}{name}": value for name, value in change.items() if value is not None}
    save_file({k: v for k, v in state.items() if change.get(k.removeprefix(prefix), v) is not None}, file)
    document = json.loads((made.adapter / "adapter_config.json").read_text())
    (made.adapter / "adapter_config.json").write_text(json.dumps({**document, **config}))
    return made.adapter


def refusal(made: Made, adapter: Path) -> loratool.LoratoolError:
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(made.base, [adapter], made.folder / "out")
    assert not (made.folder / "out").exists()
    return caught.value


@pytest.mark.parametrize(
    ("name", "lost"),
    [("loha", "fc.hada_w2_b"), ("loha-tucker", "conv2.hada_t1"), ("lokr", "fc.lokr_w1"),
     ("lokr-low-rank", "fc.lokr_w2_a"), ("adalora", "fc.lora_E"), ("adalora", "conv2.lora_B")],
)  # fmt: skip
def test_a_missing_part_is_named(name: str, lost: str, tmp_path: Path) -> None:
    made = Made(name, tmp_path)
    error = refusal(made, edited(made, {lost: None}))
    assert error.code == "E-COMPONENTS"
    assert lost.partition(".")[2] in str(error)
    assert lost.partition(".")[0] in str(error)


@pytest.mark.parametrize(
    ("name", "part", "shape"),
    [("loha", "fc.hada_w1_b", (4, 11)), ("loha", "conv2.hada_w1_b", (4, 35)), ("loha", "fc.hada_w1_a", (18,)),
     ("loha-tucker", "conv2.hada_t1", (4, 4, 3)), ("lokr", "fc.lokr_w1", (5, 3)),
     ("lokr-low-rank", "fc.lokr_w2_b", (1, 5)),
     ("lokr-low-rank", "conv2.lokr_w2_b", (1, 17)), ("lokr", "fc.lokr_w1", (0, 3)), ("adalora", "fc.lora_E", (5,)),
     ("adalora", "fc.lora_E", (4, 1)), ("adalora", "conv2.lora_A", (5, 35)), ("adalora", "fc.lora_A", (5, 0))],
)  # fmt: skip
def test_factors_that_do_not_fit_are_named(name: str, part: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    made = Made(name, tmp_path)
    error = refusal(made, edited(made, {part: torch.ones(shape)}))
    assert {problem.code for problem in error.problems} <= {"E-SHAPE", "E-COMPONENTS", "E-RANK"}
    assert part.partition(".")[0] in str(error)


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    made = Made("loha", tmp_path)
    error = refusal(made, edited(made, {"fc.hada_w1_a": None, "narrow.hada_w1_b": torch.ones(4)}))
    assert len(error.problems) == 2


@pytest.mark.parametrize(("name", "kind"), [("loha", "LORA"), ("lokr", "LOHA"), ("adalora", "LORA")])
def test_a_config_of_another_method_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    made = Made(name, tmp_path)
    error = refusal(made, edited(made, {}, peft_type=kind))
    assert error.code == "E-CONFIG"
    assert kind in error.message


@pytest.mark.parametrize(("name", "field"), [("loha", "alpha"), ("lokr", "r"), ("adalora", "init_r")])
@pytest.mark.parametrize("value", ["8", None, True, float("inf")])
def test_numbers_of_the_config_are_checked(name: str, field: str, value: Any, tmp_path: Path) -> None:
    made = Made(name, tmp_path)
    text = json.dumps({**json.loads((made.adapter / "adapter_config.json").read_text()), field: value})
    (made.adapter / "adapter_config.json").write_text(text.replace("Infinity", "1e999"))
    with pytest.raises(loratool.LoratoolError):
        loratool.load(made.adapter)


def test_a_wrapped_lokr_without_its_config(tmp_path: Path) -> None:
    """Where both factors are whole no tensor has the rank: alpha/rank can not be computed, alpha alone can."""
    made = Made("lokr", tmp_path)
    torch.save(made.wrapped, tmp_path / "wrapped.pth")
    out = tmp_path / "a.lora.safetensors"
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(tmp_path / "wrapped.pth", out, alpha=6, scaling="alpha/rank")
    assert caught.value.code == "E-ALPHA"
    assert "--config" in caught.value.hint
    loratool.extract(tmp_path / "wrapped.pth", out, alpha=6 / 4, scaling="alpha")
    assert loratool.validate(out) == []
    made.check(out, tmp_path / "out")


FOREIGN = {
    "VeraConfig": {"target_modules": ["fc"], "r": 2},
    "OFTConfig": {"target_modules": ["fc"], "oft_block_size": 3, "r": 0},
    "BOFTConfig": {"target_modules": ["fc"], "boft_block_size": 3},
    "HRAConfig": {"target_modules": ["fc"], "r": 2},
    "FourierFTConfig": {"target_modules": ["fc"], "n_frequency": 5},
    "RandLoraConfig": {"target_modules": ["fc"], "r": 2},
    "ShiraConfig": {"target_modules": ["fc"], "r": 2},
    "VBLoRAConfig": {"target_modules": ["fc"], "r": 2, "vector_length": 6, "num_vectors": 4},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_methods_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    peft = peft_cases.peft()
    net = Shapes()
    base = save_base(net, tmp_path / "base", names="memory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, getattr(peft, kind)(**FOREIGN[kind]))
        model.save_pretrained(tmp_path / "adapter")
    name = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"]
    with pytest.raises(loratool.LoratoolError, match=f"peft_type {name}") as caught:
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert caught.value.code == "E-UNSUPPORTED"
    torch.save(model.state_dict(), tmp_path / "wrapped.pth")
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(tmp_path / "wrapped.pth", tmp_path / "a.lora.safetensors", alpha=1, scaling="alpha")
    assert caught.value.code == "E-UNSUPPORTED", str(caught.value)
    assert "merge_and_unload" in caught.value.hint


# --- detection and inspection ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("loha", "loha"), ("lokr", "lokr"), ("adalora", "lora")])
def test_inspect_says_what_it_is(name: str, kind: str, tmp_path: Path) -> None:
    made = Made(name, tmp_path)
    torch.save(made.wrapped, tmp_path / "wrapped.pth")
    for path, convention in ((made.adapter, "peft"), (tmp_path / "wrapped.pth", "peft-wrapped")):
        summary = loratool.inspect(path)
        assert (summary.convention, {layer.kind for layer in summary.layers}) == (convention, {kind})
    layers = {layer.target: layer for layer in loratool.inspect(made.adapter, base=made.base).layers}
    assert layers["conv2.weight"].shape == (8, 6, 3, 2)
    assert layers["fc.weight"].scale == pytest.approx(1.5 if kind != "lora" else 6 / 5, rel=1e-5)


def test_lycoris_s_own_files_are_not_pefts(tmp_path: Path) -> None:
    from loratool.checkpoint import open_checkpoint
    from loratool.conventions import peft, peft_wrapped

    names = ["lycoris_fc.hada_w1_a", "lycoris_fc.hada_w1_b", "lycoris_fc.alpha", "lora_unet_x.lokr_w1", "h.0.lora_A"]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    source = open_checkpoint(tmp_path / "x.safetensors")
    assert not peft.detect(source)
    assert not peft_wrapped.detect(source)

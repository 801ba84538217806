"""LyCORIS itself: adapters of every algorithm that it saves, against what its wrapped modules compute.

The truth is its forward. Its `merge_to` applies the scale of LoHa and LoKr twice, and is no truth.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import State, assert_float32_close, changed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool

pytestmark = pytest.mark.peers
lycoris = pytest.importorskip("lycoris")

KINDS = ["Linear", "Conv1d", "Conv2d", "Conv3d", "LayerNorm", "GroupNorm"]


@pytest.fixture(autouse=True)
def _presets() -> Iterator[None]:
    """The presets are attributes of LyCORIS's class, and its logger talks."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    network = lycoris.LycorisNetwork
    before = {name: value for name, value in vars(network).items() if name.isupper()}
    network.apply_preset({"target_module": KINDS, "target_name": [".*"]})
    yield
    for name, value in before.items():
        setattr(network, name, value)


class Net(nn.Module):
    """Every layer that LyCORIS wraps; `a_b` has an underscore of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a_b = nn.Linear(12, 8)
        self.square = nn.ModuleList([nn.Linear(9, 9, bias=False)])
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.conv3 = nn.Conv3d(2, 4, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.group_norm = nn.LayerNorm(8), nn.GroupNorm(2, 8)


def layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield name, module


@torch.no_grad()
def weight_of(layer: nn.Module, shape: torch.Size) -> Tensor:
    """The weight that a layer's forward applies: its answer to one-hot inputs, a kernel in size, at the centre."""
    inputs = torch.eye(shape[1:].numel(), dtype=torch.float64).reshape(-1, *shape[1:])
    inputs = inputs.repeat(1, getattr(layer, "groups", 1), *[1] * len(shape[2:]))
    centre = tuple(size // 2 for size in shape[2:])
    answer = (layer(inputs) - layer(torch.zeros_like(inputs)))[(..., *centre)]  # [in * kernel, out]
    return answer.T.reshape(shape)


@torch.no_grad()
def bias_of(layer: nn.Module, shape: torch.Size) -> Tensor:
    zeros = torch.zeros(1, shape[1] * getattr(layer, "groups", 1), *shape[2:], dtype=torch.float64)
    return layer(zeros)[(0, slice(None), *(size // 2 for size in shape[2:]))]


def net(folder: Path) -> tuple[nn.Module, State]:
    """A network in float64 whose values float32 can hold, and its state saved as the base."""
    torch.manual_seed(0)
    model = Net().double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter).float().double()
    state = {name: value.float().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "base.safetensors")
    return model, state


def train(module: nn.Module) -> None:
    """Values that no initialisation gives, exact in float32."""
    for name, parameter in module.named_parameters():
        if "dora_scale" not in name:
            parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter.data)).float().double()
    for part in module.modules():
        if isinstance(getattr(part, "dora_scale", None), Tensor):
            part.dora_scale.data = (
                (part.dora_scale.data * (1 + 0.2 * torch.rand_like(part.dora_scale))).float().double()
            )


CASES: dict[str, dict[str, Any]] = {
    "locon": {"algo": "lora"},
    "locon-alpha-0": {"algo": "lora", "linear_alpha": 0, "conv_alpha": 0},
    "locon-tucker": {"algo": "lora", "use_tucker": True},
    "locon-scalar": {"algo": "lora", "use_scalar": True},
    "locon-norm": {"algo": "lora", "train_norm": True},
    "locon-dora-out": {"algo": "lora", "dora_wd": True},
    "locon-dora-in": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "locon-dora-tucker": {"algo": "lora", "dora_wd": True, "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "loha-scalar": {"algo": "loha", "use_scalar": True},
    "loha-dora-in": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
    "lokr": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1},
    "lokr-both": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "decompose_both": True, "factor": 4},
    "lokr-tucker": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "use_tucker": True, "factor": 2},
    "lokr-scalar": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "use_scalar": True, "factor": 2},
    "lokr-unbalanced": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "unbalanced_factorization": True},
    "lokr-whole": {"algo": "lokr", "full_matrix": True},
    "lokr-dora-out": {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "dora_wd": True},
    "full": {"algo": "full", "train_norm": True},
}
SIZES = {"linear_dim": 3, "linear_alpha": 5.0, "conv_dim": 2, "conv_alpha": 3.0}


@pytest.mark.parametrize("name", CASES)
def test_a_saved_file_merges_to_what_the_wrapped_model_computes(name: str, tmp_path: Path) -> None:
    model, base = net(tmp_path)
    network = lycoris.create_lycoris(model, 1.0, warn_on_unmatched=False, **{**SIZES, **CASES[name]})
    network.apply_to()
    train(network.double().eval())
    network.save_weights(str(tmp_path / "lycoris.safetensors"), torch.float32, {})
    # The file has rounded products (`scalar` folded in) and differences: take the forward of what it holds, not more.
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lycoris.safetensors", tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    for layer, module in layers(model):
        shape = base[f"{layer}.weight"].shape
        assert_float32_close(got[f"{layer}.weight"], weight_of(module, shape), name=layer)
        if f"{layer}.bias" in base:
            assert_float32_close(got[f"{layer}.bias"], bias_of(module, shape), name=layer)
    if CASES[name].get("train_norm"):
        x = torch.randn(3, 8, dtype=torch.float64)
        for layer in ("norm", "group_norm"):
            plain = type(Net().get_submodule(layer))(*((2, 8) if layer == "group_norm" else (8,))).double()
            plain.load_state_dict({k: got[f"{layer}.{k}"].double() for k in ("weight", "bias")})
            assert_float32_close(plain(x), model.get_submodule(layer)(x), name=layer)
    want = {f"{layer}.weight" for layer, _ in layers(model)}
    if CASES[name].get("train_norm"):
        want |= {f"{layer}.{part}" for layer in ("norm", "group_norm") for part in ("weight", "bias")}
    if name == "full":
        want |= {key for key in base if key.endswith(".bias")}
    assert changed(base, got) == want


OF_BASE: dict[str, dict[str, Any]] = {
    "ia3": {"algo": "ia3"},
    "ia3-in": {"algo": "ia3"},
    "glora": {"algo": "glora"},
    "glora-scalar": {"algo": "glora", "use_scalar": True, "use_tucker": True},
}


@pytest.mark.parametrize("name", OF_BASE)
def test_what_depends_on_the_base_merges_to_what_lycoris_computes_and_merges(name: str, tmp_path: Path) -> None:
    """IA3 and GLoRA, on weights with an output and an input of zeros, and with a w of -1."""
    if name == "ia3-in":  # an option of the preset, not of the network
        lycoris.LycorisNetwork.apply_preset({"module_algo_map": {kind: {"train_on_input": True} for kind in KINDS}})
    model, base = net(tmp_path)
    del model.grouped, base["grouped.weight"], base["grouped.bias"]  # LyCORIS's own forward of it fails
    for layer, module in layers(model):
        for W in (module.weight.data, base[f"{layer}.weight"]):
            W[2], W[:, 1] = 0, 0
    save_file(base, tmp_path / "base.safetensors")
    network = lycoris.create_lycoris(model, 1.0, warn_on_unmatched=False, **{**SIZES, **OF_BASE[name]})
    network.apply_to()
    train(network.double().eval())
    for part in network.loras:
        if part.name == "ia3":
            part.weight.data.view(-1)[0] = -1
            assert part.on_input == (name == "ia3-in")
    network.save_weights(str(tmp_path / "lycoris.safetensors"), torch.float32, {})
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lycoris.safetensors", tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    for layer, module in layers(model):
        assert_float32_close(got[f"{layer}.weight"], weight_of(module, base[f"{layer}.weight"].shape), name=layer)
    network.restore()
    network.merge_to(1.0)
    for layer, module in layers(model):
        assert_float32_close(got[f"{layer}.weight"], module.weight.detach(), name=layer)
    assert changed(base, got) == {f"{layer}.weight" for layer, _ in layers(model)}
    if name.startswith("ia3"):  # written again, it is LyCORIS's own file
        names = (tmp_path / name for name in ("base.safetensors", "lycoris.safetensors", "a.lora.safetensors"))
        file, own, native = names
        loratool.convert(own, native, "native", base=file)
        loratool.convert(native, tmp_path / "again.safetensors", "lycoris", base=file, as_component="model")
        before, after = load_file(own), load_file(tmp_path / "again.safetensors")
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(value, after[key].to(value.dtype)), key  # LyCORIS casts the flag as well


@pytest.mark.parametrize("algorithm", ["LoConModule", "LohaModule", "LokrModule"])
@pytest.mark.parametrize("layer", ["a_b", "conv2"])
def test_rs_lora_is_in_the_saved_alpha(layer: str, algorithm: str, tmp_path: Path) -> None:
    model, _ = net(tmp_path)
    rank = 4 if algorithm != "LokrModule" else 2 if layer == "a_b" else 1  # a larger one makes LoKr's factors whole
    options = {"lora_dim": rank, "alpha": 3.0, "rs_lora": True, "factor": 2}
    module = getattr(lycoris, algorithm)("lycoris_" + layer, model.get_submodule(layer), **options)
    module.apply_to()
    train(module.double().eval())
    state = {f"lycoris_{layer}.{key}": value.detach().float() for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "lycoris.safetensors")
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "lycoris.safetensors", tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")[f"{layer}.weight"]
    assert_float32_close(got, weight_of(model.get_submodule(layer), got.shape))
    (shown,) = loratool.inspect(tmp_path / "lycoris.safetensors").layers
    assert shown.scale == pytest.approx(3.0 / rank**0.5)


REFUSED = {"diag-oft": "OFT", "boft": "BOFT", "tlora": "T-LoRA"}


@pytest.mark.parametrize("options", [{}, {"rescaled": True, "rs_lora": True}], ids=str)
@pytest.mark.parametrize("algorithm", REFUSED)
def test_what_is_no_update_of_weights_is_refused_by_name(
    algorithm: str, options: dict[str, bool], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv2d(16, 16, 1))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    sizes = {"linear_dim": 4, "conv_dim": 4}
    network = lycoris.create_lycoris(model, 1.0, warn_on_unmatched=False, algo=algorithm, **sizes, **options)
    network.apply_to()
    network.save_weights(str(tmp_path / "lycoris.safetensors"), torch.float32, {})
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.merge(tmp_path / "base.safetensors", tmp_path / "lycoris.safetensors", tmp_path / "out.safetensors")
    (problem,) = caught.value.problems
    assert problem.code == "E-UNSUPPORTED"
    assert problem.message.startswith(f"3 modules are of {REFUSED[algorithm]}, which is not supported")
    assert problem.message.endswith("; lycoris_0, lycoris_1, lycoris_2")

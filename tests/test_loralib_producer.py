"""loralib itself: its layers train, its eval mode merges, and the same weights come out of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import State, assert_float32_close, assert_same_bits, fill, own, read
from safetensors.torch import save_file
from torch import Tensor, nn

import loratool

lora = pytest.importorskip("loralib")
pytestmark = pytest.mark.peers

ALPHA, RANK = 6, 4
LORA: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA}
ENABLED = {"c_attn": "101", "kv": "01"}
LAYOUT = {"square": "out_in"}  # beside transposed layers nothing shows it


class Net(nn.Module):
    """Every layer of loralib, packed and transposed ones among them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.wte = lora.Embedding(20, 8, **LORA)
        self.norm = nn.LayerNorm(8)
        self.fc = lora.Linear(8, 10, **LORA)
        self.square = lora.Linear(8, 8, **LORA)
        self.c_fc = lora.Linear(8, 12, fan_in_fan_out=True, **LORA)
        self.c_attn = lora.MergedLinear(8, 24, enable_lora=[True, False, True], fan_in_fan_out=True, **LORA)
        self.qkv = lora.MergedLinear(8, 24, enable_lora=[True, True, True], **LORA)
        self.kv = lora.MergedLinear(8, 16, enable_lora=[False, True], **LORA)
        self.off = lora.MergedLinear(8, 16, enable_lora=[False, False], **LORA)
        self.untrained = lora.Linear(8, 5)
        self.conv = lora.Conv2d(6, 8, 3, **LORA)
        self.grouped = lora.Conv2d(6, 12, 3, groups=3, **LORA)
        self.uneven = lora.Conv2d(6, 12, 3, groups=2, **LORA)
        self.depthwise = lora.Conv2d(6, 12, 3, groups=6, bias=False, **LORA)
        self.point = lora.Conv1d(6, 12, 1, **LORA)
        fill(self, 3)
        self.to(dtype)

    def forward(self, tokens: Tensor, image: Tensor) -> list[Tensor]:
        x = self.norm(self.wte(tokens))
        flat = [layer(x) for layer in (self.fc, self.square, self.c_fc, self.c_attn, self.qkv, self.kv)]
        images = [layer(image) for layer in (self.conv, self.grouped, self.uneven, self.depthwise)]
        return [*flat, *images, self.point(image.flatten(2))]


def without_lora(state: State) -> State:
    """The names of the model without loralib: no factors, the convolutions in their own place."""
    convolutions = ("conv.conv.", "grouped.conv.", "uneven.conv.", "depthwise.conv.", "point.conv.")
    return own(
        {
            name.replace(".conv.", ".") if name.startswith(convolutions) else name: value
            for name, value in state.items()
            if "lora_" not in name
        }
    )


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def net(request: pytest.FixtureRequest) -> Net:
    return Net(request.param)


def base_of(net: Net, folder: Path) -> Path:
    folder.mkdir()
    save_file(without_lora(net.state_dict()), folder / "model.safetensors")
    return folder


def load(path: Path, **choices: Any) -> loratool.Adapter:
    return loratool.load(path, alpha=ALPHA, enable_lora=ENABLED, layout=LAYOUT, **choices)


def assert_producers(got: State, want: State) -> None:
    """Equal to rounding: in bf16 loralib rounds the product, the scaled product and the sum."""
    assert sorted(got) == sorted(want)
    for name in want:
        if want[name].dtype == torch.float32:
            assert_float32_close(got[name], want[name], name=name)
        else:
            distance = (got[name].double() - want[name].double()).abs().max().item()
            assert distance <= 4 * 2.0**-8 * want[name].abs().max().item(), name


@pytest.mark.parametrize("kind", ["whole", "adapter", "whole in eval mode", "adapter in eval mode"])
def test_merge_is_eval_mode(tmp_path: Path, net: Net, kind: str) -> None:
    base, path = base_of(net, tmp_path / "base"), tmp_path / "saved.pt"
    net.eval() if "eval" in kind else net.train()
    torch.save(lora.lora_state_dict(net) if "adapter" in kind else net.state_dict(), path)
    net.eval()
    adapter = load(path, base=base)
    loratool.merge(base, adapter, tmp_path / "merged")
    got, want = read(tmp_path / "merged"), without_lora(net.state_dict())
    assert_producers(got, want)
    trained = {item.target.name for item in adapter.updates}
    assert len(trained) == 12
    assert_same_bits({n: got[n] for n in want if n not in trained}, {n: want[n] for n in want if n not in trained})
    assert all(not torch.equal(got[name], read(base)[name]) for name in trained)
    assert (kind == "whole in eval mode") == any(
        "12 of its 12 weights hold the delta" in note for note in adapter.notes
    )


def test_forward_is_that_of_the_merged_weights(tmp_path: Path) -> None:
    """The unmerged model computes what the merged weights do, put into the same model with empty factors."""
    net = Net().train()
    base = base_of(net, tmp_path / "base")
    torch.save(lora.lora_state_dict(net), tmp_path / "saved.pt")
    tokens, image = torch.arange(20).reshape(2, 10), torch.randn(1, 6, 7, 7)
    want = net(tokens, image)
    loratool.merge(base, load(tmp_path / "saved.pt", base=base), tmp_path / "merged")
    got = read(tmp_path / "merged")
    state = {name: torch.zeros_like(value) if "lora_" in name else value for name, value in net.state_dict().items()}
    state |= {name: got[name if name in got else name.replace(".conv.", ".")] for name in state if "lora_" not in name}
    net.load_state_dict(state)
    for number, (ours, theirs) in enumerate(zip(net(tokens, image), want, strict=True)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), number
        assert theirs.abs().max() > 0.1


def test_extract_from_eval_mode(tmp_path: Path, net: Net) -> None:
    """The base comes back to rounding, also after loralib went to and fro a few times."""
    want = without_lora(net.state_dict())
    for training in (False, True, False, True, False):
        net.train(training)
    torch.save(net.state_dict(), tmp_path / "eval.pt")
    loratool.extract(
        tmp_path / "eval.pt",
        tmp_path / "a.safetensors",
        alpha=ALPHA,
        enable_lora=ENABLED,
        layout=LAYOUT,
        already_merged=True,
        base_out=tmp_path / "base",
    )
    got = read(tmp_path / "base")
    merged = without_lora(net.state_dict())
    assert sorted(got) == sorted(want)
    for name in want:
        unit = torch.finfo(want[name].dtype).eps
        bound = 8 * unit * max(merged[name].abs().max().item(), want[name].abs().max().item())
        assert (got[name].double() - want[name].double()).abs().max().item() <= bound, name
        assert got[name].dtype == want[name].dtype


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases(tmp_path: Path, bias: str) -> None:
    net = Net()
    base = base_of(net, tmp_path / "base")
    lora.mark_only_lora_as_trainable(net, bias)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data += 0.125
    torch.save(lora.lora_state_dict(net, bias), tmp_path / "adapter.pt")
    torch.save(net.state_dict(), tmp_path / "whole.pt")
    net.eval()
    want, before = without_lora(net.state_dict()), read(base)
    for kind in ("adapter", "whole"):
        adapter = load(tmp_path / f"{kind}.pt", base=base)
        loratool.merge(base, adapter, tmp_path / kind)
        got = read(tmp_path / kind)
        moved = {name for name in want if name.endswith("bias") and not torch.equal(want[name], before[name])}
        # Layers without factors train their biases too, and `lora_state_dict` does not keep those.
        lost = {"off.bias", "untrained.bias"} if (bias, kind) == ("lora_only", "adapter") else set()
        assert lost <= moved
        assert {name for name in moved if torch.equal(got[name], before[name])} == lost
        assert_producers({n: v for n, v in got.items() if n not in lost}, {n: want[n] for n in want if n not in lost})
        assert bool(moved) == (bias != "none")


def test_conv1d_with_a_kernel_can_not_be_used_by_loralib_either(tmp_path: Path) -> None:
    layer = nn.ModuleDict({"c": lora.Conv1d(6, 12, 3, **LORA)})
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        layer["c"].eval()
    torch.save(own(layer.state_dict()), tmp_path / "a.pt")
    with pytest.raises(loratool.LoratoolError, match="Conv1d and Conv3d neither run nor merge"):
        loratool.load(tmp_path / "a.pt", alpha=ALPHA)

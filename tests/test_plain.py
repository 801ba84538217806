"""The plain wrapper of "LLMs from scratch": two scaling rules, and no file that tells which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import State, assert_rounded, assert_same_bits, changed, own, read
from safetensors.torch import save_file
from torch import Tensor, nn

import loratool

ALPHA, RANK, WIDTH = 12.0, 4, 8
RULES = {"alpha": ALPHA, "alpha/rank": ALPHA / RANK}


class Lora(nn.Module):
    """x @ A @ B with A [in, rank] and B [rank, out]."""

    def __init__(self, into: int, out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(into, rank))
        self.B = nn.Parameter(torch.zeros(rank, out))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.A @ self.B)


class LinearWithLora(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = Lora(linear.in_features, linear.out_features, rank, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


class Norm(nn.Module):
    """Its parameters are called scale and shift: a scale that is no LoRA scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.shift = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        return self.scale * centred / deviation + self.shift


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.W_query = nn.Linear(width, width, bias=False)
        self.W_key = nn.Linear(width, width, bias=False)
        self.W_value = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.W_query(x), self.W_key(x), self.W_value(x)
        weight = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1)
        return self.out_proj(weight @ value)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.att, self.ff = Attention(width), FeedForward(width)
        self.norm1, self.norm2 = Norm(width), Norm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Tangle(nn.Module):
    """Modules that are called `linear` and `lora`, as their owner likes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.lora = nn.Linear(width, width)
        self.A = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(torch.tanh(self.linear(x))) * self.A


class Gpt(nn.Module):
    def __init__(self, width: int = WIDTH, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(20, width)
        self.trf_blocks = nn.Sequential(Block(width), Block(width))
        self.final_norm = Norm(width)
        self.extra = extra if extra is not None else nn.Identity()
        self.out_head = nn.Linear(width, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_head(self.extra(self.final_norm(self.trf_blocks(self.tok_emb(x)))))


def wrap(model: nn.Module, scale: float, *, rank: int = RANK) -> None:
    """Every Linear, however deep: also those inside an earlier wrapper."""
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            setattr(model, name, LinearWithLora(module, rank, scale))
        else:
            wrap(module, scale, rank=rank)


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """As after training: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith((".lora.A", ".lora.B")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def truth(wrapped: nn.Module) -> State:
    """W + scale * (A @ B).T of every wrapper, in float64, by the base's names."""
    state: State = {}
    for name, parameter in wrapped.state_dict().items():
        if not name.endswith((".lora.A", ".lora.B")):
            state[name] = parameter.double()
    for name, module in wrapped.named_modules():
        if isinstance(module, LinearWithLora):
            A, B = module.lora.A.detach().double(), module.lora.B.detach().double()
            weight = state.pop(f"{name}.linear.weight") + module.lora.scale * (A @ B).T
            state[f"{name}.weight"] = weight
            if module.linear.bias is not None:
                state[f"{name}.bias"] = state.pop(f"{name}.linear.bias")
    return state


def made(folder: Path, scale: float, **options: Any) -> tuple[nn.Module, Path, State]:
    """A wrapped and trained model, the checkpoint of its base, and the truth."""
    torch.manual_seed(2)
    model = Gpt(extra=options.pop("extra", None))
    base = folder / "base"
    base.mkdir()
    save_file(own(model.state_dict()), base / "model.safetensors")
    wrap(model, scale, **options)
    return trained(model), base, truth(model)


def saved(state: Mapping[str, Any], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(own(state), file)
    else:
        torch.save(dict(state), file)
    return file


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(15).reshape(3, 5))


def check(folder: Path, want: State, base: Path, *, layers: int) -> None:
    got, before = read(folder), read(base)
    assert sorted(got) == sorted(before)
    assert len(changed(before, got)) == layers
    for name, value in got.items():
        assert_rounded(value, want[name], name=name)


LAYERS = 13  # Linear layers of Gpt: 2 blocks of 6, and the head

CONTAINERS: dict[str, Callable[[State, Path], Path]] = {
    "pth": lambda state, folder: saved(state, folder / "model.pth"),
    "pth-with-optimizer": lambda state, folder: saved(
        {"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}},
        folder / "model.pth",
    ),
    "safetensors": lambda state, folder: saved(state, folder / "model.safetensors"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("rule", RULES)
def test_merged_weights_reproduce_the_wrapped_model(rule: str, container: str, tmp_path: Path) -> None:
    model, base, want = made(tmp_path, RULES[rule])
    file = CONTAINERS[container](dict(model.state_dict()), tmp_path)
    adapter = tmp_path / "adapter.lora.safetensors"
    loratool.extract(file, adapter, alpha=ALPHA, scaling=rule, base_out=tmp_path / "base-out")
    assert loratool.validate(adapter) == []
    assert_same_bits(read(tmp_path / "base-out"), read(base))

    loratool.merge(base, [adapter], tmp_path / "out")
    check(tmp_path / "out", want, base, layers=LAYERS)
    merged = Gpt()
    merged.load_state_dict(read(tmp_path / "out"))
    assert torch.allclose(outputs(merged), outputs(model), rtol=1e-5, atol=1e-5)
    untouched = Gpt()
    untouched.load_state_dict(read(base))
    assert not torch.allclose(outputs(untouched), outputs(model), atol=1e-2)

    loratool.unmerge(tmp_path / "out", [adapter], tmp_path / "back", base=base)
    assert_same_bits(read(tmp_path / "back"), read(base))


@pytest.mark.parametrize("rule", RULES)
def test_a_wrapped_checkpoint_is_an_adapter_by_itself(rule: str, tmp_path: Path) -> None:
    model, base, want = made(tmp_path, RULES[rule])
    file = saved(model.state_dict(), tmp_path / "model.pth")
    adapter = loratool.load(file, alpha=ALPHA, scaling=rule)
    loratool.merge(base, [adapter], tmp_path / "out")
    check(tmp_path / "out", want, base, layers=LAYERS)


def test_the_rules_differ_by_the_rank(tmp_path: Path) -> None:
    """Guards the tests above: the wrong rule would not pass them."""
    model, base, want = made(tmp_path, RULES["alpha"])
    file = saved(model.state_dict(), tmp_path / "model.pth")
    adapter = tmp_path / "adapter.lora.safetensors"
    loratool.extract(file, adapter, alpha=ALPHA, scaling="alpha/rank")
    loratool.merge(base, [adapter], tmp_path / "out")
    with pytest.raises(AssertionError):
        check(tmp_path / "out", want, base, layers=LAYERS)


@pytest.mark.parametrize("rank", [1, WIDTH, 2 * WIDTH], ids=["one", "width", "above-width"])
def test_the_rank_is_read_from_the_factors(rank: int, tmp_path: Path) -> None:
    """At rank = width no shape tells A from B, or rank from width: the names do."""
    model, base, want = made(tmp_path, ALPHA / rank, rank=rank)
    file = saved(model.state_dict(), tmp_path / "model.pth")
    adapter = tmp_path / "adapter.lora.safetensors"
    loratool.extract(file, adapter, alpha=ALPHA, scaling="alpha/rank")
    loratool.merge(base, [adapter], tmp_path / "out")
    check(tmp_path / "out", want, base, layers=LAYERS)


def test_a_16_bit_model_is_rounded_once(tmp_path: Path) -> None:
    model, base, _ = made(tmp_path, ALPHA)
    model = model.bfloat16()
    save_file({k: v.bfloat16() for k, v in read(base).items()}, base / "model.safetensors")
    file = saved(model.state_dict(), tmp_path / "model.pth")
    adapter = tmp_path / "adapter.lora.safetensors"
    loratool.extract(file, adapter, alpha=ALPHA, scaling="alpha", base_out=tmp_path / "base-out")
    assert_same_bits(read(tmp_path / "base-out"), read(base))
    loratool.merge(base, [adapter], tmp_path / "out")
    assert {value.dtype for value in read(tmp_path / "out").values()} == {torch.bfloat16}
    check(tmp_path / "out", truth(model), base, layers=LAYERS)


# --- alpha --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["extract", "merge"])
def test_a_missing_alpha_is_asked_for(how: str, tmp_path: Path) -> None:
    model, base, _ = made(tmp_path, ALPHA)
    file = saved(model.state_dict(), tmp_path / "model.pth")
    out = tmp_path / ("adapter.lora.safetensors" if how == "extract" else "out")
    act = {
        "extract": lambda: loratool.extract(file, out),
        "merge": lambda: loratool.merge(base, [file], out),
    }[how]
    with pytest.raises(loratool.LoratoolError) as caught:
        act()
    error = caught.value
    assert error.code == "E-ALPHA"
    assert "trf_blocks.0.att.W_query" in str(error)
    assert "alpha" in error.hint
    assert not out.exists()


@pytest.mark.parametrize("given", [{"alpha": ALPHA}, {"scaling": "alpha"}], ids=["alpha-only", "rule-only"])
def test_alpha_and_rule_are_both_needed(given: dict[str, Any], tmp_path: Path) -> None:
    """The two editions of the book differ by the factor rank: no default is right for both."""
    model, _, _ = made(tmp_path, ALPHA)
    file = saved(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(file, tmp_path / "a.lora.safetensors", **given)
    assert caught.value.code == "E-ALPHA"
    assert ("scaling" if "alpha" in given else "alpha") in caught.value.hint
    assert not (tmp_path / "a.lora.safetensors").exists()


def test_alpha_per_layer(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, base, _ = made(tmp_path, 1.0)
    alphas = {"out_head": 3.0, "trf_blocks.0.*": 5.0, "*.W_query": 7.0, "*": 2.0}
    for name, module in model.named_modules():
        if isinstance(module, LinearWithLora):
            first = name.startswith("trf_blocks.0.")
            other = 7.0 if name.endswith("W_query") else 2.0
            alpha = 3.0 if name == "out_head" else 5.0 if first else other
            module.lora.scale = alpha / RANK
    file = saved(model.state_dict(), tmp_path / "model.pth")
    adapter = tmp_path / "adapter.lora.safetensors"
    loratool.extract(file, adapter, alpha=alphas, scaling="alpha/rank")
    loratool.merge(base, [adapter], tmp_path / "out")
    check(tmp_path / "out", truth(model), base, layers=LAYERS)


def test_a_layer_that_no_pattern_names_is_asked_for(tmp_path: Path) -> None:
    model, _, _ = made(tmp_path, ALPHA)
    file = saved(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.extract(file, tmp_path / "a.lora.safetensors", alpha={"trf_blocks.*": 4.0}, scaling="alpha")
    assert caught.value.code == "E-ALPHA"
    assert "out_head" in str(caught.value)
    assert "trf_blocks" not in caught.value.message


def test_a_pattern_that_names_no_layer_is_an_error(tmp_path: Path) -> None:
    model, _, _ = made(tmp_path, ALPHA)
    file = saved(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(loratool.LoratoolError, match="W_kuery"):
        loratool.extract(
            file,
            tmp_path / "a.lora.safetensors",
            alpha={"*.W_kuery": 4.0, "*": 2.0},
            scaling="alpha",
        )


# --- names --------------------------------------------------------------------------------------


def test_modules_that_only_sound_like_a_wrapper_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Gpt(extra=Tangle(WIDTH))
    base = tmp_path / "base"
    base.mkdir()
    save_file(own(model.state_dict()), base / "model.safetensors")
    wrap(model.trf_blocks, ALPHA)
    trained(model)
    file = saved(model.state_dict(), tmp_path / "model.pth")
    adapter = tmp_path / "adapter.lora.safetensors"
    loratool.extract(file, adapter, alpha=ALPHA, scaling="alpha", base_out=tmp_path / "base-out")
    assert_same_bits(read(tmp_path / "base-out"), read(base))
    loratool.merge(base, [adapter], tmp_path / "out")
    check(tmp_path / "out", truth(model), base, layers=LAYERS - 1)


def test_a_wrapper_around_them_is_still_found(tmp_path: Path) -> None:
    """`extra.linear` and `extra.lora` become wrappers: extra.linear.linear, extra.lora.lora.A..."""
    model, base, want = made(tmp_path, ALPHA, extra=Tangle(WIDTH))
    assert "extra.lora.lora.A" in model.state_dict()
    file = saved(model.state_dict(), tmp_path / "model.pth")
    adapter = tmp_path / "adapter.lora.safetensors"
    loratool.extract(file, adapter, alpha=ALPHA, scaling="alpha", base_out=tmp_path / "base-out")
    assert_same_bits(read(tmp_path / "base-out"), read(base))
    loratool.merge(base, [adapter], tmp_path / "out")
    check(tmp_path / "out", want, base, layers=LAYERS + 2)


def test_a_model_wrapped_twice_is_merged_or_refused(tmp_path: Path) -> None:
    """Running the wrapping cell again wraps the Linear inside each wrapper once more."""
    model, base, _ = made(tmp_path, ALPHA / RANK)
    wrap(model, ALPHA / RANK)
    trained(model, seed=6)
    assert "out_head.linear.lora.A" in model.state_dict()
    assert "out_head.linear.linear.weight" in model.state_dict()
    want = outputs(model)
    file = saved(model.state_dict(), tmp_path / "model.pth")
    adapter = tmp_path / "adapter.lora.safetensors"
    try:
        loratool.extract(file, adapter, alpha=ALPHA, scaling="alpha/rank")
    except loratool.LoratoolError:
        assert not adapter.exists()
        return
    loratool.merge(base, [adapter], tmp_path / "out")
    merged = Gpt()
    merged.load_state_dict(read(tmp_path / "out"))
    assert torch.allclose(outputs(merged), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_a_pair_is_never_dropped(half: str, tmp_path: Path) -> None:
    model, _, _ = made(tmp_path, ALPHA)
    state = dict(model.state_dict())
    del state[f"trf_blocks.1.att.W_key.lora.{half}"]
    file = saved(state, tmp_path / "model.pth")
    with pytest.raises(loratool.LoratoolError, match=r"trf_blocks\.1\.att\.W_key"):
        loratool.extract(file, tmp_path / "a.lora.safetensors", alpha=ALPHA, scaling="alpha")


def test_factors_that_do_not_fit_the_layer_are_an_error(tmp_path: Path) -> None:
    model, _, _ = made(tmp_path, ALPHA)
    state = dict(model.state_dict())
    name = "trf_blocks.0.ff.layers.0.lora.A"
    state[name] = state[name].T.contiguous()
    file = saved(state, tmp_path / "model.pth")
    with pytest.raises(loratool.LoratoolError, match=r"trf_blocks\.0\.ff\.layers\.0"):
        loratool.extract(file, tmp_path / "a.lora.safetensors", alpha=ALPHA, scaling="alpha")

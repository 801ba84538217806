"""Tiny models, files and number checks that the convention tests share."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]
VOCAB, HIDDEN = 40, 16


# --- models -------------------------------------------------------------------------------------


def _quiet() -> Any:
    import transformers

    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def llama(*, tied: bool = False, layers: int = 1) -> nn.Module:
    t = _quiet()
    return t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> nn.Module:
    t = _quiet()
    return t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=VOCAB,
            n_positions=16,
            n_embd=HIDDEN,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def bert() -> nn.Module:
    t = _quiet()
    return t.BertForSequenceClassification(
        t.BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=3,
        )
    )


def mixtral(*, inner: int = 12) -> nn.Module:
    t = _quiet()
    return t.MixtralForCausalLM(
        t.MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )


def gpt_oss(*, inner: int = 12) -> nn.Module:
    t = _quiet()
    return t.GptOssForCausalLM(
        t.GptOssConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_local_experts=3,
            num_experts_per_tok=2,
            sliding_window=8,
            layer_types=["full_attention"],
        )
    )


class Net(nn.Module):
    """What no language model has: convolutions, torch's own attention, a head of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.conv1 = nn.Conv1d(6, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 4, (3, 2))
        self.point = nn.Conv2d(4, 3, 1, bias=False)
        self.conv3 = nn.Conv3d(2, 3, 2)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.mha = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(5, 7)
        self.fc2 = nn.Linear(7, 7)
        self.head = nn.Sequential(nn.Linear(7, 4), nn.LayerNorm(4))
        # names that look like a wrapper's, but are the model's own
        self.module = nn.ModuleDict({"original_module": nn.Linear(2, 2), "lora_A": nn.Linear(2, 2, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc(x)))


def fill(model: nn.Module, seed: int) -> None:
    """Give all that is trainable a value no initialisation gives: LoRA starts at B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            if "lora_magnitude_vector" in name:
                value = value.abs() + 0.5
            parameter.data.copy_(value)


# --- files --------------------------------------------------------------------------------------


def save_base(model: nn.Module, folder: Path, *, names: str = "disk") -> Path:
    """`disk`: as transformers saves the model; `memory`: under the names of its modules."""
    folder.mkdir(parents=True, exist_ok=True)
    if names == "disk":
        model.save_pretrained(folder)
    else:
        save_file(own(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
        if hasattr(model, "config"):
            model.config.save_pretrained(folder)
    return folder


def own(state: Mapping[str, Tensor]) -> State:
    """Every tensor with storage of its own, which is what safetensors asks for."""
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def read(folder: Path) -> State:
    """All tensors of a checkpoint folder, whatever number of files it has."""
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    assert state, f"no tensors in {folder}"
    return state


def edit_json(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    content.update(values)
    file.write_text(json.dumps(content))


# --- checks -------------------------------------------------------------------------------------


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8) if value.dim() else value.reshape(1).view(torch.uint8)


def assert_same_bits(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], *, skip: frozenset[str] = frozenset()
) -> None:
    assert sorted(got) == sorted(want)
    for name in sorted(set(want) - skip):
        assert got[name].dtype == want[name].dtype, name
        assert got[name].shape == want[name].shape, name
        assert torch.equal(bits(got[name]), bits(want[name])), f"{name} is not the same to the bit"


def assert_rounded(got: Tensor, exact: Tensor, *, name: str = "", scale: float | None = None) -> None:
    """`got` is `exact` (float64) rounded once to its dtype.

    Next to a rounding boundary, within the error of the compute dtype, both neighbours are right:
    that dtype is float32 for a base of 16 bits, and float64 for a float32 base.
    """
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)} instead of {tuple(exact.shape)}"
    assert exact.dtype == torch.float64
    unit = 2.0**-22 if got.dtype in (torch.bfloat16, torch.float16) else 2.0**-50
    band = unit * (exact.abs().max().item() if scale is None else scale)
    low, high = (exact - band).to(got.dtype).double(), (exact + band).to(got.dtype).double()
    wrong = (got.double() < low) | (got.double() > high)
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {got.numel()} elements are not the rounded truth; "
        f"largest distance {(got.double() - exact).abs().max().item():.3g}"
    )


def assert_float32_close(got: Tensor, want: Tensor, *, name: str = "") -> None:
    """Equal but for the rounding of float32: two ways to compute the same thing in it."""
    distance = (got.double() - want.double()).abs().max().item()
    bound = 2.0**-20 * max(want.double().abs().max().item(), 2.0**-20)
    assert distance <= bound, f"{name}: off by {distance:.3g}, float32 rounding explains {bound:.3g}"


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {
        name for name in before if name in after and not torch.equal(before[name], after[name].to(before[name].dtype))
    }

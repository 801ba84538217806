"""Fine-tune all-MiniLM-L6-v2 with the plain LoRA wrapper and save the wrapped checkpoint.

Usage: `python train_plain.py MODEL_FOLDER WRAPPED.pth REFERENCE.pth`

The wrapper is the one taught in "Build a Large Language Model (From Scratch)", appendix E, in our
words. A wrapped layer `X` leaves `X.linear.weight`, `X.lora.A` and `X.lora.B` in the state dict;
alpha and the rule of scaling are nowhere in it, which is why `loratool extract` asks for them.
"""

import sys
import time

import torch
from sentences import Task, accuracy, embed, fine_tune, load_model
from torch import Tensor, nn

RANK, ALPHA = 8, 16.0


class LoRALayer(nn.Module):
    """The update alone. B starts at zero, so that training starts at the base model."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(in_features, rank) / in_features**0.5)
        self.B = nn.Parameter(torch.zeros(rank, out_features))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    """A frozen linear layer with an update beside it."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def wrap_linear_layers(module: nn.Module, rank: int, alpha: float) -> None:
    """Replace every nn.Linear below `module`, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, LinearWithLoRA(child, rank, alpha))
        else:
            wrap_linear_layers(child, rank, alpha)


def main(folder: str, wrapped: str, reference: str) -> None:
    torch.manual_seed(0)
    task, model = Task(folder), load_model(folder)
    before = accuracy(model, task)

    model.requires_grad_(False)
    # The pooler is left alone: a mean over tokens does not use it, so it would learn nothing.
    wrap_linear_layers(model.encoder, RANK, ALPHA)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"training {trained:,} LoRA numbers (rank {RANK}, alpha {ALPHA:g}, scale alpha/rank)")

    start = time.perf_counter()
    fine_tune(model, task, steps=12)
    print(f"trained for {time.perf_counter() - start:.0f} s")
    print(f"held-out accuracy: {before:.1%} before, {accuracy(model, task):.1%} after")

    torch.save(model.state_dict(), wrapped)
    with torch.no_grad():
        torch.save({"heldout": embed(model, task.heldout[0])}, reference)
    print(f"saved {wrapped} (the wrapped model) and {reference} (its answers)")


if __name__ == "__main__":
    main(*sys.argv[1:])

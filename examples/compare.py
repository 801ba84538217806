"""Two questions about checkpoints, answered without loratool.

`compare.py answers MERGED_FOLDER REFERENCE.pth`: does it answer as the wrapped model did?
`compare.py bits FOLDER BASE_FOLDER`: are its weights those of the base?
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from sentences import Task, accuracy, embed, load_model


@torch.no_grad()
def answers(merged: str, reference: str) -> bool:
    """Compare sentence embeddings, which have length one.

    Adding the update to the weights instead of the activations changes the order of sums, hence
    some 1e-6 between two correct answers.
    """
    task, model = Task(merged), load_model(merged)
    wanted = torch.load(reference)["heldout"]
    difference = (embed(model, task.heldout[0]) - wanted).abs().max().item()
    print(f"{merged}: held-out accuracy {accuracy(model, task):.1%}", end=", ")
    print(f"embeddings differ from the wrapped model's by at most {difference:.1e}")
    return difference < 1e-4


def bits(folder: str, base: str) -> bool:
    """Compare every tensor bit by bit, and say how far apart they are where they differ."""
    ours, theirs = (load_file(Path(path) / "model.safetensors") for path in (folder, base))
    if ours.keys() != theirs.keys():
        print(f"{folder}: other tensors than {base}: {sorted(ours.keys() ^ theirs.keys())}")
        return False
    differ, total, largest = 0, 0, 0.0
    for name, base_tensor in theirs.items():
        raw = torch.int32 if base_tensor.dtype == torch.float32 else base_tensor.dtype
        differ += int((ours[name].view(raw) != base_tensor.view(raw)).sum())
        total += base_tensor.numel()
        largest = max(largest, (ours[name].double() - base_tensor.double()).abs().max().item())
    if differ:
        print(f"{folder}: {differ:,} of {total:,} numbers differ from {base}", end=", ")
        print(f"by at most {largest:.1e}")
    else:
        print(f"{folder}: all {total:,} numbers are bit for bit those of {base}")
    return not differ


if __name__ == "__main__":
    question, *paths = sys.argv[1:]
    sys.exit(0 if {"answers": answers, "bits": bits}[question](*paths) else 1)

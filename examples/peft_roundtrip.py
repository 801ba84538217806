"""The same again with PEFT as the trainer and loratool as a library.

Usage: `python peft_roundtrip.py BASE_FOLDER`, in the folder where the results shall lie.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from sentences import Task, accuracy, embed, fine_tune, load_model

import loratool


def main(base: str) -> None:
    torch.manual_seed(0)
    task = Task(base)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r"encoder\..*\.(query|key|value|dense)")
    model = get_peft_model(load_model(base), config)
    fine_tune(model, task, steps=6)
    model.save_pretrained("peft-adapter")

    loratool.merge(base, ["peft-adapter"], "peft-merged")

    merged, (tokens, _) = load_model("peft-merged"), task.heldout
    with torch.no_grad():
        difference = (embed(merged, tokens) - embed(model, tokens)).abs().max().item()
    print(f"held-out accuracy: {accuracy(model, task):.1%} with PEFT's layers", end=", ")
    print(f"{accuracy(merged, task):.1%} merged; embeddings differ by at most {difference:.1e}")
    if difference > 1e-4:
        sys.exit("the merged model does not answer as PEFT's model did")


if __name__ == "__main__":
    main(*sys.argv[1:])

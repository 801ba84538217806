"""The small real task that the examples share: what does a customer want?

`data/intents.tsv` holds 144 sentences in six intents (ask, fault, change, cancel, complain, thank),
48 of them held out. All intents talk about the same parcels, invoices and trains. A sentence
model sorts by topic, so before training it finds the *intent* only seven times in ten.
"""

import csv
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import BertModel, BertTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()
DATA = Path(__file__).parent / "data" / "intents.tsv"
TEMPERATURE = 0.05  # sharpens cosines, which lie in [-1, 1], into usable logits


def load_model(folder: str | Path) -> BertModel:
    """The model in `folder`, in evaluation mode."""
    return BertModel.from_pretrained(folder, local_files_only=True).eval()


class Task:
    """The sentences, tokenised once: `train` and `heldout` are (tokens, labels)."""

    def __init__(self, folder: str | Path) -> None:
        tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
        with DATA.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        intents = sorted({row["intent"] for row in rows})

        def part(split: str) -> tuple[dict[str, Tensor], Tensor]:
            chosen = [row for row in rows if row["split"] == split]
            tokens = tokenizer([row["text"] for row in chosen], padding=True, return_tensors="pt")
            return dict(tokens), torch.tensor([intents.index(row["intent"]) for row in chosen])

        self.train, self.heldout = part("train"), part("heldout")


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings as all-MiniLM-L6-v2 defines them: mean over tokens, length one."""
    hidden = model(**tokens).last_hidden_state  # [sentences, tokens, 384]
    mask = tokens["attention_mask"].unsqueeze(-1)  # [sentences, tokens, 1]
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def centroids(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The mean embedding of each intent, [intents, 384]."""
    means = [embeddings[labels == intent].mean(0) for intent in labels.unique()]
    return normalize(torch.stack(means), dim=-1)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """Share of held-out sentences that lie nearest to the centroid of their own intent."""
    centers = centroids(embed(model, task.train[0]), task.train[1])
    tokens, labels = task.heldout
    return (embed(model, tokens) @ centers.T).argmax(1).eq(labels).double().mean().item()


def fine_tune(model: nn.Module, task: Task, steps: int) -> None:
    """Pull each sentence towards the centroid of its intent, made from other sentences."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens, labels = task.train
    model.train()
    for step in range(1, steps + 1):
        embeddings = embed(model, tokens)
        # Half of the sentences make the centroids and the other half are judged by them:
        # a sentence that helped to make its own centroid would be found near it anyway.
        order = torch.randperm(len(labels))
        makers, judged = order[::2], order[1::2]
        logits = embeddings[judged] @ centroids(embeddings[makers], labels[makers]).T
        loss = cross_entropy(logits / TEMPERATURE, labels[judged])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"  step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    model.eval()

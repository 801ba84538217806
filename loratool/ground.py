"""What updates are on top of, where the base has it in another form: fewer inputs, or a head that is its embedding."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import Target, Targeted
from loratool.checkpoint import Checkpoint
from loratool.conventions import of_base
from loratool.conventions.flat_names import Stored
from loratool.names import parent, takes_more_inputs
from loratool.quantised import Foreign
from loratool.strangers import HEADS
from loratool.tensors import TensorRef
from loratool.updates import Replace

EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "backbone.embeddings.weight",
)  # fmt: skip
# What the head is called that transformers ties to an embedding, by the embedding's whole name.
TIED_HEADS = {
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
    "transformer.wte.weight": "lm_head.weight",
    "transformer.word_embeddings.weight": "lm_head.weight",
    "backbone.embeddings.weight": "lm_head.weight",
    "gpt_neox.embed_in.weight": "embed_out.weight",
}


def is_tied(base: Checkpoint) -> bool:
    """Whether the head is the embedding, though no tensor of the base shows it: config.json says so."""
    config = base.side_json("config.json") if base.path.is_dir() else None
    return bool((config or {}).get("tie_word_embeddings")) and not any(name.endswith(HEADS) for name in base.tensors)


def under(base: Checkpoint, name: str, items: Sequence[Targeted]) -> list[Targeted]:
    """A replacement that the updates of a tensor are on top of, made of the base's numbers; [] for most tensors.

    Both make a tensor that the base does not have, so a merge asks for consent.
    """
    if any(item.update.role == "replace" for item in items):
        return []
    stored, target = base.tensors.get(name), items[0].target
    made = _embedding(base, name, target) if stored is None else _padded(stored, name, items)
    return [] if made is None else [Targeted(Target(name, target.shape), Replace(made))]


def _padded(stored: TensorRef, name: str, items: Sequence[Targeted]) -> TensorRef | None:
    """The weights with zeros for more inputs, where that is a denoiser's first layer."""
    wanted = items[0].target.shape
    if isinstance(stored.data, Foreign) or any(item.update.role != "add" for item in items):
        return None
    if not takes_more_inputs(parent(name), stored.shape, wanted):
        return None
    return of_base.padded(Stored(stored, stored), wanted)


def _embedding(base: Checkpoint, name: str, target: Target) -> TensorRef | None:
    """The embedding that a head is in the base, which stores none."""
    embeddings = [embedding for embedding, head in TIED_HEADS.items() if head == name]
    stored = next((base.tensors[found] for found in embeddings if found in base.tensors), None)
    if stored is None or stored.shape != target.shape or not is_tied(base):
        return None
    return stored

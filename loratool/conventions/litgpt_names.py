"""litgpt's layers by its own names and by transformers', and the files that lie beside its weights.

litgpt makes its checkpoints out of transformers' ones (litgpt/scripts/convert_hf_checkpoint.py): it renames, and joins
q_proj, k_proj and v_proj to attn.qkv, one after the other. No row changes its place within them. Models that
transformers has fused matrices of (GPT-NeoX, Falcon, Phi 3) are not in the table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loratool.conventions.flat_yaml import FlatYaml

HYPERPARAMETERS, MODEL_CONFIG = "hyperparameters.yaml", "model_config.yaml"
PARTS = ("query", "key", "value")
QKV, OLD_QKV = ".attn.qkv", ".attn.attn"
# Every linear layer of litgpt's GPT, which are all that can hold factors. `attn.attn` is what attn.qkv was called.
LAYER = re.compile(
    r"(?:^|.*\.)(?:transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|mlp\.(?:gate|(?:experts\.\d+\.)?(?:fc|fc_1|fc_2|proj)))"
    r"|lm_head)$"
)

# Below a layer of transformers': below transformer.h.N of litgpt's. N stands for an expert's number.
_RENAMED = {
    "self_attn.o_proj": "attn.proj",
    "self_attn.dense": "attn.proj",  # Phi 1 and 2, also the next two
    "mlp.fc1": "mlp.fc",
    "mlp.fc2": "mlp.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
    "mlp.gate": "mlp.gate",  # Qwen 3 with experts
    "mlp.experts.N.gate_proj": "mlp.experts.N.fc_1",
    "mlp.experts.N.up_proj": "mlp.experts.N.fc_2",
    "mlp.experts.N.down_proj": "mlp.experts.N.proj",
    "block_sparse_moe.gate": "mlp.gate",  # Mixtral
    "block_sparse_moe.experts.N.w1": "mlp.experts.N.fc_1",
    "block_sparse_moe.experts.N.w3": "mlp.experts.N.fc_2",
    "block_sparse_moe.experts.N.w2": "mlp.experts.N.proj",
}
_JOINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_THEIRS = re.compile(r"(?:model|language_model\.model|model\.language_model)\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Place:
    """A layer of litgpt's; of attn.qkv, where transformers has three matrices, one of PARTS by its number."""

    module: str
    part: int | None = None

    @property
    def parts(self) -> tuple[Place, ...]:
        """Query, key and value of a whole attn.qkv; of anything else only itself."""
        if self.part is None and self.module.endswith(QKV):
            return tuple(Place(self.module, part) for part in range(len(PARTS)))
        return (self,)


def place_of(name: str) -> Place | None:
    """Where litgpt has a weight, called by litgpt's or by transformers' name; None if no layer of its has factors."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    if module.startswith("transformer.h.") or module == "lm_head":
        return Place(module) if LAYER.match(module) else None
    if module == "language_model.lm_head":
        return Place("lm_head")
    if (match := _THEIRS.fullmatch(module)) is None:
        return None
    layer, below = f"transformer.h.{match[1]}", match[2]
    if below in _JOINED:
        return Place(layer + QKV, _JOINED.index(below))
    number = _EXPERT.search(below)
    ours = _RENAMED.get(_EXPERT.sub("N", below))
    return None if ours is None else Place(f"{layer}.{ours.replace('N', number[0] if number else '')}")


def homes(names: Iterable[str]) -> Mapping[Place, str]:
    """The names of a base by their places; without those that two names share."""
    found: dict[Place, list[str]] = defaultdict(list)
    for name in names:
        if (place := place_of(name)) is not None:
            found[place].append(name)
    return {place: shared[0] for place, shared in found.items() if len(shared) == 1}


def qkv_rows(model: FlatYaml) -> tuple[int, int, int]:
    """How many rows of attn.qkv are query, key and value, by model_config.yaml."""
    heads, groups, size = (model.whole(name) for name in ("n_head", "n_query_groups", "head_size"))
    return heads * size, groups * size, groups * size

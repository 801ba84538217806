"""The kinds of update, one file each, as pure tensor arithmetic on blocks of rows.

A new kind is one file here, one entry in KINDS, one page in ``spec/registry/kinds.md``, and its vectors.
"""

from loratool.updates.base import RULES, Block, Scaling, Update
from loratool.updates.dora import Dora
from loratool.updates.full import Add, Replace, ReplaceRows
from loratool.updates.loha import Loha
from loratool.updates.lokr import Lokr
from loratool.updates.lora import Lora
from loratool.updates.scale import Scale

KINDS: dict[str, type[Update]] = {cls.kind: cls for cls in (Lora, Dora, Loha, Lokr, Scale, Replace, Add, ReplaceRows)}

__all__ = [
    "KINDS",
    "RULES",
    "Add",
    "Block",
    "Dora",
    "Loha",
    "Lokr",
    "Lora",
    "Replace",
    "ReplaceRows",
    "Scale",
    "Scaling",
    "Update",
]

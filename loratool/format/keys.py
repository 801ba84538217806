"""Names, limits and component sets of the native file."""

from __future__ import annotations

import re
from collections.abc import Mapping

METADATA_KEY = "loratool"
FORMAT_NAME = "loratool"
VERSION = "1.0"
MAJOR = 1

MAX_UPDATES = 200_000
MAX_RANK = 65_536
MAX_MANIFEST = 50_000_000  # bytes
MAX_FREE_VALUES = 100_000  # JSON values in `info`, provenance and vendor keys together

FEATURES = {"dora", "loha", "lokr", "scale", "replace", "add", "replace_rows", "mid", "rows", "expert", "experts"}
FEATURES |= {"conditional"}
CORES = {"mid", "mid1", "mid2"}
DIRECTIONS = ("lora", "loha", "lokr")

MANIFEST_KEYS = {"format", "version", "features", "updates", "base", "provenance", "info", "when"}
BASE_KEYS = {"name", "revision", "architecture", "tokenizer", "added_tokens", "tensors"}
IDENTITY_KEYS = ("digest", "dtype", "shape")
DIGEST = re.compile(r"(blake3|sha256):[0-9a-f]{64}")
UPDATE_KEYS = {"target", "part", "kind", "shape", "rows", "expert", "experts", "layout"}
SCALE_KEYS = {"rank", "alpha", "scaling", "scale"}
OWN_KEYS = {"dora": {"direction", "axis"}, "scale": {"axis"}}  # of single kinds

# The sets of components a kind can have; the file's own tensors decide which one it is.
_LORA = ({"A", "B"}, {"A", "B", "mid"})
_LOHA = ({"A1", "B1", "A2", "B2"}, {"A1", "B1", "A2", "B2", "mid1", "mid2"})
_LOKR = tuple(left | right for left in ({"w1"}, {"A1", "B1"}) for right in ({"w2"}, {"A2", "B2"}, {"A2", "B2", "mid2"}))
COMPONENTS: dict[str, tuple[set[str], ...]] = {
    "lora": _LORA,
    "loha": _LOHA,
    "lokr": _LOKR,
    "scale": ({"factor"},),
    "replace": ({"value"},),
    "add": ({"value"},),
    "replace_rows": ({"index", "value"},),
}
PARTS = {kind: frozenset().union(*choices) for kind, choices in COMPONENTS.items()}  # every one it can have


def is_native(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata says that it is an adapter of this format."""
    return METADATA_KEY in metadata

"""The native adapter file, ``spec/FORMAT.md`` 1.0: the only room that knows its key names and versions.

One safetensors file; its `__metadata__` holds the key `loratool` with a canonical JSON manifest; every component of
the n-th update of a target is a tensor named ``TARGET.N.COMPONENT``. `keys` has names and limits, `reading` the rules
of a reader, `writing` the canonical form, `validating` what only a validator looks for, `info` what no merge looks at.
"""

from loratool.format.conditions import CONDITIONS
from loratool.format.info import is_kept
from loratool.format.keys import COMPONENTS, FORMAT_NAME, METADATA_KEY, VERSION, is_native
from loratool.format.reading import adapter_of, read
from loratool.format.validating import check_index, validate
from loratool.format.writing import content_digest, features_of, manifest_of, stored, unknown_alpha, write, writing

__all__ = [
    "COMPONENTS",
    "CONDITIONS",
    "FORMAT_NAME",
    "METADATA_KEY",
    "VERSION",
    "adapter_of",
    "check_index",
    "content_digest",
    "features_of",
    "is_kept",
    "is_native",
    "manifest_of",
    "read",
    "stored",
    "unknown_alpha",
    "validate",
    "write",
    "writing",
]

"""A transformers model with an adapter merged into it, and no merged checkpoint on disk.

Usage: `python load_merged.py BASE_FOLDER ADAPTER [OUT]`; with OUT, the model is saved there for a comparison.

transformers reads a checkpoint as one slice object per tensor, which it indexes when it needs the numbers. Those of
`loratool.open_merged` compute them at that moment, so that base and adapter are read once and nothing is written.
"""

import sys

import transformers

import loratool


def main(base: str, adapter: str, out: str = "") -> None:
    config = transformers.AutoConfig.from_pretrained(base)
    kind = getattr(transformers, config.architectures[0])  # the Auto classes want a path
    with loratool.open_merged(base, adapter) as merged:
        slices = {name: merged.get_slice(name) for name in merged.keys()}  # noqa: SIM118  # as of safe_open: no mapping
        # The dtype is said, because "auto" would ask it of the first tensor, and slices have no numbers yet.
        model = kind.from_pretrained(None, config=config, state_dict=slices, dtype=config.dtype)
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters, {adapter} merged into it")
    if out:
        model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

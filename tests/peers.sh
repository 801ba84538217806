#!/bin/sh
# Compare with the producers themselves: their own merges and forwards, on files that they write.
#
#     sh tests/peers.sh              all of them
#     sh tests/peers.sh -k mlx       arguments go to pytest
#
# They do not agree on one environment, nor should they bring another torch: everything is installed
# without its own requirements, torchtune apart, since PEFT refuses the torchao that it needs.
# The first run downloads about 1 GB into .venv-peers/ and .venv-torchtune/; PYTHON picks another interpreter.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}

environment() { # name, requirements: made again when one of them or the package's own requirements have changed
    made_from=$(
        echo "$root" "$1"
        "$python" --version
        sed '/^\[tool\.ruff\]/,$d' pyproject.toml
        cat tests/constraints.txt "$2"
    )
    [ "$made_from" = "$(cat "$1/made-from" 2>/dev/null)" ] && return
    echo "== making $1"
    rm -rf "$1"
    "$python" -m venv "$1"
    "$1/bin/pip" install --quiet --constraint tests/constraints.txt --editable '.[test]'
    "$1/bin/pip" install --quiet --no-deps --requirement "$2"
    echo "$made_from" >"$1/made-from"
}

environment .venv-peers tests/peers.txt
environment .venv-torchtune tests/peers-torchtune.txt

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
failed=
.venv-peers/bin/pytest -m peers -n 2 --ignore tests/test_torchtune_peer.py "$@" || failed=yes
.venv-torchtune/bin/pytest -m peers tests/test_torchtune_peer.py "$@" || [ $? = 5 ] || failed=yes # 5: none selected
[ -z "$failed" ] || { echo "== peers: failed" >&2; exit 1; }
echo "== peers: all good"

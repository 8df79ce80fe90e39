#!/usr/bin/env bash
# Measures a GPU host after bench/gpu/build.sh: bash bench/gpu/run.sh
# A part takes at most 10 minutes for a model; the same command resumes after an interruption. After each part gpu.md and
# gpu.json in $OUT, by default bench/out, have all results so far.
#
#   MODELS="1b:q4_0 8b:q4_0"   names of models in bench.gpu.models
#   DRAFT=0.1b:q8_0            draft model of the part `synthetic`
#   PARTS="cost share ..."     names of parts
#   LAYERS=99                  layers on the GPU
#   QUICK=1                    small sizes, for a trial run
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MODELS=${MODELS:-1b:q4_0 8b:q4_0 8b:q8_0 8b:f16}
DRAFT=${DRAFT:-0.1b:q8_0}
PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python3
export PYTHONPATH=.

"$PYTHON" -m bench.gpu.models $MODELS "$DRAFT" || exit 1
for part in ${PARTS:-cost share serve sampling synthetic gaps}; do
    for model in $MODELS; do
        timeout 600 "$PYTHON" -m bench.gpu.measure "$part" "$model" --draft "$DRAFT" -ngl "${LAYERS:-99}" \
            ${QUICK:+--quick} || failed="${failed:-}$part of $model failed (exit code $?); the same command resumes"$'\n'
    done
done
printf '%s' "${failed:-}" >&2
[ -z "${failed:-}" ]

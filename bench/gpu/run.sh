#!/usr/bin/env bash
# Measures a GPU host that bench/gpu/build.sh has set up: bash bench/gpu/run.sh
# Every part takes 10 minutes at most and goes on where it was when cut off. All that is known is in gpu.md and gpu.json
# in $OUT, or bench/out, after each part.
#
#   MODELS="1b:q4_0 8b:q4_0"   which, as bench.gpu.models names them
#   DRAFT=0.1b:q8_0            the draft model of the part `synthetic`
#   PARTS="cost share ..."     which parts
#   LAYERS=99                  layers on the GPU
#   QUICK=1                    little of everything, as a rehearsal
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MODELS=${MODELS:-1b:q4_0 8b:q4_0 8b:q8_0 8b:f16}
DRAFT=${DRAFT:-0.1b:q8_0}
PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python3
export PYTHONPATH=.

"$PYTHON" -m bench.gpu.models $MODELS "$DRAFT" || exit 1
for part in ${PARTS:-cost share serve synthetic gaps}; do
    for model in $MODELS; do
        timeout 600 "$PYTHON" -m bench.gpu.measure "$part" "$model" --draft "$DRAFT" -ngl "${LAYERS:-99}" \
            ${QUICK:+--quick} || failed="${failed:-}$part of $model broke off (exit code $?); call this again to go on"$'\n'
    done
done
printf '%s' "${failed:-}" >&2
[ -z "${failed:-}" ]

#!/usr/bin/env bash
# One GPU, a few minutes, no network: first correctness, then the training step beside a plain-torch peer, eager and
# compiled. Needs a Python whose torch sees the GPU; PYTHON=... chooses it. Rows are appended to RESULTS.
#
#   benchmarks/gpu.sh                    DEVICE=cpu WORKLOAD=tiny benchmarks/gpu.sh tries the script without a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
DEVICE="${DEVICE:-cuda}"
WORKLOAD="${WORKLOAD:-G1}"
ROUNDS="${ROUNDS:-10}"
RESULTS="${RESULTS:-benchmarks/results/gpu.jsonl}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$(dirname "$RESULTS")"

echo "== correctness: the same losses on $DEVICE as on the CPU"
"$PYTHON" benchmarks/agree.py --device "$DEVICE"

for dtype in bf16 fp32; do
    echo "== training step, $WORKLOAD, $dtype"
    compiled=()
    [[ "$dtype" != bf16 || "$DEVICE" == cpu ]] || compiled=(--compiled-peer)
    "$PYTHON" benchmarks/train_step.py --workload "$WORKLOAD" --dtype "$dtype" --device "$DEVICE" --rounds "$ROUNDS" \
        --warmup 3 ${compiled[@]+"${compiled[@]}"} --output "$RESULTS"
done

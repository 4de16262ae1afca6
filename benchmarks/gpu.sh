#!/usr/bin/env bash
# One GPU, no network, under nine minutes: first correctness, then large models beside a compiled plain-torch peer, then
# single kernels. Each part has a time of its own; what the budget has no room for is left out with a line that says so.
# Needs a Python whose torch sees the GPU; PYTHON=... chooses it. Rows are appended to RESULTS.
#
#   benchmarks/gpu.sh                    DEVICE=cpu WORKLOAD=tiny benchmarks/gpu.sh tries the script without a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
DEVICE="${DEVICE:-cuda}"
WORKLOAD="${WORKLOAD:-large}"
BUDGET="${BUDGET:-520}"
RESULTS="${RESULTS:-benchmarks/results/gpu.jsonl}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$(dirname "$RESULTS")"

failed=()
out_of_time=()

# part NAME SECONDS COMMAND...: runs it for at most so long, or for what is left; a fault does not stop the rest.
part() {
    local name="$1" seconds="$2" left=$((BUDGET - SECONDS)) code=0
    shift 2
    if ((left < 15)); then
        echo "== $name: left out, the budget of $BUDGET s is spent"
        out_of_time+=("$name")
        return
    fi
    echo "== $name (at $SECONDS s, at most $((left < seconds ? left : seconds)) s)"
    timeout --kill-after=10 $((left < seconds ? left : seconds)) "$@" || code=$?
    if ((code == 124 || code == 137)); then
        echo "== $name: stopped, its time is spent"
        out_of_time+=("$name")
    elif ((code)); then
        failed+=("$name")
    fi
}

part "correctness: every kernel beside plain torch" 80 "$PYTHON" benchmarks/check_kernels.py --device "$DEVICE" \
    --sources torch,triton,apex

part "correctness: the losses of all models as on the CPU" 60 "$PYTHON" benchmarks/agree.py --device "$DEVICE"

if [[ "$DEVICE" == cuda ]] && "$PYTHON" -c 'import pytest' 2>/dev/null; then
    workers=()
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
    part "correctness: tests/kernels/triton on the device" 90 "$PYTHON" -m pytest -q -x -p no:cacheprovider \
        ${workers[@]+"${workers[@]}"} tests/kernels/triton/*_cases.py
else
    echo "== correctness: tests/kernels/triton on the device: left out, they need pytest and a GPU"
fi

if [[ "$WORKLOAD" == tiny ]]; then
    part "GPT" 120 "$PYTHON" benchmarks/gpu_step.py --workload tiny --device "$DEVICE" --micro-batches 1,2 \
        --global-batch-size 4 --steps 2 --seconds 110 --output "$RESULTS"
    part "Llama" 120 "$PYTHON" benchmarks/gpu_step.py --workload tiny-llama --device "$DEVICE" --micro-batches 1,2 \
        --global-batch-size 4 --steps 2 --seconds 110 --output "$RESULTS"
    part "kernels" 120 "$PYTHON" benchmarks/kernels.py --workload tiny --device "$DEVICE" --seconds 0.02 \
        --output "$RESULTS"
else
    llama=L1B
    memory_mib=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory >> 20)')
    if ((memory_mib < 70000)); then llama=L1B-32k; fi
    part "GPT 1.3B" 180 "$PYTHON" benchmarks/gpu_step.py --workload G1.3B --device "$DEVICE" --seconds 165 \
        --output "$RESULTS"
    part "Llama 1B" 130 "$PYTHON" benchmarks/gpu_step.py --workload "$llama" --device "$DEVICE" --seconds 115 \
        --micro-batches 2,4,8 --output "$RESULTS"
    part "kernels" 90 "$PYTHON" benchmarks/kernels.py --workload G1.3B --device "$DEVICE" --seconds 0.2 \
        --output "$RESULTS"
fi

echo "== $SECONDS s; failed: ${failed[*]:-none}; out of time: ${out_of_time[*]:-none}; rows in $RESULTS"
((${#failed[@]} == 0))

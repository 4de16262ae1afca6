#!/usr/bin/env bash
# GPT, 1.3B parameters, tensor-parallel over 4 ranks and pipelined over 2 stages; more ranks become data-parallel.
#
#   DATA=prefix VOCAB=vocab.json MERGES=merges.txt scripts/pretrain_gpt_1.3b_tp4_pp2.sh
#   scripts/pretrain_gpt_1.3b_tp4_pp2.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_gpt.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-gpt3_text_document}"    # what tools/preprocess_data.py wrote, without .bin
VOCAB="${VOCAB:-gpt2-vocab.json}"
MERGES="${MERGES:-gpt2-merges.txt}"
OUT="${OUT:-runs/gpt_1.3b_tp4_pp2}"
RANKS="${RANKS:-8}"

FLAGS=(
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16
    --micro-batch-size 4 --global-batch-size 128
    --seq-length 1024 --max-position-embeddings 1024
    --train-iters 500000 --lr 2.5e-4 --clip-grad 1.0 --bf16
    --split "969,30,1" --data-path "$DATA" --vocab-file "$VOCAB" --merge-file "$MERGES"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" "$@"

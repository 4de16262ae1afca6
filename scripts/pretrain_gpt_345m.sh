#!/usr/bin/env bash
# GPT-2 medium, 345M parameters, data-parallel on the GPUs of one node.
#
#   DATA=prefix VOCAB=vocab.json MERGES=merges.txt scripts/pretrain_gpt_345m.sh
#   scripts/pretrain_gpt_345m.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_gpt.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-gpt2_text_document}"    # what tools/preprocess_data.py wrote, without .bin
VOCAB="${VOCAB:-gpt2-vocab.json}"
MERGES="${MERGES:-gpt2-merges.txt}"
OUT="${OUT:-runs/gpt_345m}"
RANKS="${RANKS:-8}"

FLAGS=(
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16
    --seq-length 1024 --max-position-embeddings 1024
    --micro-batch-size 8 --global-batch-size 512
    --train-iters 500000 --lr 1.5e-4 --min-lr 1e-5 --lr-decay-style cosine
    --lr-decay-iters 320000 --lr-warmup-fraction 0.01
    --weight-decay 0.01 --clip-grad 1.0 --bf16 --use-distributed-optimizer
    --data-path "$DATA" --vocab-file "$VOCAB" --merge-file "$MERGES" --split "969,30,1"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" "$@"

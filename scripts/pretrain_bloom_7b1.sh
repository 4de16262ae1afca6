#!/usr/bin/env bash
# BLOOM's architecture, 7.1B parameters: ALiBi, a norm behind the embeddings; documents that share a sequence do not see
# each other. Tensor-parallel over 4 ranks, pipelined over 2 stages, more ranks become data-parallel.
#
#   DATA=prefix VOCAB=vocab.json MERGES=merges.txt scripts/pretrain_bloom_7b1.sh
#   scripts/pretrain_bloom_7b1.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_gpt.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-bloom_text_document}"    # what tools/preprocess_data.py wrote, without .bin
VOCAB="${VOCAB:-gpt2-vocab.json}"
MERGES="${MERGES:-gpt2-merges.txt}"
OUT="${OUT:-runs/bloom_7b1}"
RANKS="${RANKS:-8}"

FLAGS=(
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --use-distributed-optimizer
    --model-preset bloom-7b1 --seq-length 2048 --attention-dropout 0 --hidden-dropout 0
    --reset-attention-mask --eod-mask-loss
    --micro-batch-size 2 --global-batch-size 512
    --train-iters 300000 --lr 1.2e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 1000
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --bf16
    --data-path "$DATA" --vocab-file "$VOCAB" --merge-file "$MERGES" --split "969,30,1"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" "$@"

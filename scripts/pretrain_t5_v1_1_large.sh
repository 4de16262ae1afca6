#!/usr/bin/env bash
# T5 1.1 large as published, 780M parameters: relative positions, RMSNorm, gated GELU, untied head, no biases, no
# dropout, spans as in the paper; tensor-parallel over 2 ranks, more ranks become data-parallel.
#
#   DATA=prefix TOKENIZER=spiece.model scripts/pretrain_t5_v1_1_large.sh
#   scripts/pretrain_t5_v1_1_large.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_t5.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-t5_text_document}"    # what tools/preprocess_data.py wrote, without .bin
TOKENIZER="${TOKENIZER:-spiece.model}"     # SentencePiece
OUT="${OUT:-runs/t5_v1_1_large}"
RANKS="${RANKS:-8}"

FLAGS=(
    --tensor-model-parallel-size 2 --use-distributed-optimizer
    --model-preset t5-v1_1-large --attention-dropout 0 --hidden-dropout 0
    --encoder-seq-length 512 --decoder-seq-length 114 --noise-density 0.15 --mean-noise-span-length 3
    --micro-batch-size 16 --global-batch-size 2048
    --train-iters 1000000 --lr 1e-3 --lr-decay-style inverse-square-root --lr-warmup-iters 10000
    --weight-decay 0 --clip-grad 1.0 --bf16
    --data-path "$DATA" --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER" --vocab-extra-ids 100
    --split "969,30,1"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_t5.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_t5.py" "${FLAGS[@]}" "$@"

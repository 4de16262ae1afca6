#!/usr/bin/env bash
# BERT base as published, 110M parameters: residuals leave after the norm, GELU by erf; data-parallel on the GPUs of one node.
#
#   DATA=prefix VOCAB=vocab.txt scripts/pretrain_bert_110m.sh
#   scripts/pretrain_bert_110m.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_bert.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-bert_text_sentence}"    # what tools/preprocess_data.py --split-sentences wrote, without .bin
VOCAB="${VOCAB:-bert-base-uncased-vocab.txt}"
OUT="${OUT:-runs/bert_110m}"
RANKS="${RANKS:-8}"

FLAGS=(
    --model-preset bert-base --seq-length 512
    --micro-batch-size 32 --global-batch-size 256
    --train-iters 1000000 --lr 1e-4 --lr-decay-style linear --lr-warmup-iters 10000
    --weight-decay 0.01 --adam-eps 1e-6 --clip-grad 1.0 --bf16 --use-distributed-optimizer
    --data-path "$DATA" --vocab-file "$VOCAB" --tokenizer-type BertWordPieceLowerCase --split "969,30,1"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_bert.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_bert.py" "${FLAGS[@]}" "$@"

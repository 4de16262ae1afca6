#!/usr/bin/env bash
# BERT as Megatron has it, 345M parameters: norms before the branches, the order of sentences; tensor-parallel over 2
# ranks, pipelined over 2 stages, more ranks become data-parallel.
#
#   DATA=prefix VOCAB=vocab.txt scripts/pretrain_bert_345m_tp2_pp2.sh
#   scripts/pretrain_bert_345m_tp2_pp2.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_bert.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-bert_text_sentence}"    # what tools/preprocess_data.py --split-sentences wrote, without .bin
VOCAB="${VOCAB:-bert-large-uncased-vocab.txt}"
OUT="${OUT:-runs/bert_345m_tp2_pp2}"
RANKS="${RANKS:-8}"

FLAGS=(
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16
    --seq-length 512 --max-position-embeddings 512
    --micro-batch-size 4 --global-batch-size 128
    --train-iters 1000000 --lr 1e-4 --min-lr 1e-5 --lr-decay-style linear
    --lr-decay-iters 990000 --lr-warmup-fraction 0.01
    --weight-decay 0.01 --clip-grad 1.0 --bf16 --use-distributed-optimizer
    --data-path "$DATA" --vocab-file "$VOCAB" --tokenizer-type BertWordPieceLowerCase --split "969,30,1"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_bert.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_bert.py" "${FLAGS[@]}" "$@"

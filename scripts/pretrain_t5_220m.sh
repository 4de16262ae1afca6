#!/usr/bin/env bash
# T5 as Megatron has it, 220M parameters: learned positions, LayerNorm, runs of whole words masked; pipelined over 4
# stages, of which 3 hold the encoder, whose sequences are 4 times as long; more ranks become data-parallel.
#
#   DATA=prefix VOCAB=vocab.txt scripts/pretrain_t5_220m.sh
#   scripts/pretrain_t5_220m.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_t5.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-t5_text_sentence}"    # what tools/preprocess_data.py --split-sentences wrote, without .bin
VOCAB="${VOCAB:-bert-large-uncased-vocab.txt}"
OUT="${OUT:-runs/t5_220m}"
RANKS="${RANKS:-8}"

FLAGS=(
    --pipeline-model-parallel-size 4 --pipeline-model-parallel-split-rank 3
    --encoder-num-layers 12 --decoder-num-layers 12 --hidden-size 768 --ffn-hidden-size 3072
    --num-attention-heads 12 --kv-channels 64
    --encoder-seq-length 512 --decoder-seq-length 128 --max-position-embeddings 512
    --micro-batch-size 16 --global-batch-size 512
    --train-iters 1000000 --lr 1e-4 --min-lr 1e-5 --lr-decay-style linear --lr-warmup-fraction 0.01
    --weight-decay 0.01 --clip-grad 1.0 --bf16 --use-distributed-optimizer
    --data-path "$DATA" --vocab-file "$VOCAB" --tokenizer-type BertWordPieceLowerCase --vocab-extra-ids 100 --split "969,30,1"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_t5.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_t5.py" "${FLAGS[@]}" "$@"

#!/usr/bin/env bash
# Llama style, 1.1B parameters: rotary positions, RMSNorm, SwiGLU, grouped queries, untied head, no biases; ZeRO-1.
#
#   DATA=prefix TOKENIZER=tokenizer.model scripts/pretrain_llama_1b.sh
#   scripts/pretrain_llama_1b.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_gpt.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-llama_text_document}"    # what tools/preprocess_data.py wrote, without .bin
TOKENIZER="${TOKENIZER:-tokenizer.model}"     # SentencePiece
OUT="${OUT:-runs/llama_1b}"
RANKS="${RANKS:-8}"

FLAGS=(
    --tensor-model-parallel-size 2 --use-distributed-optimizer
    --num-layers 22 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 32
    --group-query-attention --num-query-groups 4
    --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --seq-length 2048 --max-position-embeddings 2048
    --micro-batch-size 4 --global-batch-size 512
    --train-iters 100000 --lr 4e-4 --min-lr 4e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --bf16
    --data-path "$DATA" --tokenizer-type Llama2Tokenizer --tokenizer-model "$TOKENIZER" --split "969,30,1"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" "$@"

#!/usr/bin/env bash
# Llama style, 8B parameters, long context: sequences of 32768 tokens shared by 2 ranks in a ring, tensor and sequence
# parallel over 4, layers recomputed where memory needs it; more ranks become data-parallel.
#
#   DATA=prefix TOKENIZER=tokenizer.model scripts/pretrain_llama_8b_32k.sh
#   scripts/pretrain_llama_8b_32k.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_gpt.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-llama_text_document}"    # what tools/preprocess_data.py wrote, without .bin
TOKENIZER="${TOKENIZER:-tokenizer.model}"     # SentencePiece
OUT="${OUT:-runs/llama_8b_32k}"
RANKS="${RANKS:-8}"

FLAGS=(
    --tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 2 --use-distributed-optimizer
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8
    --position-embedding-type rope --rotary-base 500000 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --seq-length 32768 --max-position-embeddings 32768
    --micro-batch-size 1 --global-batch-size 128
    --recompute-granularity full --recompute-method block --recompute-num-layers 16
    --train-iters 100000 --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --bf16
    --data-path "$DATA" --tokenizer-type Llama2Tokenizer --tokenizer-model "$TOKENIZER" --split "969,30,1"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" "$@"

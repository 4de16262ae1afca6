#!/usr/bin/env bash
# Mistral's architecture, 7B parameters: grouped queries, and a window of 4096 tokens in sequences of 8192; tensor and
# sequence parallel over 4 ranks, more ranks become data-parallel.
#
#   DATA=prefix TOKENIZER=tokenizer.model scripts/pretrain_mistral_7b.sh
#   scripts/pretrain_mistral_7b.sh --dry-run      the plan for these ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_gpt.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-mistral_text_document}"    # what tools/preprocess_data.py wrote, without .bin
TOKENIZER="${TOKENIZER:-tokenizer.model}"     # SentencePiece
OUT="${OUT:-runs/mistral_7b}"
RANKS="${RANKS:-8}"

FLAGS=(
    --tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer
    --model-preset mistral-7b --seq-length 8192 --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 1 --global-batch-size 512 --recompute-activations
    --train-iters 250000 --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --bf16
    --data-path "$DATA" --tokenizer-type Llama2Tokenizer --tokenizer-model "$TOKENIZER" --split "969,30,1"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" "$@"

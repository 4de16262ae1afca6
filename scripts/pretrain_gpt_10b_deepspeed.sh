#!/usr/bin/env bash
# GPT, 10B parameters, as Megatron-DeepSpeed launches it: batch, precision, ZeRO and recomputation's memory in a ds_config.json.
#
#   DATA=prefix VOCAB=vocab.json MERGES=merges.txt scripts/pretrain_gpt_10b_deepspeed.sh
#   RANKS=64 scripts/pretrain_gpt_10b_deepspeed.sh --dry-run      the plan for 64 ranks, on any machine
#
# Typed again, it resumes from $OUT/checkpoints. Further flags go to pretrain_gpt.py and win over those below.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

DATA="${DATA:-my-gpt3_text_document}"    # what tools/preprocess_data.py wrote, without .bin
VOCAB="${VOCAB:-gpt2-vocab.json}"
MERGES="${MERGES:-gpt2-merges.txt}"
DS_CONFIG="${DS_CONFIG:-$ROOT/scripts/ds_config.json}"
OUT="${OUT:-runs/gpt_10b_deepspeed}"
RANKS="${RANKS:-8}"

FLAGS=(
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2
    --num-layers 48 --hidden-size 4096 --num-attention-heads 32
    --micro-batch-size 2 --global-batch-size 512
    --seq-length 2048 --max-position-embeddings 2048
    --train-iters 500000 --lr 1.2e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01
    --deepspeed --deepspeed_config "$DS_CONFIG" --zero-stage 1
    --checkpoint-activations --deepspeed-activation-checkpointing
    --data-path "$DATA" --vocab-file "$VOCAB" --merge-file "$MERGES"
    --log-interval 10 --eval-interval 1000 --eval-iters 10 --save-interval 1000 --save "$OUT/checkpoints" --load "$OUT/checkpoints"
    --tensorboard-dir "$OUT/tensorboard"
)

if [[ "${1:-}" == --dry-run ]]; then
    exec python "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" --world-size "$RANKS" "$@"
fi
exec torchrun --standalone --nproc-per-node "$RANKS" "$ROOT/pretrain_gpt.py" "${FLAGS[@]}" "$@"

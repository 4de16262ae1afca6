#!/usr/bin/env bash
# From a fresh clone to a GPT, a BERT or a T5 trained on two ranks, its validation loss and a sample of what it writes
# or guesses. Needs only Python >= 3.10; takes a GPU when there is one. Typed again, it resumes where it stopped and
# trains on.
#
#   scripts/quickstart.sh                      GPT
#   scripts/quickstart.sh bert                 BERT: masked words and the order of sentences
#   scripts/quickstart.sh t5                   T5: masked spans
#   LAYOUT=pp2 scripts/quickstart.sh           the same model on two pipeline stages (also: tp2, dp2)
#   CORPUS=file.jsonl scripts/quickstart.sh    your text, one {"text": ...} per line
#   ITERS=50 scripts/quickstart.sh             fewer or more iterations each time it is typed
#   OUT=DIR scripts/quickstart.sh              everything it makes goes here (default: runs/quickstart, -bert, -t5)
#
# scripts/setup_env.sh says what decides over Python and torch.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
KIND="${1:-gpt}"
LAYOUT="${LAYOUT:-tp2}"
CORPUS="${CORPUS:-}"

# ---- sizes: all the numbers of this script, chosen for less than ten minutes on two CPU cores
SPLIT=94,4,2
COMMON=(--lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0 --eval-iters 8 --seed 1234 --log-interval 10)
CPU_CORPUS=()
GPU_CORPUS=(--include-tests)
case "$KIND" in
    gpt)
        VOCAB_SIZE=8192
        CPU_ITERS=240
        CPU_MODEL=(--num-layers 6 --hidden-size 256 --num-attention-heads 4 --seq-length 256
            --max-position-embeddings 256 --micro-batch-size 8 --global-batch-size 16 --lr 1e-3 --min-lr 1e-4)
        GPU_ITERS=1000
        GPU_MODEL=(--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 512
            --max-position-embeddings 512 --micro-batch-size 16 --global-batch-size 32 --lr 6e-4 --min-lr 6e-5)
        ;;
    bert) # rotary positions: in a trial of 170 iterations the loss came to 5.47, with learned ones to 5.65
        VOCAB_SIZE=4096
        CPU_ITERS=800
        CPU_MODEL=(--num-layers 4 --hidden-size 128 --num-attention-heads 2 --seq-length 128
            --position-embedding-type rope --init-method-std 0.05
            --micro-batch-size 32 --global-batch-size 32 --lr 3e-3 --min-lr 3e-4)
        GPU_ITERS=4000
        GPU_MODEL=(--num-layers 12 --hidden-size 512 --num-attention-heads 8 --seq-length 128
            --position-embedding-type rope
            --micro-batch-size 64 --global-batch-size 128 --lr 6e-4 --min-lr 6e-5)
        ;;
    t5)
        VOCAB_SIZE=4096
        CPU_ITERS=1500
        CPU_MODEL=(--model-preset t5-v1_1-small --num-layers 2 --hidden-size 192 --num-attention-heads 4
            --kv-channels 48 --ffn-hidden-size 512 --encoder-seq-length 128 --decoder-seq-length 48
            --micro-batch-size 16 --global-batch-size 16 --lr 2e-3 --min-lr 2e-4)
        GPU_ITERS=2000
        GPU_MODEL=(--model-preset t5-v1_1-small --encoder-seq-length 512 --decoder-seq-length 128
            --micro-batch-size 32 --global-batch-size 64 --lr 6e-4 --min-lr 6e-5)
        ;;
esac
# ----

fail() {
    printf 'ERROR: %s\n    %-9s %s\n    %-9s %s\n    %-9s %s\n' "$2" found: "$3" expected: "$4" fix: "$5" >&2
    exit "$1"
}

stage() { printf '\n[%s of 6, %d:%02d] %s\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)) "$2"; }

# Print a command as one would type it, then run it.
run() {
    local word
    printf '    $ '
    for word in "$@"; do
        [[ "$word" != --* ]] || printf '\\\n          '
        printf '%q ' "$word"
    done
    printf '\n\n'
    "$@"
}

# What a file is, without reading it.
identity() {
    python -c 'import os, sys; print([(f, s.st_size, s.st_mtime_ns) for f in sys.argv[1:] for s in [os.stat(f)]])' "$@"
}

# fresh NAME KEY FILE...: all files are there, and they were made from what KEY describes.
fresh() {
    local name="$1" key="$2" file
    shift 2
    for file in "$@"; do
        [[ -e "$file" ]] || return 1
    done
    [[ "$(cat "$OUT/.made/$name" 2>/dev/null)" == "$key" ]]
}

made() {
    mkdir -p "$OUT/.made"
    echo "$2" >"$OUT/.made/$1"
}

# ---- the machine: how many ranks, which sizes
choose_sizes() {
    local gpus=0
    RANKS=2
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
    fi
    if ((gpus > 0)); then
        RANKS=$((gpus < 2 ? 1 : 2))
        ITERS="${ITERS:-$GPU_ITERS}" CORPUS_FLAGS=("${GPU_CORPUS[@]}") MODEL=("${GPU_MODEL[@]}" --bf16)
        MACHINE="$RANKS GPU(s), bf16"
    else
        ITERS="${ITERS:-$CPU_ITERS}" CORPUS_FLAGS=(${CPU_CORPUS[@]+"${CPU_CORPUS[@]}"}) MODEL=("${CPU_MODEL[@]}")
        MACHINE="CPU, fp32"
        if grep -qwE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null; then
            MODEL+=(--bf16) MACHINE="CPU, bf16 (this one multiplies it natively)"
        fi
    fi
    [[ "$ITERS" =~ ^[1-9][0-9]*$ ]] || fail 2 ITERS "$ITERS" "a whole number above 0" "ITERS=$CPU_ITERS"
}

choose_layout() {
    case "$LAYOUT" in
        tp2) PARALLEL=(--tensor-model-parallel-size 2) ;;
        pp2) PARALLEL=(--pipeline-model-parallel-size 2) ;;
        dp2) PARALLEL=(--zero-stage 1) ;;
        *) fail 2 LAYOUT "$LAYOUT" "tp2, pp2 or dp2" "LAYOUT=tp2 scripts/quickstart.sh $KIND" ;;
    esac
    if ((RANKS == 1)); then
        PARALLEL=(--tensor-model-parallel-size 1) LAYOUT="one rank, on the only GPU"
    fi
}

# ---- GPT reads documents in pieces of a byte-level BPE, BERT and T5 read sentences in lower-case WordPieces
choose_data() {
    if [[ "$KIND" == gpt ]]; then
        DATA="$OUT/corpus_text_document" PIECES=bpe VOCAB_FILES=("$OUT/vocab.json" "$OUT/merges.txt")
        TOKENIZER=(--tokenizer-type GPT2BPETokenizer --vocab-file "$OUT/vocab.json" --merge-file "$OUT/merges.txt")
        CUT=(--append-eod)
    else
        DATA="$OUT/corpus_text_sentence" PIECES=wordpiece VOCAB_FILES=("$OUT/vocab.txt")
        TOKENIZER=(--tokenizer-type BertWordPieceLowerCase --vocab-file "$OUT/vocab.txt")
        CUT=(--split-sentences)
    fi
    EXTRA=()
    [[ "$KIND" != t5 ]] || EXTRA=(--vocab-extra-ids 100)
}

# ---- the stages
build_corpus() {
    local key
    if [[ -n "$CORPUS" ]]; then
        [[ -s "$CORPUS" ]] || fail 3 CORPUS "$CORPUS: missing or empty" 'a file with one {"text": ...} per line' \
            "check the path"
        echo "    your own: $CORPUS"
        return
    fi
    CORPUS="$OUT/corpus.jsonl"
    key="$(python -c 'import sys, sysconfig; print(sys.version, sysconfig.get_path("stdlib"))') ${CORPUS_FLAGS[*]-}"
    if fresh corpus "$key" "$CORPUS"; then
        echo "    $CORPUS is there"
    else
        run python tools/build_corpus.py --output "$CORPUS" ${CORPUS_FLAGS[@]+"${CORPUS_FLAGS[@]}"}
        made corpus "$key"
    fi
}

train_tokenizer() {
    local key
    key="$VOCAB_SIZE $(identity "$CORPUS")"
    if fresh tokenizer "$key" "${VOCAB_FILES[@]}"; then
        echo "    there already: ${VOCAB_FILES[*]}"
        return
    fi
    [[ ! -e "$LATEST" ]] || fail 4 "$OUT/checkpoints" "a model trained on another corpus" \
        "the corpus that it began with" "OUT=runs/another scripts/quickstart.sh $KIND, or delete $OUT"
    run python tools/train_tokenizer.py --kind "$PIECES" --input "$CORPUS" --vocab-size "$VOCAB_SIZE" \
        --output-dir "$OUT"
    made tokenizer "$key"
}

preprocess() {
    local key
    key="$(identity "$CORPUS" "${VOCAB_FILES[@]}")"
    if fresh data "$key" "${DATA}.bin" "${DATA}.idx"; then
        echo "    there already: ${DATA}.bin and .idx"
        return
    fi
    run python tools/preprocess_data.py --input "$CORPUS" --output-prefix "$OUT/corpus" \
        "${TOKENIZER[@]}" "${CUT[@]}" --workers 2
    made data "$key"
}

# The target is the next multiple of ITERS: an interrupted run is finished first, a finished one goes on as long again.
train() {
    local behind=0 target
    local eval_every=$(((ITERS + 7) / 8)) save_every=$(((ITERS + 1) / 2))
    if [[ -e "$LATEST" ]]; then
        behind="$(cat "$LATEST")"
    fi
    target=$(((behind / ITERS + 1) * ITERS))
    if ((behind > 0)); then
        echo "    resuming after iteration $behind, on to $target; the cosine of the learning rate now spans $target"
    else
        echo "    $target iterations; interrupted or typed again, it resumes from $OUT/checkpoints"
    fi
    run torchrun --standalone --nproc-per-node "$RANKS" "pretrain_$KIND.py" \
        "${PARALLEL[@]}" "${MODEL[@]}" "${COMMON[@]}" --train-iters "$target" \
        --data-path "$DATA" --split "$SPLIT" "${TOKENIZER[@]}" ${EXTRA[@]+"${EXTRA[@]}"} \
        --eval-interval "$eval_every" --save-interval "$save_every" --save "$OUT/checkpoints" --load "$OUT/checkpoints" \
        --tensorboard-dir "$OUT/tensorboard" --metrics-file "$OUT/metrics.jsonl" && return
    local code=$?
    echo "training stopped (code $code); the same command resumes from the last checkpoint in $OUT/checkpoints" >&2
    exit "$code"
}

report_loss() {
    python - "$OUT/metrics.jsonl" "$VOCAB_SIZE" <<'PY'
import json, math, sys

KEY, ORDER = "validation lm loss", "validation sop loss"
rows = [json.loads(line) for line in open(sys.argv[1]) if KEY in line]
points = sorted({row["iteration"]: row for row in rows}.items())
step = max(1, round(len(points) / 8))
print(f"    a guess among {sys.argv[2]} tokens  {math.log(int(sys.argv[2])):.3f}")
for iteration, row in points[:-1:step] + points[-1:]:
    order = f"   order of sentences {row[ORDER]:.3f}" if ORDER in row else ""
    print(f"    iteration {iteration:6d}           {row[KEY]:.3f}  {'#' * round(5 * row[KEY]):45s}{order}".rstrip())
(first, high), (last, low) = points[0], points[-1]
print(f"    from {high[KEY]:.3f} at iteration {first} to {low[KEY]:.3f} at iteration {last}")
PY
}

show_sample() {
    case "$KIND" in
        gpt) run python tools/generate.py --load "$OUT/checkpoints" --prompt "def " --max-new-tokens 120 ;;
        t5) run python tools/generate.py --load "$OUT/checkpoints" --temperature 0 --max-new-tokens 20 \
            --prompt "for i in <extra_id_0>(len(values)): raise ValueError(<extra_id_1>)" ;;
        bert) guess_word "for i in [MASK](len(values)): raise [MASK](message)" ;;
    esac
}

# What BERT puts in the place of every [MASK].
guess_word() {
    python - "$1" "$OUT" <<'PY'
import sys
import numpy as np
from tokenizers import BertWordPieceTokenizer

pieces = BertWordPieceTokenizer(f"{sys.argv[2]}/vocab.txt", lowercase=True).encode(sys.argv[1])
np.savez(f"{sys.argv[2]}/ids.npz", input_ids=np.array([pieces.ids]))
print("    " + sys.argv[1])
PY
    run python tools/forward.py --load "$OUT/checkpoints" --input "$OUT/ids.npz" --output "$OUT/logits.npz"
    python - "$OUT" <<'PY'
import sys
import numpy as np

words = open(f"{sys.argv[1]}/vocab.txt", encoding="utf-8").read().split("\n")
ids, logits = (np.load(f"{sys.argv[1]}/{name}.npz")[key][0] for name, key in (("ids", "input_ids"), ("logits", "logits")))
for place in np.flatnonzero(ids == words.index("[MASK]")):
    chances = np.exp(logits[place] - logits[place].max())
    best = np.argsort(-chances)[:5]
    print("    [MASK]  " + "  ".join(f"{words[i]} {chances[i] / chances.sum():.0%}" for i in best))
PY
}

say_what_next() {
    cat <<NEXT

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at ($OUT):
    checkpoints/         python tools/inspect_checkpoint.py $OUT/checkpoints
    tensorboard/         tensorboard --logdir $OUT/tensorboard
    metrics.jsonl        one JSON object per iteration, at full precision
    $(printf '%s, ' "${VOCAB_FILES[@]##*/}")${DATA##*/}.bin and .idx, in Megatron's formats

Type next:
    scripts/quickstart.sh $(printf '%-16s' "$KIND") trains on
    LAYOUT=pp2 scripts/quickstart.sh $(printf '%-5s' "$KIND") trains on from the same checkpoint, on two pipeline stages (also: dp2, tp2)
    scripts/quickstart.sh gpt|bert|t5      trains another model
    scripts/test.sh                        runs the tests
NEXT
    [[ -n "${USE_ACTIVE_ENV:-}" ]] || printf '    %-38s %s\n' "source ${VENV#"$ROOT"/}/bin/activate" "and then:"
    case "$KIND" in
        gpt) echo "    python tools/generate.py --load $OUT/checkpoints --prompt \"class \" --max-new-tokens 120" ;;
        t5) echo "    python tools/generate.py --load $OUT/checkpoints --prompt \"return <extra_id_0>.join(words)\"" ;;
    esac
    [[ "$KIND" == bert ]] || cat <<NEXT
    python tools/convert_checkpoint.py --model-type $(tr '[:lower:]' '[:upper:]' <<<"$KIND") --loader megatron_ds --saver hf \\
        --load-dir $OUT/checkpoints --save-dir $OUT/hf
                                           the same weights for Hugging Face's transformers
NEXT
    cat <<NEXT
    python pretrain_gpt.py --dry-run --world-size 256 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 \\
        --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 \\
        --micro-batch-size 1 --global-batch-size 1536 --train-iters 1000 --lr 6e-5 --bf16
                                           what each of 256 GPUs would hold, do and send to train GPT-3 175B
NEXT
}

case "$KIND" in
    gpt) OUT="${OUT:-$ROOT/runs/quickstart}" ;;
    bert | t5) OUT="${OUT:-$ROOT/runs/quickstart-$KIND}" ;;
    *) fail 2 "the model" "$KIND" "gpt, bert or t5" "scripts/quickstart.sh bert" ;;
esac
[[ -z "$CORPUS" || "$CORPUS" == /* ]] || CORPUS="$PWD/$CORPUS"
[[ "$OUT" == /* ]] || OUT="$PWD/$OUT"
cd "$ROOT"
OUT="${OUT#"$ROOT"/}"
choose_data
LATEST="$OUT/checkpoints/latest_checkpointed_iteration.txt"
# One thread per rank: two ranks whose threads share two cores wait for each other.
export OMP_NUM_THREADS=1

stage 1 "environment"
source scripts/setup_env.sh
choose_sizes
choose_layout
mkdir -p "$OUT"
stage 2 "corpus"
build_corpus
stage 3 "tokenizer"
train_tokenizer
stage 4 "tokens"
preprocess
stage 5 "training: $KIND, $LAYOUT, $MACHINE"
train
stage 6 "what came of it"
echo "  validation loss:"
report_loss
echo "  a sample:"
show_sample
say_what_next

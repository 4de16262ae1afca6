"""--verify-parallel: a layout that is right passes, one that is not is told with parameter and axis."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import pytest
import torch

from megatron_ds.config import parse
from megatron_ds.parallel import launch
from megatron_ds.training.verify import verify
from tests.helpers.ranks import run_ranks
from tests.parity import harness, plants

LLAMA = """--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --num-key-value-heads 8 --ffn-hidden-size 11008
    --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 4 --global-batch-size 512 --train-samples 100000
    --lr 3e-4 --swiglu --normalization RMSNorm --use-rotary-position-embeddings --disable-bias-linear
    --untie-embeddings-and-output-weights --bf16 --tokenizer-type NullTokenizer --vocab-size 31999 --data-path nowhere
    --device cpu --verify-parallel"""
GPT2 = """--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024
    --micro-batch-size 4 --global-batch-size 32 --train-iters 100 --lr 1e-4 --tokenizer-type NullTokenizer
    --vocab-size 50256 --data-path nowhere --device cpu --verify-parallel"""


def verified(words: str, plant: Callable[[], None] | None) -> tuple[int, str]:
    """Run on every rank: exit code, and what was printed."""
    launch.adopt_environment()
    if plant is not None:
        plant()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = verify(harness.RECIPE, parse(words.split()), torch.device("cpu"))
    return code, out.getvalue()


def run(world_size: int, words: str, plant: Callable[[], None] | None = None) -> str:
    """What rank 0 printed; every rank left with the code that it announces."""
    results = run_ranks(verified, world_size, words, plant)
    text: str = results[0][1]
    assert {code for code, _ in results} == {5 if "DIFFERENT" in text else 0}
    assert not any(printed for _, printed in results[1:])
    return text


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (4, f"{LLAMA} --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
        (4, f"{GPT2} --context-parallel-size 2 --zero-stage 2 --recompute-granularity full --recompute-num-layers 4"),
        (4, f"{GPT2} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3 --zero-stage 1"),
        (
            3,
            f"{GPT2} --pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 7 "
            "--decoder-last-pipeline-num-layers 8 --enable-zbh1-pipeline",
        ),
    ],
)
def test_a_healthy_layout_passes(world_size: int, words: str) -> None:
    text = run(world_size, words)
    assert f"EQUAL: {world_size} ranks train the same model as one process" in text


def test_what_was_shrunk_is_said() -> None:
    text = run(2, f"{LLAMA} --tensor-model-parallel-size 2")
    shown = {" ".join(line.split()) for line in text.splitlines()}
    assert {"total layers 32 -> 2", "num attention heads 32 -> 16", "kv heads 8 -> 4", "bf16 True -> False"} <= shown
    assert "rope positions, RMSNorm, swiglu, no biases, untied" in text


@pytest.mark.parametrize(
    ("plant", "world_size", "flags", "parameter", "axis"),
    [
        (
            plants.row_without_all_reduce,
            4,
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
            "",
            "--tensor-model-parallel-size",
        ),
        (
            plants.partial_sums_forgotten,
            4,
            "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1",
            "layernorm.weight",
            "--sequence-parallel",
        ),
        (
            plants.norm_counted_tp_times,
            2,
            "--tensor-model-parallel-size 2",
            "gradient norm",
            "--tensor-model-parallel-size",
        ),
        (plants.ring_turned_round, 4, "--context-parallel-size 4", "", "--context-parallel-size"),
        (plants.reduced_twice, 4, "--tensor-model-parallel-size 2", "", "data parallelism"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_bug_is_told(
    plant: Callable[[], None], world_size: int, flags: str, parameter: str, axis: str
) -> None:
    text = run(world_size, f"{LLAMA} {flags}", plant)
    (different,) = [line for line in text.splitlines() if line.startswith("DIFFERENT")]
    (fault,) = [line for line in text.splitlines() if line.startswith("at fault")]
    assert parameter in different
    assert axis in fault


def test_a_tied_embedding_is_named() -> None:
    text = run(2, f"{GPT2} --pipeline-model-parallel-size 2", plants.tied_ends_not_summed)
    assert "DIFFERENT: embedding.word_embeddings.weight of step 1" in text
    assert "at fault: pipeline parallelism (--pipeline-model-parallel-size)" in text


def test_one_process_has_nothing_to_compare_with() -> None:
    assert "there is no other rank to compare with" in run(1, GPT2)

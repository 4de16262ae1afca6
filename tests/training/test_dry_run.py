"""What --dry-run says of large jobs, against the formulas of the papers; test_costs.py compares it with real steps."""

from __future__ import annotations

import re

import pytest

from tests.helpers.recipe import run

GIB = 2**30
H, A, S, LAYERS = 12288, 96, 2048, 96
GPT3 = f"""--num-layers {LAYERS} --hidden-size {H} --num-attention-heads {A} --seq-length {S} --micro-batch-size 1
    --train-iters 10 --lr 1e-4 --bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 51199 --world-size 256
    --tensor-model-parallel-size 8"""


def page(*flags: str) -> str:
    outcome = run([*" ".join(flags).split(), "--dry-run"])
    assert outcome.code == 0, outcome.err
    return outcome.out


def kept_gib(text: str) -> list[float]:
    """Activations kept at most, stage by stage."""
    section = text.split("\nactivations (", 1)[1].split("\n\n", 1)[0]
    return [float(kept) for kept in re.findall(r"^ +\d+ +([\d.]+) +[\d.]+ +[\d.]+$", section, re.MULTILINE)]


def sent_gib(text: str) -> dict[str, list[float]]:
    """Of each collective what stages send."""
    section = text.split("\nsent per rank and step (", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    out: dict[str, list[float]] = {}
    for line in section:
        if "stage" in line:
            names = re.findall(r"\w+ [a-z-]+", line.replace("stage", ""))
        else:
            for name, value in zip(names, line.split()[1:], strict=True):
                out.setdefault(name, []).append(float(value))
    return out


SBH = S * H
PER_LAYER = {
    "": SBH * (10 + 24 / 8),
    "--sequence-parallel": SBH * 34 / 8,
    "--recompute-granularity full": 2 * SBH,
    "--sequence-parallel --recompute-granularity full": 2 * SBH / 8,
    "--recompute-granularity full --distribute-saved-activations": 2 * SBH / 8,
}
"""Bytes of a layer and micro-batch with tp 8 (Korthikanti et al. 2022, table 2), flash attention keeping no s x s."""


@pytest.mark.parametrize("flags", PER_LAYER)
def test_activations_of_gpt3_are_those_of_the_paper(flags: str) -> None:
    stages = kept_gib(page(GPT3, "--pipeline-model-parallel-size 16 --global-batch-size 64", flags))
    assert len(stages) == 16
    for stage, found in list(enumerate(stages))[1:-1]:
        layers = 6 * (16 - stage) * PER_LAYER[flags] / GIB
        # Besides, the log-sum-exps of attention, the norms' statistics, what stages have sent each other, and of every
        # micro-batch the stage's output, and its input where the layers keep only a part of that.
        message = 2 * SBH / (8 if "sequence" in flags else 1) / GIB
        whole = (16 - stage) * (2 if "distribute" in flags else 1)
        assert layers - 0.005 <= found <= layers * 1.01 + (whole + 2) * message + 0.005


def test_messages_of_gpt3() -> None:
    text = page(GPT3, "--pipeline-model-parallel-size 16 --global-batch-size 128 --zero-stage 1 --sequence-parallel")
    sent, m, t, d = sent_gib(text), 64, 8, 2
    bsh = 2 * SBH / GIB
    parameters = (LAYERS / 16 * (12 * H * H / t + 13 * H)) / GIB
    for stage in range(1, 15):
        assert sent["tp all-gather"][stage] == pytest.approx(m * 6 * 6 * bsh * (t - 1) / t, abs=1e-3)
        assert sent["tp reduce-scatter"][stage] == pytest.approx(m * 6 * 4 * bsh * (t - 1) / t, abs=1e-3)
        assert sent["pp send"][stage] == pytest.approx(m * 2 * bsh / t, abs=1e-3)
        assert sent["embedding all-reduce"][stage] == 0
        assert sent["dp_cp reduce-scatter"][stage] == pytest.approx((d - 1) / d * 4 * parameters, rel=2e-3)
        assert sent["dp_cp all-gather"][stage] == pytest.approx((d - 1) / d * 2 * parameters, rel=2e-3)


SMALL = """--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --micro-batch-size 1 --lr 1e-4
    --train-iters 10 --mock-data --tokenizer-type NullTokenizer --vocab-size 1023"""
PARAMETERS = 8 * (12 * 1024**2 + 13 * 1024) + 2 * 1024 + (1024 + 1024) * 1024


@pytest.mark.parametrize(("stage", "per_parameter"), [(0, 18), (1, 6 + 12 / 8), (2, 2 + 16 / 8)])
def test_bytes_of_zero(stage: int, per_parameter: float) -> None:
    text = page(SMALL, f"--world-size 8 --bf16 --zero-stage {stage}")
    (row,) = re.findall(r"^ +0 +([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+$", text, re.MULTILINE)
    assert int(row[0].replace(",", "")) == PARAMETERS
    assert sum(map(float, row[1:])) == pytest.approx(per_parameter * PARAMETERS / GIB, abs=0.016)


def test_interleaved_stages_and_half_precision() -> None:
    chunks = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 8"
    text = page(SMALL, "--world-size 2 --fp16", chunks)
    assert "ZeRO stage 0, fp16" in text
    assert re.search(r"^ +0  embedding, 0-1 \+ 4-5 +0-0$", text, re.MULTILINE)
    assert re.search(r"^ +1  2-3 \+ 6-7, head +1-1$", text, re.MULTILINE)
    # p (1 + (p-1)/(pv)) micro-batches on the first stage
    assert re.search(r"^ +0 +[\d.]+ +[\d.]+ +2\.50$", text, re.MULTILINE)


def test_context_parallel_ranks_send_keys_and_values() -> None:
    sent = sent_gib(page(SMALL, "--world-size 4 --context-parallel-size 4 --bf16 --global-batch-size 64"))
    kv = 2 * 1024 * 1024 * 2 / GIB
    assert sent["cp send"] == [pytest.approx(64 * 8 * 3 * 3 / 4 * kv, abs=1e-3)]
    assert sent["dp_cp all-reduce"] == [pytest.approx(2 * 3 / 4 * 4 * PARAMETERS / GIB, abs=2e-3)]


def test_a_growing_batch_and_a_short_pipeline() -> None:
    text = page(
        SMALL.replace("--train-iters 10", "--train-samples 1000"),
        "--world-size 1 --global-batch-size 32 --rampup-batch-size 8 8 300",
    )
    assert "8 at first, 32 from sample 300 on, in 3 steps" in text
    short = page(SMALL, "--world-size 4 --pipeline-model-parallel-size 4 --global-batch-size 2")
    assert "fewer micro-batches than stages: 60% of the time is idle" in short  # 3 / (2 + 3)


def test_attention_dropout_keeps_a_matrix_on_cpus_only() -> None:
    flags = "--world-size 1 --bf16 --global-batch-size 1 --attention-dropout 0.1 --hidden-dropout 0"
    on_gpu, on_cpu = (kept_gib(page(SMALL, flags, device))[0] for device in ("", "--device cpu"))
    matrices = 8 * 16 * 1024 * 1024 * 2 / GIB
    assert on_cpu - on_gpu >= 2 * matrices

"""Longer runs against the oracle: Adam as users run it, bf16 and fp16."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.parity.compare import DEFAULT, STEADY, STEADY_FLAGS, Optimizer, initial, run_and_compare, train_oracle
from tests.parity.harness import GPT2, LLAMA, STYLES, arguments, batches, train_without_gradients
from tests.reference.gpt import OracleConfig
from tests.reference.training import GlobalBatch

LAYOUTS = {
    1: "",
    4: "--tensor-model-parallel-size 2 --context-parallel-size 2 --zero-stage 2",
    8: "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --zero-stage 1",
}
SMALL_GPT2, SMALL_LLAMA = (dataclasses.replace(model, hidden=32, ffn=64) for model in (GPT2, LLAMA))


def layout_arguments(tp: int, pp: int) -> list[str]:
    return ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_twenty_steps_with_the_usual_epsilon(style: str, world_size: int) -> None:
    model = STYLES[style]
    argv = arguments(model, *LAYOUTS[world_size].split())
    found = run_and_compare(model, argv, world_size, steps=20, loss=2e-5, norm=5e-5, gradient=1e-4)
    assert not found, "\n".join(map(str, found))


def learnable(model: OracleConfig, steps: int) -> list[GlobalBatch]:
    """Texts in which three of four tokens follow from the one before, so that the loss falls a long way."""
    generator = torch.Generator().manual_seed(3)
    follows = torch.randperm(model.vocab, generator=generator)
    out = []
    for _, labels, mask in batches(model, steps):
        text = torch.cat([labels[:, :1], labels], dim=1).clone()
        keeps = torch.rand(text.shape, generator=generator) < 0.75
        for i in range(1, text.shape[1]):
            text[:, i] = torch.where(keeps[:, i], follows[text[:, i - 1]], text[:, i])
        out.append((text[:, :-1], text[:, 1:], mask))
    return out


def both(
    model: OracleConfig, flags: str, world_size: int, data: list[GlobalBatch], optimizer: Optimizer = DEFAULT
) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """Losses of the ranks, those of the oracle, and which steps the ranks skipped.

    Shapes: both [steps that were not skipped]
    """
    params = {name: value.float() for name, value in initial(model, 0.05).items()}
    more = STEADY_FLAGS if optimizer is STEADY else []
    shares = run_ranks(train_without_gradients, world_size, arguments(model, *flags.split(), *more), params, data)
    skipped = shares[0].skipped
    assert all(share.skipped == skipped and repr(share.history) == repr(shares[0].history) for share in shares)
    taken = [i for i, skip in enumerate(skipped) if not skip]
    expected = train_oracle(model, [data[i] for i in taken], optimizer, 0.05)
    found = torch.tensor([shares[0].history[i][0] for i in taken], dtype=torch.float64)
    return found, torch.tensor([loss for loss, _ in expected.history], dtype=torch.float64), skipped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        (SMALL_GPT2, "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 2"),
        (SMALL_LLAMA, "--pipeline-model-parallel-size 2 --context-parallel-size 2 --fp32-residual-connection"),
    ],
    ids=["gpt2", "llama"],
)
def test_bf16_stays_near_the_oracle_for_200_steps(model: OracleConfig, flags: str) -> None:
    found, true, _ = both(model, f"{flags} --bf16 --train-iters 200", 4, learnable(model, 200), STEADY)
    assert true[:10].mean() - true[-10:].mean() > 0.5
    error = found / true - 1
    assert error.abs().max() < 2e-2
    assert error[:50].mean().abs() < 1e-3
    assert error[-50:].mean().abs() < 1e-3


@pytest.mark.parametrize("precision", ["--bf16", "--bf16 --fp32-residual-connection", "--fp16 --loss-scale 4096"])
@pytest.mark.parametrize(
    "layout",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --enable-zbh1-pipeline",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --zero-stage 2",
        "--pipeline-model-parallel-size 2 --enable-zbh1-pipeline --zero-stage 2 --recompute-activations",
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --zero-stage 1 --checkpoint-activations",
    ],
)
def test_half_precision_stays_near_the_oracle(layout: str, precision: str) -> None:
    found, true, skipped = both(SMALL_GPT2, f"{layout} {precision}", 4, batches(SMALL_GPT2, 8), STEADY)
    assert not any(skipped)
    assert (found / true - 1).abs().max() < 2e-2


def test_fp16_skips_together_and_stays_near_the_oracle() -> None:
    flags = "--tensor-model-parallel-size 2 --zero-stage 1 --fp16 --initial-loss-scale 4194304 --loss-scale-window 8"
    found, true, skipped = both(GPT2, flags, 4, learnable(GPT2, 30), STEADY)
    assert skipped[0]
    assert not skipped[-1]
    assert 1 < sum(skipped) < 20
    assert (found / true - 1).abs().max() < 2e-2

"""Any layout trains the same model: loss, gradient norm and every gathered gradient equal the single-process oracle."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.parity.harness import STYLES, arguments, assemble, batches, train
from tests.reference import gpt as oracle

LOSS_TOLERANCE, NORM_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 5e-5, 1e-4
LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4), (2, 2, 1), (2, 2, 2)]


@functools.lru_cache
def reference(style: str, steps: int) -> oracle.Trained:
    """The oracle's run in fp64, so that it adds no rounding of its own."""
    model = STYLES[style]
    params = oracle.random_params(model, std=0.05, dtype=torch.float64)
    return oracle.train(
        params,
        model,
        [(t, y, m.double()) for t, y, m in batches(model, steps)],
        lr_at=learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        clip_grad=0.5,
        keep_gradients=True,
    )


def learning_rate(step: int) -> float:
    """Warm-up over 4 steps, then cosine to step 40, from Megatron's formula."""
    if step <= 4:
        return 3e-3 * step / 4
    return 3e-4 + 0.5 * (torch.tensor((step - 4) / 36 * torch.pi, dtype=torch.float64).cos().item() + 1) * 2.7e-3


def layout_arguments(tp: int, pp: int) -> list[str]:
    return ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]


def compare(style: str, world_size: int, *flags: str, steps: int) -> None:
    model = STYLES[style]
    params = oracle.random_params(model, std=0.05, dtype=torch.float64)
    shares = run_ranks(train, world_size, arguments(model, *flags), params, batches(model, steps))
    expected = reference(style, steps)
    for share in shares:
        for step, ((loss, norm), (true_loss, true_norm)) in enumerate(
            zip(share.history, expected.history, strict=True)
        ):
            assert loss == pytest.approx(true_loss, rel=LOSS_TOLERANCE), f"loss of step {step}"
            assert norm == pytest.approx(true_norm, rel=NORM_TOLERANCE), f"gradient norm of step {step}"
    # Gradients are gathered after clipping; the oracle's are kept before it.
    clip = min(1.0, 0.5 / (expected.history[-1][1] + 1e-6))
    gradients = assemble([piece for share in shares for piece in share.gradients])
    assert gradients.keys() == expected.gradients[-1].keys()
    for name, true in expected.gradients[-1].items():
        error = (gradients[name] - clip * true).abs().max() / (clip * true).abs().max()
        assert error < GRADIENT_TOLERANCE, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "tp{}pp{}dp{}".format(*sizes))
def test_twenty_steps_equal_the_oracle(style: str, layout: tuple[int, int, int]) -> None:
    tp, pp, dp = layout
    zero = ["--zero-stage", "1"] if dp > 1 else []
    compare(style, tp * pp * dp, *layout_arguments(tp, pp), *zero, steps=20)


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, ["--zero-stage", "0"]),
        (2, ["--zero-stage", "0", "--no-overlap-grad-reduce"]),
        (2, ["--use-distributed-optimizer", "--reduce-bucket-size", "1000000"]),
        (4, [*layout_arguments(1, 4), "--pipeline-schedule", "gpipe"]),
        (4, [*layout_arguments(1, 2), "--pipeline-schedule", "gpipe", "--zero-stage", "0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_other_ways_to_the_same_result(world_size: int, flags: list[str]) -> None:
    compare("gpt2", world_size, *flags, steps=5)


def test_bf16_stays_near_the_oracle() -> None:
    model, steps = STYLES["gpt2"], 10
    params = oracle.random_params(model, std=0.05, dtype=torch.float64)
    argv = arguments(model, *layout_arguments(2, 1), "--bf16", "--zero-stage", "1")
    shares = run_ranks(train, 4, argv, params, batches(model, steps))
    for (loss, norm), (true_loss, true_norm) in zip(shares[0].history, reference("gpt2", steps).history, strict=True):
        assert loss == pytest.approx(true_loss, rel=2e-2)
        assert norm == pytest.approx(true_norm, rel=5e-2)

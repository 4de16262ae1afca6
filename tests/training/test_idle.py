"""Idle time of the real executor on real ranks, whose stages do nothing but sleep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn

from megatron_ds import log
from megatron_ds.kernels.products import FUSED, Products
from megatron_ds.model.runtime import WeightGrads
from megatron_ds.parallel import context, launch
from megatron_ds.parallel.collectives import barrier
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.pipeline.executor import Executor, Loss, Microbatch, Wire
from megatron_ds.pipeline.schedule import ScheduleName, build
from megatron_ds.timers import Timers
from megatron_ds.training.meter import idle_shares
from tests.helpers.ranks import run_ranks

STAGES = 4
MICROBATCHES = 8
FORWARD_S = 0.04
"""A backward takes twice as long, half of it for the gradients of weights."""


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, grads: WeightGrads, seconds: float) -> torch.Tensor:
        ctx.weight, ctx.grads, ctx.seconds = weight, grads, seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        time.sleep(ctx.seconds)

        def operands() -> tuple[torch.Tensor, torch.Tensor]:
            time.sleep(ctx.seconds)
            return torch.zeros(1, 1), torch.zeros(1, 1)

        made = ctx.grads.make(ctx.weight, operands, FUSED)
        return grad, None if made is None else made.view(1), None, None


class Sleeper(nn.Module):
    def __init__(self, grads: WeightGrads, seconds: float):
        super().__init__()
        self.weight, self.grads, self.seconds = nn.Parameter(torch.zeros(1)), grads, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = Sleep.apply(x, self.weight, self.grads, self.seconds)
        return out


def forward_step(batch: torch.Tensor, model: nn.Module, upstream: torch.Tensor | None) -> tuple[torch.Tensor, Loss]:
    return model(batch if upstream is None else upstream), lambda out: (out.sum(), torch.ones(()))


class NoGradients:
    """Takes gradients and drops them."""

    def arm(self, chunk: int, still_missing: Sequence[torch.Tensor] | None) -> None: ...
    def accumulate(self, weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, products: Products) -> None: ...
    def finish(self, chunk: int) -> None: ...


def idle(cases: list[tuple[ScheduleName, int]]) -> list[list[tuple[float, float]]]:
    """On every rank: of each case's steps the time spent waiting, and the time until the end."""
    launch.adopt_environment()
    sizes = {"pp": STAGES, "dp": 1, "cp": 1, "tp": 1}
    parallel = context.start(ParallelConfig(), sizes, torch.device("cpu"))
    found = [measure(parallel.pp, parallel.world, *case) for case in cases]
    context.stop()
    return found


def measure(pp: Axis, world: Axis, name: ScheduleName, chunks: int) -> list[tuple[float, float]]:
    grads, cpu = WeightGrads(), torch.device("cpu")
    executor = Executor(
        [Sleeper(grads, FORWARD_S / chunks) for _ in range(chunks)],
        forward_step,
        NoGradients(),
        pp=pp,
        wire=Wire((4, 1, 4), torch.float32, cpu),
        streams=DropoutStreams(0),
        weight_grads=grads,
    )
    batches = [Microbatch(torch.zeros(4, 1, 4, requires_grad=True), row) for row in range(MICROBATCHES)]
    actions = build(name, STAGES, chunks, MICROBATCHES)[log.rank()]
    steps = []
    for _ in range(4):
        executor.idle_seconds = 0.0
        barrier(world)
        begun = time.perf_counter()
        executor.run(actions, batches, Timers())
        steps.append((executor.idle_seconds, time.perf_counter() - begun))
    return steps


def share(ranks: list[list[list[tuple[float, float]]]], case: int) -> float:
    """Mean over the ranks, of the calmest step: other tests may be running."""
    steps = zip(*(rank[case] for rank in ranks), strict=True)
    return min(mean(idle_shares(*zip(*step, strict=True))) for step in steps)


def test_idle_share_is_that_of_the_schedule() -> None:
    p, m, v = STAGES, MICROBATCHES, 2
    cases: list[tuple[ScheduleName, int]] = [("1f1b", 1), ("gpipe", 1), ("interleaved", v), ("zbh1", 1)]
    ranks = run_ranks(idle, p, cases)
    one_f_one_b, gpipe, interleaved, zero_bubble = (share(ranks, number) for number in range(len(cases)))
    assert one_f_one_b == pytest.approx((p - 1) / (m + p - 1), abs=0.02)
    assert gpipe == pytest.approx((p - 1) / (m + p - 1), abs=0.02)
    assert interleaved == pytest.approx((p - 1) / (v * m + p - 1), abs=0.02)
    # Of time lost for a given amount of work ZB-H1 has a third of 1F1B's.
    assert zero_bubble / (1 - zero_bubble) <= 0.4 * one_f_one_b / (1 - one_f_one_b)


def test_shares_count_the_wait_for_the_last_rank() -> None:
    assert idle_shares([1.0, 3.0], [8.0, 10.0]) == [0.3, 0.3]
    assert idle_shares([0.0], [0.0]) == []

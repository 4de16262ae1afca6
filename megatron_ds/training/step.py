"""One training step, and one validation pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_ds.optim.loss_scale import LossScale
from megatron_ds.optim.lr import LRSchedule
from megatron_ds.parallel.collectives import all_reduce
from megatron_ds.parallel.sequence import context_positions
from megatron_ds.pipeline.executor import Microbatch
from megatron_ds.timers import Timers
from megatron_ds.training.engine import Engine
from megatron_ds.training.progress import Progress
from megatron_ds.training.run import Run


@dataclass(frozen=True)
class StepResult:
    """What every rank knows after a step.

    loss: mean over the global batch's target tokens. stop, out_of_time: so it is for some rank.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    next_loss_scale: LossScale
    skipped: bool
    stop: bool
    out_of_time: bool
    params_norm: float | None
    num_zeros: float | None


class Totals(NamedTuple):
    """What all ranks together found in one step, in the order of the one all-reduce that sums it."""

    loss: float
    targets: float
    squared_norm: float
    zeros: float
    stops: float
    out_of_time: float


def train_step(
    engine: Engine,
    schedule: LRSchedule,
    progress: Progress,
    batches: Iterator[Any],
    timers: Timers,
    *,
    stop: bool,
    out_of_time: bool,
) -> StepResult:
    """Forward, backward, reduce; then one sum over all ranks decides everything else.

    Comm: the schedule's, the reduction of gradients, one all-reduce of 6 numbers over the world (of another one if
          the norm of the parameters is logged), the all-gather of parameters with ZeRO
    """
    run, stage = engine.run, engine.run.parallel.pp.rank
    engine.buckets.zero()
    engine.executor.loss_scale = engine.normaliser * progress.loss_scale.scale
    count = run.plan.num_microbatches_at(progress.consumed_samples)
    with timers("batch-generator", 2):
        microbatches = take(batches, run, progress.consumed_samples, count)
    with timers("forward-backward", 1):
        sums = engine.executor.run(run.plan.actions(count)[stage], microbatches, timers)
        engine.buckets.wait()
    with timers("optimizer", 1):
        totals = _sum_over_world(engine, sums, stop, out_of_time)
        # The backward ran with a fixed scale; only now is it known over how many target tokens the loss is a mean.
        ratio = 1.0 / (engine.executor.loss_scale * totals.targets) if totals.targets else math.nan
        norm = math.sqrt(totals.squared_norm) * ratio
        if math.isfinite(norm):
            _update(engine, schedule, progress.consumed_samples, norm, ratio)
    logging = run.config.logging
    return StepResult(
        loss=totals.loss / totals.targets if totals.targets else math.nan,
        grad_norm=norm,
        learning_rate=schedule.lr_at(progress.consumed_samples),
        loss_scale=progress.loss_scale.scale,
        next_loss_scale=engine.loss_scaling.update(progress.loss_scale, overflow=not math.isfinite(norm)),
        skipped=not math.isfinite(norm),
        stop=totals.stops > 0,
        out_of_time=totals.out_of_time > 0,
        params_norm=_params_norm(engine) if logging.log_params_norm else None,
        num_zeros=totals.zeros if logging.log_num_zeros_in_grad else None,
    )


def _sum_over_world(engine: Engine, sums: torch.Tensor, stop: bool, out_of_time: bool) -> Totals:
    """Every number that the ranks have to share, in one message."""
    parallel, optimizer = engine.run.parallel, engine.optimizer
    counted = engine.run.config.logging.log_num_zeros_in_grad
    zeros = optimizer.num_zeros() if counted else sums.new_zeros(())
    mine = sums if parallel.tp.is_first else torch.zeros_like(sums)  # tensor-parallel ranks saw the same tokens
    flags = sums.new_tensor([float(stop), float(out_of_time)])
    return Totals(
        *all_reduce(torch.cat((mine, optimizer.squared_norm()[None], zeros[None], flags)), parallel.world).tolist()
    )


def _update(engine: Engine, schedule: LRSchedule, consumed_samples: int, norm: float, ratio: float) -> None:
    limit = engine.run.config.optimizer.clip_grad
    clip = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
    engine.optimizer.apply(
        lr=schedule.lr_at(consumed_samples),
        weight_decay=schedule.weight_decay_at(consumed_samples),
        scale=ratio * clip,
    )


def _params_norm(engine: Engine) -> float:
    """Comm: one all-reduce of one number over the world"""
    return math.sqrt(all_reduce(engine.optimizer.params_squared_norm(), engine.run.parallel.world).item())


def take(batches: Iterator[Any], run: Run, consumed_samples: int, count: int) -> list[Microbatch]:
    """This rank's micro-batches of the next global batch, its part of each sequence, with their global row numbers."""
    dp, cp, size = run.parallel.dp, run.parallel.cp, run.plan.micro_batch_size
    rows = [consumed_samples + (i * dp.size + dp.rank) * size for i in range(count)]
    if cp.size == 1:
        return [Microbatch(next(batches).to(run.device), row) for row in rows]
    here = context_positions(run.plan.seq_length, cp.size, cp.rank, run.sharding.ulysses)
    return [Microbatch(next(batches).at(here).to(run.device), row) for row in rows]


def evaluate(engine: Engine, batches: Iterator[Any], iterations: int, stop: Callable[[], bool]) -> tuple[float, bool]:
    """Mean loss over the target tokens of `iterations` global batches, and whether some rank was told to stop.

    Comm: the schedule's; one all-reduce of 3 numbers over the world per global batch
    """
    run = engine.run
    plan, parallel = run.plan, run.parallel
    engine.train(False)
    stopped = False
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    for _ in range(iterations):
        microbatches = take(batches, run, 0, plan.num_microbatches)
        sums = engine.executor.run(plan.eval_actions[parallel.pp.rank], microbatches, Timers())
        share = sums if parallel.tp.is_first else torch.zeros_like(sums)
        summed = all_reduce(torch.cat((share, sums.new_tensor([float(stop())]))), parallel.world)
        total += summed[:2]
        stopped = bool(summed[2] > 0)
        if stopped:
            break
    engine.train(True)
    loss_sum, targets = total.tolist()
    return (loss_sum / targets if targets else math.nan), stopped

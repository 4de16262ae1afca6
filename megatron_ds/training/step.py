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

    losses: each a mean over the global batch's targets of that kind. stop, out_of_time: so it is for some rank.
    """

    losses: dict[str, float]
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
    """What all ranks together found in one step, in the order of the one all-reduce that sums it, behind the losses."""

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
          the norm of the parameters is logged, or if there are several losses), the all-gather of parameters with ZeRO
    """
    run, stage = engine.run, engine.run.parallel.pp.rank
    engine.buckets.zero()
    engine.executor.loss_scale = engine.normaliser * progress.loss_scale.scale
    count = run.plan.num_microbatches_at(progress.consumed_samples)
    with timers("batch-generator", 2):
        microbatches = take(batches, run, progress.consumed_samples, count)
    engine.executor.loss_weights = _loss_weights(run, microbatches)
    with timers("forward-backward", 1):
        sums = engine.executor.run(run.plan.actions(count)[stage], microbatches, timers)
        engine.buckets.wait()
    with timers("optimizer", 1):
        losses, targets, totals = _sum_over_world(engine, sums, stop, out_of_time)
        # The backward ran with a fixed scale; only now is it known over how many target tokens the loss is a mean.
        ratio = 1.0 / (engine.executor.loss_scale * targets) if targets else math.nan
        norm = math.sqrt(totals.squared_norm) * ratio
        if math.isfinite(norm):
            _update(engine, schedule, progress.consumed_samples, norm, ratio)
    logging = run.config.logging
    return StepResult(
        losses=losses,
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


def _loss_weights(run: Run, microbatches: list[Microbatch]) -> torch.Tensor | None:
    """What each sum of losses counts in their total, for one that has so many targets as the first to count 1.

    The mean of the first is divided by its targets after the backward; that of another has to be before.
    Comm: with several losses one all-reduce of their numbers of targets over dp x cp
    """
    if len(run.config.model.loss_names) == 1:
        return None
    targets = sum((batch.num_targets() for batch, _ in microbatches), start=torch.zeros((), device=run.device))
    counts = all_reduce(targets.double(), run.parallel.dp_cp)
    return (counts[0] / counts.clamp(min=1)).float()


def means(names: tuple[str, ...], sums: list[float]) -> dict[str, float]:
    """Of the sums of losses, then the numbers of targets: each loss per target."""
    values = zip(names, sums[: len(names)], sums[len(names) :], strict=True)
    return {name: loss / targets if targets else math.nan for name, loss, targets in values}


def _sum_over_world(
    engine: Engine, sums: torch.Tensor, stop: bool, out_of_time: bool
) -> tuple[dict[str, float], float, Totals]:
    """Every number that the ranks have to share, in one message; of the losses their means, and the first's targets."""
    parallel, optimizer = engine.run.parallel, engine.optimizer
    counted = engine.run.config.logging.log_num_zeros_in_grad
    zeros = optimizer.num_zeros() if counted else sums.new_zeros(())
    mine = sums.flatten() if parallel.tp.is_first else sums.new_zeros(sums.numel())  # tp ranks saw the same tokens
    flags = sums.new_tensor([float(stop), float(out_of_time)])
    parts = torch.cat((mine, optimizer.squared_norm()[None], zeros[None], flags))
    summed = all_reduce(parts, parallel.world).tolist()
    names, count = engine.run.config.model.loss_names, sums.numel()
    return means(names, summed[:count]), summed[count // 2], Totals(*summed[count:])


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


def evaluate(
    engine: Engine, batches: Iterator[Any], iterations: int, stop: Callable[[], bool]
) -> tuple[dict[str, float], bool]:
    """Mean losses over the targets of `iterations` global batches, and whether some rank was told to stop.

    Comm: the schedule's; one all-reduce over the world per global batch: losses, targets, and who stops
    """
    run = engine.run
    plan, parallel = run.plan, run.parallel
    engine.train(False)
    stopped = False
    names = run.config.model.loss_names
    total = torch.zeros(2 * len(names), dtype=torch.float64, device=run.device)
    for _ in range(iterations):
        microbatches = take(batches, run, 0, plan.num_microbatches)
        sums = engine.executor.run(plan.eval_actions[parallel.pp.rank], microbatches, Timers())
        share = sums.flatten() if parallel.tp.is_first else sums.new_zeros(sums.numel())
        summed = all_reduce(torch.cat((share, sums.new_tensor([float(stop())]))), parallel.world)
        total += summed[:-1]
        stopped = bool(summed[-1] > 0)
        if stopped:
            break
    engine.train(True)
    return means(names, total.tolist()), stopped

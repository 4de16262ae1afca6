"""One training step, and one validation pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_ds.optim.loss_scale import LossScale
from megatron_ds.optim.lr import LRSchedule
from megatron_ds.parallel.collectives import all_reduce
from megatron_ds.parallel.sequence import context_positions
from megatron_ds.timers import Timers
from megatron_ds.training.engine import Engine
from megatron_ds.training.progress import Progress
from megatron_ds.training.run import Run
from megatron_ds.training.transfers import Microbatches, OnItsWay, to_device


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


class PendingStep:
    """A step that was asked of the device; `result` waits until it is done."""

    def __init__(self, numbers: torch.Tensor, interpret: Callable[[list[float]], StepResult]):
        self._numbers, self._interpret = OnItsWay(numbers), interpret

    def result(self) -> StepResult:
        """What came of it.

        Raises: RunFault if DeepSpeed's rule for the loss scale has nowhere to go
        """
        return self._interpret(self._numbers.wait().tolist())


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
    """One step, and what came of it.

    Comm: that of `launch_step`
    """
    return launch_step(engine, schedule, progress, batches, timers, stop=stop, out_of_time=out_of_time).result()


def launch_step(
    engine: Engine,
    schedule: LRSchedule,
    progress: Progress,
    batches: Iterator[Any],
    timers: Timers,
    *,
    stop: bool,
    out_of_time: bool,
    at_once: bool = False,
) -> PendingStep:
    """Forward, backward, reduce; then one sum over all ranks decides everything else, on the device.

    at_once: copy all micro-batches to the device before the first is computed.
    Comm: the schedule's, the reduction of gradients, one all-reduce of 6 numbers over the world (of another one if
          the norm of the parameters is logged, or if there are several losses), the all-gather of parameters with ZeRO
    """
    run, stage, now = engine.run, engine.run.parallel.pp.rank, progress.consumed_samples
    engine.buckets.zero()
    engine.executor.loss_scale = engine.normaliser * progress.loss_scale.scale
    count, lr = run.plan.num_microbatches_at(now), schedule.lr_at(now)
    with timers("batch-generator", 2):
        microbatches = take(batches, run, now, count, uses=len(engine.chunks), ahead=count if at_once else 1)
    engine.executor.loss_weights = _loss_weights(run, microbatches)
    with timers("forward-backward", 1):
        sums = engine.executor.run(run.plan.actions(count)[stage], microbatches, timers)
        engine.buckets.wait()
    with timers("optimizer", 1):
        summed = _sum_over_world(engine, sums, stop, out_of_time)
        norm, scale = _norm_and_scale(engine, summed)
        engine.optimizer.apply(lr=lr, weight_decay=schedule.weight_decay_at(now), scale=scale)
    numbers = [summed, norm[None], scale[None].double()]
    if run.config.logging.log_params_norm:
        numbers.append(all_reduce(engine.optimizer.params_squared_norm(), run.parallel.world)[None])
    return PendingStep(torch.cat(numbers), partial(_result, engine, progress.loss_scale, lr))


def _result(engine: Engine, loss_scale: LossScale, learning_rate: float, numbers: list[float]) -> StepResult:
    """What the device found: sums and targets of the losses, Totals, norm, scale, the parameters' squared norm."""
    config, names = engine.run.config, engine.run.config.model.loss_names
    count = 2 * len(names)
    totals = Totals(*numbers[count : count + len(Totals._fields)])
    norm, scale, *params_squared_norm = numbers[count + len(Totals._fields) :]
    skipped = scale == 0
    return StepResult(
        losses=means(names, numbers[:count]),
        grad_norm=norm,
        learning_rate=learning_rate,
        loss_scale=loss_scale.scale,
        next_loss_scale=engine.loss_scaling.update(loss_scale, overflow=skipped),
        skipped=skipped,
        stop=totals.stops > 0,
        out_of_time=totals.out_of_time > 0,
        params_norm=math.sqrt(params_squared_norm[0]) if params_squared_norm else None,
        num_zeros=totals.zeros if config.logging.log_num_zeros_in_grad else None,
    )


def _loss_weights(run: Run, microbatches: Microbatches) -> torch.Tensor | None:
    """What each sum of losses counts in their total, for one that has so many targets as the first to count 1.

    The mean of the first is divided by its targets after the backward; that of another has to be before.
    Comm: with several losses one all-reduce of their numbers of targets over dp x cp
    """
    if len(run.config.model.loss_names) == 1:
        return None
    targets = torch.stack([batch.num_targets() for batch in microbatches.given]).sum(0)
    counts = all_reduce(to_device(targets.double(), run.device), run.parallel.dp_cp)
    return (counts[0] / counts.clamp(min=1)).float()


def means(names: tuple[str, ...], sums: list[float]) -> dict[str, float]:
    """Of the sums of losses, then the numbers of targets: each loss per target."""
    values = zip(names, sums[: len(names)], sums[len(names) :], strict=True)
    return {name: loss / targets if targets else math.nan for name, loss, targets in values}


def _sum_over_world(engine: Engine, sums: torch.Tensor, stop: bool, out_of_time: bool) -> torch.Tensor:
    """Every number that the ranks have to share, in one message: sums and targets of the losses, then Totals."""
    parallel, optimizer = engine.run.parallel, engine.optimizer
    counted = engine.run.config.logging.log_num_zeros_in_grad
    zeros = optimizer.num_zeros() if counted else sums.new_zeros(())
    mine = sums.flatten() if parallel.tp.is_first else sums.new_zeros(sums.numel())  # tp ranks saw the same tokens
    flags = [sums.new_full((1,), float(flag)) for flag in (stop, out_of_time)]
    return all_reduce(torch.cat((mine, optimizer.squared_norm()[None], zeros[None], *flags)), parallel.world)


def _norm_and_scale(engine: Engine, summed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient norm, and what the gradients are multiplied by: 0 where the norm is not finite.

    Shapes: -> [] fp64, [] fp32
    """
    names, limit = engine.run.config.model.loss_names, engine.run.config.optimizer.clip_grad
    # The backward ran with a fixed scale; only now is it known over how many target tokens the loss is a mean.
    # Without any the ratio is infinite, and the norm is not finite.
    ratio = 1.0 / (summed[len(names)] * engine.executor.loss_scale)
    norm = summed[2 * len(names)].sqrt() * ratio
    clip = (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else torch.ones_like(norm)
    return norm, torch.where(norm.isfinite(), ratio * clip, 0.0).float()


def take(
    batches: Iterator[Any], run: Run, consumed_samples: int, count: int, *, uses: int = 1, ahead: int = 1
) -> Microbatches:
    """This rank's micro-batches of the next global batch, its part of each sequence, with their global row numbers."""
    dp, cp, size = run.parallel.dp, run.parallel.cp, run.plan.micro_batch_size
    rows = [consumed_samples + (i * dp.size + dp.rank) * size for i in range(count)]
    given = [next(batches) for _ in rows]
    if cp.size > 1:
        here = context_positions(run.plan.seq_length, cp.size, cp.rank, run.sharding.ulysses)
        given = [batch.at(here) for batch in given]
    if run.device.type == "cuda":  # the loader's are pinned, but not what was cut from them
        given = [batch.pinned() for batch in given]
    return Microbatches(given, rows, run.device, uses=uses, ahead=ahead)


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
        microbatches = take(batches, run, 0, plan.num_microbatches, uses=len(engine.chunks))
        sums = engine.executor.run(plan.eval_actions[parallel.pp.rank], microbatches, Timers())
        share = sums.flatten() if parallel.tp.is_first else sums.new_zeros(sums.numel())
        summed = all_reduce(torch.cat((share, sums.new_full((1,), float(stop())))), parallel.world)
        total += summed[:-1]
        stopped = bool(summed[-1] > 0)
        if stopped:
            break
    engine.train(True)
    return means(names, total.tolist()), stopped

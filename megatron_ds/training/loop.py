"""The loop: step, then log, validate, save, leave."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ds import log
from megatron_ds.data.loader import MicrobatchLoader
from megatron_ds.optim.lr import LRSchedule
from megatron_ds.parallel.collectives import all_reduce, gather_bytes
from megatron_ds.timers import Timers, longest, timer_block
from megatron_ds.training.engine import Engine
from megatron_ds.training.meter import Meter
from megatron_ds.training.metrics import Metrics, Position, StepRecord
from megatron_ds.training.progress import Progress
from megatron_ds.training.resume import save_checkpoint
from megatron_ds.training.step import StepResult, evaluate, train_step

Batches = Callable[[Progress], MicrobatchLoader]
"""Batches of a dataset from where a run stands."""


@dataclass
class Loop:
    """A run from where it stands to where it stops; `stop` says whether this process was told to."""

    engine: Engine
    schedule: LRSchedule
    metrics: Metrics
    timers: Timers
    progress: Progress
    flops_per_sample: int
    train_batches: Batches
    valid_batches: Batches | None
    stop: Callable[[], bool]
    begun: float
    meter: Meter | None = None
    saved_at: int | None = None
    timed_iterations: int = 0

    def train(self) -> bool:
        """Train until the iterations are done or a reason to leave comes; True if told to stop."""
        training, plan = self.engine.run.config.training, self.engine.run.plan
        if training.manual_gc:
            gc.disable()
        self.saved_at = self.progress.iteration
        stopped = self._agreed_to_stop()
        batches = self.train_batches(self.progress)
        while self.progress.iteration < plan.train_iters and not stopped:
            begun, samples = time.perf_counter(), plan.global_batch_at(self.progress.consumed_samples)
            with self.meter.step(self.progress) if self.meter else nullcontext():
                result = train_step(
                    self.engine,
                    self.schedule,
                    self.progress,
                    batches,
                    self.timers,
                    stop=self.stop(),
                    out_of_time=self._out_of_time(),
                )
            self.progress = self.progress.after_step(samples, result.skipped, result.next_loss_scale)
            self._log(result, samples, time.perf_counter() - begun)
            stopped = result.stop
            if self._every(training.eval_interval) and self.valid_batches:
                stopped = stopped or self._validate()
                # Also when it was left out: later validations must read the same rows as without the interruption.
                validated = training.eval_iters * plan.global_batch_size
                self.progress = self.progress.after_validation(validated)
            if self._every(self.engine.run.config.checkpoint.save_interval):
                self.save()
            if training.manual_gc and self._every(training.manual_gc_interval):
                gc.collect()
            if result.out_of_time:
                log.info(f"exiting program after {(time.monotonic() - self.begun) / 60:.1f} minutes")
                break
            if self._every(training.exit_interval):
                log.info(f"exiting program at iteration {self.progress.iteration}")
                break
        batches.close()
        self.save()
        return stopped

    def save(self) -> None:
        """Save unless there is nowhere to, or nothing new."""
        if self.engine.run.config.checkpoint.save and self.saved_at != self.progress.iteration:
            save_checkpoint(self.engine, self.progress)
            self.saved_at = self.progress.iteration

    def final_evaluation(self, batches: MicrobatchLoader, split: Literal["validation", "test"]) -> bool:
        """The pass over the validation or test set after the training; True if told to stop."""
        drawn = self.engine.run.config.training.eval_iters * self.engine.run.plan.global_batch_size
        where = f"iteration {self.progress.iteration} on {drawn}-sample draw from {split} set"
        return self._evaluate(batches, where, split)

    def _validate(self) -> bool:
        assert self.valid_batches
        where = f"iteration {self.progress.iteration}"
        return self._evaluate(self.valid_batches(self.progress), where, "validation")

    def _evaluate(self, batches: MicrobatchLoader, where: str, split: Literal["validation", "test"]) -> bool:
        with closing(batches):
            losses, stopped = evaluate(self.engine, batches, self.engine.run.config.training.eval_iters, self.stop)
        if not stopped:
            self.metrics.validation(where, losses, self._position(), split)
        if self.engine.run.config.training.manual_gc:
            gc.collect()
        return stopped

    def _log(self, result: StepResult, samples: int, elapsed_s: float) -> None:
        plan, position = self.engine.run.plan, self._position()
        tokens_per_s = samples * plan.seq_length / elapsed_s
        self.metrics.step(
            StepRecord(
                iteration=position.iteration,
                consumed_samples=position.consumed_samples,
                consumed_tokens=position.consumed_tokens,
                losses=result.losses,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                loss_scale=result.loss_scale,
                global_batch_size=samples,
                skipped=result.skipped,
                nan=not all(map(math.isfinite, result.losses.values())),
                elapsed_s=elapsed_s,
                tokens_per_s=tokens_per_s,
                tflops=samples / elapsed_s * self.flops_per_sample / plan.world_size / 1e12,
                params_norm=result.params_norm,
                num_zeros=result.num_zeros,
            )
        )
        self.timed_iterations += 1
        if self._every(self.engine.run.config.logging.log_interval):
            self._log_timers()

    def _log_timers(self) -> None:
        """Comm: gathers every rank's timers over the world."""
        logging, world = self.engine.run.config.logging, self.engine.run.parallel.world
        if logging.timing_log_level == 0:
            return
        ranks = [json.loads(raw) for raw in gather_bytes(json.dumps(self.timers.elapsed()).encode(), world)]
        log.last(timer_block(ranks, logging.timing_log_option, self.timed_iterations))
        seconds = {name: value / self.timed_iterations for name, value in longest(ranks).items()}
        self.metrics.timers(seconds, self._position())
        self.timed_iterations = 0

    def _out_of_time(self) -> bool:
        minutes = self.engine.run.config.training.exit_duration_in_mins
        return minutes is not None and time.monotonic() - self.begun > minutes * 60

    def _agreed_to_stop(self) -> bool:
        flag = torch.tensor([float(self.stop())], device=self.engine.run.device)
        return bool(all_reduce(flag, self.engine.run.parallel.world) > 0)

    def _every(self, interval: int | None) -> bool:
        return bool(interval) and self.progress.iteration % (interval or 1) == 0

    def _position(self) -> Position:
        samples = self.progress.consumed_samples
        return Position(self.progress.iteration, samples, samples * self.engine.run.plan.seq_length)

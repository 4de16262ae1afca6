"""Rules of the global batch, which may grow while the run goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from megatron_ds.batch import batch_schedule, read_steps, steps
from megatron_ds.config import Config
from megatron_ds.errors import ConfigError
from megatron_ds.rules_layout import ranks_per_replica
from megatron_ds.training.config import TrainingConfig
from megatron_ds.ways import Ways, divisors, either, nearest, nearest_multiple, plural


def check_growth(config: Config) -> Iterator[ConfigError]:
    """A batch that changes is asked for in one way, and for a run counted in samples."""
    training = config.training
    ramped, stepped = bool(training.rampup_batch_size), training.step_batch_size_schedule is not None
    if ramped and stepped:
        yield ConfigError(
            "--rampup-batch-size and --step-batch-size-schedule", "both", "one of them", "leave one of them out"
        )
    if stepped and training.global_batch_size is not None:
        yield ConfigError(
            "--step-batch-size-schedule",
            f"--global-batch-size {training.global_batch_size} beside it",
            "one of them: the schedule says every batch",
            "leave --global-batch-size out",
        )
    if (ramped or stepped) and training.train_iters and not training.train_samples:
        flag = "--rampup-batch-size" if ramped else "--step-batch-size-schedule"
        yield ConfigError(
            flag,
            f"--train-iters {training.train_iters}",
            "a length in samples, since iterations differ",
            "leave --train-iters out and give --train-samples",
        )
    if stepped:
        try:
            steps(training.step_batch_size_schedule or "", config.data.seq_length or 1)
        except ConfigError as error:
            yield error


def batch_unit(config: Config, world_size: int) -> tuple[int, int]:
    """(micro-batch x dp, that of which every batch is a multiple: interleaving wants micro-batches in groups of pp)."""
    parallel, micro = config.parallel, config.training.micro_batch_size or 1
    share = micro * (world_size // ranks_per_replica(parallel))
    interleaves = parallel.schedule_name == "interleaved" and parallel.virtual_stages(config.model.total_layers) > 1
    return share, share * (parallel.pipeline_model_parallel_size if interleaves else 1)


def check_batch(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """Every batch is a whole number of micro-batches on every data-parallel rank, and of rounds when interleaving."""
    training = config.training
    if world_size % ranks_per_replica(config.parallel) or any(True for _ in check_growth(config)):
        return
    share, unit = batch_unit(config, world_size)
    full = training.global_batch_size or share
    # The ramp is judged apart, so that a wrong one and a wrong final batch are both told.
    schedule = batch_schedule(dataclasses.replace(training, rampup_batch_size=()), config.data.seq_length or 1, share)
    wrong = [batch for batch in schedule.batches if batch % unit or not batch]
    if wrong and training.step_batch_size_schedule is not None:
        yield ConfigError(
            "--step-batch-size-schedule",
            f"batches of {', '.join(map(str, wrong))}, {_layout(config, share, unit)}",
            f"multiples of {unit}",
            nearest_batch(training, share, unit).flags,
        )
    elif wrong:
        below, above = full // unit * unit, (full // unit + 1) * unit
        yield ConfigError(
            "--global-batch-size",
            f"{full}, {_layout(config, share, unit)}",
            f"a multiple of {unit}",
            either(f"--global-batch-size {below}" if below else "", f"--global-batch-size {above}"),
        )
    first = schedule.batch_at(0)
    if training.rampup_batch_size:
        yield from _ramp_errors(config, share, unit, full)
        first = min(first, training.rampup_batch_size[0])
    if training.train_samples and training.train_samples < first:
        yield ConfigError(
            "--train-samples",
            f"{training.train_samples}, with a global batch of {first}",
            "at least one batch",
            f"--train-samples {-(-first // unit) * unit}",
        )


def _layout(config: Config, share: int, unit: int) -> str:
    micro = config.training.micro_batch_size or 1
    ranks = f"with --micro-batch-size {micro} on {plural(share // micro, 'data-parallel rank')}"
    return ranks if unit == share else f"{ranks} and {unit // share} interleaved stages"


class NearestBatch(NamedTuple):
    """The legal batch nearest to the one asked for: as changed flags, and in the configuration."""

    flags: str
    training: TrainingConfig


def nearest_batch(training: TrainingConfig, share: int, unit: int) -> NearestBatch:
    """Every batch a multiple of `unit`, whether it grows or not; thresholds are kept."""
    if training.step_batch_size_schedule is not None:
        pairs = read_steps(training.step_batch_size_schedule)
        text = " ".join(f"{pair.threshold}:{nearest_multiple(unit, pair.batch)}" for pair in pairs)
        changed = dataclasses.replace(training, step_batch_size_schedule=text)
        return NearestBatch(f"--step-batch-size-schedule '{text}'", changed)
    full = nearest_multiple(unit, training.global_batch_size or share)
    changed, flags = dataclasses.replace(training, global_batch_size=full), f"--global-batch-size {full}"
    if not training.rampup_batch_size:
        return NearestBatch(flags, changed)
    start, increment, samples = training.rampup_batch_size
    start = min(full, nearest_multiple(unit, start))
    increment = unit * nearest(divisors((full - start) // unit), increment // unit) if full > start else unit
    changed = dataclasses.replace(changed, rampup_batch_size=(start, increment, samples))
    ramp = f"--rampup-batch-size {start} {increment} {samples}"
    return NearestBatch(ramp if full == training.global_batch_size else f"{ramp} {flags}", changed)


def _ramp_errors(config: Config, share: int, unit: int, full: int) -> Iterator[ConfigError]:
    """The ramp arrives at the global batch, over batches that all come out even."""
    start, increment, samples = config.training.rampup_batch_size
    if start > full or (full - start) % increment:
        expected = "a START from which whole INCREMENTs lead to the global batch"
    else:
        # All but the last, which is judged as the global batch.
        batches = list(range(start, full, increment))
        if config.training.decrease_batch_size_if_needed:
            batches = [batch // share * share for batch in batches]
        if all(batch and batch % unit == 0 for batch in batches):
            return
        expected = f"multiples of {unit}"
    yield ConfigError(
        "--rampup-batch-size",
        f"{start} {increment} {samples} up to a global batch of {full}, {_layout(config, share, unit)}",
        expected,
        nearest_batch(config.training, share, unit).flags,
    )

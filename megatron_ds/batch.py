"""The global batch as a function of consumed samples: constant, ramped up (Megatron's rule) or in steps."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.errors import ConfigError
from megatron_ds.training.config import TrainingConfig

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class BatchSchedule:
    """From `starts[i]` consumed samples on the global batch is `batches[i]`; the first start is 0, none goes back."""

    starts: tuple[int, ...]
    batches: tuple[int, ...]

    @property
    def final(self) -> int:
        """The batch that stays."""
        return self.batches[-1]

    def batch_at(self, consumed_samples: int) -> int:
        """Samples of the step that starts after `consumed_samples`."""
        return self.batches[bisect_right(self.starts, consumed_samples) - 1]

    def iterations(self, samples: int, consumed_samples: int = 0) -> int:
        """Steps from `consumed_samples` on until the next one would go beyond `samples`."""
        done = 0
        while True:
            batch = self.batch_at(consumed_samples)
            fitting = max(0, samples - consumed_samples) // batch
            here = self._steps_to_next(consumed_samples)
            if here is None or fitting < here:
                return done + fitting
            done, consumed_samples = done + here, consumed_samples + here * batch

    def consumed_after(self, iterations: int, consumed_samples: int = 0) -> int:
        """Consumed samples when `iterations` more steps are done."""
        while True:
            batch = self.batch_at(consumed_samples)
            here = self._steps_to_next(consumed_samples)
            if here is None or iterations <= here:
                return consumed_samples + iterations * batch
            iterations, consumed_samples = iterations - here, consumed_samples + here * batch

    def _steps_to_next(self, consumed_samples: int) -> int | None:
        """Steps with the batch of now; None if it stays."""
        at = bisect_right(self.starts, consumed_samples)
        if at == len(self.starts):
            return None
        return -(-(self.starts[at] - consumed_samples) // self.batches[at - 1])


def ramp(start: int, increment: int, samples: int, full: int) -> BatchSchedule:
    """`start`, then `increment` more each time, `full` after `samples` samples.

    Megatron floors consumed / (samples / increments) in floating point, so each change is sought where that rounds to.
    """
    increments = (full - start) // increment
    changes = [_first_sample(number, samples / increments, samples) for number in range(1, increments + 1)]
    return BatchSchedule((0, *changes), tuple(start + number * increment for number in range(increments + 1)))


def _first_sample(number: int, samples_each: float, samples: int) -> int:
    """The first consumed samples at which `number` increments are made."""
    if samples == 0:
        return 0
    at = int(number * samples_each)
    while at > 0 and int((at - 1) / samples_each) >= number:
        at -= 1
    while at <= samples and int(at / samples_each) < number:
        at += 1
    return at


class Step(NamedTuple):
    """One pair of --step-batch-size-schedule."""

    tokens: int
    batch: int
    threshold: str
    """As it was written."""


def read_steps(text: str) -> list[Step]:
    """Read pairs THRESHOLD:BATCH, thresholds in tokens, numbers with K, M, B or T behind them.

    Raises: ConfigError
    """
    return sorted(_step(entry, text) for entry in text.replace(",", " ").split())


def _step(entry: str, text: str) -> Step:
    threshold, _, batch = entry.partition(":")
    try:
        step = Step(_number(threshold), _number(batch), threshold)
        if step.tokens < 0 or step.batch < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise _step_error(f"{entry!r} in {text!r}", "pairs TOKENS:BATCH", "0:768 250B:1536") from None
    return step


def steps(text: str, seq_length: int) -> BatchSchedule:
    """The schedule that a text asks for.

    Raises: ConfigError
    """
    pairs = read_steps(text)
    starts, batches = tuple(pair.tokens // seq_length for pair in pairs), tuple(pair.batch for pair in pairs)
    if not pairs or pairs[0].tokens != 0:
        raise _step_error(f"{text!r}", "0 as the first threshold", f"0:{batches[0] if batches else 768} ...")
    if len(set(starts)) < len(starts):
        raise _step_error(
            f"{text!r} changes the batch twice within one sample of {seq_length} tokens",
            "thresholds that rise by at least a sample",
            "0:768 250B:1536",
        )
    return BatchSchedule(starts, batches)


def _number(word: str) -> int:
    """`250B` -> 250 * 10**9, `1.5K` -> 1500"""
    factor = SUFFIXES.get(word[-1:].upper(), 1)
    return int(float(word[:-1] if factor > 1 else word) * factor)


def _step_error(found: str, expected: str, example: str) -> ConfigError:
    return ConfigError("--step-batch-size-schedule", found, expected, f"--step-batch-size-schedule '{example}'")


def batch_schedule(training: TrainingConfig, seq_length: int, share: int) -> BatchSchedule:
    """What the flags ask for; `share` = micro-batch x data-parallel size is the smallest batch, and the usual one.

    Raises: ConfigError for a --step-batch-size-schedule that cannot be read
    """
    full = training.global_batch_size or share
    if training.step_batch_size_schedule is not None:
        asked = steps(training.step_batch_size_schedule, seq_length)
    elif training.rampup_batch_size and training.rampup_batch_size[0] < full:
        start, increment, samples = training.rampup_batch_size
        asked = ramp(start, increment, samples, full)
    else:
        asked = BatchSchedule((0,), (full,))
    if not training.decrease_batch_size_if_needed:
        return asked
    return BatchSchedule(asked.starts, tuple(batch // share * share for batch in asked.batches))

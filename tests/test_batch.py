"""Growing batches against the rules written out as slow loops, sample by sample and step by step."""

from __future__ import annotations

import random

import pytest

from megatron_ds.batch import BatchSchedule, batch_schedule, ramp, steps
from megatron_ds.errors import ConfigError
from megatron_ds.training.config import TrainingConfig


def megatron_ramp(consumed: int, start: int, increment: int, samples: int, full: int) -> int:
    """Megatron's rule, in its own floating point."""
    if consumed > samples:
        return full
    per_increment = samples / ((full - start) // increment)
    return start + int(consumed / per_increment) * increment


RAMPS = [(2, 2, 30, 8), (16, 16, 1000, 64), (1, 1, 7, 4), (3, 7, 100, 24), (4, 4, 3, 32), (192, 16, 977, 2048)]


@pytest.mark.parametrize("rule", RAMPS)
def test_ramp_sample_by_sample(rule: tuple[int, int, int, int]) -> None:
    found = ramp(*rule)
    for consumed in range(rule[2] + 20):
        assert found.batch_at(consumed) == megatron_ramp(consumed, *rule), consumed


def test_ramp_where_floating_point_rounds_the_wrong_way() -> None:
    # Exact division would change the batch elsewhere: 3 increments over 10 samples are 3.33.. each, and so on.
    draw = random.Random(0)
    for _ in range(200):
        start, by = draw.randint(1, 9), draw.randint(1, 9)
        rule = (start, by, draw.randint(1, 400), start + by * draw.randint(1, 49))
        found = ramp(*rule)
        for consumed in range(0, rule[2] + 3):
            assert found.batch_at(consumed) == megatron_ramp(consumed, *rule), (rule, consumed)


def test_ramp_by_hand() -> None:
    # Three increments in 30 samples: one more at 10, 20 and 30.
    found = ramp(2, 2, 30, 8)
    assert [found.batch_at(n) for n in (0, 9, 10, 19, 20, 29, 30, 31, 10**9)] == [2, 2, 4, 4, 6, 6, 8, 8, 8]
    assert found.final == 8
    assert ramp(2, 2, 0, 8).batch_at(0) == 8


def megatron_train_iters(train_samples: int, rule: tuple[int, int, int, int]) -> int:
    """As Megatron counts: the ramp step by step, the rest by division."""
    iterations = consumed = 0
    while consumed <= rule[2]:
        consumed += megatron_ramp(consumed, *rule)
        iterations += 1
    return iterations + (train_samples - consumed) // rule[3]


@pytest.mark.parametrize("rule", RAMPS)
def test_iterations_are_megatrons(rule: tuple[int, int, int, int]) -> None:
    for train_samples in (rule[2] + 2 * rule[3], 10 * rule[2] + 3 * rule[3] + 1, 1_000_003):
        assert ramp(*rule).iterations(train_samples) == megatron_train_iters(train_samples, rule)


def loop(schedule: BatchSchedule, consumed: int, samples: int) -> tuple[int, int]:
    """Step while the next batch fits; (steps, consumed samples)."""
    done = 0
    while consumed + schedule.batch_at(consumed) <= samples:
        consumed += schedule.batch_at(consumed)
        done += 1
    return done, consumed


SCHEDULES = [
    BatchSchedule((0,), (8,)),
    ramp(2, 2, 30, 8),
    ramp(3, 7, 100, 24),
    BatchSchedule((0, 10, 11, 200), (4, 6, 3, 32)),
    BatchSchedule((0, 0, 50), (4, 8, 2)),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_closed_forms_against_the_loop(schedule: BatchSchedule) -> None:
    for begin in (0, 1, 7, 10, 29, 31, 99, 250):
        for samples in range(0, 320, 7):
            done, consumed = loop(schedule, begin, samples)
            assert schedule.iterations(samples, begin) == done, (begin, samples)
            assert schedule.consumed_after(done, begin) == consumed
    assert schedule.consumed_after(0, 5) == 5


def test_a_run_cut_in_two_is_as_long_as_one() -> None:
    schedule = ramp(16, 16, 1000, 64)
    whole = schedule.iterations(5000)
    for first in (0, 1, 7, 30, whole):
        assert first + schedule.iterations(5000, schedule.consumed_after(first)) == whole


def test_bloom_counts_at_once() -> None:
    # 9.8 M samples of ramp and 220 M in all: as many steps as the loop takes.
    schedule = ramp(192, 16, 9_765_625, 2048)
    assert schedule.iterations(220_000_000) == megatron_train_iters(220_000_000, (192, 16, 9_765_625, 2048))


def test_steps_are_thresholds_in_tokens() -> None:
    schedule = steps("0:768 250B:1536 1.5T:3072", 4096)
    assert schedule.starts == (0, 250 * 10**9 // 4096, 1500 * 10**9 // 4096)
    assert [schedule.batch_at(n) for n in (0, 61_035_155, 61_035_156, 10**12)] == [768, 768, 1536, 3072]
    assert steps("1K:8,0:4, 2m:2K", 10) == BatchSchedule((0, 100, 200_000), (4, 8, 2000))


@pytest.mark.parametrize(
    "text", ["", "768", "0:768 250B", "1M:8", "0:8 1M:0", "0:8 -1:4", "0:8 x:4", "0:8 infB:4", "0:8 nan:4", "0:8 9:16"]
)
def test_unreadable_steps(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        steps(text, 10)
    assert caught.value.subject == "--step-batch-size-schedule"
    assert caught.value.fix


def test_what_the_flags_ask_for() -> None:
    assert batch_schedule(TrainingConfig(), 10, 12).final == 12
    assert batch_schedule(TrainingConfig(global_batch_size=24), 10, 12) == BatchSchedule((0,), (24,))
    ramped = TrainingConfig(global_batch_size=24, rampup_batch_size=(12, 12, 100))
    assert batch_schedule(ramped, 10, 12).batches == (12, 24)
    level = TrainingConfig(global_batch_size=24, rampup_batch_size=(24, 12, 100))
    assert batch_schedule(level, 10, 12) == BatchSchedule((0,), (24,))
    stepped = TrainingConfig(step_batch_size_schedule="0:12 1K:36")
    assert batch_schedule(stepped, 10, 12) == BatchSchedule((0, 100), (12, 36))


def test_decrease_rounds_every_batch_down() -> None:
    odd = TrainingConfig(global_batch_size=64, rampup_batch_size=(16, 16, 90), decrease_batch_size_if_needed=True)
    schedule = batch_schedule(odd, 10, 12)
    assert [schedule.batch_at(n) for n in (0, 30, 60, 91)] == [12, 24, 48, 60]  # of 16, 32, 48, 64
    # What is counted is what is consumed: 3 of 12, then 24, 24, then 48, then 60s.
    assert schedule.iterations(300) == loop(schedule, 0, 300)[0]

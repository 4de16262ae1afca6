"""Timers on a clock that the test turns by hand, and the printed block letter by letter."""

from __future__ import annotations

import pytest

from megatron_ds import timers as module
from megatron_ds.timers import Timers, longest, timer_block


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def test_stretches_add_up_until_the_reset(clock):
    timers = Timers()
    for seconds in (1.5, 2.0):
        with timers("forward-backward"):
            clock.now += seconds
        clock.now += 100
    assert timers.elapsed(reset=False) == {"forward-backward": 3.5}
    assert timers.elapsed() == {"forward-backward": 3.5}
    assert timers.elapsed() == {}


def test_timers_nest_under_different_names(clock):
    timers = Timers()
    with timers("outer"):
        clock.now += 1
        with timers("inner"):
            clock.now += 2
    assert timers.elapsed() == {"outer": 3, "inner": 2}


@pytest.mark.parametrize(("level", "seen"), [(0, ["a"]), (1, ["a", "b"]), (2, ["a", "b", "c"])])
def test_levels_above_the_log_level_measure_nothing(level, seen):
    synchronised = []
    timers = Timers(level, synchronise=lambda: synchronised.append(1))
    for own, name in enumerate("abc"):
        with timers(name, level=own):
            pass
    assert list(timers.elapsed()) == seen
    assert len(synchronised) == 2 * len(seen)


def test_queued_work_is_counted_where_it_was_asked_for(clock):
    """The device still owes 5 s when the stretch begins and 3 s when it ends: only the 3 s belong to it."""
    queue = [5.0]

    def synchronise():
        clock.now += sum(queue)
        queue.clear()

    timers = Timers(synchronise=synchronise)
    with timers("forward-compute"):
        queue.append(3.0)
    assert timers.elapsed() == {"forward-compute": 3.0}


def test_a_stretch_that_raises_is_closed(clock):
    timers = Timers()

    def fail():
        with timers("a"):
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with timers("a"):
        clock.now += 1
    assert timers.elapsed() == {"a": 2}


RANKS = [{"forward-backward": 1.0, "optimizer": 0.25}, {"forward-backward": 3.0, "forward-recv": 0.5}]


def test_block_is_megatrons():
    dots = "." * 31
    assert timer_block(RANKS, "minmax", iterations=10).splitlines() == [
        "(min, max) time across ranks (ms):",
        f"    forward-backward {dots}: (100.00, 300.00)",
        "    optimizer ......................................: (0.00, 25.00)",
        "    forward-recv ...................................: (0.00, 50.00)",
    ]
    assert timer_block(RANKS, "max").splitlines()[:2] == [
        "max time across ranks (ms):",
        f"    forward-backward {dots}: 3000.00",
    ]
    assert timer_block(RANKS, "all", iterations=10).splitlines()[:4] == [
        "times across ranks (ms):",
        "  forward-backward:",
        "     rank  0: 100.00",
        "     rank  1: 300.00",
    ]


def test_nothing_timed_prints_nothing():
    assert timer_block([{}, {}]) == ""


def test_longest_is_the_slowest_ranks():
    assert longest(RANKS) == {"forward-backward": 3.0, "optimizer": 0.25, "forward-recv": 0.5}

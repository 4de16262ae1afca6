"""Learning rates and weight decay against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from megatron_ds.optim.config import LRConfig, OptimizerConfig
from megatron_ds.optim.lr import lr_errors, lr_schedule

BATCH = 10


def schedule(lr=1.0, weight_decay=0.01, train_iters=100, train_samples=None, **flags):
    """100 iterations of 10 samples, unless told otherwise."""
    optimizer = OptimizerConfig(lr=lr, weight_decay=weight_decay)
    return lr_schedule(LRConfig(**flags), optimizer, train_samples, BATCH, None if train_samples else train_iters)


def rates(subject, iterations):
    return [subject.lr_at(i * BATCH) for i in iterations]


def test_warmup_starts_at_its_initial_rate_and_ends_at_the_peak():
    subject = schedule(lr=4.0, lr_decay_style="constant", lr_warmup_iters=20)
    assert rates(subject, [0, 5, 10, 20, 21, 100, 1000]) == pytest.approx([0, 1, 2, 4, 4, 4, 4])
    subject = schedule(lr=4.0, lr_decay_style="constant", lr_warmup_iters=20, lr_warmup_init=2.0)
    assert rates(subject, [0, 10, 20]) == pytest.approx([2, 3, 4])


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        # iterations 0, 10, 20 (end of warm-up), 40, 60, 80, 100 (end), 101; 1.0 falls to 0.2 over 80 iterations
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", [0, 0.5, 1, 0.2 + 0.8 * (2 + math.sqrt(2)) / 4, 0.6, 0.2 + 0.8 * (2 - math.sqrt(2)) / 4, 0.2, 0.2]),
        # sqrt(20/i); at the end 0.447 and then the floor of 0.2
        (
            "inverse-square-root",
            [0, 0.5, 1, math.sqrt(0.5), math.sqrt(1 / 3), 0.5, math.sqrt(0.2), 0.2],
        ),
    ],
)
def test_decay_styles(style, expected):
    subject = schedule(lr_decay_style=style, lr_warmup_iters=20, min_lr=0.2)
    assert rates(subject, [0, 10, 20, 40, 60, 80, 100, 101]) == pytest.approx(expected, abs=1e-15)


def test_decay_without_warmup():
    assert rates(schedule(lr_decay_style="linear"), [0, 25, 100]) == pytest.approx([1, 0.75, 0])
    # Without warm-up the reference's constant is max(warmup, 1) = 1 sample: lr / sqrt(samples).
    subject = schedule(lr_decay_style="inverse-square-root")
    assert [subject.lr_at(n) for n in (0, 1, 4, 100)] == pytest.approx([1, 1, 0.5, 0.1])


def test_inverse_square_root_stays_above_min_lr():
    subject = schedule(lr_decay_style="inverse-square-root", lr_warmup_iters=1, min_lr=0.5)
    assert rates(subject, [2, 4, 9]) == pytest.approx([math.sqrt(0.5), 0.5, 0.5])


@pytest.mark.parametrize(
    ("style", "halfway"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", math.sqrt(2) - 1), ("minus_sqrt", 1 - math.sqrt(0.5))],
)
def test_wsd_is_flat_until_the_final_decay(style, halfway):
    subject = schedule(
        lr_decay_style="WSD", lr_warmup_iters=10, lr_wsd_decay_iters=20, lr_wsd_decay_style=style, min_lr=0.5
    )
    expected = [0, 0.5, 1, 1, 1, 0.5 + 0.5 * halfway, 0.5, 0.5]
    assert rates(subject, [0, 5, 10, 50, 80, 90, 100, 101]) == pytest.approx(expected)


def test_decay_may_end_before_the_training():
    subject = schedule(lr_decay_style="linear", lr_decay_iters=50, min_lr=0.1)
    assert rates(subject, [0, 25, 50, 51, 99]) == pytest.approx([1, 0.55, 0.1, 0.1, 0.1])


def test_warmup_fraction_is_of_the_decay_not_of_the_training():
    subject = schedule(lr_decay_style="constant", lr_decay_iters=50, lr_warmup_fraction=0.2)
    assert rates(subject, [5, 10]) == pytest.approx([0.5, 1.0])
    subject = schedule(train_samples=600, lr_decay_samples=400, lr_warmup_fraction=0.25, lr_decay_style="linear")
    assert [subject.lr_at(n) for n in (50, 100, 250, 400)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_lengths_in_samples():
    subject = schedule(
        train_samples=1000,
        lr_warmup_samples=100,
        lr_decay_style="WSD",
        lr_wsd_decay_samples=200,
        lr_wsd_decay_style="linear",
    )
    assert [subject.lr_at(n) for n in (0, 50, 100, 800, 900, 1000)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


def test_weight_decay():
    assert [schedule(weight_decay=0.1).weight_decay_at(n) for n in (0, 500, 2000)] == [0.1, 0.1, 0.1]
    moving = {"start_weight_decay": 0.1, "end_weight_decay": 0.3}
    linear = schedule(weight_decay_incr_style="linear", **moving)
    assert [linear.weight_decay_at(n) for n in (0, 250, 1000, 1010)] == pytest.approx([0.1, 0.15, 0.3, 0.3])
    cosine = schedule(weight_decay_incr_style="cosine", **moving)
    share = (2 - math.sqrt(2)) / 4
    assert [cosine.weight_decay_at(n) for n in (0, 250, 500, 1000)] == pytest.approx([0.1, 0.1 + 0.2 * share, 0.2, 0.3])


def subjects(lr=1e-3, train_samples=None, train_iters=100, **flags):
    errors = lr_errors(LRConfig(**flags), OptimizerConfig(lr=lr), train_samples, BATCH, train_iters)
    assert all(error.found and error.expected for error in errors)
    return [error.subject for error in errors]


def test_correct_flags_break_no_rule():
    assert subjects() == []
    assert subjects(lr_warmup_fraction=0.01, min_lr=1e-4, lr_decay_style="cosine") == []
    assert subjects(train_samples=1000, train_iters=None, lr_warmup_samples=10, lr_decay_samples=900) == []
    assert subjects(lr_decay_style="WSD", lr_wsd_decay_iters=10, lr_warmup_iters=90) == []
    assert subjects(weight_decay_incr_style="cosine", start_weight_decay=0.0, end_weight_decay=0.1) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"lr": None}, "--lr"),
        ({"lr": -1.0}, "--lr"),
        ({"min_lr": 1e-2}, "--min-lr"),
        ({"lr_warmup_init": 1e-2}, "--lr-warmup-init"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 5}, "--lr-warmup-fraction"),
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction"),
        ({"lr_warmup_iters": 100}, "--lr-warmup-iters"),
        ({"lr_warmup_iters": 50, "lr_decay_iters": 50}, "--lr-warmup-iters"),
        ({"train_samples": 100, "train_iters": None, "lr_warmup_samples": 100}, "--lr-warmup-samples"),
        ({"lr_decay_iters": 0}, "--lr-decay-iters"),
        ({"lr_decay_samples": 100}, "--lr-decay-samples"),
        ({"lr_warmup_samples": 100}, "--lr-warmup-samples"),
        ({"train_samples": 1000, "train_iters": None, "lr_decay_iters": 10}, "--lr-decay-iters"),
        ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 60, "lr_warmup_iters": 50}, "--lr-wsd-decay-iters"),
        ({"start_weight_decay": 0.1}, "--start-weight-decay, --end-weight-decay"),
        ({"weight_decay_incr_style": "linear", "start_weight_decay": 0.1}, "--weight-decay-incr-style linear"),
        (
            {"weight_decay_incr_style": "linear", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
            "--weight-decay-incr-style linear",
        ),
    ],
)
def test_broken_rules(flags, expected):
    assert expected in subjects(**flags)


def test_rules_are_reported_together():
    broken = subjects(min_lr=1.0, lr_warmup_fraction=0.1, lr_warmup_iters=5, start_weight_decay=0.1)
    assert broken == ["--min-lr", "--start-weight-decay, --end-weight-decay", "--lr-warmup-fraction"]


def test_a_run_without_a_length_is_left_to_its_own_rule():
    assert subjects(train_iters=None, lr_warmup_iters=5) == []

"""Blend indices against the greedy rule, one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ds.data import blend
from megatron_ds.data.blend import build_blend_index, normalize, parse_blend, shares, source_sizes
from megatron_ds.errors import ConfigError


def slow_blend(weights: list[float], size: int) -> tuple[list[int], list[int]]:
    """The rule as it is stated: take from whoever is furthest behind, the first of equals."""
    taken = [0] * len(weights)
    source, sample = [], []
    for k in range(size):
        behind = [w * max(float(k), 1.0) - float(n) for w, n in zip(weights, taken, strict=True)]
        pick = behind.index(max(behind))
        source.append(pick)
        sample.append(taken[pick])
        taken[pick] += 1
    return source, sample


@pytest.mark.parametrize("segment", [1, 7, 64, 4096])
def test_random_weights_equal_the_rule(monkeypatch: pytest.MonkeyPatch, segment: int) -> None:
    """Random, equal, lopsided and round weights; segments so short that most guesses must be mended."""
    monkeypatch.setattr(blend, "_SEGMENT_SAMPLES", segment)
    rng = np.random.default_rng(segment)
    for case in range(24):
        count = int(rng.integers(1, 12))
        kinds = (rng.random(count), np.ones(count), rng.dirichlet([0.1] * count) + 1e-9, rng.integers(1, 5, count))
        weights = normalize(kinds[case % 4])
        size = int(rng.integers(1, 500))
        found = build_blend_index(weights, size)
        source, sample = slow_blend(weights.tolist(), size)
        assert found["source"].tolist() == source and found["sample"].tolist() == sample, case
        assert found["source"].dtype == np.int16 and found["sample"].dtype == np.int64


def test_first_samples_by_hand() -> None:
    """w = 3/4, 1/4. k=0: .75 .25 -> 0. k=1: -.25 .25 -> 1. k=2: .5 -.5 -> 0. k=3: .25 -.25 -> 0. k=4: 0 0 -> 0."""
    found = build_blend_index(normalize([3, 1]), 5)
    assert found["source"].tolist() == [0, 1, 0, 0, 0] and found["sample"].tolist() == [0, 0, 1, 2, 3]


def test_sizes() -> None:
    """1000 samples by 1 : 2: 334 + 667 = 1001 in the blend; sources are built with 0.5 % more, rounded up."""
    weights = normalize([1, 2])
    assert shares(weights, 1000) == [334, 667]
    assert source_sizes(weights, 1000, [334, 667]) == [336, 671]
    assert source_sizes(weights, 1000, [334, 680]) == [336, 680]


def test_parse() -> None:
    assert parse_blend(["a"], "--data-path").prefixes == ("a",)
    weighted = parse_blend(["0.3", "a", "7e-1", "b"], "--data-path")
    assert weighted.prefixes == ("a", "b") and weighted.weights == (0.3, 0.7)
    assert parse_blend(["a", "b", "c"], "--data-path").weights is None
    assert parse_blend(["a", "b"], "--data-path") == blend.Blend(("a", "b"), None)
    assert parse_blend(["0", "a", "2", "b"], "--data-path") == blend.Blend(("b",), (2.0,))


@pytest.mark.parametrize("words", [["1", "a", "b", "c"], ["-1", "a", "2", "b"], ["0", "a"], ["nan", "a"]])
def test_nonsense_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--data-path"):
        parse_blend(words, "--data-path")

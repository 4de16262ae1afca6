"""Which tokens are hidden, against the same rule written out with nested lists."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_ds.data.masking import choose_spans, draw_ngram, draw_span, find_words, mask_budget, random_parts

CONTINUES = np.arange(100) >= 60


def words_by_hand(tokens: list[int], separators: set[int]) -> list[list[int]]:
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in separators:
            continue
        if token >= 60 and words:
            words[-1].append(position)
        else:
            words.append([position])
    return words


def spans_by_hand(words: list[list[int]], budget: float, rng: np.random.RandomState, longest: int) -> list[list[int]]:
    """Nested lists of candidates, and the generator's own choice(), as Megatron does it."""
    sizes = np.arange(1, longest + 1)
    chances = (1 / sizes) / (1 / sizes).sum()
    candidates = [[words[w : w + n] for n in sizes] for w in range(len(words))]
    rng.shuffle(candidates)
    hidden: list[int] = []
    spans = []
    for runs in candidates:
        if len(hidden) >= budget:
            break
        n = rng.choice(sizes, p=chances / chances.sum()) if longest == 3 else min(rng.geometric(0.2), longest)
        while n and len(hidden) + sum(map(len, runs[n - 1])) > budget:
            n -= 1
        span = [position for word in runs[n - 1] for position in word]
        if n == 0 or set(span) & set(hidden):
            continue
        hidden += span
        spans.append(span)
    return sorted(spans)


@pytest.mark.parametrize("longest", [3, 10])
def test_spans_as_by_hand(longest: int) -> None:
    draw = draw_ngram if longest == 3 else draw_span
    for seed in range(60):
        numbers = np.random.default_rng(seed)
        tokens = numbers.integers(0, 100, numbers.integers(1, 200))
        words = find_words(tokens, CONTINUES, (1, 2))
        budget = 0.15 * len(tokens)
        expected = spans_by_hand(words_by_hand(tokens.tolist(), {1, 2}), budget, np.random.RandomState(seed), longest)
        got = choose_spans(words, int(budget), np.random.RandomState(seed), draw)
        assert got == expected and sum(map(len, got)) <= budget
        assert all(len(words.run(w, 1)) > 0 for w in range(len(words)))


def test_words_join_their_pieces() -> None:
    """Also the first one without a beginning, and across a separator."""
    words = find_words(np.array([1, 70, 71, 5, 1, 72, 6]), CONTINUES, (1,))
    assert [words.run(w, 1) for w in range(len(words))] == [[1, 2], [3, 5], [6]]
    assert words.run(1, 5) == [3, 5, 6]
    assert len(find_words(np.array([1, 1]), CONTINUES, (1,))) == 0


def test_hide_is_asked_in_the_order_of_choice_and_spans_come_in_the_order_of_the_text() -> None:
    asked: list[int] = []
    words = find_words(np.arange(50), CONTINUES)
    spans = choose_spans(words, 20, np.random.RandomState(3), draw_ngram, asked.append)
    assert sorted(asked) == [p for span in spans for p in span] and asked != sorted(asked)


def test_no_more_spans_than_allowed() -> None:
    words = find_words(np.zeros(100, np.int64), CONTINUES)
    assert len(choose_spans(words, 50, np.random.RandomState(0), draw_ngram)) > 2
    assert len(choose_spans(words, 50, np.random.RandomState(0), draw_ngram, max_spans=2)) == 2


@pytest.mark.parametrize(
    ("tokens", "target", "budget"),
    [(512, 509, 76), (20, 509, 3), (3, 509, 1), (8, 6, 0), (100, 40, 6)],
)
def test_budget(tokens: int, target: int, budget: int) -> None:
    """15 %, at least one token, but never more than 15 % of the target."""
    assert mask_budget(0.15, tokens, target) == budget


def test_random_parts_are_all_ways_alike() -> None:
    """5 in 3 parts: 6 ways."""
    rng = np.random.RandomState(0)
    drawn = [tuple(random_parts(5, 3, rng).tolist()) for _ in range(1200)]
    ways = {parts for parts in itertools.product((1, 2, 3), repeat=3) if sum(parts) == 5}
    assert set(drawn) == ways and min(drawn.count(way) for way in ways) > 150
    assert random_parts(4, 1, rng).tolist() == [4] and random_parts(3, 3, rng).tolist() == [1, 1, 1]

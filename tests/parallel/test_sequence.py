"""The positions of each context-parallel rank, by hand."""

from __future__ import annotations

import pytest

from megatron_ds.parallel.sequence import context_positions

RING_OF_TWO = [[0, 1, 6, 7], [2, 3, 4, 5]]
RING_OF_FOUR = [[0, 7], [1, 6], [2, 5], [3, 4]]
ULYSSES_OF_TWO = [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("ulysses", "expected"),
    [(False, [list(range(8))]), (False, RING_OF_TWO), (False, RING_OF_FOUR), (True, ULYSSES_OF_TWO)],
)
def test_positions(ulysses: bool, expected: list[list[int]]) -> None:
    found = [context_positions(8, len(expected), rank, ulysses).tolist() for rank in range(len(expected))]
    assert found == expected


def test_one_rank_holds_everything_whatever_the_length() -> None:
    for s in (1, 2, 7):
        for ulysses in (False, True):
            assert context_positions(s, 1, 0, ulysses).tolist() == list(range(s))

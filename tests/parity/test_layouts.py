"""Any layout trains the same model: five steps on every layout of the table equal the oracle, in every gradient."""

from __future__ import annotations

import itertools

import pytest

from tests.parity.compare import STEADY, STEADY_FLAGS, run_and_compare
from tests.parity.harness import arguments
from tests.parity.layouts import LAYOUTS, OPTIONS, TABLE, Layout, is_possible, pairs, world_size

IMPOSSIBLE = {
    *itertools.product([("tp", "4")], [("cp", "ring4"), ("cp", "a2a4"), ("pp", "4")]),
    *itertools.product([("cp", "ring4"), ("cp", "a2a4")], [("pp", "4")]),
    *itertools.product([("sp", "sp")], [("cp", "a2a2"), ("cp", "a2a4"), ("recompute", "spread")]),
    *itertools.product([("tp", "1")], [("sp", "sp"), ("recompute", "spread")]),
    *itertools.product([("pp", "1")], [("schedule", "interleaved"), ("stages", "uneven")]),
    (("schedule", "interleaved"), ("stages", "uneven")),
    (("zero", "0"), ("overlap", "gather")),
}
"""More than eight ranks, or a combination that is refused."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_five_steps_equal_the_oracle(layout: Layout) -> None:
    argv = arguments(layout.model, *layout.flags(), *STEADY_FLAGS)
    found = run_and_compare(
        layout.model, argv, world_size(layout), steps=5, mask=layout.mask, optimizer=STEADY, std=0.1
    )
    assert not found, "\n".join(map(str, found))


def test_every_two_options_that_can_meet_do_so() -> None:
    wanted = {
        ((one, a), (other, b))
        for one, other in itertools.combinations(OPTIONS, 2)
        for a, b in itertools.product(OPTIONS[one], OPTIONS[other])
    }
    covered = {pair for layout in LAYOUTS for pair in pairs(layout)}
    assert covered <= wanted
    assert wanted - covered == IMPOSSIBLE


def test_every_layout_is_possible_and_there_once() -> None:
    assert TABLE.split()[: len(OPTIONS)] == list(OPTIONS) == list(Layout._fields)
    assert all(is_possible(layout) for layout in LAYOUTS)
    assert len(set(LAYOUTS)) == len(LAYOUTS) >= 40

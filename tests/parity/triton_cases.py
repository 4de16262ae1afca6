"""Parity with our own Triton kernels, interpreted. These run in a process of their own: see test_kernels.py."""

from __future__ import annotations

import pytest

from tests.parity.kernels_common import (
    BERT,
    SEQUENCE_PARALLEL,
    SOLO,
    TIED_ENDS,
    AnyLayout,
    equals_the_oracle,
    sources,
    stays_near_the_oracle,
)

FLAGS = "--kernels triton --attention-backend unfused"


def test_they_are_what_runs() -> None:
    found = sources(FLAGS)
    assert {operation for operation, source in found.items() if source != "triton"} == {"linear", "attention"}


@pytest.mark.parametrize("layout", [SOLO, SEQUENCE_PARALLEL, TIED_ENDS, BERT], ids=str)
def test_three_steps_equal_the_oracle(layout: AnyLayout) -> None:
    equals_the_oracle(layout, FLAGS)


@pytest.mark.parametrize("layout", [SOLO, SEQUENCE_PARALLEL], ids=str)
def test_bf16_stays_near_the_oracle(layout: AnyLayout) -> None:
    stays_near_the_oracle(layout, FLAGS)

"""Parity with our own Triton kernels, interpreted. These run in a process of their own: see test_kernels.py."""

from __future__ import annotations

import pytest

from tests.parity.kernels_common import (
    SOLO_LLAMA,
    TENSOR_PARALLEL,
    TIED_ENDS,
    AnyLayout,
    equals_the_oracle,
    sources,
    stays_near_the_oracle,
)
from tests.parity.layouts_models import BertLayout, T5Layout

FLAGS = "--kernels triton --attention-backend unfused"
SOLO_BERT = BertLayout.parse("1 - 1 1 1f1b 1 0 - post binary padded uneven")
SOLO_T5 = T5Layout.parse("1 - 1 - 1f1b 1 0 - 1.0 1+1 32+16 padded uneven")


def test_they_are_what_runs() -> None:
    found = sources(FLAGS)
    assert {operation for operation, source in found.items() if source != "triton"} == {"linear", "attention"}


@pytest.mark.parametrize(
    ("layout", "layers"),
    [(SOLO_LLAMA, 1), (TENSOR_PARALLEL, 1), (TIED_ENDS, 2), (SOLO_BERT, 1), (SOLO_T5, None)],
    ids=str,
)
def test_two_steps_equal_the_oracle(layout: AnyLayout, layers: int | None) -> None:
    equals_the_oracle(layout, FLAGS, steps=2, layers=layers)


def test_bf16_stays_near_the_oracle() -> None:
    stays_near_the_oracle(TENSOR_PARALLEL, FLAGS, steps=2, layers=1)

"""A rank that chose other kernels than the first is told, before it trains on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os

import pytest
import torch

from megatron_ds.kernels import choose
from tests.helpers.ranks import run_ranks
from tests.helpers.recipe import TINY, as_rank, words


def without(*operations: str) -> None:
    """From here on this rank's torch lacks them, as if a trial had failed."""
    offer = choose.OFFERS["torch"]

    def lacking(device: torch.device) -> choose.Offer:
        whole = offer(device)
        return dataclasses.replace(whole, op_lacks=lambda name: "is broken" if name in operations else None)

    choose.OFFERS = {**choose.OFFERS, "torch": lacking}


def told(argv: list[str], ranks_without: dict[int, list[str]]) -> tuple[int, str]:
    """Run on every rank: how it left, and what it said of it."""
    without(*ranks_without.get(int(os.environ["RANK"]), ()))
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            as_rank(argv)
    except SystemExit as left:
        return int(left.code or 0), err.getvalue()
    return 0, err.getvalue()


@pytest.mark.parametrize("flags", [{}, {"verify_parallel": True}], ids=["training", "verify"])
def test_ranks_that_chose_differently_do_not_start(flags: dict[str, bool]) -> None:
    argv = words(TINY | {"mock_data": True, "hidden_dropout": 0.1, "tensor_model_parallel_size": 2} | flags)
    first, second = run_ranks(told, 2, argv, {1: ["bias_dropout_add"]})
    assert (first[0], second[0]) == (2, 2), first[1] + second[1]
    assert "error: --kernels" in first[1] and "--kernels reference" in first[1]
    found = "bias_dropout_add from torch on rank 0, from reference on rank 1 (torch: is broken)"
    assert found in first[1]


def test_ranks_that_all_lack_the_same_train() -> None:
    argv = words(TINY | {"mock_data": True, "train_iters": 1, "eval_iters": 0})
    lacking = ["bias_dropout_add", "adamw"]
    assert run_ranks(told, 2, argv, {0: lacking, 1: lacking}) == [(0, ""), (0, "")]

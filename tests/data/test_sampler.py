"""Rows of each rank against the definition."""

from __future__ import annotations

from itertools import islice
from typing import Literal

import pytest
import torch

from megatron_ds.data.sampler import microbatch_rows
from megatron_ds.errors import DataError


def rows_of(
    kind: Literal["single", "cyclic"], rows: int, consumed: int, mbs: int, rank: int, dp: int, count: int
) -> list[list[int]]:
    found = microbatch_rows(kind, rows=rows, consumed_samples=consumed, micro_batch_size=mbs, dp_rank=rank, dp_size=dp)
    return list(islice(found, count))


def test_single_by_hand() -> None:
    assert rows_of("single", 100, 24, 2, 0, 3, 2) == [[24, 25], [30, 31]]
    assert rows_of("single", 100, 24, 2, 2, 3, 2) == [[28, 29], [34, 35]]


@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (1, 4), (2, 2), (4, 1), (1, 8), (2, 4), (8, 1)])
def test_single_global_batch_is_the_same_for_any_layout(mbs: int, dp: int) -> None:
    steps = 16 // (mbs * dp)
    union = [row for r in range(dp) for rows in rows_of("single", 64, 16, mbs, r, dp, steps) for row in rows]
    assert sorted(union) == list(range(16, 32))


def test_single_ends_with_numbers() -> None:
    found = microbatch_rows("single", rows=11, consumed_samples=4, micro_batch_size=2, dp_rank=0, dp_size=2)
    assert next(found) == [4, 5]
    with pytest.raises(DataError, match=r"11 samples, 8 of them consumed(.|\n)*4 more"):
        next(found)


def slow_cyclic(rows: int, consumed: int, mbs: int, rank: int, dp: int, count: int) -> list[list[int]]:
    """One sample at a time: skip what this epoch has consumed, then start the next epoch."""
    active = rows - rows % (mbs * dp)
    bucket = (rows // (mbs * dp)) * mbs
    out: list[list[int]] = []
    while len(out) < count:
        epoch, position = consumed // active, (consumed % active) // dp
        generator = torch.Generator()
        generator.manual_seed(epoch)
        order = torch.randperm(bucket, generator=generator).tolist()
        batch: list[int] = []
        for local in order[position:]:
            batch.append(rank * bucket + local)
            if len(batch) == mbs:
                out.append(batch)
                batch = []
                consumed += mbs * dp
    return out[:count]


@pytest.mark.parametrize(
    ("rows", "consumed", "mbs", "dp"), [(20, 0, 2, 2), (23, 8, 2, 2), (23, 45, 3, 1), (50, 200, 1, 4)]
)
def test_cyclic_equals_the_definition(rows: int, consumed: int, mbs: int, dp: int) -> None:
    for rank in range(dp):
        assert rows_of("cyclic", rows, consumed, mbs, rank, dp, 40) == slow_cyclic(rows, consumed, mbs, rank, dp, 40)


def test_cyclic_epoch_covers_every_row_once() -> None:
    seen = [row for rank in range(3) for rows in rows_of("cyclic", 25, 0, 2, rank, 3, 4) for row in rows]
    assert sorted(seen) == list(range(24))


def test_cyclic_resumes_where_it_was() -> None:
    whole = rows_of("cyclic", 23, 0, 2, 1, 2, 30)
    assert rows_of("cyclic", 23, 7 * 4, 2, 1, 2, 23) == whole[7:]


def test_cyclic_needs_one_micro_batch() -> None:
    with pytest.raises(DataError, match="3 samples"):
        rows_of("cyclic", 3, 0, 2, 0, 2, 1)
    with pytest.raises(DataError, match=r"5 consumed samples(.|\n)*multiple(.|\n)*4"):
        rows_of("cyclic", 30, 5, 2, 0, 2, 1)

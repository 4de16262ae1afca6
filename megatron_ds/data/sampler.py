"""Which rows of a dataset this data-parallel rank reads, from a given number of consumed samples on.

single   the dataset's own order, once: micro-batch j of rank r is rows consumed + (j dp + r) mbs + [0, mbs)
cyclic   epoch after epoch; each rank shuffles its own share of the rows with the epoch's number as seed

A global batch of `single` holds the same rows for every dp. One of `cyclic` does not, for the shares depend on dp.
Source: Megatron's pretraining samplers
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from megatron_ds.errors import DataError


def microbatch_rows(
    kind: Literal["single", "cyclic"],
    *,
    rows: int,
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> Iterator[list[int]]:
    """The rows of successive micro-batches of one data-parallel rank, without end.

    Raises: DataError when `single` has no whole micro-batch left for every rank, or `cyclic` cannot start
    """
    if kind == "single":
        return _single(rows, consumed_samples, micro_batch_size, dp_rank, dp_size)
    return _cyclic(rows, consumed_samples, micro_batch_size, dp_rank, dp_size)


def _single(rows: int, consumed: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[list[int]]:
    while consumed + micro_batch_size * dp_size <= rows:
        first = consumed + dp_rank * micro_batch_size
        yield list(range(first, first + micro_batch_size))
        consumed += micro_batch_size * dp_size
    raise DataError(
        "data",
        found=f"{rows} samples, {consumed} of them consumed",
        expected=f"{micro_batch_size * dp_size} more for the next micro-batch of {dp_size} data-parallel ranks",
        fix="ask for more samples when the dataset is built, or --dataloader-type cyclic",
    )


def _cyclic(rows: int, consumed: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[list[int]]:
    per_step = micro_batch_size * dp_size
    active, share = rows - rows % per_step, rows // per_step * micro_batch_size
    if not share:
        raise DataError("data", found=f"{rows} samples", expected=f"at least {per_step}, one micro-batch of every rank")
    if consumed % per_step:
        raise DataError(
            "--dataloader-type cyclic",
            found=f"{consumed} consumed samples",
            expected=f"a multiple of micro-batch x data-parallel size, {per_step}",
            fix="resume with the global batch size of the run before",
        )
    while True:
        epoch, done = divmod(consumed, active)
        order = torch.randperm(share, generator=torch.Generator().manual_seed(epoch))
        mine = (dp_rank * share + order[done // dp_size :]).tolist()
        for first in range(0, len(mine) - micro_batch_size + 1, micro_batch_size):
            yield mine[first : first + micro_batch_size]
            consumed += per_step

"""Rows of a dataset to batches on time: micro-batches of this data-parallel rank, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch

from megatron_ds.data.batch import Collate
from megatron_ds.data.blend import TokenDataset
from megatron_ds.data.sampler import microbatch_rows
from megatron_ds.errors import DataError


class MicrobatchLoader(Iterator[Any]):
    """Successive micro-batches of one data-parallel rank, in order, up to two per thread read ahead.

    Threads read, collate and pin; `next` waits for them and does none of it, unless there are none. Batches come in
    pinned memory where `device` is a GPU, which copies them while it computes.
    Raises: DataError from `next` when the dataset is used up or a token is wrong, not before that micro-batch is due
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        collate: Collate,
        dataloader_type: Literal["single", "cyclic"] = "single",
        num_workers: int = 2,
        device: torch.device | None = None,
    ):
        self.dataset, self.collate = dataset, collate
        self._pins = device is not None and device.type == "cuda"
        self._rows = microbatch_rows(
            dataloader_type,
            rows=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        # Which GPU is current is a thread's own affair: a new thread would pin for the first one, and wake it up.
        begin = (torch.cuda.set_device, (device,)) if self._pins else (None, ())
        self._threads = ThreadPoolExecutor(num_workers, "data", *begin) if num_workers else None
        self._ahead: deque[Future[Any]] = deque()
        self._depth = 2 * num_workers
        self._end: DataError | None = None

    def __next__(self) -> Any:
        if self._threads is None:
            return self._read(next(self._rows))
        while len(self._ahead) < self._depth and self._end is None:
            try:
                self._ahead.append(self._threads.submit(self._read, next(self._rows)))
            except DataError as exc:
                self._end = exc
        if not self._ahead:
            assert self._end is not None
            raise self._end
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Stop reading ahead."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _read(self, rows: list[int]) -> Any:
        batch = self.collate([self.dataset[row] for row in rows])
        return batch.pinned() if self._pins else batch

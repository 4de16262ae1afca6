"""Rows of a dataset to batches on time: micro-batches of this data-parallel rank, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from megatron_ds.data.blend import TokenDataset
from megatron_ds.data.sampler import microbatch_rows
from megatron_ds.errors import ConfigError, DataError


@dataclass(frozen=True)
class GPTBatch:
    """One micro-batch.

    Shapes: each [b, s]; int64, but loss_mask float32
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor

    def to(self, device: torch.device | str) -> GPTBatch:
        """The same batch on a device."""
        return GPTBatch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def at(self, positions: torch.Tensor) -> GPTBatch:
        """The given positions of every sequence.

        Shapes: positions [n] -> each [b, n]
        """
        return GPTBatch(*(getattr(self, field.name)[:, positions] for field in fields(self)))


def gpt_batch(
    rows: npt.NDArray[np.int64], eod: int | None, *, eod_mask_loss: bool = False, reset_position_ids: bool = False
) -> GPTBatch:
    """Inputs, and as labels the same tokens one to the left; both options look at where the input is `eod`.

    Shapes: rows [b, s + 1]
    """
    tokens, labels = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    is_eod = tokens == eod if eod is not None else np.zeros_like(tokens, bool)
    loss_mask = np.ones(tokens.shape, np.float32)
    if eod_mask_loss:
        loss_mask[is_eod] = 0.0
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if reset_position_ids:
        starts = np.zeros_like(tokens)
        starts[:, 1:] = np.where(is_eod[:, :-1], positions[:, 1:], 0)
        positions = positions - np.maximum.accumulate(starts, axis=1)
    return GPTBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(loss_mask),
        torch.from_numpy(np.array(positions, np.int64)),
    )


class MicrobatchLoader(Iterator[GPTBatch]):
    """Successive micro-batches of one data-parallel rank, in order, up to two per thread read ahead.

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
        eod: int | None,
        dataloader_type: Literal["single", "cyclic"] = "single",
        num_workers: int = 2,
        eod_mask_loss: bool = False,
        reset_position_ids: bool = False,
    ):
        if eod is None and (eod_mask_loss or reset_position_ids):
            raise ConfigError(
                "--eod-mask-loss, --reset-position-ids", found="no tokenizer", expected="one that ends documents"
            )
        self.dataset = dataset
        self._eod, self._eod_mask_loss, self._reset_position_ids = eod, eod_mask_loss, reset_position_ids
        self._rows = microbatch_rows(
            dataloader_type,
            rows=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        self._threads = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._ahead: deque[Future[GPTBatch]] = deque()
        self._depth = 2 * num_workers
        self._end: DataError | None = None

    def __next__(self) -> GPTBatch:
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

    def _read(self, rows: list[int]) -> GPTBatch:
        stacked = np.stack([self.dataset[row] for row in rows])
        return gpt_batch(
            stacked, self._eod, eod_mask_loss=self._eod_mask_loss, reset_position_ids=self._reset_position_ids
        )

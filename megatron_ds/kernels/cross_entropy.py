"""Cross-entropy over one rank's columns of the logits: what the forward needs of them, and their gradient in place.

Rows are worked on in blocks, so that fp32 copies of half-precision logits exist for a block only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

Tensor = torch.Tensor
BLOCK = 256 * 1024
"""Logits of a thread's block of rows: on CPUs so many stay in the cache."""
LARGE_BLOCK = 64 * 1024 * 1024
"""Logits of a block on other devices, where it has to keep them busy."""


class CrossEntropy(NamedTuple):
    """Both halves; between them ranks merge their log-sums.

    Shapes: logits [n, w], column [n]: the target's, -1 where it lies on another rank; columns from `valid` on are
            padding
    """

    statistics: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    """(logits, column, valid) -> log-sum-exp of the columns, the target's logit (0 where there is none), [n] in fp32"""
    gradient: Callable[[Tensor, Tensor, int, Tensor, Tensor, Tensor], Tensor]
    """(logits, column, valid, log_sum, log_total, upstream): overwrites the logits with (p - one-hot) * upstream, where
    p = exp(logits - log_total); log_sum as `statistics` gave it, all [n] in fp32"""


def statistics(logits: Tensor, column: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """The first half in plain torch: see CrossEntropy."""
    wide = logits[:, :valid].float()
    here = column >= 0
    target = wide.gather(1, column.clamp(min=0).unsqueeze(1)).squeeze(1) if valid else wide.new_zeros(len(wide))
    return torch.logsumexp(wide, 1), torch.where(here, target, 0.0)


def gradient(
    logits: Tensor, column: Tensor, valid: int, log_sum: Tensor, log_total: Tensor, upstream: Tensor
) -> Tensor:
    """The second half in plain torch: see CrossEntropy."""
    p = torch.exp(logits[:, :valid].float() - log_total.unsqueeze(1))
    _subtract_targets(p, column, torch.ones_like(upstream))
    logits[:, valid:] = 0
    logits[:, :valid] = p * upstream.unsqueeze(1)
    return logits


def statistics_by_blocks(logits: Tensor, column: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """The first half, for CPUs: see CrossEntropy. log-sum = largest logit - log of its probability."""
    log_sum = torch.full((len(logits),), -torch.inf, device=logits.device)
    target = torch.zeros_like(log_sum)
    for rows, p in _blocks(logits, valid):
        part = logits[rows, :valid]
        torch.softmax(_wide(part, p), 1, out=p)
        log_sum[rows] = part.amax(1).float().sub_(p.amax(1).log_())
        found = part.gather(1, column[rows].clamp(min=0).unsqueeze(1)).squeeze(1)
        target[rows] = found.float().masked_fill_(column[rows] < 0, 0.0)
    return log_sum, target


def gradient_by_blocks(
    logits: Tensor, column: Tensor, valid: int, log_sum: Tensor, log_total: Tensor, upstream: Tensor
) -> Tensor:
    """The second half, for CPUs: see CrossEntropy."""
    if valid < logits.shape[1]:
        logits[:, valid:] = 0
    factor = (log_sum - log_total).exp_().mul_(upstream)  # this rank's columns have so much of the whole sum
    for rows, p in _blocks(logits, valid):
        part = logits[rows, :valid]
        torch.softmax(_wide(part, p), 1, out=p).mul_(factor[rows].unsqueeze(1))
        _subtract_targets(p, column[rows], upstream[rows])
        part.copy_(p)
    return logits


def _wide(part: Tensor, room: Tensor) -> Tensor:
    """A block in fp32: itself, or a copy in `room`."""
    return part if part.dtype == torch.float32 else room.copy_(part)


def _blocks(logits: Tensor, valid: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows that are worked on together, and room for them in fp32, the same for all blocks."""
    n = len(logits) if valid else 0
    block = BLOCK * torch.get_num_threads() if logits.device.type == "cpu" else LARGE_BLOCK
    size = max(1, block // logits.shape[1])
    room = torch.empty(min(size, n), valid, device=logits.device)
    for first in range(0, n, size):
        rows = slice(first, min(first + size, n))
        yield rows, room[: rows.stop - first]


def _subtract_targets(p: Tensor, column: Tensor, amount: Tensor) -> None:
    """p - one-hot * amount, in place.

    Shapes: p [n, w], column and amount [n]
    """
    if p.shape[1]:
        p.scatter_add_(1, column.clamp(min=0).unsqueeze(1), amount.masked_fill(column < 0, 0.0).neg_().unsqueeze(1))


REFERENCE = CrossEntropy(statistics, gradient)
BY_BLOCKS = CrossEntropy(statistics_by_blocks, gradient_by_blocks)

"""Cross-entropy over one rank's columns of the logits: what the forward needs of them, and their gradient in place.

Rows are worked on in blocks, so that fp32 copies of half-precision logits exist for a block only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

Tensor = torch.Tensor
BLOCK = {"cpu": 512 * 1024}
"""Logits of a block of rows: on CPUs so many stay in the cache."""
LARGE_BLOCK = 64 * 1024 * 1024
"""The same on other devices, where a block has to keep them busy."""


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
    _subtract_targets(p, column)
    logits[:, valid:] = 0
    logits[:, :valid] = p * upstream.unsqueeze(1)
    return logits


def statistics_by_blocks(logits: Tensor, column: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """The first half, for CPUs: see CrossEntropy. log-sum = largest logit - log of its probability."""
    log_sum = torch.full((len(logits),), -torch.inf, device=logits.device)
    target = torch.zeros_like(log_sum)
    for rows in _blocks(logits) if valid else ():
        part = logits[rows, :valid]
        largest = part.amax(1)
        log_p = torch.softmax(part, 1, dtype=torch.float32).amax(1).log_()
        log_sum[rows] = largest.float().sub_(log_p)
        found = part.gather(1, column[rows].clamp(min=0).unsqueeze(1)).squeeze(1)
        target[rows] = found.float().masked_fill_(column[rows] < 0, 0.0)
    return log_sum, target


def gradient_by_blocks(
    logits: Tensor, column: Tensor, valid: int, log_sum: Tensor, log_total: Tensor, upstream: Tensor
) -> Tensor:
    """The second half, for CPUs: see CrossEntropy."""
    if valid < logits.shape[1]:
        logits[:, valid:] = 0
    share = (log_sum - log_total).exp_()  # of this rank's columns in the whole sum
    shared = logits.is_cuda or not bool((share == 1).all())  # a GPU would have to be waited for to know
    for rows in _blocks(logits) if valid else ():
        part = logits[rows, :valid]
        p = torch.softmax(part, 1, dtype=torch.float32)
        if shared:
            p.mul_(share[rows].unsqueeze(1))
        _subtract_targets(p, column[rows])
        part.copy_(p.mul_(upstream[rows].unsqueeze(1)))
    return logits


def _blocks(logits: Tensor) -> list[slice]:
    rows = max(1, BLOCK.get(logits.device.type, LARGE_BLOCK) // logits.shape[1])
    return [slice(first, first + rows) for first in range(0, len(logits), rows)]


def _subtract_targets(p: Tensor, column: Tensor) -> None:
    """p - one-hot, in place."""
    if p.shape[1]:
        p.scatter_add_(1, column.clamp(min=0).unsqueeze(1), -(column >= 0).to(p.dtype).unsqueeze(1))


REFERENCE = CrossEntropy(statistics, gradient)
BY_BLOCKS = CrossEntropy(statistics_by_blocks, gradient_by_blocks)

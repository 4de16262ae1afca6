"""Which positions of a sequence a context-parallel rank holds."""

from __future__ import annotations

import torch


def context_positions(s: int, c: int, rank: int, ulysses: bool) -> torch.Tensor:
    """Ascending global positions of `rank`, one of `c` ranks that share a sequence of `s` positions.

    ulysses: the rank-th of c equal chunks. Otherwise chunks rank and 2c-1-rank of 2c, because under a causal mask a
    late position has more to see than an early one, and such a pair costs the same on every rank.
    Shapes: -> [s/c]
    """
    if ulysses:
        return torch.arange(s).tensor_split(c)[rank]
    chunks = torch.arange(s).tensor_split(2 * c)
    return torch.cat((chunks[rank], chunks[2 * c - 1 - rank]))

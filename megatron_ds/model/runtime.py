"""What layers need besides their shapes: who holds which part, what computes, where random numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megatron_ds.kernels.table import Kernels
from megatron_ds.model.config import RecomputeConfig
from megatron_ds.parallel.context import Sharding
from megatron_ds.parallel.rng import DropoutStreams


class PostponedGrad(NamedTuple):
    """A weight, and how to compute its gradient of one micro-batch."""

    weight: torch.Tensor
    compute: Callable[[], torch.Tensor]


class WeightGrads:
    """Splits a backward in two: inside `postponed()` linears leave their weight gradients undone and list them.

    Source: Qi et al. 2023, arXiv:2401.10241, sec. 2
    """

    def __init__(self) -> None:
        self.list: list[PostponedGrad] | None = None

    @contextmanager
    def postponed(self) -> Iterator[list[PostponedGrad]]:
        """Collect the weight gradients of the backward that runs inside."""
        self.list = []
        try:
            yield self.list
        finally:
            self.list = None

    def make(self, weight: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """The gradient, or None if it is postponed."""
        if self.list is None:
            return compute()
        self.list.append(PostponedGrad(weight, compute))
        return None


@dataclass(frozen=True)
class Runtime:
    """Shared by all layers of a rank.

    fp32_residual: the residual stream is fp32 whatever the parameters are.
    """

    shards: Sharding = field(default_factory=Sharding.solo)
    kernels: Kernels = field(default_factory=Kernels)
    streams: DropoutStreams = field(default_factory=lambda: DropoutStreams(0))
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    weight_grads: WeightGrads = field(default_factory=WeightGrads)
    fp32_residual: bool = False

"""What layers need besides their shapes: who holds which part, what computes, where random numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from megatron_ds.kernels.products import Products
from megatron_ds.kernels.table import Kernels
from megatron_ds.model.config import RecomputeConfig
from megatron_ds.parallel.context import Sharding
from megatron_ds.parallel.rng import DropoutStreams


class PostponedGrad(NamedTuple):
    """A weight, and where the operands of its gradient of one micro-batch come from: grad^T x.

    Shapes: operands() -> grad [n, o], x [n, i]
    """

    weight: torch.Tensor
    operands: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    products: Products


class MainGrads(Protocol):
    """Where the gradients of weights are summed over micro-batches."""

    def accumulate(
        self, weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, products: Products, more: bool = False
    ) -> None:
        """Add grad^T x to the gradient of a weight; `more`: another part of it follows in the same backward."""

    def accumulate_rows(self, weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, more: bool = False) -> None:
        """Add rows to the rows of a table's gradient; `more` likewise."""


class WeightGrads:
    """Takes the gradients of weights out of autograd's hands: straight into the main gradients, where there are any.

    It can also split a backward in two: inside `postponed()` linears leave their weight gradients undone and list them.
    Source: Qi et al. 2023, arXiv:2401.10241, sec. 2
    """

    def __init__(self) -> None:
        self.list: list[PostponedGrad] | None = None
        self.main: MainGrads | None = None

    @contextmanager
    def postponed(self) -> Iterator[list[PostponedGrad]]:
        """Collect the weight gradients of the backward that runs inside."""
        self.list = []
        try:
            yield self.list
        finally:
            self.list = None

    def make(
        self,
        weight: torch.Tensor,
        operands: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        products: Products,
        more: bool = False,
    ) -> torch.Tensor | None:
        """The gradient of a weight for autograd; None if it is postponed, or already where it belongs."""
        if self.list is not None:
            self.list.append(PostponedGrad(weight, operands, products))
        elif self.main is not None:
            self.main.accumulate(weight, *operands(), products, more)
        else:
            return products.grad_weight(*operands())
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

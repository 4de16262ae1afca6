"""The end of every residual branch: bias, dropout, add."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def bias_dropout_add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, dropout: float
) -> torch.Tensor:
    """residual + dropout(x + bias).

    Shapes: x and residual [s, b, h], bias [h] -> [s, b, h]
    """
    if bias is not None:
        x = x + bias
    return residual + (F.dropout(x, dropout) if dropout else x)


def fused_bias_dropout_add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, dropout: float
) -> torch.Tensor:
    """The same; without dropout nothing is kept and one tensor is made.

    Shapes: as in `bias_dropout_add`
    """
    if dropout or bias is None or x.dtype != residual.dtype:
        return bias_dropout_add(x, bias, residual, dropout)
    out: torch.Tensor = _BiasAdd.apply(x, bias, residual)
    return out


class _BiasAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.add(x, bias).add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return grad, grad.flatten(0, -2).sum(0), grad

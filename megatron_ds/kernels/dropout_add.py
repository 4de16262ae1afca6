"""The end of every residual branch: bias, dropout, add."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bias_dropout_add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, dropout: float
) -> torch.Tensor:
    """residual + dropout(x + bias).

    Shapes: x and residual [s, b, h], bias [h] -> [s, b, h]
    """
    if bias is not None:
        x = x + bias
    return residual + (F.dropout(x, dropout) if dropout else x)

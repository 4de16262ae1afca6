"""LayerNorm and RMSNorm over the last dim, statistics in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias.

    Shapes: x [..., h] -> [..., h]
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; RMSNorm has no bias.

    Shapes: x [..., h] -> [..., h]
    Source: Zhang and Sennrich 2019, arXiv:1910.07467
    """
    assert bias is None
    return F.rms_norm(x, weight.shape, weight, eps)

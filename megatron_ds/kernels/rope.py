"""Rotary position embedding, half-split form (GPT-NeoX, Llama): feature i turns with feature i + rotated/2.

Source: Su et al. 2021, arXiv:2104.09864
"""

from __future__ import annotations

import torch


def rope_table(positions: torch.Tensor, rotated: int, base: float, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines of every position's angles.

    Shapes: positions [s, b] -> [2, s, b, 1, rotated]
    """
    frequencies = base ** (-torch.arange(0, rotated, 2, device=positions.device, dtype=torch.float32) / rotated)
    angles = (positions.float().unsqueeze(-1) * frequencies).repeat(1, 1, 2).unsqueeze(2)
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn the first `rotated` features of every head.

    Shapes: x [s, b, a, d], table [2, s, b, 1, rotated] -> [s, b, a, d]
    """
    rotated = table.shape[-1]
    turned, kept = x[..., :rotated], x[..., rotated:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * table[0] + torch.cat((-high, low), dim=-1) * table[1]
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned

"""Rotary position embedding, half-split form (GPT-NeoX, Llama): feature i turns with feature i + rotated/2.

Source: Su et al. 2021, arXiv:2104.09864
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class RopeScaling(NamedTuple):
    """Llama 3.1's stretching: long wavelengths by `factor`, short ones not at all, those between in proportion."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


def rope_frequencies(
    rotated: int, base: float, interpolation: float | None = None, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """Angle per position of every pair of features; `interpolation` divides all of them.

    Shapes: -> [rotated/2]
    """
    frequencies = 1.0 / base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    if interpolation is not None:
        frequencies = frequencies / interpolation
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_positions * frequencies / (2 * math.pi)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_table(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines of every position's angles.

    Shapes: positions [s, b], frequencies [rotated/2] -> [2, s, b, 1, rotated]
    """
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

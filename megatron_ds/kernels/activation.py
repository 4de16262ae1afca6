"""Activations of the MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, as GPT-2 and Megatron use it.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415
    """
    return F.gelu(x, approximate="tanh")


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where x holds gate and up side by side.

    Shapes: x [..., 2f] -> [..., f]
    Source: Shazeer 2020, arXiv:2002.05202
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up

"""Activations of the MLP; gated ones get gate and up side by side: x [..., 2f] -> [..., f].

Source: Hendrycks and Gimpel 2016, arXiv:1606.08415; Shazeer 2020, arXiv:2002.05202
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, as GPT-2 and Megatron's fused kernel have it."""
    return F.gelu(x, approximate="tanh")


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by erf."""
    return F.gelu(x)


def relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)."""
    return F.relu(x)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2."""
    return F.relu(x).square()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu_tanh(x: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, GELU in its tanh form."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def geglu(x: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, GELU by erf."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


def reglu(x: torch.Tensor) -> torch.Tensor:
    """relu(gate) * up."""
    gate, up = x.chunk(2, dim=-1)
    return F.relu(gate) * up


def liglu(x: torch.Tensor) -> torch.Tensor:
    """gate * up."""
    gate, up = x.chunk(2, dim=-1)
    return gate * up

"""Causal self-attention through torch's scaled_dot_product_attention: flash on CPU and GPU, no s x s matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over earlier positions; fewer key heads than query heads are shared in groups.

    Shapes: q [s, b, a, d], k and v [s, b, k, d] -> [s, b, a*d]
    """
    s, b, a, d = q.shape
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=k.shape[1] != a)
    return out.permute(2, 0, 1, 3).reshape(s, b, a * d)

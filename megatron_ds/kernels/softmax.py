"""Scaled masked softmax, for attention that makes its matrix of scores."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """softmax(scale * scores) over the keys that are seen, in fp32; a query that sees nothing gets zeros.

    Shapes: scores [b, a, sq, sk], mask [b or 1, a or 1, sq, sk], booleans, true where seen -> [b, a, sq, sk]
    """
    wide = scores.float() * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        mask = ~later if mask is None else mask & ~later
    if mask is None:
        return torch.softmax(wide, -1).to(scores.dtype)
    p = torch.softmax(wide.masked_fill(~mask, -torch.inf), -1)
    return p.masked_fill(~mask.any(-1, keepdim=True), 0.0).to(scores.dtype)

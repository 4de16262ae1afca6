"""Causal self-attention: through torch's scaled_dot_product_attention, or in blocks of rows where that is faster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

ROWS = 128
"""Rows of a block: its scores stay in the processor's cache."""
LONGEST = 512
"""Sequences for which blocks were measured to be faster."""


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over earlier positions; fewer key heads than query heads are shared in groups.

    torch's flash attention on CPUs makes little of bf16: there short sequences are computed in blocks.

    Shapes: q [s, b, a, d], k and v [s, b, k, d] -> [s, b, a*d]
    """
    short = q.shape[0] <= LONGEST and q.shape == k.shape
    if short and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not dropout:
        out: torch.Tensor = _Blocks.apply(q, k, v)
        return out
    return causal_attention(q, k, v, dropout)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """The same through torch's scaled_dot_product_attention: flash on CPU and GPU, no s x s matrix.

    Shapes: q [s, b, a, d], k and v [s, b, k, d] -> [s, b, a*d]
    """
    s, b, a, d = q.shape
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=k.shape[1] != a)
    return out.permute(2, 0, 1, 3).reshape(s, b, a * d)


class _Blocks(torch.autograd.Function):
    """Blocks of rows against all earlier columns; scores and softmax in fp32, probabilities kept in q's precision."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, b, a, d = q.shape
        out = q.new_empty(s, b * a, d)
        rows, columns, values = _by_head(q), _by_head(k), _by_head(v)
        kept = [_probabilities(rows, columns, first, last) for first, last in _blocks(s)]
        for p, (first, last) in zip(kept, _blocks(s), strict=True):
            out[first:last] = torch.bmm(p, values[:, :last]).transpose(0, 1)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(s, b, a * d)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *kept = ctx.saved_tensors
        s, b, a, d = q.shape
        q, k, v = _by_head(q), _by_head(k), _by_head(v)
        grad = _by_head(grad.reshape(s, b, a, d))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (first, last) in zip(kept, _blocks(s), strict=True):
            rows = grad[:, first:last]
            dv[:, :last] += torch.bmm(p.transpose(1, 2), rows)
            dp = torch.bmm(rows, v[:, :last].transpose(1, 2))
            # d(scores) = p * (dp - the row's sum of p * dp)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, first:last] = torch.bmm(ds, k[:, :last])
            dk[:, :last] += torch.bmm(ds.transpose(1, 2), q[:, first:last])
        scale = 1 / math.sqrt(d)
        dq, dk, dv = (t.view(b, a, s, d).permute(2, 0, 1, 3) for t in (dq.mul_(scale), dk.mul_(scale), dv))
        return dq, dk, dv


def _by_head(t: torch.Tensor) -> torch.Tensor:
    """[s, b, a, d] -> [b*a, s, d]"""
    return t.permute(1, 2, 0, 3).flatten(0, 1)


def _blocks(s: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + ROWS, s)) for first in range(0, s, ROWS))


def _probabilities(q: torch.Tensor, k: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """softmax of rows [first, last) over columns [0, last), those after each row left out.

    Shapes: q, k [n, s, d] -> [n, last - first, last]
    """
    scores = torch.bmm(q[:, first:last].float().mul_(1 / math.sqrt(q.shape[-1])), k[:, :last].float().transpose(1, 2))
    scores[:, :, first:] += torch.full((last - first, last - first), -torch.inf, device=q.device).triu_(1)
    return torch.softmax(scores, -1).to(q.dtype)

"""Attention: through torch's scaled_dot_product_attention, or in blocks of rows where that is faster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ROWS = 128
"""Rows of a block: its scores stay in the processor's cache."""
LONGEST = 512
"""Sequences for which blocks were measured to be faster."""


class Pattern(NamedTuple):
    """What holds for every sample: whether later keys are hidden, and the factor of the scores (None: 1/sqrt(d)).

    Everything else that a query may or may not see is a mask, beside which `causal` has no meaning.
    """

    causal: bool = True
    scale: float | None = None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, pattern: Pattern, dropout: float
) -> torch.Tensor:
    """softmax(scale q k^T + mask) v; fewer key heads than query heads are shared in groups.

    A mask of booleans says which keys a query sees. torch's flash attention on CPUs makes little of bf16: there short
    sequences are computed in blocks.

    Shapes: q [sq, b, a, d], k and v [sk, b, k, d], mask [b or 1, a or 1, sq, sk] -> [sq, b, a*d]
    """
    short = max(q.shape[0], k.shape[0]) <= LONGEST and q.shape[1:] == k.shape[1:]
    fixed = mask is None or not mask.requires_grad
    if short and fixed and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not dropout:
        out: torch.Tensor = _Blocks.apply(q, k, v, mask, pattern)
        return out
    return torch_attention(q, k, v, mask, pattern, dropout)


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, pattern: Pattern, dropout: float
) -> torch.Tensor:
    """The same through torch's scaled_dot_product_attention: without a mask flash, no matrix of sq x sk.

    Shapes: as in `attention`
    """
    s, b, a, d = q.shape
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=pattern.causal and mask is None,
        scale=pattern.scale,
        enable_gqa=k.shape[1] != a,
    )
    return out.permute(2, 0, 1, 3).reshape(s, b, a * d)


class _Blocks(torch.autograd.Function):
    """Blocks of rows against all columns that they see; scores and softmax in fp32, probabilities in q's precision."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, pattern: Pattern
    ) -> torch.Tensor:
        s, b, a, d = q.shape
        out = q.new_empty(s, b * a, d)
        rows, columns, values = _by_head(q), _by_head(k), _by_head(v)
        scale = 1 / math.sqrt(d) if pattern.scale is None else pattern.scale
        ctx.causal, ctx.scale = pattern.causal and mask is None, scale
        kept = []
        for first, last, end in _blocks(s, len(k), ctx.causal):
            scores = torch.bmm(rows[:, first:last].float().mul_(scale), columns[:, :end].float().transpose(1, 2))
            if mask is not None:
                _apply(scores.view(b, a, last - first, end), mask[:, :, first:last])
            elif ctx.causal:
                scores[:, :, first:] += torch.full((last - first,) * 2, -torch.inf, device=q.device).triu_(1)
            kept.append(torch.softmax(scores, -1).to(q.dtype))
            out[first:last] = torch.bmm(kept[-1], values[:, :end]).transpose(0, 1)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(s, b, a * d)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        s, b, a, d = q.shape
        q, k, v = _by_head(q), _by_head(k), _by_head(v)
        grad = _by_head(grad.reshape(s, b, a, d))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (first, last, end) in zip(kept, _blocks(s, k.shape[1], ctx.causal), strict=True):
            rows = grad[:, first:last]
            dv[:, :end] += torch.bmm(p.transpose(1, 2), rows)
            dp = torch.bmm(rows, v[:, :end].transpose(1, 2))
            # d(scores) = p * (dp - the row's sum of p * dp)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, first:last] = torch.bmm(ds, k[:, :end])
            dk[:, :end] += torch.bmm(ds.transpose(1, 2), q[:, first:last])
        dq, dk, dv = (t.view(b, a, -1, d).permute(2, 0, 1, 3) for t in (dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv))
        return dq, dk, dv, None, None


def _by_head(t: torch.Tensor) -> torch.Tensor:
    """[s, b, a, d] -> [b*a, s, d]"""
    return t.permute(1, 2, 0, 3).flatten(0, 1)


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Rows [first, last) and the number of columns that they see."""
    for first in range(0, queries, ROWS):
        last = min(first + ROWS, queries)
        yield first, last, last if causal else keys


def _apply(scores: torch.Tensor, mask: torch.Tensor) -> None:
    """Add a mask to scores, in place."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores += mask

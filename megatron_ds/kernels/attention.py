"""Attention: through torch's scaled_dot_product_attention, in blocks of rows where that is faster, or unfused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensor = torch.Tensor
ROWS = 64
"""Rows of a block: its scores stay in the processor's cache."""
LONGEST = 512
"""Sequences for which blocks were measured to be faster."""
LEARNED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of torch's backends those that have a gradient of the mask; cuDNN's is chosen without and fails in the backward."""
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Pattern(NamedTuple):
    """What holds for every sample: whether later keys are hidden, and the factor of the scores (None: 1/sqrt(d)).

    Everything else that a query may or may not see is a mask, beside which `causal` has no meaning.
    """

    causal: bool = True
    scale: float | None = None


Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Pattern, float], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern, dropout: float) -> Tensor:
    """softmax(scale q k^T + mask) v; fewer key heads than query heads are shared in groups.

    A mask of booleans says which keys a query sees. torch's flash attention on CPUs makes little of bf16, and of short
    sequences: these are computed in blocks.

    Shapes: q [sq, b, a, d], k and v [sk, b, k, d], mask [b or 1, a or 1, sq, sk] -> [sq, b, a*d]
    """
    return _on_cpu(q, k, v, mask, pattern, dropout, q.dtype)


def attention_in_fp32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern, dropout: float) -> Tensor:
    """The same for processors that multiply fp32 faster than half precision; what is kept is as it came.

    Shapes: as in `attention`
    """
    return _on_cpu(q, k, v, mask, pattern, dropout, torch.float32)


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern, dropout: float, multiplied: torch.dtype
) -> Tensor:
    """By what is fastest for a case; `multiplied`: the precision in which."""
    aligned = q.shape[0] == k.shape[0] or not pattern.causal
    fixed = mask is None or not mask.requires_grad
    ours = q.device.type == "cpu" and multiplied in (torch.bfloat16, torch.float32) and q.dtype != torch.float64
    longest = max(q.shape[0], k.shape[0])
    if not (ours and aligned and fixed and not dropout and longest):
        return torch_attention(q, k, v, mask, pattern, dropout)
    if longest <= LONGEST:
        out: Tensor = _Blocks.apply(q, k, v, mask, pattern, multiplied)
    elif multiplied != q.dtype:
        out = _Flash.apply(q, k, v, mask, pattern, multiplied)
    else:
        out = torch_attention(q, k, v, mask, pattern, dropout)
    return out


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern, dropout: float) -> Tensor:
    """The same through torch's scaled_dot_product_attention: without a mask flash, no matrix of sq x sk.

    Shapes: as in `attention`
    """
    s, b, a, d = q.shape
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    with sdpa_kernel(LEARNED) if mask is not None and mask.requires_grad else nullcontext():
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


def by_backends(backends: Sequence[SDPBackend]) -> Attention:
    """torch's attention by the first of these backends that can serve a call."""

    def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern, dropout: float) -> Tensor:
        with sdpa_kernel(list(backends), set_priority=True):
            return torch_attention(q, k, v, mask, pattern, dropout)

    return chosen


def unfused(softmax: Callable[[Tensor, Tensor | None, float, bool], Tensor]) -> Attention:
    """Two products and a softmax between them, with the whole matrix of scores."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern, dropout: float) -> Tensor:
        s, b, a, d = q.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        if k.shape[1] != a:
            k, v = (t.repeat_interleave(a // t.shape[1], 1) for t in (k, v))
        scale = 1 / math.sqrt(d) if pattern.scale is None else pattern.scale
        scores = (q * scale) @ k.mT  # in fp16 a product that is scaled afterwards may have overflowed
        if mask is not None and mask.dtype != torch.bool:
            p = softmax(scores.float() + mask, None, 1.0, False).to(q.dtype)
        else:
            p = softmax(scores, mask, 1.0, pattern.causal and mask is None)
        return (F.dropout(p, dropout) @ v).permute(2, 0, 1, 3).reshape(s, b, a * d)

    return call


class _Blocks(torch.autograd.Function):
    """Blocks of rows against all columns that they see; scores and softmax in fp32, kept probabilities as q.

    The g query heads that share a key head lie under each other, so that nothing is copied for them.
    `multiplied`: what all other products are made in, q's precision or fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern, multiplied: torch.dtype
    ) -> Tensor:
        (s, b, a, d), heads = q.shape, k.shape[2]
        out = q.new_empty(s, b, a * d)
        keys, values = _by_head(k, heads), _by_head(v, heads)
        columns, wide_values = keys.float(), values.to(multiplied)
        scale = 1 / math.sqrt(d) if pattern.scale is None else pattern.scale
        ctx.causal, ctx.scale, ctx.heads, ctx.multiplied = pattern.causal and mask is None, scale, heads, multiplied
        queries, kept, places = [], [], out.view(s, b * heads, a // heads, d)
        later = torch.full((ROWS, ROWS), -torch.inf, device=q.device).triu_(1) if ctx.causal else None
        for first, last, end in _blocks(s, len(k), ctx.causal):
            queries.append(_by_head(q[first:last], heads))
            part = queries[-1].float()
            scores = torch.baddbmm(part.new_empty(()), part, columns[:, :end].mT, beta=0, alpha=scale)
            if mask is not None:
                _apply(scores.view(b, a, last - first, end), mask[:, :, first:last])
            elif later is not None:
                scores.view(b * heads, -1, last - first, end)[..., first:] += later[: last - first, : last - first]
            kept.append(torch.softmax(scores, -1).to(q.dtype))
            places[first:last] = _by_row(torch.bmm(kept[-1].to(multiplied), wide_values[:, :end]), last - first)
        # Not q, k and v, which may be parts of one tensor that then lives no longer.
        ctx.save_for_backward(keys, values, *queries, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, v, *others = ctx.saved_tensors
        queries, kept = others[: len(others) // 2], others[len(others) // 2 :]
        (s, b, _), d, heads = grad.shape, k.shape[-1], ctx.heads
        grad, multiplied = grad.view(s, b, -1, d), ctx.multiplied
        k, v = k.to(multiplied), v.to(multiplied)
        dq, nothing = grad.new_empty(grad.shape), k.new_empty(())
        places, dk, dv = dq.view(s, b * heads, -1, d), None, None
        blocks = zip(queries, kept, _blocks(s, k.shape[1], ctx.causal), strict=True)
        # The last rows first: they see all columns, so that nothing has to be zeroed for their products. bf16 products
        # copy what is not dense, and several times what is also transposed.
        for q, p, (first, last, end) in reversed(list(blocks)):
            rows, q, p = (t.to(multiplied) for t in (_by_head(grad[first:last], heads), q, p))
            dp = torch.bmm(rows, v[:, :end].contiguous().mT)
            # d(scores) = p * (dp - the row's sum of p * dp)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            places[first:last] = _by_row(torch.baddbmm(nothing, ds, k[:, :end], beta=0, alpha=ctx.scale), last - first)
            to_keys = torch.baddbmm(nothing, ds.mT, q, beta=0, alpha=ctx.scale)
            to_values = torch.bmm(p.mT, rows)
            if dk is None or dv is None:
                dk, dv = to_keys, to_values
            else:  # baddbmm_ into a part would multiply matrix by matrix
                dk[:, :end] += to_keys
                dv[:, :end] += to_values
        assert dk is not None and dv is not None
        to_k, to_v = (t.to(grad.dtype).view(b, heads, -1, d).permute(2, 0, 1, 3) for t in (dk, dv))
        return dq, to_k, to_v, None, None, None


class _Flash(torch.autograd.Function):
    """torch's flash attention for CPUs, multiplied in another precision than that of what is kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern, multiplied: torch.dtype
    ) -> Tensor:
        ctx.causal, ctx.scale, ctx.multiplied = pattern.causal and mask is None, pattern.scale, multiplied
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.new_zeros((), dtype=multiplied).masked_fill(~mask, -torch.inf)
        elif mask is not None:
            mask = mask.to(multiplied)
        wide, lse = _flash(*_for_flash(q, k, v, multiplied), 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        out = wide.permute(2, 0, 1, 3).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        flat: Tensor = out.flatten(2)
        return flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        rows, kept = (t.view(q.shape).permute(1, 2, 0, 3).to(ctx.multiplied) for t in (grad, out))
        wide = _for_flash(q, k, v, ctx.multiplied)
        grads = _flash_backward(rows, *wide, kept, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        dq, dk, dv = (t.permute(2, 0, 1, 3) for t in grads)
        if k.shape != q.shape:
            dk, dv = (t.unflatten(2, (k.shape[2], -1)).sum(3) for t in (dk, dv))
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None, None


def _for_flash(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, a, d] -> [b, a, s, d] of a precision, with a key head for each query head."""
    q, k, v = (t.permute(1, 2, 0, 3).to(dtype) for t in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    return (q, k, v) if shared == 1 else (q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1))


def _by_head(t: Tensor, heads: int) -> Tensor:
    """[s, b, a, d] -> [b*k, (a/k)*s, d]"""
    return t.permute(1, 2, 0, 3).reshape(t.shape[1] * heads, -1, t.shape[-1])


def _by_row(t: Tensor, rows: int) -> Tensor:
    """[b*k, (a/k)*rows, d] -> [rows, b*k, a/k, d]"""
    return t.view(len(t), -1, rows, t.shape[-1]).permute(2, 0, 1, 3)


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Rows [first, last) and the number of columns that they see."""
    for first in range(0, queries, ROWS):
        last = min(first + ROWS, queries)
        yield first, last, last if causal else keys


def _apply(scores: Tensor, mask: Tensor) -> None:
    """Add a mask to scores, in place."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores += mask

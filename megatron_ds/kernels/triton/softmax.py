"""Scaled masked softmax for attention whose scores are held: scale, mask and softmax in one pass over a row."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_ds.kernels.triton.launch import jit, tiles, whole_rows

Tensor = torch.Tensor


def softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """softmax(scale * scores) over the keys that a query sees: those of the mask, and if `causal` none later than it.

    A query that sees nothing gets zeros.
    Shapes: scores [b, a, sq, sk], mask of booleans [b or 1, a or 1, sq, sk] -> [b, a, sq, sk]
    """
    p: Tensor = _Softmax.apply(scores, mask, scale, causal)
    return p


class _Softmax(torch.autograd.Function):
    """Keeps the result alone: where it is 0 no gradient passes."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        ctx.scale = scale
        scores = scores.contiguous()
        p = torch.empty_like(scores)
        if p.numel():
            a, sq, sk = scores.shape[1:]
            rows, tile = p.numel() // sk, whole_rows(sk)
            seen = None if mask is None else mask.expand(scores.shape).view(torch.uint8)
            _forward[tiles(rows, sk, tile)](
                scores, seen, p, rows, a, sq, sk, scale, *((0, 0, 0, 0) if seen is None else seen.stride()),
                CAUSAL=causal, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (p,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(p)
        if p.numel():
            sk = p.shape[-1]
            rows, tile = p.numel() // sk, whole_rows(sk)
            _backward[tiles(rows, sk, tile)](
                grad, p, out, rows, sk, ctx.scale, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps
            )
        return out, None, None, None


@jit
def _forward(
    scores: tl.tensor,
    mask: tl.tensor,
    p: tl.tensor,
    rows: tl.tensor,
    a: tl.tensor,
    sq: tl.tensor,
    sk: tl.tensor,
    scale: tl.tensor,
    mask_b: tl.tensor,
    mask_a: tl.tensor,
    mask_q: tl.tensor,
    mask_k: tl.tensor,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < sk)
    query, head = row % sq, row // sq
    seen, read = inside, inside
    if CAUSAL:
        seen = seen & (column <= query)
        # To a round number of keys: up to the query alone they would be read one by one.
        read = read & (column < (query // 16 + 1) * 16)
    if mask is not None:
        at = mask + head // a * mask_b + head % a * mask_a + query * mask_q + column * mask_k
        seen = seen & (tl.load(at, mask=read, other=0) != 0)
    value = tl.load(scores + row * sk + column, mask=read, other=0.0).to(tl.float32) * scale
    value = tl.where(seen, value, float("-inf"))
    top = tl.max(value, axis=1)
    value = tl.exp(value - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(value, axis=1)
    value = value / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(p + row * sk + column, value.to(p.dtype.element_ty), mask=inside)


@jit
def _backward(
    grad: tl.tensor,
    p: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    sk: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < sk)
    value = tl.load(p + row * sk + column, mask=inside, other=0.0).to(tl.float32)
    dp = tl.load(grad + row * sk + column, mask=inside, other=0.0).to(tl.float32)
    value = value * (dp - tl.sum(value * dp, axis=1)[:, None]) * scale
    tl.store(out + row * sk + column, value.to(out.dtype.element_ty), mask=inside)

"""LayerNorm and RMSNorm, forward and backward each in one pass over the rows."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_ds.kernels.triton.launch import jit, resident_programs, tiles, whole_rows

Tensor = torch.Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias.

    Shapes: x [..., h], weight and bias [h] -> [..., h]
    Source: Ba et al. 2016, arXiv:1607.06450
    """
    y: Tensor = _Norm.apply(x, weight, bias, eps, True)
    return y


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; RMSNorm has no bias.

    Shapes: x [..., h], weight [h] -> [..., h]
    Source: Zhang and Sennrich 2019, arXiv:1910.07467
    """
    assert bias is None
    y: Tensor = _Norm.apply(x, weight, None, eps, False)
    return y


class _Norm(torch.autograd.Function):
    """Keeps the input and two numbers a row (RMSNorm: one)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
        h = x.shape[-1]
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        rows = x.numel() // h if h else 0
        y = torch.empty_like(x)
        mean = x.new_empty(rows, dtype=torch.float32) if centred else None
        rstd = x.new_empty(rows, dtype=torch.float32)
        if rows:
            tile = whole_rows(h)
            _forward[tiles(rows, h, tile)](
                x, weight, bias, y, mean, rstd, rows, h, eps,
                ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        rows, h = len(rstd), x.shape[-1]
        grad, dx = grad.contiguous(), torch.empty_like(x)
        tile = whole_rows(h)
        programs = min(-(-rows // tile.rows), resident_programs(x.device))
        # Partial sums, one row a program, summed in a fixed order: with atomics no two runs would be equal.
        dw = x.new_empty(programs, h, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        db = x.new_empty(programs, h, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        if rows:
            _backward[(programs,)](
                grad, x, weight, mean, rstd, dx, dw, db, rows, h,
                ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
        dweight = None if dw is None else dw.sum(0).to(weight.dtype)
        dbias = None if db is None else db.sum(0).to(bias.dtype)
        return dx, dweight, dbias, None, None


@jit
def _forward(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    rows: tl.tensor,
    h: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < h)[None, :]
    at = row.to(tl.int64)[:, None] * h + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if mean is not None:
        centre = tl.sum(value, axis=1) / h
        tl.store(mean + row, centre, mask=row < rows)
        value = tl.where(inside, value - centre[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(value * value, axis=1) / h + eps)
    tl.store(rstd + row, factor, mask=row < rows)
    value = value * factor[:, None] * tl.load(weight + column, mask=column < h, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=column < h, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@jit
def _backward(
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    dx: tl.tensor,
    dw: tl.tensor,
    db: tl.tensor,
    rows: tl.tensor,
    h: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    scale = tl.load(weight + column, mask=column < h, other=0.0).to(tl.float32)[None, :]
    sum_w = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sum_b = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < h)[None, :]
        at = row.to(tl.int64)[:, None] * h + column[None, :]
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        if mean is not None:
            value -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        value = tl.where(inside, value * factor, 0.0)
        if dw is not None:
            sum_w += dy * value
        if db is not None:
            sum_b += dy
        dy = dy * scale
        left = dy - value * (tl.sum(dy * value, axis=1) / h)[:, None]
        if mean is not None:
            left -= (tl.sum(dy, axis=1) / h)[:, None]
        tl.store(dx + at, (left * factor).to(dx.dtype.element_ty), mask=inside)
    to = program * h + column
    if dw is not None:
        tl.store(dw + to, tl.sum(sum_w, axis=0), mask=column < h)
    if db is not None:
        tl.store(db + to, tl.sum(sum_b, axis=0), mask=column < h)

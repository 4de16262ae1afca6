"""The end of every residual branch in one pass: bias, dropout, add.

Of the mask only its seed is kept, one number that torch's generator draws on the device: the stream in which torch
stands decides the mask, and the backward makes it again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_ds.kernels.triton.launch import column_sums, jit, pieces, tiles

Tensor = torch.Tensor


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, dropout: float) -> Tensor:
    """residual + dropout(x + bias), in the wider precision of x and residual.

    Shapes: x and residual [..., h], bias [h] -> [..., h]
    """
    y: Tensor = _BiasDropoutAdd.apply(x, bias, residual, dropout)
    return y


class _BiasDropoutAdd(torch.autograd.Function):
    """Keeps a seed, and that only if there is dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, dropout: float) -> Tensor:
        assert x.shape == residual.shape and 0 <= dropout <= 1
        ctx.dropout = dropout
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype, residual.dtype
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) if dropout else None
        ctx.save_for_backward(seed)
        return _launch(x, bias, residual, seed, dropout, torch.promote_types(x.dtype, residual.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        x_dtype, bias_dtype, residual_dtype = ctx.dtypes
        dx = grad.to(x_dtype) if seed is None else _launch(grad, None, None, seed, ctx.dropout, x_dtype)
        dbias = None
        if ctx.needs_input_grad[1]:
            dbias = column_sums(dx).to(bias_dtype)
        return dx, dbias, grad.to(residual_dtype), None


def _launch(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, dropout: float, dtype: torch.dtype
) -> Tensor:
    """residual + dropout(x + bias) in that precision; the same seed drops the same."""
    x = x.contiguous()
    bias, residual = (None if t is None else t.contiguous() for t in (bias, residual))
    y = torch.empty_like(x, dtype=dtype)
    if y.numel():
        h = x.shape[-1]
        rows, tile = y.numel() // h, pieces(h)
        factor = 1 / (1 - dropout) if dropout < 1 else 0.0
        _kernel[tiles(rows, h, tile)](
            x, bias, residual, seed, y, rows, h, dropout, factor,
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return y


@jit
def _kernel(
    x: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    seed: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    h: tl.tensor,
    dropout: tl.tensor,
    factor: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    blocks = tl.cdiv(h, COLUMNS)
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < h)
    at = row * h + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=column < h, other=0.0).to(tl.float32)
    if seed is not None:
        value = tl.where(tl.rand(tl.load(seed), at) >= dropout, value * factor, 0.0)
    if residual is not None:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)

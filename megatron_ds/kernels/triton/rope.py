"""Rotary position embedding, half-split form, in one pass: neither halves nor heads are copied apart.

Source: Su et al. 2021, arXiv:2104.09864
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_ds.kernels.triton.launch import ELEMENTS, jit

Tensor = torch.Tensor


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn the first `rotated` features of every head; the table gets no gradient.

    Shapes: x [s, b, a, d], table [2, s, b, 1, rotated] -> [s, b, a, d]
    """
    y: Tensor = _Rope.apply(x, table)
    return y


class _Rope(torch.autograd.Function):
    """The gradient is turned back by the same kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (table,) = ctx.saved_tensors
        return _turn(grad, table, True), None


def _turn(x: Tensor, table: Tensor, back: bool) -> Tensor:
    (s, b, a, d), rotated = x.shape, table.shape[-1]
    assert rotated % 2 == 0 and rotated <= d
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    # Queries and keys are slices of one product: they are read where they lie.
    x = x if x.stride(-1) == 1 else x.contiguous()
    table = table.expand(2, s, b, 1, rotated)
    table = table if table.stride(-1) == 1 else table.contiguous()
    half, rest = triton.next_power_of_2(max(1, rotated // 2)), d - rotated
    heads = min(triton.next_power_of_2(a), max(1, ELEMENTS // half))
    _kernel[(s * b * -(-a // heads),)](
        x, table, y, b, a, d, rotated // 2, *x.stride()[:3], *table.stride()[:3],
        BACK=back, HEADS=heads, HALF=half, REST=triton.next_power_of_2(rest) if rest else 0, num_warps=4,
    )  # fmt: skip
    return y


@jit
def _kernel(
    x: tl.tensor,
    table: tl.tensor,
    y: tl.tensor,
    b: tl.tensor,
    a: tl.tensor,
    d: tl.tensor,
    half: tl.tensor,
    x_s: tl.tensor,
    x_b: tl.tensor,
    x_a: tl.tensor,
    table_part: tl.tensor,
    table_s: tl.tensor,
    table_b: tl.tensor,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """One position; `table_part` is the way from a cosine to its sine."""
    groups = tl.cdiv(a, HEADS)
    position = (tl.program_id(0) // groups).to(tl.int64)
    head = (tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS))[:, None]
    i = tl.arange(0, HALF)[None, :]
    angle = table + position // b * table_s + position % b * table_b + i
    cos_low = tl.load(angle, mask=i < half, other=0.0).to(tl.float32)
    cos_high = tl.load(angle + half, mask=i < half, other=0.0).to(tl.float32)
    sin_low = tl.load(angle + table_part, mask=i < half, other=0.0).to(tl.float32)
    sin_high = tl.load(angle + table_part + half, mask=i < half, other=0.0).to(tl.float32)
    at = x + position // b * x_s + position % b * x_b + head * x_a
    to = y + (position * a + head) * d
    inside = (head < a) & (i < half)
    low = tl.load(at + i, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + half + i, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        new_low = low * cos_low + high * sin_high
        new_high = high * cos_high - low * sin_low
    else:
        new_low = low * cos_low - high * sin_low
        new_high = high * cos_high + low * sin_high
    tl.store(to + i, new_low.to(y.dtype.element_ty), mask=inside)
    tl.store(to + half + i, new_high.to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        i = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < a) & (i < d)
        tl.store(to + i, tl.load(at + i, mask=inside), mask=inside)

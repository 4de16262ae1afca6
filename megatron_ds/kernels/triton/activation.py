"""Activations of the MLP with the bias before them; gated ones get gate and up side by side: x [..., 2f] -> [..., f].

The backward computes everything again from x: nothing else is kept.
Source: Hendrycks and Gimpel 2016, arXiv:1606.08415; Shazeer 2020, arXiv:2002.05202
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_ds.kernels.activation import Activation
from megatron_ds.kernels.triton.launch import column_sums, jit, pieces, tiles

Tensor = torch.Tensor


KINDS = {
    "gelu_tanh": ("gelu_tanh", False),
    "gelu": ("gelu", False),
    "relu": ("relu", False),
    "squared_relu": ("squared_relu", False),
    "swiglu": ("silu", True),
    "geglu_tanh": ("gelu_tanh", True),
    "geglu": ("gelu", True),
    "reglu": ("relu", True),
    "liglu": ("identity", True),
}
"""Of each activation the function, and whether it is a gate's."""


def _activation(kind: str, gated: bool) -> Activation:
    def call(x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert not gated or x.shape[-1] % 2 == 0
        y: Tensor = _Activation.apply(x, bias, kind, gated)
        return y

    return call


class _Activation(torch.autograd.Function):
    """One pass over x and one over x and the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
        ctx.kind, ctx.gated = kind, gated
        x = x.contiguous()
        bias = None if bias is None else bias.contiguous()
        f = x.shape[-1] // (2 if gated else 1)
        y = x.new_empty(*x.shape[:-1], f)
        if y.numel():
            rows, tile = y.numel() // f, pieces(f)
            _forward[tiles(rows, f, tile)](
                x, bias, y, rows, f, KIND=kind, GATED=gated, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps
            )
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        f = grad.shape[-1]
        if grad.numel():
            rows, tile = grad.numel() // f, pieces(f)
            _backward[tiles(rows, f, tile)](
                grad, x, bias, dx, rows, f,
                KIND=ctx.kind, GATED=ctx.gated, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
        dbias = None
        if ctx.needs_input_grad[1]:
            dbias = column_sums(dx).to(bias.dtype)
        return dx, dbias, None, None


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({name: _activation(*how) for name, how in KINDS.items()})
"""All of kernels/activation.py, under the same names."""


@jit
def _value(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "gelu_tanh":
        # 1 + tanh(u) = 2 sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "relu":
        y = tl.where(x <= 0.0, 0.0, x)  # this way round a NaN stays one
    elif KIND == "squared_relu":
        y = tl.where(x <= 0.0, 0.0, x * x)
    else:
        tl.static_assert(KIND == "identity")
        y = x
    return y


@jit
def _slope(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif KIND == "relu":
        y = tl.where(x <= 0.0, 0.0, 1.0)
    elif KIND == "squared_relu":
        y = tl.where(x <= 0.0, 0.0, 2.0 * x)
    else:
        tl.static_assert(KIND == "identity")
        y = tl.full(x.shape, 1.0, tl.float32)
    return y


@jit
def _biased(x: tl.tensor, bias: tl.tensor, at: tl.tensor, column: tl.tensor, inside: tl.tensor) -> tl.tensor:
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return value


@jit
def _forward(
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    f: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    blocks = tl.cdiv(f, COLUMNS)
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < f)
    to = row * f + column
    if GATED:
        gate = _biased(x, bias, to + row * f, column, inside)
        value = _value(gate, KIND) * _biased(x, bias, to + row * f + f, column + f, inside)
    else:
        value = _value(_biased(x, bias, to, column, inside), KIND)
    tl.store(y + to, value.to(y.dtype.element_ty), mask=inside)


@jit
def _backward(
    grad: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    dx: tl.tensor,
    rows: tl.tensor,
    f: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    blocks = tl.cdiv(f, COLUMNS)
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < f)
    at = row * f + column
    dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        at += row * f
        gate = _biased(x, bias, at, column, inside)
        up = _biased(x, bias, at + f, column + f, inside)
        tl.store(dx + at + f, (dy * _value(gate, KIND)).to(dx.dtype.element_ty), mask=inside)
        dy = dy * up
    else:
        gate = _biased(x, bias, at, column, inside)
    tl.store(dx + at, (dy * _slope(gate, KIND)).to(dx.dtype.element_ty), mask=inside)

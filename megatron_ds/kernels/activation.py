"""Activations of the MLP with the bias before them; gated ones get gate and up side by side: x [..., 2f] -> [..., f].

Source: Hendrycks and Gimpel 2016, arXiv:1606.08415; Shazeer 2020, arXiv:2002.05202
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

Tensor = torch.Tensor
Activation = Callable[[Tensor, "Tensor | None"], Tensor]
ValueAndSlope = Callable[[Tensor, "Tensor | None"], tuple[Tensor, Tensor]]

BLOCK = 256 * 1024
"""Elements of a thread that are worked on at once: the fp32 copies of so many stay in the cache."""
_SLOPE, _CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU in its tanh form, as GPT-2 and Megatron's fused kernel have it."""
    return F.gelu(_biased(x, bias), approximate="tanh")


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU by erf."""
    return F.gelu(_biased(x, bias))


def relu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """max(x, 0)."""
    return F.relu(_biased(x, bias))


def squared_relu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """max(x, 0)^2."""
    return F.relu(_biased(x, bias)).square()


def swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up."""
    gate, up = _biased(x, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(gate) * up, GELU in its tanh form."""
    gate, up = _biased(x, bias).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(gate) * up, GELU by erf."""
    gate, up = _biased(x, bias).chunk(2, dim=-1)
    return F.gelu(gate) * up


def reglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(gate) * up."""
    gate, up = _biased(x, bias).chunk(2, dim=-1)
    return F.relu(gate) * up


def liglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gate * up."""
    gate, up = _biased(x, bias).chunk(2, dim=-1)
    return gate * up


def fused_gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `gelu_tanh`; for 16-bit numbers on CPUs value and slope from one sigmoid, block by block.

    In fp32 the passes wait for memory, and torch's own two are as fast.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return gelu_tanh(x, bias)
    out: Tensor = _WithSlope.apply(x, bias, _gelu_tanh_by_blocks)
    return out


def with_slope(both: ValueAndSlope) -> Activation:
    """An elementwise activation from a function that gives its value and its slope; only the slope is kept."""

    def call(x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = _WithSlope.apply(x, bias, both)
        return out

    return call


def gelu_tanh_and_slope(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """z s with s = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3), for tanh(u) = 2 s - 1; slope s + z s (1 - s) 2u'.

    All passes over memory, if somebody compiles it, in one.
    """
    z = x.float() if bias is None else x.float() + bias.float()
    square = z * z
    sigmoid = torch.sigmoid(_SLOPE * (z + _CUBE * z * square))
    value = z * sigmoid
    slope = sigmoid + value * (1 - sigmoid) * (_SLOPE + 3 * _SLOPE * _CUBE * square)
    return value.to(x.dtype), slope.to(x.dtype)


def _gelu_tanh_by_blocks(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same with torch's operators, in blocks that stay in the cache."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    out, slope = torch.empty_like(rows), torch.empty_like(rows)
    size = max(1, BLOCK * torch.get_num_threads() // width)
    room = torch.empty(4, min(size, len(rows)), width)
    constant = torch.full((), _SLOPE)
    for block, to_out, to_slope in zip(rows.split(size), out.split(size), slope.split(size), strict=True):
        z, square, sigmoid, rest = room[:, : len(block)]
        z.copy_(block)
        if bias is not None:
            z.add_(bias)
        torch.mul(z, z, out=square)
        torch.addcmul(z, z, square, value=_CUBE, out=sigmoid).mul_(_SLOPE).sigmoid_()
        torch.ops.aten.sigmoid_backward(z, sigmoid, grad_input=rest)  # z s (1 - s)
        torch.add(constant, square, alpha=3 * _SLOPE * _CUBE, out=square)
        to_out.copy_(z.mul_(sigmoid))
        to_slope.copy_(sigmoid.addcmul_(rest, square))
    return out.view(x.shape), slope.view(x.shape)


def fused_swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `swiglu`, keeping nothing but its input."""
    out: Tensor = _SwiGLU.apply(x, bias)
    return out


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, both: ValueAndSlope) -> Tensor:
        value, slope = both(x, bias)
        ctx.save_for_backward(slope)
        ctx.has_bias = bias is not None
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        grad = slope.mul_(grad)  # a second backward would notice that it has changed
        return grad, grad.flatten(0, -2).sum(0) if ctx.has_bias else None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias)
        gate, up = _biased(x, bias).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        gate, up = _biased(x, bias).chunk(2, dim=-1)
        out = torch.empty_like(x)
        to_gate, to_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=to_up)
        to_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out, out.flatten(0, -2).sum(0) if bias is not None else None


REFERENCE: Mapping[str, Activation] = MappingProxyType(
    {
        function.__name__: function
        for function in (gelu_tanh, gelu, relu, squared_relu, swiglu, geglu_tanh, geglu, reglu, liglu)
    }
)
FUSED: Mapping[str, Activation] = MappingProxyType({**REFERENCE, "gelu_tanh": fused_gelu_tanh, "swiglu": fused_swiglu})

"""The two linear layers of tensor parallelism.

A pair column -> row needs one all-reduce forward (at the end of row) and one backward (at the start of column); the
backward one runs while the weight gradient is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ds.parallel.collectives import all_reduce, all_reduce_async
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Init, ParamSpec, Split


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: Axis) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.has_bias = axis, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        grad_x = flat_grad @ weight if ctx.needs_input_grad[0] else None
        pending = all_reduce_async(grad_x, ctx.axis) if grad_x is not None else None
        grad_weight = flat_grad.t() @ x.reshape(-1, x.shape[-1])
        grad_bias = flat_grad.sum(0) if ctx.has_bias else None
        if pending is None or grad_x is None:
            return None, grad_weight, grad_bias, None
        pending.wait()
        return grad_x.view(x.shape), grad_weight, grad_bias, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return all_reduce(F.linear(x, weight), axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        grad_x = (flat_grad @ weight).view(x.shape)
        return grad_x, flat_grad.t() @ x.reshape(-1, x.shape[-1]), None


def column_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tp: Axis) -> torch.Tensor:
    """x A_i + b_i for any weight split by output columns (a tied embedding is one too).

    Shapes: x [s, b, i], weight [o/tp, i] -> [s, b, o/tp]
    Comm:   backward all-reduce of dX, overlapped with dA
    """
    out: torch.Tensor = _ColumnLinear.apply(x, weight, bias, tp)
    return out


class ColumnParallelLinear(nn.Module):
    """Linear layer split by output columns: Y_i = X A_i + b_i.

    Shapes: x [s, b, i] -> [s, b, o/tp]; `parts` lists the sizes of fused outputs, each split by itself
    Comm:   forward none; backward all-reduce of dX, overlapped with dA
    Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3
    """

    def __init__(self, inputs: int, parts: tuple[int, ...], *, bias: bool, init: Init, tp: Axis, **factory: Any):
        super().__init__()
        self.inputs, self.parts, self.init, self.tp = inputs, parts, init, tp
        outputs = sum(parts) // tp.size
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        self.bias = nn.Parameter(torch.empty(outputs, **factory)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X A_i + b_i."""
        return column_linear(x, self.weight, self.bias, self.tp)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        split, outputs = Split(0, self.parts), sum(self.parts)
        rows = [ParamSpec("weight", (outputs, self.inputs), self.init, split)]
        bias = ParamSpec("bias", (outputs,), Init("zeros"), split, decay=False)
        return rows + ([bias] if self.bias is not None else [])

    def flops_per_token(self) -> int:
        """Forward FLOPs of the whole layer, all tensor-parallel ranks together."""
        return 2 * self.inputs * sum(self.parts)


class RowParallelLinear(nn.Module):
    """Linear layer split by input rows: Y = sum_i X_i A_i; the bias is left to the caller, who fuses it.

    Shapes: x [s, b, i/tp] -> [s, b, o]
    Comm:   forward all-reduce of Y; backward none
    Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, init: Init, tp: Axis, **factory: Any):
        super().__init__()
        self.inputs, self.outputs, self.init, self.tp = inputs, outputs, init, tp
        self.weight = nn.Parameter(torch.empty(outputs, inputs // tp.size, **factory))
        self.bias = nn.Parameter(torch.empty(outputs, **factory)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """sum_i X_i A_i, without the bias."""
        out: torch.Tensor = _RowLinear.apply(x, self.weight, self.tp)
        return out

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        rows = [ParamSpec("weight", (self.outputs, self.inputs), self.init, Split(1))]
        bias = ParamSpec("bias", (self.outputs,), Init("zeros"), decay=False)
        return rows + ([bias] if self.bias is not None else [])

    def flops_per_token(self) -> int:
        """Forward FLOPs of the whole layer, all tensor-parallel ranks together."""
        return 2 * self.inputs * self.outputs

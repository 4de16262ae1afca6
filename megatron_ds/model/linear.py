"""The two linear layers of tensor parallelism, with and without sequence parallelism.

    column -> row       forward                            backward
    tensor parallel     all-reduce after row               all-reduce of dX, while dA is computed
    + sequence          all-gather, reduce-scatter         all-gather of dY; all-gather of X again, reduce-scatter of dX

X is kept cut over the sequence and gathered again for dA. dY is gathered once, for dX and dA together, unless dA is
postponed: then its cut part is kept and gathered again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ds.kernels.products import Products
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.collectives import (
    all_gather,
    all_reduce,
    all_reduce_async,
    reduce_scatter,
    start_all_gather,
    start_reduce_scatter,
)
from megatron_ds.parallel.spec import Init, ParamSpec, Split


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        runtime: Runtime,
        products: Products,
        more: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.runtime, ctx.has_bias, ctx.more = runtime, bias is not None, more
        ctx.products = products
        shards = runtime.shards
        whole = all_gather(x, shards.tp) if shards.sequence_parallel else x
        return products.forward(_rows(whole), weight, bias).view(*whole.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        runtime: Runtime = ctx.runtime
        tp, sequence_parallel, products = runtime.shards.tp, runtime.shards.sequence_parallel, ctx.products
        flat_grad = _rows(grad)
        # Started before dX is computed, needed only after it.
        gathered = start_all_gather(x, tp) if sequence_parallel and runtime.weight_grads.list is None else None
        grad_x = products.grad_input(flat_grad, weight).view(*grad.shape[:-1], -1)
        if sequence_parallel:
            grad_x, pending = start_reduce_scatter(grad_x, tp)
        else:
            pending = all_reduce_async(grad_x, tp)

        def operands() -> tuple[torch.Tensor, torch.Tensor]:
            if not sequence_parallel:
                return flat_grad, _rows(x)
            whole, handle = gathered or start_all_gather(x, tp)
            handle.wait()
            return flat_grad, _rows(whole)

        made = runtime.weight_grads.make(weight, operands, products, ctx.more)
        grad_bias = flat_grad.sum(0) if ctx.has_bias else None
        pending.wait()
        return grad_x, made, grad_bias, None, None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, runtime: Runtime) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.runtime = runtime
        partial = runtime.kernels.linear.forward(_rows(x), weight, None).view(*x.shape[:-1], -1)
        shards = runtime.shards
        return reduce_scatter(partial, shards.tp) if shards.sequence_parallel else all_reduce(partial, shards.tp)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        runtime: Runtime = ctx.runtime
        shards, products, postponed = runtime.shards, runtime.kernels.linear, runtime.weight_grads.list is not None
        whole = all_gather(grad, shards.tp) if shards.sequence_parallel else grad
        rows = _rows(whole)
        kept = _rows(grad) if postponed else rows

        def operands() -> tuple[torch.Tensor, torch.Tensor]:
            again = all_gather(kept, shards.tp) if shards.sequence_parallel and postponed else kept
            return again, _rows(x)

        grad_x = products.grad_input(rows, weight).view(x.shape)
        return grad_x, runtime.weight_grads.make(weight, operands, products), None


def _rows(t: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [all the others, n]"""
    return t.reshape(-1, t.shape[-1])


def column_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    runtime: Runtime,
    products: Products,
    more: bool = False,
) -> torch.Tensor:
    """x A_i + b_i for any weight split by output columns (a tied embedding is one too).

    more: the weight also gets a gradient from elsewhere in the same backward, later on.
    Shapes: x [s, b, i] (sequence parallel: [s/tp, b, i]), weight [o/tp, i] -> [s, b, o/tp]
    Comm:   backward all-reduce of dX, overlapped with dA (sequence parallel: see above)
    """
    out: torch.Tensor = _ColumnLinear.apply(x, weight, bias, runtime, products, more)
    return out


class ColumnParallelLinear(nn.Module):
    """Linear layer split by output columns: Y_i = X A_i + b_i.

    adds_bias: False leaves the bias to the caller, who fuses it.
    Shapes: x [s, b, i] -> [s, b, o/tp] (sequence parallel: x [s/tp, b, i]); `parts` lists the sizes of fused outputs,
            each split by itself
    Comm:   forward none (SP: all-gather of X); backward all-reduce of dX (SP: reduce-scatter, and X gathered again)
    Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3; Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2
    """

    def __init__(
        self,
        inputs: int,
        parts: tuple[int, ...],
        *,
        bias: bool,
        init: Init,
        runtime: Runtime,
        adds_bias: bool = True,
        **factory: Any,
    ):
        super().__init__()
        self.inputs, self.parts, self.init, self.runtime, self.adds_bias = inputs, parts, init, runtime, adds_bias
        outputs = sum(parts) // runtime.shards.tp.size
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        self.bias = nn.Parameter(torch.empty(outputs, **factory)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X A_i + b_i."""
        bias = self.bias if self.adds_bias else None
        return column_linear(x, self.weight, bias, self.runtime, self.runtime.kernels.linear)

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

    Shapes: x [s, b, i/tp] -> [s, b, o] (sequence parallel: [s/tp, b, o])
    Comm:   forward all-reduce of Y (SP: reduce-scatter); backward none (SP: all-gather of dY)
    Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3; Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, init: Init, runtime: Runtime, **factory: Any):
        super().__init__()
        self.inputs, self.outputs, self.init, self.runtime = inputs, outputs, init, runtime
        self.weight = nn.Parameter(torch.empty(outputs, inputs // runtime.shards.tp.size, **factory))
        self.bias = nn.Parameter(torch.empty(outputs, **factory)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """sum_i X_i A_i, without the bias."""
        out: torch.Tensor = _RowLinear.apply(x, self.weight, self.runtime)
        return out

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        rows = [ParamSpec("weight", (self.outputs, self.inputs), self.init, Split(1))]
        partial_over = self.runtime.shards.partial_over
        bias = ParamSpec("bias", (self.outputs,), Init("zeros"), decay=False, partial_over=partial_over)
        return rows + ([bias] if self.bias is not None else [])

    def flops_per_token(self) -> int:
        """Forward FLOPs of the whole layer, all tensor-parallel ranks together."""
        return 2 * self.inputs * self.outputs


class ReplicatedLinear(nn.Module):
    """Linear layer that every tensor-parallel rank has whole.

    Shapes: x [..., i] -> [..., o]
    """

    def __init__(self, inputs: int, outputs: int, *, init: Init, runtime: Runtime, **factory: Any):
        super().__init__()
        self.init, self.runtime = init, runtime
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        self.bias = nn.Parameter(torch.empty(outputs, **factory))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X A + b."""
        return F.linear(x, self.weight, self.bias)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        over = self.runtime.shards.partial_over
        return [
            ParamSpec("weight", tuple(self.weight.shape), self.init, partial_over=over),
            ParamSpec("bias", tuple(self.bias.shape), Init("zeros"), decay=False, partial_over=over),
        ]

    def flops_per_token(self) -> int:
        """Forward FLOPs."""
        return 2 * self.weight.numel()

"""The three products of a linear layer, and the sum of weight gradients over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
BLOCK = 1024 * 1024
"""Elements of a weight gradient that are added at once on CPUs."""
WIDENED = 512 * 1024
"""Elements of a matrix that are copied to fp32 at once: the copy stays in the cache."""


class Products(NamedTuple):
    """How a linear layer multiplies.

    Shapes: x [n, i], weight [o, i], bias [o], grad [n, o], total [o, i]
    """

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """x weight^T + bias"""
    grad_input: Callable[[Tensor, Tensor], Tensor]
    """grad weight"""
    grad_weight: Callable[[Tensor, Tensor], Tensor]
    """grad^T x"""
    add_grad_weight: Callable[[Tensor, Tensor, Tensor, int], None]
    """total = beta total + grad^T x, summed in total's precision; beta is 0 or 1, and with 0 total is not read"""


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """grad weight."""
    return torch.mm(grad, weight)


def grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x."""
    return torch.mm(grad.t(), x)


def add_after(total: Tensor, grad: Tensor, x: Tensor, beta: int) -> None:
    """Multiply, round to x's precision, then add."""
    part = torch.mm(grad.t(), x)
    total.add_(part) if beta else total.copy_(part)


def add_flat(total: Tensor, part: Tensor) -> None:
    """total += part, which has a lower precision."""
    total += part


def add_by_blocks(total: Tensor, part: Tensor) -> None:
    """The same in blocks, for torch makes a copy in total's precision first: one that stays in the cache."""
    for some_of_total, some in zip(total.split(BLOCK), part.split(BLOCK), strict=True):
        some_of_total += some


def add_product(
    total: Tensor, grad: Tensor, x: Tensor, beta: int, add: Callable[[Tensor, Tensor], None] = add_by_blocks
) -> None:
    """Add while multiplying, where torch's product can: nothing is rounded or written in between.

    add: adds a flat product to a flat total of higher precision, where torch's product cannot
    """
    if total.dtype == x.dtype:
        total.addmm_(grad.t(), x, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, grad.t(), x, beta=beta, out_dtype=total.dtype, out=total)
    elif not beta:
        total.copy_(torch.mm(grad.t(), x))
    else:
        add(total.view(-1), torch.mm(grad.t(), x).view(-1))


def forward_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias of half-precision numbers on a processor that multiplies fp32 faster; rounded at the end."""
    wide, out = x.float(), x.new_empty(len(x), len(weight))
    for rows in _pieces(*weight.shape):
        part = weight[rows].float().t()
        out[:, rows] = torch.mm(wide, part) if bias is None else torch.addmm(bias[rows].float(), wide, part)
    return out


def grad_input_in_fp32(grad: Tensor, weight: Tensor) -> Tensor:
    """grad weight, as above."""
    total = grad.new_zeros(len(grad), weight.shape[1], dtype=torch.float32)
    for rows in _pieces(*weight.shape):
        total.addmm_(grad[:, rows].float(), weight[rows].float())
    return total.to(grad.dtype)


def grad_weight_in_fp32(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x, as above."""
    total = x.new_empty(grad.shape[1], x.shape[1])
    add_product_in_fp32(total, grad, x, 0)
    return total


def add_product_in_fp32(total: Tensor, grad: Tensor, x: Tensor, beta: int) -> None:
    """Add while multiplying, as above; into an fp32 total nothing is rounded."""
    wide = x.float()
    for rows in _pieces(*grad.t().shape):
        part, to_rows = total[rows], grad[:, rows].float().t()
        if total.dtype == torch.float32:
            part.addmm_(to_rows, wide, beta=beta)
        else:
            made = torch.mm(to_rows, wide)
            part.add_(made) if beta else part.copy_(made)


def _pieces(rows: int, width: int) -> Iterator[slice]:
    """Rows of a matrix that are copied at once."""
    size = max(1, WIDENED // max(1, width))
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """total[ids[i]] += rows[i], the same sum in every run.

    Shapes: total [v, h], ids [n], rows [n, h]
    """
    if total.is_cuda:  # index_add_ adds there in the order in which threads come by
        total.add_(torch.ops.aten.embedding_dense_backward(rows, ids, total.shape[0], -1, False))
    else:
        total.index_add_(0, ids, rows.to(total.dtype))


REFERENCE = Products(F.linear, grad_input, grad_weight, add_after)
FUSED = Products(F.linear, grad_input, grad_weight, add_product)
IN_FP32 = Products(forward_in_fp32, grad_input_in_fp32, grad_weight_in_fp32, add_product_in_fp32)
"""For half precision where installed.slow_half() says so."""

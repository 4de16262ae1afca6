"""Cross-entropy over this rank's columns of the vocabulary: what the ranks sum, and the gradient over the logits.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (the sum of exponentials in one pass)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from megatron_ds.kernels.triton.launch import jit

Tensor = torch.Tensor
BLOCK = 4096
"""Columns that a program holds at once."""


def statistics(logits: Tensor, column: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials over the first `valid` columns, and the target's logit (0 where column is -1).

    Shapes: logits [n, w], column [n] -> [n], [n], both fp32
    """
    n, w = logits.shape
    assert 0 <= valid <= w
    log_sum = logits.new_empty(n, dtype=torch.float32)
    target_logit = logits.new_empty(n, dtype=torch.float32)
    if n:
        block = min(BLOCK, triton.next_power_of_2(max(1, w)))
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        _statistics[(n,)](
            logits, column.contiguous(), log_sum, target_logit, w, valid, logits.stride(0), BLOCK=block, num_warps=8
        )
    return log_sum, target_logit


def gradient(
    logits: Tensor, column: Tensor, valid: int, log_sum: Tensor, log_total: Tensor, upstream: Tensor
) -> Tensor:
    """(softmax - onehot) * upstream, written over the logits; 0 in padded columns. log_sum is not needed.

    Shapes: logits [n, w], column, log_sum, log_total and upstream [n] -> [n, w]
    """
    n, w = logits.shape
    assert 0 <= valid <= w and logits.stride(1) == 1
    if logits.numel():
        block = min(BLOCK, triton.next_power_of_2(w))
        _gradient[(n * -(-w // block),)](
            logits, column.contiguous(), log_total.contiguous(), upstream.contiguous(), w, valid, logits.stride(0),
            BLOCK=block, num_warps=8,
        )  # fmt: skip
        increment_version(logits)  # as torch's own operators in place do: autograd is to notice
    return logits


@jit
def _statistics(
    logits: tl.tensor,
    column: tl.tensor,
    log_sum: tl.tensor,
    target_logit: tl.tensor,
    w: tl.tensor,
    valid: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * stride
    top = float("-inf")
    total = 0.0
    for start in range(0, valid, BLOCK):
        i = start + tl.arange(0, BLOCK)
        # Padding is read and left out afterwards: w is a round number, `valid` would have columns read one by one.
        logit = tl.load(start_of_row + i, mask=i < w, other=0.0).to(tl.float32)
        logit = tl.where(i < valid, logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, axis=0))
        # While nothing but -inf was met, any finite number serves; -inf - -inf would be NaN.
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(logit - finite), axis=0)
        top = new_top
    # Asked this way round, a NaN among the logits reaches the loss.
    tl.store(log_sum + row, tl.where(total == 0.0, float("-inf"), top + tl.log(total)))
    target = tl.load(column + row)
    tl.store(target_logit + row, tl.load(start_of_row + target, mask=target >= 0, other=0.0).to(tl.float32))


@jit
def _gradient(
    logits: tl.tensor,
    column: tl.tensor,
    log_total: tl.tensor,
    upstream: tl.tensor,
    w: tl.tensor,
    valid: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(w, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * stride + i
    logit = tl.load(at, mask=i < w, other=0.0).to(tl.float32)
    share = tl.exp(logit - tl.load(log_total + row)) - tl.where(i == tl.load(column + row), 1.0, 0.0)
    value = tl.where(i < valid, share * tl.load(upstream + row), 0.0)
    tl.store(at, value.to(logits.dtype.element_ty), mask=i < w)

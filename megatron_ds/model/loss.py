"""Cross-entropy over a vocabulary that is split across tensor-parallel ranks; the logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ds.kernels.cross_entropy import BY_BLOCKS, CrossEntropy
from megatron_ds.model.embedding import Vocab
from megatron_ds.parallel.collectives import all_reduce
from megatron_ds.parallel.context import Axis


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Each rank normalises its own columns; then the ranks merge their log-sum-exps.

    The gradient (softmax - one-hot) is made in the backward pass, in the logits' own memory: nothing of their size is
    made besides them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, vocab: Vocab, tp: Axis, kernel: CrossEntropy
    ) -> torch.Tensor:
        width = logits.shape[-1]
        flat, wanted = logits.detach().view(-1, width), targets.reshape(-1) - tp.rank * width
        valid = max(0, min(width, vocab.size - tp.rank * width))  # padded columns get probability 0
        column = wanted.masked_fill((wanted < 0) | (wanted >= valid), -1)
        log_sum, target_logit = kernel.statistics(flat, column, valid)
        peak = all_reduce(log_sum.clone(), tp, "max")
        merged = torch.stack(((log_sum - peak).exp(), target_logit))
        all_reduce(merged, tp)
        log_total = peak + merged[0].log()
        ctx.kernel, ctx.valid = kernel, valid
        ctx.save_for_backward(flat, column, log_sum, log_total)
        return (log_total - merged[1]).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, column, log_sum, log_total = ctx.saved_tensors
        weights = upstream.reshape(-1).float()
        grad = ctx.kernel.gradient(logits, column, ctx.valid, log_sum, log_total, weights)
        return grad.view(*upstream.shape, -1), None, None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, vocab: Vocab, tp: Axis, kernel: CrossEntropy = BY_BLOCKS
) -> torch.Tensor:
    """-log softmax(logits)[target], per token, in fp32; its backward consumes `logits`.

    Shapes: logits [s, b, v/tp], targets [s, b] -> [s, b]
    Comm:   forward two all-reduces of [s*b] and [2, s*b] over tp; backward none
    Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3
    """
    out: torch.Tensor = _VocabParallelCrossEntropy.apply(logits, targets, vocab, tp, kernel)
    return out

"""Cross-entropy over a vocabulary that is split across tensor-parallel ranks; the logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ds.model.embedding import Vocab
from megatron_ds.parallel.collectives import all_reduce
from megatron_ds.parallel.context import Axis


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Each rank normalises its own columns; then the ranks merge their log-sum-exps.

    The gradient (softmax - one-hot) is made in the forward pass, in the buffer of the log-softmax, so that nothing
    of the size of the logits is alive afterwards but the logits' own gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, vocab: Vocab, tp: Axis) -> torch.Tensor:
        width = logits.shape[-1]
        flat, wanted = logits.view(-1, width), targets.reshape(-1) - tp.rank * width
        valid = max(0, min(width, vocab.size - tp.rank * width))
        if valid < width:
            # Padded columns get probability 0. Nothing else reads the logits, so this may be done in place.
            flat.detach()[:, valid:] = -torch.inf
        here = (wanted >= 0) & (wanted < valid)
        column = wanted.masked_fill(~here, 0).unsqueeze(-1)
        logp = torch.log_softmax(flat, dim=-1, dtype=torch.float32)
        if not valid:
            logp.fill_(-torch.inf)
        target_logit = flat.gather(-1, column).squeeze(-1).float()
        log_sum = (
            target_logit - logp.gather(-1, column).squeeze(-1) if valid else torch.full_like(target_logit, -torch.inf)
        )
        peak = all_reduce(log_sum.clone(), tp, "max")
        merged = torch.stack(((log_sum - peak).exp(), target_logit.masked_fill(~here, 0.0)))
        all_reduce(merged, tp)
        log_total = peak + merged[0].log()
        losses = (log_total - merged[1]).view(targets.shape)
        if not ctx.needs_input_grad[0]:
            return losses
        grad = logp.add_((log_sum - log_total).unsqueeze(-1)).exp_() if tp.size > 1 and valid else logp.exp_()
        grad.scatter_add_(-1, column, -here.to(grad.dtype).unsqueeze(-1))
        # Half precision would lose small elements of an fp16 gradient before the loss scale is multiplied in.
        ctx.save_for_backward(grad if logits.dtype == torch.float16 else grad.to(logits.dtype))
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        scaled = grad.mul_(upstream.reshape(-1, 1).to(grad.dtype)).to(ctx.dtype)
        return scaled.view(*upstream.shape, -1), None, None, None


def vocab_parallel_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vocab: Vocab, tp: Axis) -> torch.Tensor:
    """-log softmax(logits)[target], per token, in fp32; consumes `logits`.

    Shapes: logits [s, b, v/tp], targets [s, b] -> [s, b]
    Comm:   forward two all-reduces of [s*b] and [2, s*b] over tp; backward none
    Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3
    """
    out: torch.Tensor = _VocabParallelCrossEntropy.apply(logits, targets, vocab, tp)
    return out

"""Attention of some queries to some of the keys that they see: the piece of which ring attention is made.

The forward also returns the log-sum-exp of the scores, by which pieces are merged. The backward takes the output and
the log-sum-exp of the whole row, and needs nothing else to know about the other pieces: with P = exp(S - lse),
dS = P * (dP - rowsum(dO * O)).

Source: Dao 2023, arXiv:2307.08691, sec. 3.1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention

Tensor = torch.Tensor
_aten = torch.ops.aten


class BlockKernel(NamedTuple):
    """`block_forward` and `block_backward` in one implementation."""

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float],
        tuple[Tensor, Tensor, Tensor],
    ]


def block_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> tuple[Tensor, Tensor]:
    """(dropout(softmax(q k^T / sqrt(d))) v, log-sum-exp of the scores, at least fp32).

    Dropout keeps what one `bernoulli_` over the probabilities [b, a, sq, sk] says, drawn from torch's generator.
    Shapes: q [b, a, sq, d], k and v [b, k, sk, d] -> [b, a, sq, d], [b, a, sq]; causal: sq = sk
    """
    return choose(q, k, v, dropout).forward(q, k, v, causal, dropout)


def block_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through this block, where `out` and `lse` are those of the queries' whole rows.

    With dropout the generator must stand where it stood before `block_forward`.
    Shapes: as in `block_forward`; grad_out and out as q
    """
    return choose(q, k, v, dropout).backward(grad_out, q, k, v, out, lse, causal, dropout)


def choose(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> BlockKernel:
    """Flash attention wherever torch has it; with dropout its masks could not be drawn again from a seed."""
    if dropout:
        return PLAIN
    if q.device.type == "cpu":
        return FLASH_CPU
    # The kernel itself refuses head sizes that are no multiple of 8; torch's own attention pads them beforehand.
    fits = q.device.type == "cuda" and q.shape[-1] % 8 == 0
    return FLASH_CUDA if fits and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True)) else PLAIN


def _flash_cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal)
    return out, lse


def _flash_cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, dropout, causal
    )
    return dq, dk, dv


def _flash_cuda_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal)
    return out, lse


def _flash_cuda_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    packed = random_state = (None, None)  # offsets of a packed batch, and what dropout drew: there is neither
    sizes = q.shape[2], k.shape[2]
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse.contiguous(), *packed, *sizes, dropout, causal, *random_state
    )
    return dq, dk, dv


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal)
    lse = scores.logsumexp(-1)
    probabilities = torch.exp(scores - lse.unsqueeze(-1))
    out = (probabilities * _kept(scores, dropout)) @ v.to(scores.dtype)
    return out.view(q.shape).to(q.dtype), lse.view(q.shape[:3])


def _plain_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = _scores(q, k, causal)
    probabilities = torch.exp(scores - lse.reshape(scores.shape[:3]).unsqueeze(-1))
    kept = _kept(scores, dropout)
    wide_grad, wide_out, wide_q = (_by_kv_head(t, k.shape[1]).to(scores.dtype) for t in (grad_out, out, q))
    grad_probabilities = (wide_grad @ v.to(scores.dtype).mT) * kept
    delta = (wide_grad * wide_out).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - delta) / math.sqrt(q.shape[-1])
    dq = (grad_scores @ k.to(scores.dtype)).view(q.shape)
    dk, dv = grad_scores.mT @ wide_q, (probabilities * kept).mT @ wide_grad
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """q k^T / sqrt(d), -inf where a key comes after the query: [b, k, (a/k) sq, sk], at least fp32."""
    (b, _, sq, d), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    scores = _by_kv_head(q, k.shape[1]).to(wide) @ k.to(wide).mT / math.sqrt(d)
    if causal:
        later = torch.ones(sq, sq, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.view(b, -1, sq, sq).masked_fill(later, -math.inf).view(scores.shape)
    return scores


def _by_kv_head(t: Tensor, kv_heads: int) -> Tensor:
    """The rows of all heads that share a key head under each other: [b, a, s, d] -> [b, k, (a/k) s, d]."""
    return t.reshape(t.shape[0], kv_heads, -1, t.shape[-1])


def _kept(probabilities: Tensor, dropout: float) -> Tensor | float:
    """What dropout multiplies the probabilities with."""
    if not dropout:
        return 1.0
    return torch.empty_like(probabilities).bernoulli_(1 - dropout) / (1 - dropout)


FLASH_CPU = BlockKernel(_flash_cpu_forward, _flash_cpu_backward)
FLASH_CUDA = BlockKernel(_flash_cuda_forward, _flash_cuda_backward)
PLAIN = BlockKernel(_plain_forward, _plain_backward)

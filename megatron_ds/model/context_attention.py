"""Causal attention over a sequence that the ranks of an axis share: by a ring, or by all-to-all.

c is the size of the axis. In the ring each rank holds chunks r and 2c-1-r of 2c and keeps its queries, while keys and
values go round; every rank then has the same work under the causal mask. With all-to-all (Ulysses) it holds the r-th
of c chunks, and for the time of the attention the whole sequence of 1/c of the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_ds.kernels.attention_block import block_backward, block_forward
from megatron_ds.parallel.collectives import exchange_parts
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.p2p import Transfer, post

Tensor = torch.Tensor


class _Passing:
    """A buffer on its way to the next rank, and that of the previous rank on its way here."""

    def __init__(self, buffer: Tensor, cp: Axis):
        self.leaving, self.arriving = buffer, torch.empty_like(buffer)
        send = Transfer(True, self.leaving, (cp.rank + 1) % cp.size)
        receive = Transfer(False, self.arriving, (cp.rank - 1) % cp.size)
        self.handles = post([send, receive], cp)

    def wait(self) -> Tensor:
        """What has arrived."""
        for handle in self.handles:
            handle.wait()
        return self.arriving


def _round(kv: Tensor, cp: Axis) -> Iterator[tuple[int, Tensor]]:
    """Every rank's buffer after its number, our own first; the next one arrives while the caller uses this one.

    Comm: c-1 sends of the buffer
    """
    for hop in range(cp.size):
        passing = _Passing(kv, cp) if hop < cp.size - 1 else None
        yield (cp.rank - hop) % cp.size, kv
        if passing:
            kv = passing.wait()


def visible(rank: int, owner: int, half: int) -> tuple[slice, slice, bool]:
    """Which queries of `rank` see keys of `owner`, which keys they see, and whether under a causal mask.

    The head chunk of an earlier rank lies before all our queries and its tail chunk behind them; both chunks of a
    later rank lie between our two.
    """
    everything, head, tail = slice(None), slice(None, half), slice(half, None)
    if owner == rank:
        return everything, everything, True
    return (everything, head, False) if owner < rank else (tail, everything, False)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cp: Axis, dropout: float, enter: Callable[[int], None]
    ) -> Tensor:
        s, b, a, d = q.shape
        queries = _by_head(q)
        total = torch.zeros_like(queries, dtype=torch.float32)
        lse = torch.full((b, a, s), -math.inf, device=q.device)
        for owner, kv in _round(torch.stack((k, v)), cp):
            rows, cols, causal = visible(cp.rank, owner, s // 2)
            if dropout:
                enter(cp.rank * cp.size + owner)
            keys, values = _by_head(kv[0, cols]), _by_head(kv[1, cols])
            part, part_lse = block_forward(queries[:, :, rows], keys, values, causal, dropout)
            _merge(total[:, :, rows], lse[:, :, rows], part, part_lse)
        out = q.new_empty(s, b, a * d)
        out.view(q.shape).copy_(_by_position(total))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.cp, ctx.dropout, ctx.enter = cp, dropout, enter
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        cp, dropout = ctx.cp, ctx.dropout
        queries, result, grads = (_by_head(t.reshape(q.shape)) for t in (q, out, grad))
        grad_q = torch.zeros_like(queries, dtype=torch.float32)
        own_grad_kv = k.new_zeros(2, *k.shape)
        passing = None
        for owner, kv in _round(torch.stack((k, v)), cp):
            rows, cols, causal = visible(cp.rank, owner, q.shape[0] // 2)
            if dropout:
                ctx.enter(cp.rank * cp.size + owner)
            keys, values = _by_head(kv[0, cols]), _by_head(kv[1, cols])
            dq, dk, dv = block_backward(
                grads[:, :, rows],
                queries[:, :, rows],
                keys,
                values,
                result[:, :, rows],
                lse[:, :, rows],
                causal,
                dropout,
            )
            grad_q[:, :, rows] += dq
            if owner == cp.rank:
                grad_kv = own_grad_kv
            else:
                # The sum for this owner was begun by the rank after it, and follows its keys from rank to rank.
                grad_kv = passing.wait() if passing else torch.zeros_like(kv)
            grad_kv[0, cols] += _by_position(dk)
            grad_kv[1, cols] += _by_position(dv)
            if owner != cp.rank:
                passing = _Passing(grad_kv, cp)
        if passing:
            own_grad_kv += passing.wait()
        return _by_position(grad_q).to(q.dtype), own_grad_kv[0], own_grad_kv[1], None, None, None


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add another block to what these rows have found so far, in place: the average of both, weighted by exp(lse)."""
    out.lerp_(part.float(), torch.sigmoid(part_lse - lse).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _by_head(t: Tensor) -> Tensor:
    """[s, b, a, d] -> [b, a, s, d]."""
    return t.permute(1, 2, 0, 3)


def _by_position(t: Tensor) -> Tensor:
    """[b, a, s, d] -> [s, b, a, d]."""
    return t.permute(2, 0, 1, 3)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, cp: Axis, dropout: float, enter: Callable[[int], None]) -> Tensor:
    """Causal attention of this rank's queries to the keys of all ranks.

    `enter(block)` begins the random stream of the dropout in one block of scores, the same in forward and backward;
    blocks of this rank and of others have different numbers.

    Shapes: q [s/c, b, a, d], k and v [s/c, b, k, d] -> [s/c, b, a*d]
    Comm:   forward c-1 sends of this rank's share of K and V; backward 2 (c-1), their gradients going round with them
    Source: Liu et al. 2023, arXiv:2310.01889; the pairs of chunks: Llama 3 2024, arXiv:2407.21783, sec. 3.3.2
    """
    out: Tensor = _RingAttention.apply(q, k, v, cp, dropout, enter)
    return out


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, cp: Axis, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Causal attention to the whole sequence in 1/c of the heads at a time; `attend` knows nothing of other ranks.

    Shapes: q [s/c, b, a, d], k and v [s/c, b, k, d] -> [s/c, b, a*d]; attend: q [s, b, a/c, d] ... -> [s, b, a/c*d]
    Comm:   forward an all-to-all of q, k and v together and one of the output; backward the same
    Source: Jacobs et al. 2023, arXiv:2309.14509
    """
    shares = q.shape[2] // cp.size, k.shape[2] // cp.size, v.shape[2] // cp.size
    # The copy that puts each rank's heads together also joins the three: one message instead of three.
    parts = [t.unflatten(2, (cp.size, -1)).permute(2, 0, 1, 3, 4) for t in (q, k, v)]
    joined = exchange_parts(torch.cat(parts, dim=3).flatten(0, 1), cp)
    out = exchange_parts(attend(*joined.split(shares, dim=2)), cp)
    heads: Tensor = out.unflatten(0, (cp.size, -1)).permute(1, 2, 0, 3)
    return heads.flatten(2)

"""Point-to-point transfers along an axis, posted in matched batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_ds.parallel.collectives import Done
from megatron_ds.parallel.context import Axis


class Transfer(NamedTuple):
    """Send `tensor` to, or receive it from, the rank `peer` of an axis."""

    send: bool
    tensor: torch.Tensor
    peer: int


def post(transfers: list[Transfer], axis: Axis) -> list[Any]:
    """Start all transfers; the `wait()` of a transfer's handle completes it, and until then its tensor must live.

    Posted as one batch: with NCCL two neighbours that each send first would wait for each other for ever.
    """
    for transfer in transfers:
        if transfer.send:
            axis.traffic.add("send", transfer.tensor.nbytes)
    if axis.on_paper:
        return [Done()] * len(transfers)
    ops = [
        dist.P2POp(dist.isend if t.send else dist.irecv, t.tensor, group=axis.group, group_peer=t.peer)
        for t in transfers
    ]
    works = dist.batch_isend_irecv(ops)
    # NCCL coalesces the batch into one handle.
    return list(works) if len(works) == len(ops) else [works[0]] * len(ops)

"""Point-to-point transfers between neighbouring pipeline stages, issued in matched batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_ds.parallel.context import Axis


class Transfer(NamedTuple):
    """Send `tensor` to, or receive it from, the stage `peer` of the pipeline axis."""

    send: bool
    tensor: torch.Tensor
    peer: int


def exchange(transfers: list[Transfer], pp: Axis) -> list[Any]:
    """Wait for what is received; return the handles of what is sent, whose tensors must live until they complete.

    Issued as one batch: with NCCL two neighbours that each send first would wait for each other for ever.
    """
    ops = [
        dist.P2POp(dist.isend if t.send else dist.irecv, t.tensor, group=pp.group, group_peer=t.peer) for t in transfers
    ]
    works = dist.batch_isend_irecv(ops)
    if len(works) < len(ops):  # NCCL coalesces the batch into one handle
        for work in works:
            work.wait()
        return []
    for work, transfer in zip(works, transfers, strict=True):
        if not transfer.send:
            work.wait()
    return [work for work, transfer in zip(works, transfers, strict=True) if transfer.send]

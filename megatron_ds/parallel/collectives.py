"""The collectives, each the identity on an axis of size 1.

Nothing outside this room imports torch.distributed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_ds.parallel.context import Axis

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renames both and warns about the old names; 2.11 has only the old ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Done:
    """The handle of a collective that had nothing to do."""

    def wait(self) -> None:
        """Return at once."""


def all_reduce(tensor: torch.Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum") -> torch.Tensor:
    """Reduce `tensor` over the axis, in place."""
    if axis.size > 1:
        dist.all_reduce(tensor, _OPS[op], group=axis.group)
    return tensor


def all_reduce_async(tensor: torch.Tensor, axis: Axis) -> Any:
    """Start summing `tensor` over the axis in place; the handle's `wait()` completes it."""
    return dist.all_reduce(tensor, group=axis.group, async_op=True) if axis.size > 1 else Done()


def reduce_scatter_async(shard: torch.Tensor, full: torch.Tensor, axis: Axis) -> Any:
    """Start summing `full` over the axis, keeping this rank's part of it in `shard`, which may be a view of `full`."""
    return _reduce_scatter(shard, full, group=axis.group, async_op=True) if axis.size > 1 else Done()


def all_gather_async(full: torch.Tensor, shard: torch.Tensor, axis: Axis) -> Any:
    """Start filling `full` with every rank's `shard`, which may be a view of `full`."""
    return _all_gather(full, shard, group=axis.group, async_op=True) if axis.size > 1 else Done()


def barrier(axis: Axis) -> None:
    """Wait for all ranks of the axis."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


def gather_bytes(payload: bytes, axis: Axis) -> list[bytes]:
    """Every rank's payload on every rank, in rank order."""
    if axis.size == 1:
        return [payload]
    device = _wire_device(axis)
    sizes = torch.zeros(axis.size, dtype=torch.int64, device=device)
    sizes[axis.rank] = len(payload)
    dist.all_reduce(sizes, group=axis.group)
    longest = max(int(sizes.max()), 1)
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else 0
    everyone = torch.empty(axis.size * longest, dtype=torch.uint8, device=device)
    _all_gather(everyone, mine.to(device), group=axis.group)
    rows = everyone.cpu().view(axis.size, longest)
    return [rows[i, : int(sizes[i])].numpy().tobytes() for i in range(axis.size)]


def _wire_device(axis: Axis) -> torch.device:
    backend = dist.get_backend(axis.group)
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.mark_dirty(x)
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def reduce_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Leave such a region: sum the ranks' partial results, in place.

    Comm:   forward all-reduce over the axis; backward none
    Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3 (the operator g)
    """
    out: torch.Tensor = _ReduceFrom.apply(x, axis) if axis.size > 1 else x
    return out

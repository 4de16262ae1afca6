"""The collectives, each the identity on an axis of size 1.

Nothing outside this room imports torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.shared_memory import Posted

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renames both and warns about the old names; 2.11 has only the old ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Done:
    """The handle of a collective that had nothing to do."""

    def wait(self) -> None:
        """Return at once."""


class _ByMessages:
    """A reduce-scatter or an all-gather on gloo, made of messages between all pairs of ranks.

    gloo's own reduce-scatter is an all-reduce that throws most of its work away, and its all-gather goes round a ring:
    they take 2 to 4 times as long (benchmarks/collectives.py).
    """

    def __init__(self, works: list[Any], mine: torch.Tensor, received: list[torch.Tensor], alive: Any):
        # `alive`: what is being sent must not be freed before it is gone.
        self.works, self.mine, self.received, self.alive = works, mine, received, alive

    @classmethod
    def reduce_scatter(cls, shard: torch.Tensor, full: torch.Tensor, axis: Axis) -> _ByMessages:
        """Send every rank its part of `full`; add what comes to the own part."""
        parts = full.view(axis.size, -1)
        mine = shard.view(-1)
        if mine.data_ptr() != parts[axis.rank].data_ptr():
            mine.copy_(parts[axis.rank])
        received = [torch.empty_like(mine) for _ in range(axis.size - 1)]
        return cls(_with_everyone(axis, list(parts), received), mine, received, full)

    @classmethod
    def all_gather(cls, full: torch.Tensor, shard: torch.Tensor, axis: Axis) -> _ByMessages:
        """Send every rank the own part; put what comes in its place."""
        parts = full.view(axis.size, -1)
        mine = shard.view(-1)
        if mine.data_ptr() != parts[axis.rank].data_ptr():
            parts[axis.rank].copy_(mine)
        sources = [parts[(axis.rank - distance) % axis.size] for distance in range(1, axis.size)]
        return cls(_with_everyone(axis, [mine] * axis.size, sources), mine, [], shard)

    def wait(self) -> None:
        """Complete it."""
        for work in self.works:
            work.wait()
        for part in self.received:
            self.mine.add_(part)
        self.works, self.received, self.alive = [], [], None


class _InMemory:
    """A collective between ranks of one machine: what each of them posted is put together when it is waited for."""

    def __init__(self, posted: Posted, put_together: Callable[[list[torch.Tensor]], None]):
        self.posted: Posted | None = posted
        self.put_together = put_together

    def wait(self) -> None:
        """Complete it."""
        if self.posted is not None:
            with torch.no_grad():
                self.put_together(self.posted.parts())
            self.posted.close()
            self.posted = None


def _post(tensor: torch.Tensor, axis: Axis) -> Posted | None:
    """Show a tensor to the axis's ranks in memory that they share; None if there is none for it."""
    if not axis.on_gloo:
        return None
    return axis.memory.post(tensor.detach(), axis.rank, axis.size, partial(gather_bytes, axis=axis))


def _combine(out: torch.Tensor, op: str, parts: list[torch.Tensor]) -> None:
    """Reduce the ranks' tensors in rank order, so that all ranks get the same bits."""
    first, second, *others = parts
    out = out.detach().view(-1)
    if op != "sum":
        pick = torch.maximum if op == "max" else torch.minimum
        pick(first, second, out=out)
        for part in others:
            pick(out, part, out=out)
    elif others and out.dtype in (torch.float16, torch.bfloat16):
        total = first.float()
        for part in parts[1:]:
            total += part
        out.copy_(total)
    else:
        torch.add(first, second, out=out)
        for part in others:
            out += part


def _part(full: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's part of a tensor that lies flat."""
    return full.view(axis.size, -1)[axis.rank]


def _lay_out(full: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """One after the other."""
    for place, part in zip(full.detach().view(len(parts), -1), parts, strict=True):
        place.copy_(part)


def _with_everyone(axis: Axis, to_send: list[torch.Tensor], to_receive: list[torch.Tensor]) -> list[Any]:
    """Exchange a message with each other rank, in turn with those 1, 2, ... places after and before this one."""
    works = []
    for distance in range(1, axis.size):
        after, before = (axis.rank + distance) % axis.size, (axis.rank - distance) % axis.size
        works.append(dist.isend(to_send[after], group=axis.group, group_dst=after))
        works.append(dist.irecv(to_receive[distance - 1], group=axis.group, group_src=before))
    return works


def all_reduce(tensor: torch.Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum") -> torch.Tensor:
    """Reduce `tensor` over the axis, in place."""
    _start_all_reduce(tensor, axis, op).wait()
    return tensor


def all_reduce_async(tensor: torch.Tensor, axis: Axis) -> Any:
    """Start summing `tensor` over the axis in place; the handle's `wait()` completes it."""
    return _start_all_reduce(tensor, axis, "sum")


def _start_all_reduce(tensor: torch.Tensor, axis: Axis, op: str) -> Any:
    if not _others(axis, "all-reduce", 2 * tensor.nbytes):
        return Done()
    posted = _post(tensor, axis)
    if posted is not None:
        return _InMemory(posted, partial(_combine, tensor, op))
    return dist.all_reduce(tensor, _OPS[op], group=axis.group, async_op=True)


def reduce_scatter_async(shard: torch.Tensor, full: torch.Tensor, axis: Axis) -> Any:
    """Start summing `full` over the axis, keeping this rank's part of it in `shard`, which may be a view of `full`."""
    if not _others(axis, "reduce-scatter", full.nbytes):
        return Done()
    posted = _post(full, axis)
    if posted is not None:
        return _InMemory(posted, lambda parts: _combine(shard, "sum", [_part(part, axis) for part in parts]))
    if axis.on_gloo:
        return _ByMessages.reduce_scatter(shard, full, axis)
    return _reduce_scatter(shard, full, group=axis.group, async_op=True)


def all_gather_async(full: torch.Tensor, shard: torch.Tensor, axis: Axis) -> Any:
    """Start filling `full` with every rank's `shard`, which may be a view of `full`."""
    if not _others(axis, "all-gather", full.nbytes):
        return Done()
    posted = _post(shard, axis)
    if posted is not None:
        return _InMemory(posted, partial(_lay_out, full))
    if axis.on_gloo:
        return _ByMessages.all_gather(full, shard, axis)
    return _all_gather(full, shard, group=axis.group, async_op=True)


def start_all_gather(shard: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Any]:
    """Start putting every rank's `shard` one after the other along dim 0; the tensor is whole after `wait()`.

    Shapes: [n, ...] -> [n * axis, ...]
    """
    if axis.size == 1:
        return shard, Done()
    full = shard.new_empty((shard.shape[0] * axis.size, *shard.shape[1:]))
    return full, all_gather_async(full, shard.contiguous(), axis)


def start_reduce_scatter(full: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Any]:
    """Start summing over the ranks, of which each keeps its part of dim 0.

    Shapes: [n * axis, ...] -> [n, ...]
    """
    if axis.size == 1:
        return full, Done()
    shard = full.new_empty((full.shape[0] // axis.size, *full.shape[1:]))
    return shard, reduce_scatter_async(shard, full.contiguous(), axis)


def all_gather(shard: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Every rank's `shard`, one after the other along dim 0.

    Shapes: [n, ...] -> [n * axis, ...]
    """
    full, handle = start_all_gather(shard, axis)
    handle.wait()
    return full


def reduce_scatter(full: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum over the ranks, of which each keeps its part of dim 0.

    Shapes: [n * axis, ...] -> [n, ...]
    """
    shard, handle = start_reduce_scatter(full, axis)
    handle.wait()
    return shard


def all_to_all(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Give part i of dim 0 to rank i; what comes from rank i lies at part i.

    Shapes: [n * axis, ...] -> [n * axis, ...]
    """
    if axis.size == 1:
        return tensor
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if not _others(axis, "all-to-all", tensor.nbytes):
        return out
    posted = _post(tensor, axis)
    if posted is not None:
        _InMemory(posted, lambda parts: _lay_out(out, [_part(part, axis) for part in parts])).wait()
    else:
        dist.all_to_all_single(out, tensor.contiguous(), group=axis.group)
    return out


def _others(axis: Axis, collective: str, moved_bytes: int) -> bool:
    """Count what goes to the other ranks; True if there are any that can be reached."""
    if axis.size == 1:
        return False
    axis.traffic.add(collective, moved_bytes * (axis.size - 1) // axis.size)
    return not axis.on_paper


def barrier(axis: Axis) -> None:
    """Wait for all ranks of the axis."""
    if axis.size > 1 and not axis.on_paper:
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
    """Sum the ranks' partial results, in place.

    Comm:   forward all-reduce over the axis; backward none
    Source: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3 (the operator g)
    """
    out: torch.Tensor = _ReduceFrom.apply(x, axis) if axis.size > 1 else x
    return out


class _ReduceScatterFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(grad, ctx.axis), None


def reduce_scatter_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum the ranks' partial results, of which each rank keeps its part of dim 0.

    Shapes: [s, ...] -> [s/tp, ...]
    Comm:   forward reduce-scatter over the axis; backward all-gather
    Source: Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.2 (the operator g-bar)
    """
    out: torch.Tensor = _ReduceScatterFrom.apply(x, axis) if axis.size > 1 else x
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return all_to_all(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_to_all(grad, ctx.axis), None


def exchange_parts(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Give part i of dim 0 to rank i and take its part; its own inverse.

    Shapes: [n * axis, ...] -> [n * axis, ...]
    Comm:   forward all-to-all over the axis; backward the same
    """
    out: torch.Tensor = _AllToAll.apply(x, axis) if axis.size > 1 else x
    return out

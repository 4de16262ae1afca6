"""Flat parameter and gradient buffers, and the reduction of gradients over data-parallel ranks during the backward.

Note [From autograd gradient to optimizer shard]
    Parameters are views of a bucket's flat buffer, in the reverse order of the forward pass, so that a bucket fills up
    while the backward runs. ZeRO-0 and ZeRO-1: each gradient is added into the bucket's fp32 view as soon as autograd
    has it (fp32 parameters: autograd itself adds in place). In the last backward of a step the buckets are *armed*: one
    whose gradients are complete starts its reduction over dp (and cp) at once. ZeRO-0 sums the whole bucket on every
    rank; ZeRO-1 leaves each rank the sum of its own shard.
    ZeRO-2 keeps fp32 gradients of the own shard only. There every backward is armed: a bucket whose gradients are
    complete is reduced slice by slice through a small fp32 buffer, added to the shard, and autograd's gradients go.
    What is only a partial sum along another axis (a tied embedding: first and last stage; norms and biases under
    sequence parallelism: tp) lies in buckets of its own, laid out alike on all those ranks, and is summed once at the
    end of the step, on the shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_ds.parallel.collectives import all_gather_async, all_reduce, all_reduce_async, reduce_scatter_async
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import ParamSpec

SLICE = 4_000_000
"""Gradient elements that ZeRO-2 has on the way at once; twice as many at most."""
REDUCTIONS_AT_ONCE = 2


@dataclass
class Bucket:
    """Contiguous parameters of one chunk, their gradients, and the range that this rank's optimizer owns.

    Shapes: params [n] with n a multiple of dp; shard = elements [start, stop); grads [n], or only the shard's (ZeRO-2)
    """

    specs: list[ParamSpec]
    chunk: int
    offsets: dict[str, int]
    params: torch.Tensor
    grads: torch.Tensor
    start: int
    stop: int
    dp: Axis
    partial_over: Axis | None
    waiting: set[str] = field(default_factory=set)
    pending: list[Any] = field(default_factory=list)
    reduced: bool = False
    gathering: Any = None
    arrived: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """True where each data-parallel rank owns a part (ZeRO-1 and 2)."""
        return self.stop - self.start < self.params.numel()

    @property
    def keeps_shard_only(self) -> bool:
        """True where gradients outside the shard are not kept (ZeRO-2)."""
        return self.grads.numel() < self.params.numel()

    @property
    def autograd_adds(self) -> bool:
        """True where a parameter's gradient is its place in the bucket, into which autograd adds by itself."""
        return self.grads.dtype == self.params.dtype and not self.keeps_shard_only

    def main_grad(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Where the named parameter's gradient is kept."""
        offset = self.offsets[name]
        return self.grads[offset : offset + torch.Size(shape).numel()].view(shape)

    @property
    def shard_grads(self) -> torch.Tensor:
        """Gradients of the elements that this rank's optimizer owns."""
        return self.grads if self.keeps_shard_only else self.grads[self.start : self.stop]

    def reduce(self) -> None:
        """Start summing the gradients over dp."""
        assert not self.reduced
        self.reduced = True
        if self.keeps_shard_only:
            self._reduce_by_slices()
        elif self.sharded:
            self.pending = [reduce_scatter_async(self.shard_grads, self.grads, self.dp)]
        else:
            self.pending = [all_reduce_async(self.grads, self.dp)]

    def _reduce_by_slices(self) -> None:
        """Add the sum of all ranks' gradients to the shard; slice i of the buffer belongs to rank i."""
        share = self.stop - self.start
        width = max(1, min(SLICE, self.params.numel() // 8) // self.dp.size)
        for low in range(0, share, width):
            high = min(low + width, share)
            full = self.grads.new_zeros(self.dp.size, high - low)
            for rank in range(self.dp.size):
                self._copy_grads(full[rank], rank * share + low)
            mine = torch.empty_like(full[0])
            handle = reduce_scatter_async(mine, full.view(-1), self.dp)
            self.pending.append(_AddLater(handle, full, mine, self.grads[low:high]))
            if len(self.pending) > 1:
                self.pending.pop(0).wait()
        for param in self.arrived.values():
            param.grad = None
        self.arrived.clear()

    def _copy_grads(self, out: torch.Tensor, start: int) -> None:
        """Copy what has arrived for elements [start, start + len(out)) of the bucket."""
        for name, param in self.arrived.items():
            begin = self.offsets[name]
            low, high = max(begin, start), min(begin + param.numel(), start + out.numel())
            if low < high:
                assert param.grad is not None
                out[low - start : high - start] = param.grad.reshape(-1)[low - begin : high - begin]

    def settle(self) -> None:
        """Wait for the sum over dp."""
        for handle in self.pending:
            handle.wait()
        self.pending = []

    def finish(self) -> None:
        """Wait for the sum over dp; the next backward may come."""
        self.settle()
        self.reduced = False

    def start_gather(self) -> None:
        """Start collecting the shards that the ranks have updated."""
        if self.sharded:
            self.gathering = all_gather_async(self.params, self.params[self.start : self.stop], self.dp)

    def finish_gather(self) -> None:
        """Wait until the parameters are whole."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None


@dataclass
class _AddLater:
    """A reduce-scatter on its way, and where its result is added; `full` lives until then."""

    handle: Any
    full: torch.Tensor
    mine: torch.Tensor
    shard: torch.Tensor

    def wait(self) -> None:
        self.handle.wait()
        self.shard.add_(self.mine)


class Buckets:
    """All buckets of one rank's model chunks, and the hooks that fill them."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        tables: Sequence[dict[str, ParamSpec]],
        *,
        dp: Axis,
        tp_size: int,
        axes: dict[str, Axis],
        zero_stage: int,
        capacity: int | None,
        overlap: bool,
        dtype: torch.dtype,
        grad_dtype: torch.dtype,
        device: torch.device,
    ):
        self.overlap, self.sharded = overlap, zero_stage >= 1
        self.armed: set[int] = set()
        self.on_the_way: list[Bucket] = []
        self.of: dict[str, Bucket] = {}
        self.names: dict[int, str] = {}
        total = sum(_numel(tp_size, spec) for table in tables for spec in table.values())
        capacity = capacity or max(1_000_000, min(40_000_000, total // 8))
        for number, table in enumerate(tables):
            for specs in _group(table, tp_size, capacity):
                bucket = _allocate(specs, number, tp_size, dp, axes, zero_stage, dtype, grad_dtype, device)
                assert not self.of.keys() & bucket.offsets.keys()
                self.of |= dict.fromkeys(bucket.offsets, bucket)
        for chunk, table in zip(chunks, tables, strict=True):
            for name, spec in table.items():
                self._adopt(chunk, name, spec.local_shape(tp_size))

    def __iter__(self) -> Iterator[Bucket]:
        return iter({id(bucket): bucket for bucket in self.of.values()}.values())

    def _adopt(self, model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        """Make the named parameter a view of its bucket, and listen for its gradient."""
        owner, _, leaf = name.rpartition(".")
        bucket = self.of[name]
        param = nn.Parameter(self.view(name, shape))
        setattr(model.get_submodule(owner), leaf, param)
        self.names[id(param)] = name
        if bucket.autograd_adds:
            param.grad = bucket.main_grad(name, shape)
        param.register_post_accumulate_grad_hook(partial(self._on_grad, name))

    def view(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The named parameter in its flat buffer."""
        bucket = self.of[name]
        offset = bucket.offsets[name]
        return bucket.params[offset : offset + torch.Size(shape).numel()].view(shape)

    def _on_grad(self, name: str, param: nn.Parameter) -> None:
        if param.grad is None:  # postponed: it comes by `add`
            return
        bucket = self.of[name]
        if bucket.keeps_shard_only:
            bucket.arrived[name] = param
        elif not bucket.autograd_adds:
            bucket.main_grad(name, tuple(param.shape)).add_(param.grad)
            param.grad = None
        if bucket.chunk in self.armed:
            bucket.waiting.discard(name)
            if not bucket.waiting and not bucket.reduced:
                self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        """Start a reduction; a reduction on its way holds buffers, so let the oldest end first."""
        self.on_the_way = [other for other in self.on_the_way if other.pending]
        while len(self.on_the_way) >= REDUCTIONS_AT_ONCE:
            self.on_the_way.pop(0).settle()
        bucket.reduce()
        self.on_the_way.append(bucket)

    @torch.no_grad()
    def add(self, weight: torch.Tensor, grad: torch.Tensor) -> None:
        """A gradient that autograd did not bring: one that was postponed."""
        assert isinstance(weight, nn.Parameter)
        weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
        self._on_grad(self.names[id(weight)], weight)

    def zero(self) -> None:
        """Forget the last step's gradients."""
        for bucket in self:
            bucket.grads.zero_()

    def arm(self, chunk: int, still_missing: Sequence[torch.Tensor] | None = None) -> None:
        """The next backward completes the chunk's gradients: reduce each bucket as soon as it is full."""
        if not self.overlap:
            return
        self.armed.add(chunk)
        missing = {self.names[id(weight)] for weight in still_missing} if still_missing is not None else None
        for bucket in self._of_chunk(chunk):
            bucket.waiting = set(bucket.offsets) if missing is None else missing & bucket.offsets.keys()
            if not bucket.waiting:
                self._reduce(bucket)

    def finish(self, chunk: int) -> None:
        """Wait until the chunk's gradients are summed over dp."""
        self.armed.discard(chunk)
        for bucket in self._of_chunk(chunk):
            if not bucket.reduced:
                self._reduce(bucket)
            bucket.finish()

    def sum_partials(self) -> None:
        """Add what other axes hold of the sums, once all are summed over dp."""
        for bucket in self:
            if bucket.partial_over is not None:
                all_reduce(bucket.shard_grads, bucket.partial_over)

    def _of_chunk(self, chunk: int) -> list[Bucket]:
        return [bucket for bucket in self if bucket.chunk == chunk]

    def gather_params(self) -> None:
        """Start collecting updated parameters from the ranks that own them, first those that are used first."""
        for bucket in reversed(list(self)):
            bucket.start_gather()

    def wait_params(self) -> None:
        """Wait until all parameters are whole."""
        for bucket in self:
            bucket.finish_gather()

    def wait_in_forward(self, chunks: Sequence[nn.Module]) -> None:
        """Let every module of a layer wait for its own parameters, and every chunk for those outside of layers."""
        for chunk in chunks:
            for prefix, module in chunk.named_modules():
                if prefix.startswith("layers."):
                    names = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
                elif not prefix:
                    names = [name for name, _ in chunk.named_parameters() if not name.startswith("layers.")]
                else:
                    continue
                buckets = {id(self.of[name]): self.of[name] for name in names}
                module.register_forward_pre_hook(partial(_wait_for, list(buckets.values())))


def _wait_for(buckets: list[Bucket], *_: object) -> None:
    for bucket in buckets:
        bucket.finish_gather()


def _group(table: dict[str, ParamSpec], tp_size: int, capacity: int) -> Iterable[list[ParamSpec]]:
    """Parameters in reverse order, cut into lists of at most `capacity` elements; partial sums lie apart."""
    filling: dict[tuple[str, ...], list[ParamSpec]] = {}
    for spec in reversed(table.values()):
        bucket = filling.setdefault(spec.partial_over, [])
        if bucket and sum(map(partial(_numel, tp_size), bucket)) + _numel(tp_size, spec) > capacity:
            yield bucket
            bucket = filling[spec.partial_over] = []
        bucket.append(spec)
    yield from filling.values()


def _numel(tp_size: int, spec: ParamSpec) -> int:
    return torch.Size(spec.local_shape(tp_size)).numel()


def _allocate(
    specs: list[ParamSpec],
    chunk: int,
    tp_size: int,
    dp: Axis,
    axes: dict[str, Axis],
    zero_stage: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
) -> Bucket:
    offsets, used = {}, 0
    for spec in specs:
        offsets[spec.name] = used
        used += _numel(tp_size, spec)
    share = -(-used // dp.size)
    size = share * dp.size
    start, stop = (dp.rank * share, (dp.rank + 1) * share) if zero_stage else (0, size)
    (over,) = {spec.partial_over for spec in specs}
    return Bucket(
        specs,
        chunk,
        offsets,
        torch.zeros(size, dtype=dtype, device=device),
        torch.zeros(share if zero_stage >= 2 else size, dtype=grad_dtype, device=device),
        start,
        stop,
        dp,
        axes[over[0]] if over else None,
    )

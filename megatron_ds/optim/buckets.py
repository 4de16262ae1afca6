"""Flat parameter and gradient buffers, and the reduction of gradients over data-parallel ranks during the backward.

Note [From autograd gradient to optimizer shard]
    Parameters are views of a bucket's flat buffer, in the reverse order of the forward pass, so that a bucket fills up
    while the backward runs. Each gradient is added into the bucket's fp32 view as soon as autograd has it (fp32
    parameters: autograd itself adds in place). In the last backward of a step the buckets are *armed*: one whose
    gradients are complete starts its reduction over dp at once. ZeRO-0 sums the whole bucket on every rank; ZeRO-1
    leaves each rank the sum of its own shard. What is only a partial sum along another axis (a tied embedding: first
    and last stage) lies in buckets of its own, laid out alike at both ends, and is summed after, on the shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_ds.parallel.collectives import all_gather_async, all_reduce, all_reduce_async, reduce_scatter_async
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import ParamSpec


@dataclass
class Bucket:
    """Contiguous parameters, their fp32 gradients, and the range that this rank's optimizer owns.

    Shapes: params and grads [n] with n a multiple of dp; shard = elements [start, stop)
    """

    specs: list[ParamSpec]
    offsets: dict[str, int]
    params: torch.Tensor
    grads: torch.Tensor
    start: int
    stop: int
    dp: Axis
    partial_over: Axis | None
    waiting: set[str] = field(default_factory=set)
    pending: Any = None

    @property
    def sharded(self) -> bool:
        """True where each data-parallel rank owns a part (ZeRO-1)."""
        return self.stop - self.start < self.params.numel()

    def reduce(self) -> None:
        """Start summing the gradients over dp."""
        assert self.pending is None
        if self.sharded:
            self.pending = reduce_scatter_async(self.grads[self.start : self.stop], self.grads, self.dp)
        else:
            self.pending = all_reduce_async(self.grads, self.dp)

    def finish(self) -> None:
        """Wait for the sum over dp, then add what other axes hold."""
        if self.pending is None:
            self.reduce()
        self.pending.wait()
        self.pending = None
        if self.partial_over is not None:
            all_reduce(self.grads[self.start : self.stop], self.partial_over)

    def gather_params(self) -> Any:
        """Start collecting the shards that the ranks have updated."""
        shard = self.params[self.start : self.stop]
        return all_gather_async(self.params, shard, self.dp) if self.sharded else None


class Buckets:
    """All buckets of one rank's model chunks, and the hooks that fill them."""

    def __init__(
        self,
        model: nn.Module,
        table: dict[str, ParamSpec],
        *,
        dp: Axis,
        tp_size: int,
        axes: dict[str, Axis],
        sharded: bool,
        capacity: int,
        overlap: bool,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.overlap, self.armed, self.sharded = overlap, False, sharded
        self.of: dict[str, Bucket] = {}
        for specs in _group(table, tp_size, capacity):
            bucket = _allocate(specs, tp_size, dp, axes, sharded, dtype, device)
            self.of |= dict.fromkeys(bucket.offsets, bucket)
        for name, spec in table.items():
            self._adopt(model, name, spec.local_shape(tp_size))

    def __iter__(self) -> Iterator[Bucket]:
        return iter({id(bucket): bucket for bucket in self.of.values()}.values())

    def _adopt(self, model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        """Make the named parameter a view of its bucket, and listen for its gradient."""
        owner, _, leaf = name.rpartition(".")
        param = nn.Parameter(self.view(name, shape, grads=False))
        setattr(model.get_submodule(owner), leaf, param)
        main_grad = self.view(name, shape, grads=True)
        in_place = param.dtype == main_grad.dtype
        if in_place:
            param.grad = main_grad
        param.register_post_accumulate_grad_hook(partial(self._on_grad, name, None if in_place else main_grad))

    def view(self, name: str, shape: tuple[int, ...], grads: bool) -> torch.Tensor:
        """The named parameter, or its fp32 gradient, in its flat buffer."""
        bucket = self.of[name]
        flat, offset = bucket.grads if grads else bucket.params, bucket.offsets[name]
        return flat[offset : offset + torch.Size(shape).numel()].view(shape)

    def _on_grad(self, name: str, main_grad: torch.Tensor | None, param: torch.Tensor) -> None:
        if main_grad is not None:
            assert param.grad is not None
            main_grad.add_(param.grad)
            param.grad = None
        if self.armed:
            bucket = self.of[name]
            bucket.waiting.discard(name)
            if not bucket.waiting:
                bucket.reduce()

    def zero(self) -> None:
        """Forget the last step's gradients."""
        for bucket in self:
            bucket.grads.zero_()

    def arm(self) -> None:
        """The next backward completes the gradients: reduce each bucket as soon as it is full."""
        self.armed = self.overlap
        for bucket in self:
            bucket.waiting = set(bucket.offsets)

    def finish(self) -> None:
        """Wait until every rank's gradients are summed."""
        self.armed = False
        for bucket in self:
            bucket.finish()

    def gather_params(self) -> None:
        """Collect updated parameters from the ranks that own them."""
        for handle in [bucket.gather_params() for bucket in self]:
            if handle is not None:
                handle.wait()


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
    tp_size: int,
    dp: Axis,
    axes: dict[str, Axis],
    sharded: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Bucket:
    offsets, used = {}, 0
    for spec in specs:
        offsets[spec.name] = used
        used += _numel(tp_size, spec)
    share = -(-used // dp.size)
    size = share * dp.size
    start, stop = (dp.rank * share, (dp.rank + 1) * share) if sharded else (0, size)
    (over,) = {spec.partial_over for spec in specs}
    return Bucket(
        specs,
        offsets,
        torch.zeros(size, dtype=dtype, device=device),
        torch.zeros(size, dtype=torch.float32, device=device),
        start,
        stop,
        dp,
        axes[over[0]] if over else None,
    )

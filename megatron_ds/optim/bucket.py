"""One bucket: contiguous parameters, their gradients, and how these are summed over data-parallel ranks.

The whole story is in buckets.py, Note [From autograd gradient to optimizer shard].
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from megatron_ds.parallel.collectives import all_gather_async, all_reduce_async, reduce_scatter_async
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import ParamSpec

SLICE = 4_000_000
"""Most gradient elements that ZeRO-2 sends at once; up to three such slices are on the way."""
SMALLEST_SLICE = 250_000
"""Below this a message costs its latency, whatever its size."""


@dataclass
class Bucket:
    """Contiguous parameters of one chunk, their gradients, and the range that this rank's optimizer owns.

    blank: parameters whose places in `grads` hold the last step's numbers, which the first gradient will overwrite.
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
    blank: set[str] = field(default_factory=set)
    reduced: bool = False
    gathering: Any = None
    arrived: dict[str, torch.Tensor] = field(default_factory=dict)

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
        """True where a parameter's `grad` is its place in the bucket, into which autograd adds by itself."""
        return self.grads.dtype == self.params.dtype and not self.keeps_shard_only

    def main_grad(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Where the named parameter's gradient is kept."""
        offset = self.offsets[name]
        return self.grads[offset : offset + torch.Size(shape).numel()].view(shape)

    def clear(self, overwritten: Set[str]) -> None:
        """Forget the last step's gradients; those that will be overwritten are left as they are until then."""
        if self.keeps_shard_only:
            self.grads.zero_()
        else:
            self.blank = self.offsets.keys() & overwritten
            self._zero(self.offsets.keys() - self.blank)

    def _zero(self, names: Set[str]) -> None:
        starts = pairwise([*self.offsets.values(), len(self.grads)])
        parts = [
            self.grads[start:stop] for name, (start, stop) in zip(self.offsets, starts, strict=True) if name in names
        ]
        if parts:
            torch._foreach_zero_(parts)

    def is_first(self, name: str) -> bool:
        """True if the parameter's gradient is blank, which it is no longer: the caller writes it."""
        first = name in self.blank
        self.blank.discard(name)
        return first

    @property
    def shard_grads(self) -> torch.Tensor:
        """Gradients of the elements that this rank's optimizer owns."""
        return self.grads if self.keeps_shard_only else self.grads[self.start : self.stop]

    def reduce(self) -> None:
        """Start summing the gradients over dp."""
        assert not self.reduced
        self.reduced = True
        self._zero(self.blank)
        self.blank = set()
        if self.keeps_shard_only:
            self._reduce_by_slices()
        elif self.sharded:
            self.pending = [reduce_scatter_async(self.shard_grads, self.grads, self.dp)]
        else:
            self.pending = [all_reduce_async(self.grads, self.dp)]

    def take(self, name: str, grad: torch.Tensor) -> None:
        """Add a gradient to what the parameter has."""
        if not self.keeps_shard_only:
            self.main_grad(name, tuple(grad.shape)).add_(grad)
        elif name in self.arrived:
            self.arrived[name] = self.arrived[name].float().add_(grad)
        else:
            self.arrived[name] = grad

    def _reduce_by_slices(self) -> None:
        """Add the sum of all ranks' gradients to the shard; row i of the buffer belongs to rank i."""
        share, total = self.stop - self.start, self.params.numel()
        width = max(1, min(SLICE, max(total // 8, SMALLEST_SLICE)) // self.dp.size)
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
        self.arrived.clear()

    def _copy_grads(self, out: torch.Tensor, start: int) -> None:
        """Copy what has arrived for elements [start, start + len(out)) of the bucket."""
        stop = start + out.numel()
        first = max(0, bisect_right(self.specs, start, key=lambda spec: self.offsets[spec.name]) - 1)
        for spec in self.specs[first:]:
            begin = self.offsets[spec.name]
            if begin >= stop:
                return
            grad = self.arrived.get(spec.name)
            if grad is None:
                continue
            low, high = max(begin, start), min(begin + grad.numel(), stop)
            if low < high:
                out[low - start : high - start] = grad.reshape(-1)[low - begin : high - begin]

    def wait(self) -> None:
        """Wait for the sum over dp."""
        for handle in self.pending:
            handle.wait()
        self.pending = []

    def settle(self) -> None:
        """The same; then more gradients may come."""
        self.wait()
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

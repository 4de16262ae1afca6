"""Flat parameter and gradient buffers, and the reduction of gradients over data-parallel ranks during the backward.

Note [From autograd gradient to optimizer shard]
    Parameters are views of a bucket's flat buffer, in the reverse order of the forward pass, so that a bucket fills up
    while the backward runs. ZeRO-0 and ZeRO-1: linears and embeddings add the gradients of their weights into the
    bucket's fp32 view themselves (`accumulate`); any other is added as soon as autograd has it (fp32 parameters:
    autograd itself adds in place). The first product of a step overwrites, from the second step on when it is known to
    come: that saves writing and reading zeros. Such a weight gets nothing from autograd.
    In the last backward of a step the buckets are *armed*: one whose gradients are complete starts its reduction over
    dp (and cp) at once. ZeRO-0 sums the whole bucket on every rank; ZeRO-1 leaves each rank the sum of its own shard.
    ZeRO-2 keeps fp32 gradients of the own shard only. There every backward is armed: a bucket whose gradients are
    complete is reduced slice by slice through a small fp32 buffer and added to the shard, and the gradients that waited
    go. One that comes again before (zbh1: a later micro-batch's, by I) is added to the first in fp32.
    What is only a partial sum along another axis (a tied embedding: first and last stage; norms and biases under
    sequence parallelism: tp) lies in buckets of its own, laid out alike on all those ranks, and is summed once at the
    end of the step, on the shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from megatron_ds.kernels.products import Products, add_rows
from megatron_ds.optim.bucket import Bucket
from megatron_ds.parallel.collectives import all_reduce
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import ParamSpec

REDUCTIONS_AT_ONCE = 2
"""Buckets whose reduction into shards may be on the way: each holds buffers."""


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
        self.overlap, self.sharded = (overlap and dp.size > 1) or zero_stage >= 2, zero_stage >= 1
        self.armed: set[int] = set()
        self.overwritten: set[str] = set()
        self.on_the_way: list[Bucket] = []
        self.all: list[Bucket] = []
        self.of: dict[str, Bucket] = {}
        self.names: dict[int, str] = {}
        total = sum(_numel(tp_size, spec) for table in tables for spec in table.values())
        usual = max(1_000_000, min(40_000_000, total // 8))
        capacity = capacity or usual
        if zero_stage >= 2:  # a bucket's gradients live until it is complete: a large one would undo what is saved
            capacity = min(capacity, usual)
        for number, table in enumerate(tables):
            for specs in _group(table, tp_size, capacity):
                bucket = _allocate(specs, number, tp_size, dp, axes, zero_stage, dtype, grad_dtype, device)
                assert not self.of.keys() & bucket.offsets.keys()
                self.all.append(bucket)
                self.of |= dict.fromkeys(bucket.offsets, bucket)
        for chunk, table in zip(chunks, tables, strict=True):
            for name, spec in table.items():
                self._adopt(chunk, name, spec.local_shape(tp_size))

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self.all)

    def _adopt(self, model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        """Make the named parameter a view of its bucket, and listen for its gradient."""
        owner, _, leaf = name.rpartition(".")
        bucket = self.of[name]
        param = nn.Parameter(self.view(name, shape))
        setattr(model.get_submodule(owner), leaf, param)
        self.names[id(param)] = name
        if bucket.autograd_adds:
            param.grad = bucket.main_grad(name, shape)
        # A `grad` of another dtype than the parameter's (torch's `grad_dtype`) is what torch.compile will not have.
        if self.overlap or not bucket.autograd_adds:
            param.register_post_accumulate_grad_hook(partial(self._on_grad, name))

    def view(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The named parameter in its flat buffer."""
        bucket = self.of[name]
        offset = bucket.offsets[name]
        return bucket.params[offset : offset + torch.Size(shape).numel()].view(shape)

    def _on_grad(self, name: str, param: nn.Parameter) -> None:
        if param.grad is None:  # it comes by `accumulate`
            return
        bucket = self.of[name]
        if not bucket.autograd_adds:
            bucket.take(name, param.grad)
            param.grad = None
        self._has(bucket, name)

    @torch.no_grad()
    def accumulate(
        self, weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, products: Products, more: bool = False
    ) -> None:
        """Add grad^T x to a weight's gradient; `more`: another part of it follows in the same backward.

        Shapes: grad [n, o], x [n, i]
        """
        name = self.names[id(weight)]
        bucket = self.of[name]
        if bucket.keeps_shard_only:
            bucket.take(name, products.grad_weight(grad, x))
        else:
            total, beta = bucket.main_grad(name, tuple(weight.shape)), 0 if bucket.is_first(name) else 1
            products.add_grad_weight(total, grad, x, beta)
            self.overwritten.add(name)
        if not more:
            self._has(bucket, name)

    @torch.no_grad()
    def accumulate_rows(self, weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, more: bool = False) -> None:
        """Add rows to the rows `ids` of a table's gradient; `more` as in `accumulate`.

        Shapes: ids [n], rows [n, h]
        """
        name = self.names[id(weight)]
        bucket = self.of[name]
        if bucket.keeps_shard_only:
            bucket.take(name, torch.ops.aten.embedding_dense_backward(rows, ids, len(weight), -1, False))
        else:
            total = bucket.main_grad(name, tuple(weight.shape))
            add_rows(total.zero_() if bucket.is_first(name) else total, ids, rows)
        if not more:
            self._has(bucket, name)

    def _has(self, bucket: Bucket, name: str) -> None:
        """Reduce the bucket if this was what an armed one waited for."""
        if bucket.chunk in self.armed:
            bucket.waiting.discard(name)
            if not bucket.waiting and not bucket.reduced:
                self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        """Start a reduction; one that leaves shards holds buffers on its way, so let the oldest of those end first."""
        if bucket.sharded:
            self.on_the_way = [other for other in self.on_the_way if other.pending]
            while len(self.on_the_way) >= REDUCTIONS_AT_ONCE:
                self.on_the_way.pop(0).wait()
            self.on_the_way.append(bucket)
        bucket.reduce()

    def zero(self) -> None:
        """Forget the last step's gradients."""
        for bucket in self:
            bucket.clear(self.overwritten)

    def arm(self, chunk: int, still_missing: Sequence[torch.Tensor] | None = None) -> None:
        """The next backward completes the chunk's gradients: reduce each bucket as soon as it is full."""
        missing = {self.names[id(weight)] for weight in still_missing} if still_missing is not None else None
        for bucket in self._of_chunk(chunk):
            bucket.settle()
            bucket.waiting = set(bucket.offsets) if missing is None else missing & bucket.offsets.keys()
            if self.overlap and not bucket.waiting:
                self._reduce(bucket)
        if self.overlap:
            self.armed.add(chunk)

    def finish(self, chunk: int) -> None:
        """The backward is done: reduce what is not yet on its way."""
        self.armed.discard(chunk)
        for bucket in self._of_chunk(chunk):
            if not bucket.reduced:
                self._reduce(bucket)
            if bucket.keeps_shard_only:  # what is on the way would be kept beside the next activations
                bucket.wait()

    def wait(self) -> None:
        """Wait until all gradients are whole."""
        for bucket in self:
            bucket.settle()
        self.sum_partials()

    def sum_partials(self) -> None:
        """Add what other axes hold of the sums over dp."""
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
        """Let every module wait for its own parameters when it is called; embeddings, which are also used without
        being called (a tied head), when their chunk is."""
        for chunk in chunks:
            for prefix, module in chunk.named_modules():
                whole = not prefix
                names = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=whole)]
                names = [name for name in names if name.startswith("embedding.") == whole]
                buckets = {id(self.of[name]): self.of[name] for name in names}
                if buckets:
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

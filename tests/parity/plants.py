"""Bugs to plant: each replaces one thing of the package, inside a rank, by what somebody could have written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import pretrain_gpt
from megatron_ds.data.batch import BERTBatch
from megatron_ds.model import context_attention, linear
from megatron_ds.model.attention import CrossAttention
from megatron_ds.model.chunk import ModelChunk
from megatron_ds.model.t5 import T5Model
from megatron_ds.optim.buckets import Buckets
from megatron_ds.optim.zero import Segment, ZeroOptimizer
from megatron_ds.parallel.collectives import Done, all_reduce
from megatron_ds.parallel.context import Axis, Sharding
from megatron_ds.training import step
from tests.parity import harness
from tests.parity.harness import RECIPE, Share, train
from tests.reference.training import GlobalBatch


def row_without_all_reduce() -> None:
    """The row-parallel linear gives each rank its own partial sum."""
    linear.all_reduce = lambda tensor, axis: tensor  # type: ignore[assignment]


def column_without_reduce() -> None:
    """The column-parallel linear's backward keeps its partial dX."""
    linear.all_reduce_async = lambda tensor, axis: Done()  # type: ignore[assignment]


def wrong_count() -> None:
    """The loss is a mean over all positions, masked ones too."""

    def forward_step(batch: Any, model: Any, upstream: Any) -> Any:
        losses, loss = pretrain_gpt.forward_step(batch, model, upstream)
        return losses, lambda x: (loss(x)[0], torch.tensor(float(batch.loss_mask.numel())))

    harness.RECIPES["GPT"] = RECIPE._replace(forward_step=forward_step)


def norm_counted_tp_times() -> None:
    """Every tensor-parallel rank counts what it only has a copy of."""

    def counted(self: ZeroOptimizer) -> list[Segment]:
        here = self.buckets.sharded or self.dp.is_first
        return [segment for segment in self.segments if here and not segment.spec.owned_by_first_stage]

    ZeroOptimizer._counted = counted  # type: ignore[method-assign]


def reduced_twice() -> None:
    """Gradients are summed over data-parallel ranks, and then once more."""
    wait = Buckets.wait

    def wait_and_reduce(buckets: Buckets) -> None:
        wait(buckets)
        for bucket in buckets:
            all_reduce(bucket.grads, bucket.dp)

    Buckets.wait = wait_and_reduce  # type: ignore[method-assign]


def partial_sums_forgotten() -> None:
    """Under sequence parallelism nobody adds up the gradients of norms, biases and positions."""
    Sharding.partial_over = property(lambda self: ())  # type: ignore[assignment,method-assign]


def tied_ends_not_summed() -> None:
    """First and last stage keep their own parts of the tied embedding's gradient."""
    Buckets.sum_partials = lambda self: None  # type: ignore[method-assign]


def ring_turned_round() -> None:
    """Keys and values in the ring are taken for those of the rank on the other side."""
    rightly = context_attention._round

    def wrongly(kv: torch.Tensor, cp: Axis) -> Iterator[tuple[int, torch.Tensor]]:
        for hop, (_, buffer) in enumerate(rightly(kv, cp)):
            yield (cp.rank + hop) % cp.size, buffer

    context_attention._round = wrongly


def positions_not_balanced() -> None:
    """The ring is given contiguous parts of the sequence."""
    rightly = step.context_positions
    step.context_positions = lambda s, c, rank, ulysses: rightly(s, c, rank, True)


def padding_seen() -> None:
    """Nobody keeps attention off the padding."""
    ModelChunk._mask = lambda self, length, causal, documents: None  # type: ignore[method-assign]


def padding_of_the_encoder_seen() -> None:
    """The encoder's own attention is right, the decoder's attention to it is not."""
    rightly = CrossAttention.forward

    def unmasked(self: CrossAttention, x: torch.Tensor, memory: torch.Tensor, mask: Any) -> torch.Tensor:
        return rightly(self, x, memory, None)

    CrossAttention.forward = unmasked  # type: ignore[method-assign]


def relative_tables_cut_off() -> None:
    """The gradient of the relative positions stays on the stage that used them."""
    unpack = T5Model._unpack

    def detached(self: T5Model, stream: torch.Tensor, lengths: Any) -> Any:
        source, target, tables = unpack(self, stream, lengths)
        return source, target, tables and tuple(table.detach() for table in tables)

    T5Model._unpack = detached  # type: ignore[method-assign]


def memory_cut_off() -> None:
    """The decoder's attention to the encoder gives it no gradient."""
    rightly = CrossAttention.forward

    def detached(self: CrossAttention, x: torch.Tensor, memory: torch.Tensor, mask: Any) -> torch.Tensor:
        return rightly(self, x, memory.detach(), mask)

    CrossAttention.forward = detached  # type: ignore[method-assign]


def losses_added_unweighted() -> None:
    """The sum of both losses is divided by the number of masked words."""
    step._loss_weights = lambda run, microbatches: torch.ones(2)


def order_counted_by_every_part() -> None:
    """Every part of a sequence asks for the order of its first position."""
    rightly = BERTBatch.at

    def at(self: BERTBatch, positions: torch.Tensor) -> BERTBatch:
        return dataclasses.replace(rightly(self, positions), order_mask=self.order_mask)

    BERTBatch.at = at  # type: ignore[method-assign]


def train_with(
    plant: Callable[[], None],
    argv: Sequence[str],
    params: dict[str, torch.Tensor],
    global_batches: Sequence[GlobalBatch],
) -> Share:
    """Run on every rank: the harness's `train` with a bug."""
    plant()
    return train(argv, params, global_batches)

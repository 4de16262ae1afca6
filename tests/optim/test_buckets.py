"""One table in several places of a backward: its gradient is all of them together, whoever reduces it when."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_ds.model.embedding import Vocab, VocabParallelEmbedding
from megatron_ds.model.runtime import Runtime
from megatron_ds.optim.buckets import Buckets
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Init
from tests.helpers.ranks import run_ranks

ROWS, H, N, STEPS, MICROBATCHES = 7, 3, 5, 3, 2
"""Of the table; positions that are looked up; 7 x 3 elements leave the shards of two ranks unequal without padding."""


def drawn(step: int, rank: int, number: int) -> tuple[torch.Tensor, ...]:
    """Of one micro-batch: ids of two lookups, the head's input, and what the gradients of the three are. Whole numbers
    of which bf16 loses nothing."""
    draw = torch.Generator().manual_seed(100 * step + 10 * rank + number)
    ids = torch.randint(ROWS, (2, N, 1), generator=draw)
    numbers = [torch.randint(-3, 4, (N, 1, width), generator=draw).float() for width in (H, H, H, ROWS)]
    return ids[0], ids[1], *numbers


def by_autograd(world_size: int, step: int) -> torch.Tensor:
    """The sum over ranks and micro-batches in fp64, by torch alone."""
    table = torch.zeros(ROWS, H, dtype=torch.float64, requires_grad=True)
    for rank, number in itertools.product(range(world_size), range(MICROBATCHES)):
        one, other, *numbers = drawn(step, rank, number)
        x, to_one, to_other, to_head = (t.double() for t in numbers)
        parts = (table[one] * to_one).sum(), (table[other] * to_other).sum(), (x @ table.t() * to_head).sum()
        sum(parts).backward()  # type: ignore[union-attr]
    assert table.grad is not None
    return table.grad


def by_buckets(zero_stage: int, dtype: torch.dtype, overlap: bool) -> list[tuple[int, int, list[float]]]:
    """Run on every rank: the gradients of every step that its optimizer would see, and which elements they are of."""
    dist.init_process_group("gloo")
    dp = Axis("dp_cp", dist.get_world_size(), dist.get_rank(), dist.group.WORLD, on_gloo=True)
    runtime, cpu = Runtime(), torch.device("cpu")
    model = nn.Module()
    model.words = VocabParallelEmbedding(
        Vocab(ROWS, ROWS), H, init=Init("normal", 0.02), runtime=runtime, device="meta", dtype=dtype
    )
    table = {f"words.{spec.name}": dataclasses.replace(spec, name=f"words.{spec.name}") for spec in model.words.specs()}
    buckets = Buckets(
        [model], [table], dp=dp, tp_size=1, axes={}, zero_stage=zero_stage, capacity=None, overlap=overlap,
        dtype=dtype, grad_dtype=torch.float32, device=cpu,
    )  # fmt: skip
    runtime.weight_grads.main = buckets
    found = []
    for step in range(STEPS):
        buckets.zero()
        for number in range(MICROBATCHES):
            one, other, x, to_one, to_other, to_head = drawn(step, dp.rank, number)
            last = number == MICROBATCHES - 1
            if zero_stage == 2 or last:
                buckets.arm(0)
            first = model.words(one)
            second = model.words(other, more=True)  # made later, its gradient is the first of the two
            logits = model.words.project(x.to(dtype))
            ((first * to_one).sum() + (second * to_other).sum() + (logits * to_head).sum()).backward()
            if zero_stage == 2 or last:
                buckets.finish(0)
        buckets.wait()
        (bucket,) = buckets
        found.append((bucket.start, bucket.stop, bucket.shard_grads.tolist()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("zero_stage", "overlap"), [(0, True), (0, False), (1, True), (2, True)])
def test_two_lookups_and_a_tied_head_are_summed(zero_stage: int, overlap: bool, dtype: torch.dtype) -> None:
    ranks = run_ranks(by_buckets, 2, zero_stage, dtype, overlap)
    for step in range(STEPS):
        expected = by_autograd(2, step).flatten().tolist() + [0.0]  # one element more makes the shards alike
        for start, stop, grads in (rank[step] for rank in ranks):
            assert grads == expected[start:stop], (step, start)

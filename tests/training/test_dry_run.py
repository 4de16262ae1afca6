"""What --dry-run says a rank would send is what a rank sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ds.parallel import collectives, context
from megatron_ds.training.dry_run import sent_bytes
from megatron_ds.training.progress import Progress
from tests.helpers.ranks import run_ranks
from tests.parity.harness import RECIPE, STYLES, arguments, batches, start, steps


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def predicted_and_counted(argv: list[str], style: str) -> tuple[dict[str, int], dict[str, int]]:
    """Run on every rank: the prediction for its stage, and bytes given to torch.distributed in one step, per axis."""
    engine = start(argv)
    engine.initialise()
    parallel = engine.run.parallel
    predicted = sent_bytes(engine.run, RECIPE)[parallel.pp.rank]
    counted = dict.fromkeys(predicted, 0)
    axes = {getattr(parallel, name).handle: name for name in counted if getattr(parallel, name).size > 1}

    def counting(call: Any, payload: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # An axis as long as the world shares its group with the one all-reduce of fp64 numbers that ends a step.
            if kwargs["group"] in axes and payload(args).dtype != torch.float64:
                counted[axes[kwargs["group"]]] += size(payload(args))
            return call(*args, **kwargs)

        return wrapped

    def batch(ops: list[dist.P2POp]) -> Any:
        counted["pp"] += sum(size(op.tensor) for op in ops if op.op is dist.isend)
        return exchange(ops)

    exchange, dist.batch_isend_irecv = dist.batch_isend_irecv, batch
    dist.all_reduce = counting(dist.all_reduce, lambda args: args[0])
    collectives._reduce_scatter = counting(collectives._reduce_scatter, lambda args: args[1])
    collectives._all_gather = counting(collectives._all_gather, lambda args: args[0])
    steps(engine, Progress(), batches(STYLES[style], 1))
    context.stop()
    return predicted, counted


@pytest.mark.parametrize(
    ("world_size", "style", "flags"),
    [
        (4, "gpt2", "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        (4, "llama", "--tensor-model-parallel-size 2 --zero-stage 1 --bf16"),
        (4, "gpt2", "--pipeline-model-parallel-size 4 --bf16"),
        (4, "gpt2", "--pipeline-model-parallel-size 2 --zero-stage 1"),
    ],
)
def test_predicted_bytes_are_the_bytes_sent(world_size: int, style: str, flags: str) -> None:
    found = run_ranks(predicted_and_counted, world_size, arguments(STYLES[style], *flags.split()), style)
    for predicted, counted in found:
        # Buckets are padded to a multiple of dp: a few elements more than the parameters that they hold.
        for axis, value in predicted.items():
            slack = 200 if "--zero-stage" in flags and axis in ("dp", "embedding") else 0
            assert value <= counted[axis] <= value + slack, axis

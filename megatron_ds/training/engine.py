"""One rank's share of the training: its model chunk, buckets, optimizer and executor, built from a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ds.model.gpt import GPTModel
from megatron_ds.model.init import initial_values
from megatron_ds.optim.buckets import Buckets
from megatron_ds.optim.zero import ZeroOptimizer
from megatron_ds.parallel.spec import ParamSpec, Piece
from megatron_ds.pipeline.executor import Executor, Wire
from megatron_ds.training.run import Recipe, Run


@dataclass
class Engine:
    """What a training step works with."""

    run: Run
    model: GPTModel
    table: dict[str, ParamSpec]
    buckets: Buckets
    optimizer: ZeroOptimizer
    executor: Executor

    def initialise(self) -> None:
        """Give every parameter its initial value, one at a time."""
        tp = self.run.parallel.tp
        with torch.no_grad():
            for name, spec in self.table.items():
                values = initial_values(spec, self.run.config.training.seed, tp.rank, tp.size)
                self.optimizer.set_values(name, values.to(self.run.device))

    def model_pieces(self) -> Iterator[Piece]:
        """This rank's parameters."""
        tp = self.run.parallel.tp
        for name, spec in self.table.items():
            local = self.buckets.view(name, spec.local_shape(tp.size), grads=False)
            yield from spec.pieces(local, tp.rank, tp.size, f"model/{name}")

    def pieces_to_save(self, with_optimizer: bool) -> Iterator[Piece]:
        """What this rank writes, so that every element of the model is written by exactly one rank."""
        parallel = self.run.parallel
        for piece in self.model_pieces() if parallel.dp.is_first else ():
            spec = self.table[piece.name.removeprefix("model/")]
            if not spec.owned_by_first_stage and (spec.split is not None or parallel.tp.is_first):
                yield piece
        if with_optimizer:
            for piece in self.optimizer.pieces():
                if self.optimizer.saves(self.table[piece.name.split("/")[1]]):
                    yield piece


def build_engine(run: Run, recipe: Recipe) -> Engine:
    """Make the chunk of this rank's stage and everything around it; parameters are still zero."""
    parallel, plan, optimizer = run.parallel, run.plan, run.config.optimizer
    model = recipe.model(run, plan.stages[parallel.pp.rank])
    table = model.table()
    buckets = Buckets(
        model,
        table,
        dp=parallel.dp,
        tp_size=parallel.tp.size,
        axes={"embedding": parallel.embedding},
        sharded=plan.zero_stage >= 1,
        capacity=optimizer.reduce_bucket_size,
        overlap=optimizer.overlap_grad_reduce,
        dtype=run.dtype,
        device=run.device,
    )
    hidden = run.config.model.hidden_size
    assert hidden
    executor = Executor(
        model,
        recipe.forward_step,
        buckets,
        pp=parallel.pp,
        streams=run.streams,
        wire=Wire((plan.seq_length, plan.micro_batch_size, hidden), run.dtype, run.device),
        # About 1 / positions, but a power of two: exact in every precision. The step makes up for the difference.
        loss_scale=2.0 ** -math.ceil(math.log2(plan.tokens_per_batch)),
    )
    return Engine(
        run, model, table, buckets, ZeroOptimizer(buckets, optimizer, tp=parallel.tp, dp=parallel.dp), executor
    )

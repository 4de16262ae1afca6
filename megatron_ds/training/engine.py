"""One rank's share of the training: its model chunks, buckets, optimizer and executor, built from a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ds.model.chunk import ModelChunk
from megatron_ds.model.init import initial_values
from megatron_ds.optim.buckets import Buckets
from megatron_ds.optim.loss_scale import LossScaling
from megatron_ds.optim.zero import ZeroOptimizer
from megatron_ds.parallel.spec import ParamSpec, Piece
from megatron_ds.pipeline.executor import Executor, Wire
from megatron_ds.training.run import Recipe, Run


@dataclass
class Engine:
    """What a training step works with."""

    run: Run
    chunks: list[ModelChunk]
    table: dict[str, ParamSpec]
    buckets: Buckets
    optimizer: ZeroOptimizer
    executor: Executor
    loss_scaling: LossScaling
    normaliser: float
    """About 1 / positions of a global batch, but a power of two: exact in every precision."""

    def initialise(self) -> None:
        """Give every parameter its initial value, one at a time."""
        tp = self.run.parallel.tp
        with torch.no_grad():
            for name, spec in self.table.items():
                values = initial_values(spec, self.run.config.training.seed, tp.rank, tp.size)
                self.optimizer.set_values(name, values.to(self.run.device))

    def train(self, training: bool) -> None:
        """Switch dropout on or off."""
        for chunk in self.chunks:
            chunk.train(training)

    def model_pieces(self) -> Iterator[Piece]:
        """This rank's parameters."""
        tp = self.run.parallel.tp
        for name, spec in self.table.items():
            local = self.buckets.view(name, spec.local_shape(tp.size))
            yield from spec.pieces(local, tp.rank, tp.size, f"model/{name}")

    def pieces_to_save(self, with_optimizer: bool) -> Iterator[Piece]:
        """What this rank writes, so that every element of the model is written by exactly one rank."""
        parallel = self.run.parallel
        for piece in self.model_pieces() if parallel.dp_cp.is_first else ():
            spec = self.table[piece.name.removeprefix("model/")]
            if not spec.owned_by_first_stage and (spec.split is not None or parallel.tp.is_first):
                yield piece
        if with_optimizer:
            for piece in self.optimizer.pieces():
                if self.optimizer.saves(self.table[piece.name.split("/")[1]]):
                    yield piece


def build_engine(run: Run, recipe: Recipe) -> Engine:
    """Make the chunks of this rank's stage and everything around them; parameters are still zero."""
    parallel, plan, config = run.parallel, run.plan, run.config
    chunks = [recipe.model(run, stage) for stage in plan.stages[parallel.pp.rank]]
    tables = [chunk.table() for chunk in chunks]
    buckets = Buckets(
        chunks,
        tables,
        dp=parallel.dp_cp,
        tp_size=parallel.tp.size,
        axes={"embedding": parallel.embedding, "tp": parallel.tp},
        zero_stage=plan.zero_stage,
        capacity=config.optimizer.reduce_bucket_size,
        overlap=config.optimizer.overlap_grad_reduce,
        dtype=run.dtype,
        grad_dtype=torch.bfloat16 if config.precision.grad_reduce_in_bf16 else torch.float32,
        device=run.device,
    )
    run.weight_grads.main = buckets
    if config.optimizer.overlap_param_gather:
        buckets.wait_in_forward(chunks)
    wire = Wire(chunks[0].wire_shape(plan.lengths, plan.micro_batch_size), run.residual_dtype, run.device)
    executor = Executor(
        chunks,
        recipe.forward_step,
        buckets,
        pp=parallel.pp,
        wire=wire,
        streams=run.streams,
        weight_grads=run.weight_grads,
        num_losses=len(config.model.loss_names),
    )
    optimizer = ZeroOptimizer(buckets, config.optimizer, tp=parallel.tp, dp=parallel.dp_cp, adamw=run.kernels.adamw)
    table = {name: spec for rows in tables for name, spec in rows.items()}
    normaliser = 2.0 ** -math.ceil(math.log2(plan.tokens_per_batch))
    return Engine(
        run, chunks, table, buckets, optimizer, executor, LossScaling.from_config(config.precision), normaliser
    )

"""What a step costs each rank: bytes held, bytes sent, time idle; predicted and measured by the same engine.

Note [Prediction on paper]
    A prediction builds the engine that a rank would build, but under FakeTensorMode, where tensors have shapes and no
    memory, and on axes with nobody at the other ends, where collectives only count. It runs one micro-batch through
    each kind of chunk that the rank has, and the end of a step. The list of the rank's actions tells the rest: how
    often each happens, and whose activations live at the same time.
    A measurement reads the same counters, in a real step. What neither sees: fragmentation, buffers of NCCL, what an
    operator needs inside, and what the optimizer needs while it updates.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ds.data.batch import blank_batch
from megatron_ds.kernels import activation, cross_entropy, norm
from megatron_ds.kernels.attention import Pattern, torch_attention
from megatron_ds.kernels.mask import Rule
from megatron_ds.kernels.table import Kernels
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.runtime import WeightGrads
from megatron_ds.parallel.collectives import all_reduce
from megatron_ds.parallel.context import ParallelContext, coordinates
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.pipeline.schedule import COMMUNICATION, Action, Actions, Kind
from megatron_ds.timers import Timers
from megatron_ds.training.engine import Engine, build_engine
from megatron_ds.training.memory import footprints
from megatron_ds.training.run import Recipe, Run, Stage
from megatron_ds.training.step import Totals, take

RECEIVES = frozenset({Kind.RECV_F, Kind.RECV_B})

Sent = Counter[str]
"""Bytes that a rank hands to others, under `axis collective`; see parallel/traffic.py for what is counted."""


class Held(NamedTuple):
    """What a rank keeps between steps; bytes with the padding of the buckets."""

    parameters: int
    params_bytes: int
    grads_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class Costs:
    """Of one rank in one step.

    activation_bytes: most that is kept between two actions, because later backwards need it.
    peak_bytes: most while an action runs, with what that needs besides.
    live: most micro-batches whose activations are kept; one that is so for one of v chunks counts 1/v.
    """

    num_microbatches: int
    held: Held
    sent: Sent
    activation_bytes: int
    peak_bytes: int
    live: float

    @property
    def total_bytes(self) -> int:
        """The most that the rank needs at once, as far as it is counted."""
        _, *kept = self.held
        return sum(kept) + self.peak_bytes


@dataclass(frozen=True)
class ChunkCosts:
    """Of one micro-batch on one chunk.

    keeps: by how much an action of a kind changes what is kept. needs: the most at once while it runs, above that.
    reduced: what the reduction of the chunk's gradients sends; `sent` is everything else.
    """

    sent: Sent
    reduced: Sent
    keeps: dict[Kind, int]
    needs: dict[Kind, int]


@dataclass(frozen=True)
class Paper:
    """What an engine on paper says of its rank. step: what the end of a step sends."""

    held: Held
    chunks: tuple[ChunkCosts, ...]
    step: Sent
    wire_bytes: int


def predict(run: Run, recipe: Recipe, rank: int, num_microbatches: int) -> Costs:
    """What a step of so many micro-batches costs any rank of the plan; see Note [Prediction on paper]."""
    stage = coordinates(rank, run.plan.sizes)["pp"]
    return in_all(on_paper(run, recipe, rank), run.plan.actions(num_microbatches)[stage], num_microbatches)


def on_paper(run: Run, recipe: Recipe, rank: int) -> Paper:
    """Build the engine of a rank without memory, and try every kind of chunk and the end of a step."""
    with FakeTensorMode():
        engine = build_engine(_paper_run(run, rank), recipe)
        by_kind: dict[Hashable, ChunkCosts] = {}
        kinds = [kind_of(run.config.model, chunk.stage) for chunk in engine.chunks]
        for number, kind in enumerate(kinds):
            if kind not in by_kind:
                by_kind[kind] = _try_chunk(engine, number)
        chunks = tuple(by_kind[kind] for kind in kinds)
        wire = engine.executor.wire
        wire_bytes = torch.Size(wire.shape).numel() * wire.dtype.itemsize
        return Paper(held(engine), chunks, _try_end_of_step(engine), wire_bytes)


def kind_of(model: TransformerConfig, stage: Stage) -> Hashable:
    """All that makes one chunk cost something else than another: how many layers of which kind, and the ends."""
    border = model.encoder_layers if model.model_type == "T5" else 0
    layers = min(stage.stop, border) - min(stage.start, border), stage.stop - stage.start
    return layers, stage.start < border <= stage.stop, stage.is_first, stage.is_last


def in_all(paper: Paper, actions: Actions, num_microbatches: int) -> Costs:
    """Add up a rank's actions."""
    sent, kept, most_kept, most = Counter(paper.step), 0, 0, 0
    for action in actions:
        chunk = paper.chunks[action.chunk]
        if action.kind in COMMUNICATION:
            kept += paper.wire_bytes if action.kind in RECEIVES else 0
            continue
        sent.update(chunk.sent if action.kind is Kind.F else chunk.reduced if action.kind is Kind.REDUCE else {})
        most = max(most, kept + chunk.needs[action.kind])
        kept += chunk.keeps[action.kind]
        most_kept = max(most_kept, kept)
    live = most_live([action.kind for action in actions]) / len(paper.chunks)
    return Costs(num_microbatches, paper.held, sent, most_kept, most, live)


def held(engine: Engine) -> Held:
    """Sums over the engine's own tensors."""
    buckets, optimizer = list(engine.buckets), engine.optimizer
    masters = [m for b in buckets if not optimizer.model_is_master(b) for m in [optimizer.masters[id(b)]]]
    moments = [moment for segment in optimizer.segments for moment in (segment.exp_avg, segment.exp_avg_sq)]
    return Held(
        sum(parameter.numel() for chunk in engine.chunks for parameter in chunk.parameters()),
        sum(bucket.params.nbytes for bucket in buckets),
        sum(bucket.grads.nbytes for bucket in buckets),
        sum(tensor.nbytes for tensor in (*masters, *moments)),
    )


def sent_so_far(parallel: ParallelContext) -> Sent:
    """The counters of all axes."""
    return Counter({f"{axis.name} {name}": n for axis in parallel.axes for name, n in axis.traffic.sent_bytes.items()})


def most_live(order: Sequence[Kind]) -> int:
    """Most micro-batches of any chunk between F and B or W."""
    return max(accumulate((kind is Kind.F) - (kind in (Kind.B, Kind.W)) for kind in order))


def _paper_run(run: Run, rank: int) -> Run:
    """The run as that rank would see it, without memory and without other ranks."""
    # Triton's kernels keep what these keep. Of plain torch SwiGLU would keep a product more, and cross-entropy copy all
    # logits in fp32.
    on_gpu = Kernels(
        layer_norm=norm.layer_norm,
        activations={**activation.FUSED, "gelu_tanh": activation.gelu_tanh},
        attention=_flash,
        bias_dropout_add=_bias_dropout_add,
        cross_entropy=cross_entropy.BY_BLOCKS,
    )
    if not run.config.model.attention_dropout:
        on_gpu = dataclasses.replace(on_gpu, mask=_no_mask)
    return dataclasses.replace(
        run,
        parallel=ParallelContext.on_paper(run.plan.sizes, rank),
        kernels=run.kernels if run.device.type == "cpu" else on_gpu,
        device=torch.device("cpu"),
        streams=DropoutStreams(run.config.training.seed),
        weight_grads=WeightGrads(),
    )


def _no_mask(rule: Rule) -> None:
    """Without dropout GPUs leave out what is not seen block by block, and there is no matrix."""


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, pattern: Pattern, dropout: float
) -> torch.Tensor:
    """GPUs drop out inside the attention; torch on CPUs would keep a matrix of s x s."""
    return torch_attention(q, k, v, mask, pattern, 0.0)


def _bias_dropout_add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, dropout: float
) -> torch.Tensor:
    """With masks of one byte, as on GPUs; torch on CPUs keeps factors of x's precision."""
    x = x if bias is None else x + bias
    return residual + (torch.native_dropout(x, dropout, True)[0] if dropout else x)


def _try_chunk(engine: Engine, number: int) -> ChunkCosts:
    """Run one micro-batch through one chunk, as the only one of a step."""
    run = engine.run
    batch = blank_batch(run.config.model.model_type, run.config.data, run.plan.micro_batch_size)
    before = sent_so_far(run.parallel)
    with footprints(engine.executor) as found:
        engine.executor.run(_only(engine, number), take(repeat(batch), run, 0, 1), Timers())
    sent = sent_so_far(run.parallel) - before
    reduced = Counter({name: n for name, n in sent.items() if name.startswith("dp_cp ")})
    keeps = {action.kind: action.after - action.before for action in found}
    needs = {action.kind: action.most - action.before for action in found}
    return ChunkCosts(sent - reduced, reduced, keeps, needs)


def _only(engine: Engine, chunk: int) -> Actions:
    """What the schedule does to the first micro-batch in one chunk, and the reduction."""
    run = engine.run
    stage, fewest = run.parallel.pp.rank, run.plan.sizes["pp"]
    actions = run.plan.actions(fewest)[stage]
    first = [a for a in actions if a.chunk == chunk and a.microbatch == 0 and a.kind is not Kind.REDUCE]
    return (*first, Action(Kind.REDUCE, chunk, 0))


def _try_end_of_step(engine: Engine) -> Sent:
    """What a step sends once the backward is done: see train_step."""
    run = engine.run
    parallel, logging = run.parallel, run.config.logging
    before, losses = sent_so_far(parallel), run.config.model.loss_names
    engine.buckets.wait()
    all_reduce(torch.zeros(2 * len(losses) + len(Totals._fields), dtype=torch.float64), parallel.world)
    if len(losses) > 1:
        all_reduce(torch.zeros(len(losses), dtype=torch.float64), parallel.dp_cp)
    if logging.log_params_norm:
        all_reduce(torch.zeros((), dtype=torch.float64), parallel.world)
    engine.optimizer.publish()
    return sent_so_far(parallel) - before

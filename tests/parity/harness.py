"""Train the package on N ranks from given weights and batches, and gather what the oracle can be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import pretrain_gpt
from megatron_ds import log
from megatron_ds.config import parse
from megatron_ds.data.loader import GPTBatch
from megatron_ds.kernels.table import Kernels
from megatron_ds.optim.lr import lr_schedule
from megatron_ds.parallel import context, launch
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.plan import make_plan
from megatron_ds.timers import Timers
from megatron_ds.training.engine import Engine, build_engine
from megatron_ds.training.progress import Progress
from megatron_ds.training.resume import checkpoint_to_load, load_checkpoint, save_checkpoint
from megatron_ds.training.run import Recipe, Run
from megatron_ds.training.step import train_step
from tests.reference.gpt import GlobalBatch, OracleConfig

RECIPE = Recipe(pretrain_gpt.train_valid_test_datasets_provider, pretrain_gpt.model_provider, pretrain_gpt.forward_step)
VOCAB = 131
"""No multiple of anything: every layout pads it, and with tp=4 the last ranks hold nothing but padding."""


MICRO = 2
"""Samples of a micro-batch."""


@dataclass
class Share:
    """What one rank of a run saw: the same losses and norms on every rank, its own pieces of the last gradients."""

    history: list[tuple[float, float]] = field(default_factory=list)
    gradients: list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]] = field(default_factory=list)
    params: list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]] = field(default_factory=list)


GPT2 = OracleConfig(num_layers=4, hidden=64, heads=8, kv_heads=8, ffn=256, vocab=VOCAB, max_positions=32)
LLAMA = OracleConfig(
    num_layers=4,
    hidden=64,
    heads=8,
    kv_heads=4,
    ffn=96,
    vocab=VOCAB,
    max_positions=32,
    norm="rmsnorm",
    swiglu=True,
    bias=False,
    qkv_bias=False,
    positions="rope",
    tied=False,
)
STYLES = {"gpt2": GPT2, "llama": LLAMA}


def arguments(model: OracleConfig, *layout: str) -> list[str]:
    """The command line that asks for the oracle's model and optimizer."""
    words = f"""--num-layers {model.num_layers} --hidden-size {model.hidden} --num-attention-heads {model.heads}
        --num-key-value-heads {model.kv_heads} --ffn-hidden-size {model.ffn} --seq-length {model.max_positions}
        --position-embedding-type {"rope" if model.positions == "rope" else "absolute"}
        --rotary-percent {model.rotary_percent}
        --normalization {"RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"}
        --hidden-dropout 0 --attention-dropout 0 --micro-batch-size {MICRO} --global-batch-size 8 --train-iters 40
        --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 4 --weight-decay 0.1 --clip-grad 0.5
        --adam-beta2 0.95 --reduce-bucket-size 20000 --tokenizer-type NullTokenizer --vocab-size {VOCAB - 1}
        --mock-data --device cpu"""
    switches = ["--swiglu"] * model.swiglu + ["--disable-bias-linear"] * (not model.bias)
    return [*words.split(), *switches, *["--untie-embeddings-and-output-weights"] * (not model.tied), *layout]


def batches(model: OracleConfig, steps: int, ragged: bool = True) -> list[GlobalBatch]:
    """Global batches of 8 samples; ragged: every sample has another number of target tokens."""
    generator = torch.Generator().manual_seed(7)
    out = []
    for _ in range(steps):
        text = torch.randint(0, model.vocab, (8, model.max_positions + 1), generator=generator)
        mask = torch.ones(8, model.max_positions)
        if ragged:
            kept = torch.randint(1, model.max_positions, (8, 1), generator=generator)
            mask = (torch.arange(model.max_positions) < kept).float()
        out.append((text[:, :-1], text[:, 1:], mask))
    return out


def start(argv: Sequence[str]) -> Engine:
    """Join the other ranks and build this rank's engine."""
    launch.adopt_environment()
    config = parse(argv)
    plan = make_plan(config, log.world_size(), VOCAB)
    device = torch.device("cpu")
    parallel = context.start(config.parallel, plan.sizes, device)
    streams = DropoutStreams(config.training.seed, parallel.tp.rank)
    return build_engine(Run(config, plan, parallel, Kernels(), device, None, streams), RECIPE)


def set_weights(engine: Engine, params: dict[str, torch.Tensor]) -> None:
    """Cut the oracle's weights for this rank, by hand: a column or row range per fused part."""
    tp = engine.run.parallel.tp
    with torch.no_grad():
        for name, spec in engine.table.items():
            whole = params[name].float()
            if spec.split is None:
                engine.optimizer.set_values(name, whole)
                continue
            if spec.split.padded_to:
                whole = torch.cat([whole, torch.zeros(spec.split.padded_to - len(whole), *whole.shape[1:])])
            parts = whole.split(list(spec.split.parts) or whole.shape[spec.split.dim], dim=spec.split.dim)
            mine = [part.chunk(tp.size, dim=spec.split.dim)[tp.rank] for part in parts]
            engine.optimizer.set_values(name, torch.cat(mine, dim=spec.split.dim))


def steps(engine: Engine, progress: Progress, global_batches: Sequence[GlobalBatch]) -> tuple[Progress, Share]:
    """Train; the rows of micro-batch i on data-parallel rank r are written down here once more."""
    run, share = engine.run, Share()
    plan, training, dp = run.plan, run.config.training, run.parallel.dp
    schedule = lr_schedule(run.config.lr, run.config.optimizer, None, plan.global_batch_size, training.train_iters)
    for tokens, labels, mask in global_batches:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        starts = [(i * dp.size + dp.rank) * MICRO for i in range(len(tokens) // MICRO // dp.size)]
        micro = [GPTBatch(*(t[r : r + MICRO] for t in (tokens, labels, mask, positions))) for r in starts]
        result = train_step(engine, schedule, progress, iter(micro), Timers(), stop=False, out_of_time=False)
        progress = progress.after_step(len(tokens), result.skipped)
        share.history.append((result.loss, result.grad_norm))
    return progress, share


def train(argv: Sequence[str], params: dict[str, torch.Tensor], global_batches: Sequence[GlobalBatch]) -> Share:
    """Run on every rank of `run_ranks`: train from the given weights."""
    engine = start(argv)
    set_weights(engine, params)
    _, share = steps(engine, Progress(), global_batches)
    tp = engine.run.parallel.tp
    for segment in engine.optimizer.segments:
        if engine.optimizer.saves(segment.spec):
            for out, values in ((share.gradients, segment.grad), (share.params, segment.master)):
                for piece in segment.spec.flat_pieces(values, segment.start, tp.rank, tp.size):
                    out.append((piece.name, piece.global_shape, piece.box.slices(), piece.tensor.clone()))
    context.stop()
    return share


def train_and_save(argv: Sequence[str], params: dict[str, torch.Tensor], global_batches: Sequence[GlobalBatch]) -> Any:
    """Run on every rank: train from the given weights, save at the end."""
    engine = start(argv)
    set_weights(engine, params)
    progress, share = steps(engine, Progress(), global_batches)
    save_checkpoint(engine, progress)
    context.stop()
    return share.history


def resume(argv: Sequence[str], global_batches: Sequence[GlobalBatch]) -> Any:
    """Run on every rank: load what --load says, train on."""
    engine = start(argv)
    index = checkpoint_to_load(engine.run.config)
    assert index is not None
    progress = load_checkpoint(engine, index)
    _, share = steps(engine, progress, global_batches)
    context.stop()
    return share.history


def assemble(pieces: Sequence[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Global tensors from all ranks' pieces; an element that nobody or more than one brought is NaN."""
    out: dict[str, torch.Tensor] = {}
    for name, shape, where, values in pieces:
        tensor = out.setdefault(name, torch.full(shape, torch.nan))
        tensor[where] = torch.where(tensor[where].isnan(), values, torch.nan)
    return out


def resave(argv: Sequence[str]) -> None:
    """Run on every rank: load what --load says and save it again at once."""
    engine = start(argv)
    index = checkpoint_to_load(engine.run.config)
    assert index is not None
    save_checkpoint(engine, load_checkpoint(engine, index))
    context.stop()

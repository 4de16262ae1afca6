"""Train the package on N ranks from given weights and batches, and gather what the oracle can be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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

SEQ, SAMPLES = 32, 8
"""Length of a sequence; sequences of a global batch."""

MICRO = 2
"""Samples of a micro-batch, unless a layout asks for something else."""

Mask = Literal["full", "holes", "uneven"]
Placed = tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]
"""Name and shape of a global tensor, a place in it, and the values there."""


@dataclass
class Share:
    """What one rank of a run saw: the same losses and norms on every rank, its own pieces of gradients and weights."""

    history: list[tuple[float, float]] = field(default_factory=list)
    gradients: list[list[Placed]] = field(default_factory=list)
    """Of every step, after clipping."""
    params: list[Placed] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)


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
    """The command line that asks for the oracle's model and optimizer; of a flag given twice the later one counts."""
    words = f"""--num-layers {model.num_layers} --hidden-size {model.hidden} --num-attention-heads {model.heads}
        --num-key-value-heads {model.kv_heads} --ffn-hidden-size {model.ffn} --seq-length {SEQ}
        --max-position-embeddings {model.max_positions}
        --position-embedding-type {"rope" if model.positions == "rope" else "absolute"}
        --rotary-percent {model.rotary_percent}
        --normalization {"RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"}
        --hidden-dropout 0 --attention-dropout 0 --micro-batch-size {MICRO} --global-batch-size {SAMPLES}
        --train-iters 40 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 4 --weight-decay 0.1
        --clip-grad 0.5 --adam-beta2 0.95 --reduce-bucket-size 20000 --tokenizer-type NullTokenizer
        --vocab-size {model.vocab - 1} --mock-data --device cpu"""
    switches = ["--swiglu"] * model.swiglu + ["--disable-bias-linear"] * (not model.bias)
    return [*words.split(), *switches, *["--untie-embeddings-and-output-weights"] * (not model.tied), *layout]


def batches(model: OracleConfig, steps: int, mask: Mask = "uneven") -> list[GlobalBatch]:
    """Global batches of random tokens.

    mask: full; holes, as many in every sequence; uneven: every sample has another number of target tokens and the
    third and fourth have none, so that there is a micro-batch without any.
    """
    generator = torch.Generator().manual_seed(7)
    out = []
    for _ in range(steps):
        text = torch.randint(0, model.vocab, (SAMPLES, SEQ + 1), generator=generator)
        keep = torch.ones(SAMPLES, SEQ)
        if mask == "uneven":
            kept = torch.randint(1, SEQ, (SAMPLES, 1), generator=generator)
            kept[2:4] = 0
            keep = (torch.arange(SEQ) < kept).float()
        elif mask == "holes":
            keep = (torch.rand(SAMPLES, SEQ, generator=generator).argsort(1) < SEQ * 3 // 4).float()
        out.append((text[:, :-1], text[:, 1:], keep))
    return out


def start(argv: Sequence[str]) -> Engine:
    """Join the other ranks and build this rank's engine."""
    launch.adopt_environment()
    config = parse(argv)
    assert config.tokenizer.vocab_size
    plan = make_plan(config, log.world_size(), config.tokenizer.vocab_size + 1)
    device = torch.device("cpu")
    parallel = context.start(config.parallel, plan.sizes, device)
    streams = DropoutStreams(config.training.seed)
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


def fresh(engine: Engine) -> Progress:
    """Where a run begins."""
    return Progress(loss_scale=engine.loss_scaling.start())


def steps(
    engine: Engine, progress: Progress, global_batches: Sequence[GlobalBatch], keep_gradients: bool = False
) -> tuple[Progress, Share]:
    """Train; the rows of micro-batch i on data-parallel rank r are written down here once more."""
    run, share = engine.run, Share()
    plan, training, dp = run.plan, run.config.training, run.parallel.dp
    schedule = lr_schedule(run.config.lr, run.config.optimizer, None, plan.global_batch_size, training.train_iters)
    size = plan.micro_batch_size
    for tokens, labels, mask in global_batches:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        starts = [(i * dp.size + dp.rank) * size for i in range(len(tokens) // size // dp.size)]
        micro = [GPTBatch(*(t[r : r + size] for t in (tokens, labels, mask, positions))) for r in starts]
        result = train_step(engine, schedule, progress, iter(micro), Timers(), stop=False, out_of_time=False)
        progress = progress.after_step(len(tokens), result.skipped, result.next_loss_scale)
        share.history.append((result.loss, result.grad_norm))
        share.skipped.append(result.skipped)
        if keep_gradients:
            share.gradients.append(placed(engine, "grad"))
    return progress, share


def placed(engine: Engine, what: Literal["grad", "master"]) -> list[Placed]:
    """This rank's pieces of all gradients, or of all weights; over all ranks every element once."""
    tp, out = engine.run.parallel.tp, []
    for segment in engine.optimizer.segments:
        if engine.optimizer.saves(segment.spec):
            for piece in segment.spec.flat_pieces(getattr(segment, what), segment.start, tp.rank, tp.size):
                out.append((piece.name, piece.global_shape, piece.box.slices(), piece.tensor.clone()))
    return out


def train(argv: Sequence[str], params: dict[str, torch.Tensor], global_batches: Sequence[GlobalBatch]) -> Share:
    """Run on every rank of `run_ranks`: train from the given weights."""
    engine = start(argv)
    set_weights(engine, params)
    _, share = steps(engine, fresh(engine), global_batches, keep_gradients=True)
    share.params = placed(engine, "master")
    context.stop()
    return share


def train_without_gradients(
    argv: Sequence[str], params: dict[str, torch.Tensor], global_batches: Sequence[GlobalBatch]
) -> Share:
    """Run on every rank: the same for many steps."""
    engine = start(argv)
    set_weights(engine, params)
    _, share = steps(engine, fresh(engine), global_batches)
    context.stop()
    return share


def train_and_save(argv: Sequence[str], params: dict[str, torch.Tensor], global_batches: Sequence[GlobalBatch]) -> Any:
    """Run on every rank: train from the given weights, save at the end."""
    engine = start(argv)
    set_weights(engine, params)
    progress, share = steps(engine, fresh(engine), global_batches)
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


def assemble(pieces: Sequence[Placed]) -> dict[str, torch.Tensor]:
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

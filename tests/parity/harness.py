"""Train the package on N ranks from given weights and batches, and gather what the oracle can be compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

import pretrain_bert
import pretrain_gpt
import pretrain_t5
from megatron_ds import log
from megatron_ds.config import parse
from megatron_ds.data.batch import BERTBatch, GPTBatch, T5Batch
from megatron_ds.kernels.adamw import AdamW, Hyper, Part
from megatron_ds.optim.lr import lr_schedule
from megatron_ds.parallel import context, launch
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.plan import make_plan
from megatron_ds.timers import Timers
from megatron_ds.training.engine import Engine, build_engine
from megatron_ds.training.progress import Progress
from megatron_ds.training.resume import checkpoint_to_load, load_checkpoint, save_checkpoint
from megatron_ds.training.run import Recipe, Run, chosen_kernels
from megatron_ds.training.step import train_step
from tests.parity.models import GPT2, LLAMA, STYLES, VOCAB, arguments, batches
from tests.reference import bert, t5
from tests.reference.training import GlobalBatch

__all__ = ["GPT2", "LLAMA", "RECIPE", "RECIPES", "STYLES", "VOCAB", "GlobalBatch", "arguments", "batches"]

ModelType = Literal["GPT", "BERT", "T5"]
RECIPES = {
    name: Recipe(script.train_valid_test_datasets_provider, script.model_provider, script.forward_step)
    for name, script in {"GPT": pretrain_gpt, "BERT": pretrain_bert, "T5": pretrain_t5}.items()
}
RECIPE = RECIPES["GPT"]

Placed = tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]
"""Name and shape of a global tensor, a place in it, and the values there."""


@dataclass
class Share:
    """What one rank of a run saw: the same losses and norms on every rank, its own pieces of gradients and weights."""

    history: list[tuple[float, ...]] = field(default_factory=list)
    """Of every step the losses, then the norm."""
    gradients: list[list[Placed]] = field(default_factory=list)
    """Of every step, after clipping."""
    params: list[Placed] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)


def gpt_micro_batch(tokens: torch.Tensor, *rest: torch.Tensor) -> GPTBatch:
    """labels, loss mask, and for packed documents positions and which document a token is of."""
    packing = rest[2:] or (torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return GPTBatch(tokens, *rest[:2], *packing)


def bert_micro_batch(*parts: torch.Tensor) -> BERTBatch:
    """Padding is a document of its own; every sample's order is asked."""
    whole = bert.GlobalBatch(*parts)
    positions = torch.arange(whole.tokens.shape[1]).expand_as(whole.tokens)
    return BERTBatch(
        tokens=whole.tokens,
        token_types=whole.token_types,
        labels=whole.labels.clamp(min=0),
        loss_mask=whole.loss_mask,
        documents=(~whole.real).long(),
        is_random=whole.is_random,
        position_ids=positions,
        order_mask=torch.ones(len(positions)),
    )


def t5_micro_batch(*parts: torch.Tensor) -> T5Batch:
    """Padding of the encoder is a document of its own; that of the decoder follows what counts, which cannot see it."""
    whole = t5.GlobalBatch(*parts)
    return T5Batch(
        encoder_tokens=whole.encoder_tokens,
        decoder_tokens=whole.decoder_tokens,
        labels=whole.labels.clamp(min=0),
        loss_mask=whole.loss_mask,
        encoder_documents=(~whole.real).long(),
    )


MICRO_BATCHES: dict[str, Callable[..., Any]] = {
    "GPT": gpt_micro_batch,
    "BERT": bert_micro_batch,
    "T5": t5_micro_batch,
}


def model_type_of(global_batches: Sequence[GlobalBatch]) -> ModelType:
    """Whose batches these are; a GPT's if there are none."""
    kinds: dict[type, ModelType] = {bert.GlobalBatch: "BERT", t5.GlobalBatch: "T5"}
    return kinds.get(type(global_batches[0]), "GPT") if global_batches else "GPT"


def start(argv: Sequence[str], model_type: ModelType = "GPT") -> Engine:
    """Join the other ranks and build this rank's engine."""
    launch.adopt_environment()
    config = parse(argv, {"model_type": model_type})
    assert config.tokenizer.vocab_size
    plan = make_plan(config, log.world_size(), config.tokenizer.vocab_size + 1)
    device = torch.device("cpu")
    parallel = context.start(config.parallel, plan.sizes, device)
    streams = DropoutStreams(config.training.seed)
    kernels = chosen_kernels(config, device).kernels
    kernels = replace(kernels, adamw=partial(update_and_keep, kernels.adamw))
    return build_engine(Run(config, plan, parallel, kernels, device, None, streams), RECIPES[model_type])


def update_and_keep(adamw: AdamW, parts: Sequence[Part], step: torch.Tensor, scale: torch.Tensor, hyper: Hyper) -> None:
    """An update that leaves the gradients as they were applied; not every kernel does."""
    applied = [part.grad * scale for part in parts]
    adamw(parts, step, scale, hyper)
    for part, grad in zip(parts, applied, strict=True):
        part.grad.copy_(grad)


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
    make = MICRO_BATCHES[run.config.model.model_type]
    for whole in global_batches:
        samples = len(whole[0])
        starts = [(i * dp.size + dp.rank) * size for i in range(samples // size // dp.size)]
        micro = [make(*(t[r : r + size] for t in whole)) for r in starts]
        result = train_step(engine, schedule, progress, iter(micro), Timers(), stop=False, out_of_time=False)
        progress = progress.after_step(samples, result.skipped, result.next_loss_scale)
        share.history.append((*result.losses.values(), result.grad_norm))
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
    engine = start(argv, model_type_of(global_batches))
    set_weights(engine, params)
    _, share = steps(engine, fresh(engine), global_batches, keep_gradients=True)
    share.params = placed(engine, "master")
    context.stop()
    return share


def train_without_gradients(
    argv: Sequence[str], params: dict[str, torch.Tensor], global_batches: Sequence[GlobalBatch]
) -> Share:
    """Run on every rank: the same for many steps."""
    engine = start(argv, model_type_of(global_batches))
    set_weights(engine, params)
    _, share = steps(engine, fresh(engine), global_batches)
    context.stop()
    return share


def train_and_save(argv: Sequence[str], params: dict[str, torch.Tensor], global_batches: Sequence[GlobalBatch]) -> Any:
    """Run on every rank: train from the given weights, save at the end."""
    engine = start(argv, model_type_of(global_batches))
    set_weights(engine, params)
    progress, share = steps(engine, fresh(engine), global_batches)
    save_checkpoint(engine, progress)
    context.stop()
    return share.history


def resume(argv: Sequence[str], global_batches: Sequence[GlobalBatch]) -> Any:
    """Run on every rank: load what --load says, train on."""
    engine = start(argv, model_type_of(global_batches))
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

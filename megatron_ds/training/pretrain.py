"""pretrain(): from a command line to a trained model, or to one clear message."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import torch

from megatron_ds import log
from megatron_ds.config import Config, attributed, explain, overridden, parse, with_checkpoint_model
from megatron_ds.data.batch import collate_for
from megatron_ds.data.loader import MicrobatchLoader
from megatron_ds.data.tokenizer import Tokenizer, build_tokenizer, planned_vocab_size
from megatron_ds.deepspeed_json import Merged, merge
from megatron_ds.errors import EXIT_FAULT, EXIT_RESUBMIT, EXIT_TERMINATED, ConfigError, ConfigErrors, UserError
from megatron_ds.kernels.table import Kernels
from megatron_ds.optim.lr import lr_schedule
from megatron_ds.parallel import context, launch
from megatron_ds.parallel.collectives import gather_bytes
from megatron_ds.parallel.context import ParallelContext
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.plan import Plan, SampleCounts, continue_from, make_plan, samples_from
from megatron_ds.rules import check_config
from megatron_ds.rules_layout import ranks_per_replica
from megatron_ds.timers import Timers
from megatron_ds.training import cpu, dry_run
from megatron_ds.training.engine import Engine, build_engine
from megatron_ds.training.flops import train_flops_per_sample
from megatron_ds.training.loop import Loop
from megatron_ds.training.meter import Meter
from megatron_ds.training.metrics import Metrics
from megatron_ds.training.progress import Progress
from megatron_ds.training.resume import agree_on_checkpoint, check_save_directory, checkpoint_to_load, load_checkpoint
from megatron_ds.training.run import (
    Datasets,
    DatasetsProvider,
    ForwardStep,
    ModelProvider,
    Recipe,
    Run,
    agree_on_kernels,
    as_splits,
    chosen_kernels,
)
from megatron_ds.training.signals import StopRequest
from megatron_ds.training.verify import verify


def pretrain(
    train_valid_test_datasets_provider: DatasetsProvider,
    model_provider: ModelProvider,
    forward_step: ForwardStep,
    args_defaults: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Train a model as the command line says; leave the process with an exit code of errors.py when that is not 0.

    args_defaults: values of config fields that the recipe prefers; what is typed wins.
    """
    recipe, stop = Recipe(train_valid_test_datasets_provider, model_provider, forward_step), StopRequest()
    words = sys.argv[1:] if argv is None else argv
    code = _guarded(lambda: _main(recipe, args_defaults or {}, words, stop), stop)
    if code:
        sys.exit(code)


def _main(recipe: Recipe, defaults: Mapping[str, Any], argv: Sequence[str], stop: StopRequest) -> int:
    begun = time.monotonic()
    declared = os.environ.get("WORLD_SIZE", "1")
    launch.adopt_environment()
    typed, overruled = _as_stored(parse(argv, defaults))
    plans = typed.training.dry_run or typed.training.print_config
    world_size = _planned_world_size(typed, declared) if plans else log.world_size()
    merged = merge(typed, world_size)
    config = merged.config
    if config.training.print_config:
        log.info(explain(attributed(typed, config, "ds_config.json")))
        return 0
    for line in overruled:
        log.info(line)
    check_config(config, world_size)
    if config.training.dry_run:
        return _dry_run(recipe, merged, world_size)
    stop.listen()
    device = _device(config)
    if device.type == "cpu":
        log.info(cpu.prepare(config.parallel.cpu_threads_per_rank))
    elif config.parallel.cpu_threads_per_rank is not None:
        log.info("--cpu-threads-per-rank: no effect on GPUs")
    if config.training.verify_parallel:
        return verify(recipe, config, device)
    tokenizer = _tokenizer(config)
    vocab_size = tokenizer.vocab_size if tokenizer else planned_vocab_size(config.tokenizer, "GPT2BPETokenizer")[0]
    plan = make_plan(config, log.world_size(), vocab_size)
    checkpoint = checkpoint_to_load(config)
    check_save_directory(config)
    _announce(merged, plan)
    run = _join(config, plan, tokenizer, device)
    agree_on_checkpoint(checkpoint, run.parallel.world)
    engine = build_engine(run, recipe)
    # A checkpoint that does not fit is found before index files are written; initial values can wait for the data.
    fresh = Progress(loss_scale=engine.loss_scaling.start())
    progress = fresh if checkpoint is None else load_checkpoint(engine, checkpoint)
    run = engine.run = dataclasses.replace(
        run, plan=continue_from(plan, config.training, progress.iteration, progress.consumed_samples)
    )
    datasets = as_splits(recipe.datasets(run, _samples(run, progress)))
    _say_time("after dataloaders are built")
    if checkpoint is None:
        engine.initialise()
    _say_size(engine)
    _say_time("after model, optimizer, and learning rate scheduler are built")
    loop = _loop(engine, recipe, datasets, progress, stop, begun)
    stopped = _train_and_test(loop, datasets, engine)
    if loop.meter is not None:
        log.info(loop.meter.report(recipe))
    context.stop()
    if stopped and not config.checkpoint.save:
        log.warn("told to stop, and nothing is saved: there is no --save")
        return EXIT_TERMINATED
    return EXIT_RESUBMIT if stopped else 0


def _as_stored(config: Config) -> tuple[Config, list[str]]:
    """With --use-checkpoint-args the model of the checkpoint, and what was typed in vain."""
    index = checkpoint_to_load(config) if config.checkpoint.use_checkpoint_args else None
    if index is None:
        return config, []
    stored = with_checkpoint_model(config, index.state)
    return stored, overridden(config, stored)


def _samples(run: Run, progress: Progress) -> SampleCounts:
    consumed = progress.consumed_samples, progress.consumed_valid_samples
    return samples_from(run.plan, run.config.training, progress.iteration, *consumed)


def _train_and_test(loop: Loop, datasets: Datasets, engine: Engine) -> bool:
    training, stopped = engine.run.config.training, False
    try:
        if not training.skip_train:
            if loop.progress.iteration >= engine.run.plan.train_iters:
                log.info(f"already finished: iteration {loop.progress.iteration} of {engine.run.plan.train_iters}")
                return False
            _say_time("before the start of training step")
            stopped = loop.train()
            _say_time("after training is done")
        finished = training.skip_train or loop.progress.iteration >= engine.run.plan.train_iters
        for split, dataset in (("validation", datasets.valid), ("test", datasets.test)):
            if finished and not stopped and dataset is not None and training.eval_iters:
                consumed = loop.progress.consumed_valid_samples if split == "validation" else 0
                batches = _loader(engine.run, dataset, consumed)
                stopped = loop.final_evaluation(batches, "test" if split == "test" else "validation")
    finally:
        loop.metrics.close()
    return stopped


def _loop(
    engine: Engine, recipe: Recipe, datasets: Datasets, progress: Progress, stop: StopRequest, begun: float
) -> Loop:
    run, plan, training = engine.run, engine.run.plan, engine.run.config.training
    synchronise = torch.cuda.synchronize if run.device.type == "cuda" else None
    metrics = Metrics(
        run.config.logging,
        train_iters=plan.train_iters,
        world_size=plan.world_size,
        sequence_length=plan.seq_length,
        writes=log.rank() == log.world_size() - 1,
        start_iteration=sys.maxsize if training.skip_train else progress.iteration,  # an evaluation drops no line
    )
    valid = datasets.valid if training.eval_iters else None
    return Loop(
        engine,
        lr_schedule(
            run.config.lr, run.config.optimizer, training.train_samples, plan.global_batch_size, training.train_iters
        ),
        metrics,
        Timers(run.config.logging.timing_log_level, synchronise),
        progress,
        train_flops_per_sample(run, recipe),
        lambda now: _loader(run, datasets.train, now.consumed_samples),
        (lambda now: _loader(run, valid, now.consumed_valid_samples)) if valid is not None else None,
        stop,
        begun,
        Meter(engine) if training.report_costs else None,
    )


def _loader(run: Run, dataset: Any, consumed_samples: int) -> MicrobatchLoader:
    data = run.config.data
    return MicrobatchLoader(
        dataset,
        consumed_samples=consumed_samples,
        micro_batch_size=run.plan.micro_batch_size,
        dp_rank=run.parallel.dp.rank,
        dp_size=run.parallel.dp.size,
        dataloader_type=data.dataloader_type,
        num_workers=data.num_workers,
        collate=collate_for(run.config.model.model_type, data, run.tokenizer.eod if run.tokenizer else None),
        device=run.device,
    )


def _planned_world_size(config: Config, declared: str) -> int:
    """How many ranks a dry run is about: what was asked for, else what was launched, else the fewest possible.

    declared: WORLD_SIZE as it was found; for a plan it need not come from a launcher.
    """
    parallel = config.parallel
    launched = max(log.world_size(), int(declared) if declared.isdecimal() else 1)
    if parallel.world_size is not None or launched > 1:
        return parallel.world_size or launched
    world_size = max(1, ranks_per_replica(parallel))
    log.info(f"no --world-size given: planning for {world_size}, the smallest that this layout runs on\n")
    return world_size


def _dry_run(recipe: Recipe, merged: Merged, world_size: int) -> int:
    config = merged.config
    vocab_size, note = planned_vocab_size(config.tokenizer, "GPT2BPETokenizer")
    plan = make_plan(config, world_size, vocab_size)
    run = Run(config, plan, ParallelContext.solo(), Kernels(), torch.device("cpu"), None, DropoutStreams(0))
    _say_merged(merged)
    log.info(dry_run.report(run, recipe, note))
    return 0


def _say_merged(merged: Merged) -> None:
    """What ds_config.json changed."""
    for text in (merged.table(), *merged.notes):
        if text:
            log.info(text)


def _tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer that the flags name; with --mock-data none is needed."""
    wanted = config.tokenizer
    if config.data.mock_data and wanted.tokenizer_type is None and wanted.vocab_file is None:
        return None
    return build_tokenizer(wanted, "GPT2BPETokenizer")


def _device(config: Config) -> torch.device:
    """Where to compute.

    Raises: ConfigError if a GPU or a backend is asked for that cannot serve
    """
    wanted, backend = config.parallel.device, config.parallel.distributed_backend
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "cuda, and torch sees no GPU", "auto or cpu on this machine", "--device auto")
    device = torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")
    serves = {"cpu": "gloo", "cuda": "nccl"}[device.type]
    if backend not in (None, serves):
        raise ConfigError(
            "--distributed-backend", f"{backend} on {device.type}", serves, "leave it out: the device decides"
        )
    if device.type == "cpu":
        return device
    local, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if visible == 1 and "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        local = 0  # srun --gpus-per-task=1 shows every task its own GPU only
    if local >= visible:
        raise ConfigError(
            "--nproc-per-node",
            f"local rank {local} on a machine with {visible} GPUs",
            "a GPU for every rank",
            f"torchrun --nproc-per-node {visible}, or --device cpu",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _join(config: Config, plan: Plan, tokenizer: Tokenizer | None, device: torch.device) -> Run:
    """Comm: rendezvous of the world; gathers every rank's choice of kernels over it."""
    parallel = context.start(config.parallel, plan.sizes, device)
    _say_time("after megatron is initialized")
    streams = DropoutStreams(config.training.seed, device_type=device.type)
    chosen = chosen_kernels(config, device)
    agree_on_kernels(chosen, parallel.world)
    for line in chosen.lines():
        log.info(line)
    return Run(config, plan, parallel, chosen.kernels, device, tokenizer, streams)


def _announce(merged: Merged, plan: Plan) -> None:
    config, sizes, vocab = merged.config, plan.sizes, plan.vocab
    log.info(
        f"using world size: {plan.world_size}, data-parallel-size: {sizes['dp']}, "
        + (f"context-parallel-size: {sizes['cp']}, " if sizes["cp"] > 1 else "")
        + f"tensor-model-parallel size: {sizes['tp']}, pipeline-model-parallel size: {sizes['pp']} "
    )
    log.info(config.describe())
    _say_merged(merged)
    if config.compat.used():
        log.info(f"accepted, without effect (see --help): {' '.join(config.compat.used())}")
    if not config.model.uses_rope and {"model.rotary_percent", "model.rotary_base"} & config.typed:
        log.info("--rotary-percent, --rotary-base: no effect without --position-embedding-type rope")
    if plan.zero_stage == 2 and not config.optimizer.overlap_grad_reduce:
        log.info("--no-overlap-grad-reduce: no effect with --zero-stage 2, which reduces during every backward")
    if plan.zero_stage == 2 and config.optimizer.reduce_bucket_size:
        log.info(
            "--reduce-bucket-size: with --zero-stage 2 at most an eighth of the rank's parameters, 1 to 40 million"
        )
    dummies = vocab.padded - vocab.size
    log.info(f" > padded vocab (size: {vocab.size}) with {dummies} dummy tokens (new size: {vocab.padded})")
    names = ("train: ", "validation:", "test: ")
    log.info(" > datasets target sizes (minimum size):")
    for name, count in zip(names, plan.samples, strict=True):
        log.info(f"    {name:<12}{count}")


def _say_size(engine: Engine) -> None:
    """Comm: gathers one line per rank over the world."""
    parallel = engine.run.parallel
    count = sum(parameter.numel() for chunk in engine.chunks for parameter in chunk.parameters())
    where = f"({parallel.tp.rank}, {parallel.pp.rank})"
    line = f" > number of parameters on (tensor, pipeline) model parallel rank {where}: {count}"
    for row in gather_bytes(line.encode() if parallel.dp_cp.is_first else b"", parallel.world):
        if row:
            log.info(row.decode())


def _say_time(what: str) -> None:
    log.info(f"[{what}] datetime: {datetime.now():%Y-%m-%d %H:%M:%S} ")


LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


def _guarded(work: Callable[[], int], stop: StopRequest) -> int:
    """Turn whatever goes wrong into one message and an exit code.

    A mistake that every rank finds is told by rank 0 alone: the others wait for the launcher to stop them, and speak
    only if it has not.
    """
    try:
        return work()
    except UserError as error:
        if log.rank() == 0 or not stop.within(5.0):
            where = f"[rank {log.rank()}] " if log.rank() else ""
            broken = error.errors if isinstance(error, ConfigErrors) else (error,)
            _tell("\n".join(f"{where}error: {one.render()}" for one in broken))
        return error.exit_code
    except RuntimeError as error:
        if any(sign in str(error) for sign in LOST_PEER):
            time.sleep(2)  # the rank that failed first has something better to say
            reason = re.sub(r"\[/\S+\] |\. This is typically.*", "", str(error).splitlines()[0])
            _tell(f"[rank {log.rank()}] error: lost contact with another rank: {reason}")
        else:
            _tell(f"[rank {log.rank()}] {traceback.format_exc()}")
        return EXIT_FAULT
    except KeyboardInterrupt:
        _tell(f"[rank {log.rank()}] interrupted")
        return 128 + 2
    except Exception:
        _tell(f"[rank {log.rank()}] {traceback.format_exc()}")
        return EXIT_FAULT


def _tell(message: str) -> None:
    log.clear_progress()
    print(message, file=sys.stderr, flush=True)

"""From engine to checkpoint and back: which pieces, and which state beside them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_ds import log
from megatron_ds.checkpoint.layout import Index
from megatron_ds.checkpoint.load import find, holds_checkpoints, load, names
from megatron_ds.checkpoint.save import save
from megatron_ds.config import Config
from megatron_ds.data.t5 import first_token
from megatron_ds.errors import CheckpointError, ConfigError, DataError
from megatron_ds.model.config import TransformerConfig
from megatron_ds.optim.loss_scale import LossScale
from megatron_ds.parallel.collectives import barrier, gather_bytes
from megatron_ds.parallel.context import Axis
from megatron_ds.training.engine import Engine
from megatron_ds.training.progress import Progress
from megatron_ds.training.run import Run

T = TypeVar("T")


def checkpoint_to_load(config: Config) -> Index | None:
    """The checkpoint that --load means; None for a fresh start.

    A directory without any checkpoint is an error unless the run saves there too: then this is its first start, which
    --exit-on-missing-checkpoint rules out.

    Raises: CheckpointError
    """
    options = config.checkpoint
    if options.load is None:
        return None
    same = options.save is not None and Path(options.save).resolve() == Path(options.load).resolve()
    may_start = same and not options.exit_on_missing_checkpoint
    if may_start and options.ckpt_step is None and not holds_checkpoints(options.load):
        log.info(f"no checkpoint in {options.load} yet: starting from scratch")
        return None
    return find(options.load, options.ckpt_step).index


def check_save_directory(config: Config) -> None:
    """A directory that cannot be made should not be found out after hours of training.

    Raises: ConfigError
    """
    if config.checkpoint.save is None:
        return
    wanted = Path(config.checkpoint.save).absolute()
    there = next(path for path in (wanted, *wanted.parents) if path.exists())
    trouble = "not a directory" if not there.is_dir() else "" if os.access(there, os.W_OK) else "not writable"
    if trouble:
        raise ConfigError("--save", f"{there} is {trouble}", "a directory to write to", f"another one than {wanted}")


def save_checkpoint(engine: Engine, progress: Progress) -> None:
    """Save everything that a run on any layout needs to go on."""
    options, world = engine.run.config.checkpoint, engine.run.parallel.world
    assert options.save
    engine.buckets.wait_params()
    begun = time.perf_counter()
    log.info(f"saving checkpoint at iteration {progress.iteration:7d} to {options.save}")
    save(
        options.save, progress.iteration, engine.pieces_to_save(options.save_optim), _state(engine.run, progress), world
    )
    seconds = time.perf_counter() - begun
    log.info(
        f"  successfully saved checkpoint at iteration {progress.iteration:7d} to {options.save} in {seconds:.1f} s"
    )


def load_checkpoint(engine: Engine, index: Index) -> Progress:
    """Fill parameters and optimizer, whatever layout and precision they were saved in.

    Raises: CheckpointError if tensors are missing or have other shapes
    """
    _check_architecture(engine.run.config.model, index)
    options, optimizer = engine.run.config.checkpoint, engine.optimizer
    with_optimizer = options.load_optim and not options.finetune
    stored = set(names(index))
    wanted = list(engine.model_pieces()) + (list(optimizer.pieces()) if with_optimizer else [])
    if with_optimizer and not any(name.startswith("optimizer/") for name in stored):
        raise CheckpointError(
            f"--load: {index.path}",
            "a checkpoint without optimizer state",
            "one that a training run saved",
            "--finetune to start from its weights at iteration 0, or --no-load-optim to go on from its iteration",
        )
    load(index, [piece._replace(name=_best_source(piece.name, stored)) for piece in wanted])
    if with_optimizer:
        progress = _read_state(index, "progress", Progress.from_state)
        optimizer.set_steps(progress.optimizer_steps)
    else:
        optimizer.masters_from_params()
        progress = Progress() if options.finetune else _read_state(index, "progress", Progress.from_state)
        progress = dataclasses.replace(progress, optimizer_steps=0, loss_scale=LossScale())
    progress = dataclasses.replace(progress, loss_scale=engine.loss_scaling.resume(progress.loss_scale))
    barrier(engine.run.parallel.world)
    log.info(f"  successfully loaded checkpoint from {options.load} at iteration {index.iteration}")
    return progress


def agree_on_checkpoint(index: Index | None, world: Axis) -> None:
    """Every rank read the directory for itself; a node with a late or missing mount must not start from elsewhere.

    Comm:   gathers a few bytes over the world
    Raises: CheckpointError on every rank if they differ
    """
    mine = "none" if index is None else str(index.iteration)
    found = [raw.decode() for raw in gather_bytes(mine.encode(), world)]
    if len(set(found)) > 1:
        ranks = ", ".join(f"{it}: rank {found.index(it)}" for it in sorted(set(found)))
        raise CheckpointError(
            "--load",
            f"ranks see different latest iterations ({ranks})",
            "one directory that all nodes share",
            "mount it everywhere, or name the iteration with --ckpt-step",
        )


def stored_model(index: Index) -> TransformerConfig:
    """The model that a checkpoint holds.

    Raises: CheckpointError if its state names none that this version knows
    """
    return _read_state(index, "model", TransformerConfig.from_state)


def _read_state(index: Index, key: str, read: Callable[[Mapping[str, Any]], T]) -> T:
    try:
        return read(index.state[key])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{index.path}/index.json",
            f"a state whose {key!r} cannot be read: {error}",
            "what a run of this version writes",
            "another --ckpt-step, or the version that wrote it",
        ) from error


def _check_architecture(model: TransformerConfig, index: Index) -> None:
    """Weights of equal shapes may still mean another model: heads, norms, positions, tying."""
    stored = stored_model(index)
    if stored.model_type != model.model_type:
        raise CheckpointError(
            f"--load: {index.path}",
            f"a {stored.model_type} model",
            f"a {model.model_type} model, in a recipe for one",
            f"pretrain_{stored.model_type.lower()}.py",
        )
    asked, found = model.architecture(), stored.architecture()
    differing = [flag for flag in asked if asked[flag] != found[flag]]
    if differing:
        raise CheckpointError(
            f"--load: {index.path}",
            "; ".join(f"{flag} {found[flag]}" for flag in differing),
            "; ".join(f"{flag} {asked[flag]}" for flag in differing),
            "give the flags that the checkpoint was trained with",
        )


def _best_source(name: str, stored: set[str]) -> str:
    """A master that was not saved is the model's own parameter, and an fp32 parameter is best read from its master."""
    kind, parameter, *rest = name.split("/")
    master, model = f"optimizer/{parameter}/master", f"model/{parameter}"
    if kind == "model":
        return master if master in stored else model
    return model if rest == ["master"] and master not in stored else name


def _decoder_start(run: Run) -> int | None:
    """What T5's decoder was trained to begin with; None where samples come from elsewhere."""
    if run.config.model.model_type != "T5" or run.config.data.mock_data or run.tokenizer is None:
        return None
    try:
        return first_token(run.config.data, run.tokenizer)
    except DataError:  # our own samples would have been refused at start; a provider's need no such token
        return None


def _state(run: Run, progress: Progress) -> dict[str, Any]:
    """JSON beside the tensors: progress, and what a tool needs to rebuild the model."""
    layout = {**run.plan.sizes, "zero_stage": run.plan.zero_stage}
    return {
        "progress": dataclasses.asdict(progress),
        "layout": layout,
        "vocab_size": run.plan.vocab.size,
        "max_positions": run.plan.max_positions,
        "seq_length": run.plan.seq_length,
        "decoder_seq_length": run.plan.lengths.decoder or None,
        "decoder_start_token_id": _decoder_start(run),
        "model": dataclasses.asdict(run.config.model),
        "tokenizer": dataclasses.asdict(run.config.tokenizer),
        "dtype": str(run.dtype).removeprefix("torch."),
    }

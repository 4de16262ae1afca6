"""Our own checkpoints as weights, and weights as a checkpoint of ours that any layout loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint.layout import Index
from megatron_ds.checkpoint.load import find, load, names
from megatron_ds.checkpoint.save import save
from megatron_ds.checkpoint.shard import DTYPES
from megatron_ds.convert.weights import Weights
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.errors import CheckpointError
from megatron_ds.model.chunk import Stage
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.zoo import build_model
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Box, Piece
from megatron_ds.training.progress import Progress
from megatron_ds.training.resume import stored_model

_MODEL = "model/"


def load_native(directory: str | Path, step: int | None = None) -> Weights:
    """The model in one of our checkpoints: its own tensors as it computed with them, not the optimizer's masters.

    Raises: CheckpointError
    """
    index = find(directory, step).index
    state = index.state
    try:
        tokenizer = TokenizerConfig(**state["tokenizer"])
        sizes = {name: state[name] for name in ("vocab_size", "max_positions", "seq_length")}
        dtype = getattr(torch, state["dtype"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index.path}/index.json", f"a state that cannot be read: {error!r}", "what a run of this version writes"
        ) from error
    return Weights(
        config=stored_model(index),
        **sizes,
        decoder_seq_length=state.get("decoder_seq_length"),
        dtype=dtype,
        iteration=index.iteration,
        tokenizer=tokenizer,
        names=tuple(name.removeprefix(_MODEL) for name in names(index) if name.startswith(_MODEL)),
        read=lambda name: _whole(index, _MODEL + name),
        home=state.get("home"),
        decoder_start=state.get("decoder_start_token_id"),
    )


def _whole(index: Index, name: str) -> torch.Tensor:
    stored = index.tensors[name]
    values = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    load(index, [Piece(name, stored.shape, _all_of(stored.shape), values)])
    return values


def save_native(weights: Weights, directory: Path) -> None:
    """Write a checkpoint without optimizer state.

    Raises: CheckpointError if the tensors are not those of the model that the config describes
    """
    pieces = list(_pieces(weights))  # whatever is wrong with them is found before anything is written
    save(directory, weights.iteration, pieces, _state(weights), Axis.solo("world"))


def _pieces(weights: Weights) -> Iterator[Piece]:
    config, vocab = weights.config, Vocab(weights.vocab_size, weights.vocab_size)
    stage = Stage(0, config.total_layers, True, True)
    model = build_model(config, vocab, stage, max_positions=weights.max_positions, device="meta")
    shapes = {name: spec.shape for name, spec in model.table().items()}
    odd = sorted(shapes.keys() ^ set(weights.names))
    if odd:
        raise _misfit(f"{len(odd)} parameters too few or too many, such as {', '.join(odd[:4])}")
    for name, shape in shapes.items():
        tensor = weights.read(name)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise _misfit(f"{name} {tensor.dtype} {list(tensor.shape)}, not {list(shape)}")
        yield Piece(_MODEL + name, shape, _all_of(shape), tensor)


def _misfit(found: str) -> CheckpointError:
    return CheckpointError("--load-dir", found, "the tensors of the model that its config describes")


def _all_of(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def _state(weights: Weights) -> dict[str, Any]:
    """What a run stores beside its tensors, as far as weights tell."""
    size = weights.vocab_size
    tokenizer = weights.tokenizer or TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=size - 1)
    return {
        "progress": dataclasses.asdict(Progress(iteration=weights.iteration)),
        "layout": {"pp": 1, "dp": 1, "cp": 1, "tp": 1, "zero_stage": 0},
        "vocab_size": size,
        "max_positions": weights.max_positions,
        "seq_length": weights.seq_length,
        "decoder_seq_length": weights.decoder_seq_length,
        "model": dataclasses.asdict(weights.config),
        "tokenizer": dataclasses.asdict(tokenizer),
        "dtype": str(weights.dtype).removeprefix("torch."),
        "home": weights.home,
        "decoder_start_token_id": weights.decoder_start,
    }

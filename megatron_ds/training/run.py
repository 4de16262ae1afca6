"""What a recipe gets to see: Run, the datasets it hands back, and the three functions it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from megatron_ds.config import Config
from megatron_ds.data.tokenizer import Tokenizer
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.kernels.choose import Chosen, choose
from megatron_ds.kernels.table import Kernels
from megatron_ds.model.chunk import ModelChunk, Stage
from megatron_ds.model.runtime import Runtime, WeightGrads
from megatron_ds.parallel.collectives import gather_bytes
from megatron_ds.parallel.context import Axis, ParallelContext, Sharding
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.pipeline.executor import ForwardStep, Loss
from megatron_ds.plan import Plan, SampleCounts

__all__ = ["DatasetsProvider", "ForwardStep", "Loss", "ModelProvider", "Recipe", "Run", "Stage"]


@dataclass(frozen=True)
class Run:
    """Everything that a recipe may need to know, frozen."""

    config: Config
    plan: Plan
    parallel: ParallelContext
    kernels: Kernels
    device: torch.device
    tokenizer: Tokenizer | None
    """None while only planning (--dry-run), and with --mock-data unless one is asked for."""
    streams: DropoutStreams
    weight_grads: WeightGrads = field(default_factory=WeightGrads)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of parameters and of what layers compute."""
        return dtype_of(self.config)

    @property
    def residual_dtype(self) -> torch.dtype:
        """Precision of the residual stream, which is what stages send each other."""
        return torch.float32 if self.config.precision.fp32_residual_connection else self.dtype

    @property
    def sharding(self) -> Sharding:
        """How the tensors inside a layer are shared."""
        parallel, asked = self.parallel, self.config.parallel
        return Sharding(
            parallel.tp,
            parallel.cp,
            sequence_parallel=asked.sequence_parallel and parallel.tp.size > 1,
            ulysses=asked.ds_sequence_parallel_size > 1,
        )

    @property
    def runtime(self) -> Runtime:
        """What a model needs besides its shape."""
        fp32_residual = self.residual_dtype != self.dtype
        return Runtime(
            self.sharding, self.kernels, self.streams, self.config.recompute, self.weight_grads, fp32_residual
        )

    @property
    def factory(self) -> dict[str, Any]:
        """How a model provider makes parameters: without memory; their place in a bucket comes later."""
        return {"device": "meta", "dtype": self.dtype}


def dtype_of(config: Config) -> torch.dtype:
    """Precision of parameters and of what layers compute."""
    precision = config.precision
    return torch.bfloat16 if precision.bf16 else torch.float16 if precision.fp16 else torch.float32


def chosen_kernels(config: Config, device: torch.device) -> Chosen:
    """The table of operations for a run on a device.

    Raises: ConfigError if what was asked for by name is not to be had here
    """
    model = config.model
    return choose(
        config.kernels,
        device,
        dtype_of(config),
        attention_dropout=model.attention_dropout,
        head_size=model.head_size,
        hidden_size=model.hidden_size or 96,
        masks=model.model_type != "GPT" or model.window_size is not None or config.data.reset_attention_mask,
    )


def agree_on_kernels(chosen: Chosen, world: Axis) -> None:
    """Every rank tried kernels for itself; others would draw other dropout masks, where ranks have to draw the same.

    Comm:   gathers a few bytes over the world
    Raises: ConfigError on every rank if they differ
    """
    mine = {choice.operation: (choice.source, choice.why) for choice in chosen.choices}
    first, *others = (json.loads(raw) for raw in gather_bytes(json.dumps(mine).encode(), world))
    for rank, found in enumerate(others, 1):
        for operation, (source, why) in found.items():
            expected, instead = first[operation]
            if source != expected:
                reasons = "; ".join(sorted({*why} ^ {*instead}))
                raise ConfigError(
                    "--kernels",
                    f"{operation} from {expected} on rank 0, from {source} on rank {rank} ({reasons})",
                    "the same kernels on all ranks",
                    "--kernels reference, or mend the rank: tools/doctor.py shows what it has",
                )


class Datasets(Protocol):
    """One map-style dataset per split; None where no samples are needed. A tuple of the three serves as well."""

    @property
    def train(self) -> Any:
        """Rows to train on."""

    @property
    def valid(self) -> Any:
        """Rows to validate on."""

    @property
    def test(self) -> Any:
        """Rows of the final test."""


class Splits(NamedTuple):
    """Three datasets that a provider gave as a plain tuple."""

    train: Any
    valid: Any
    test: Any


def as_splits(found: Datasets | Sequence[Any]) -> Datasets:
    """What a provider gave: an object with three attributes, or the tuple that Megatron's providers return.

    Raises: DataError for anything else
    """
    if isinstance(found, (tuple, list)) and len(found) == 3:
        return Splits(*found)
    if not all(hasattr(found, name) for name in Splits._fields):
        raise DataError(
            "the recipe's datasets provider",
            found=f"a {type(found).__name__}",
            expected="three datasets (None for one that is not needed): training, validation, test",
            fix="return train, valid, test",
        )
    return found  # type: ignore[return-value]


ModelProvider = Callable[[Run, Stage], ModelChunk]
DatasetsProvider = Callable[[Run, SampleCounts], "Datasets | Sequence[Any]"]


class Recipe(NamedTuple):
    """The three functions that make a training script."""

    datasets: DatasetsProvider
    model: ModelProvider
    forward_step: ForwardStep

"""The whole configuration: what was typed, one frozen group per concern."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ds.checkpoint.config import CheckpointConfig
from megatron_ds.cli import Parser, arg
from megatron_ds.compat import HINTS, CompatConfig
from megatron_ds.data.config import DataConfig, TokenizerConfig
from megatron_ds.model.config import RecomputeConfig, TransformerConfig
from megatron_ds.optim.config import LRConfig, OptimizerConfig, PrecisionConfig
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.training.config import LoggingConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """DeepSpeed."""

    deepspeed: bool = arg(False, "Read --deepspeed_config; see docs/ds_config.md.", "--deepspeed", "--deepscale")
    deepspeed_config: str | None = arg(
        None,
        "ds_config.json, merged with the flags; where the two disagree a table says what was chosen.",
        "--deepspeed_config",
        "--deepscale_config",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every group of flags; constructible without a command line."""

    model: TransformerConfig
    recompute: RecomputeConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    lr: LRConfig
    precision: PrecisionConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    deepspeed: DeepSpeedConfig
    compat: CompatConfig
    typed: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    """The fields that the command line gave, as 'optimizer.lr'; all others are defaults."""

    def describe(self) -> str:
        """Every value, in Megatron's block of arguments."""
        groups = (getattr(self, name) for name in GROUPS if name != "compat")
        values = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
        lines = [f"  {name} ".ljust(50, ".") + f" {values[name]}" for name in sorted(values, key=str.lower)]
        head = "------------------------ arguments ------------------------"
        tail = "-------------------- end of arguments ---------------------"
        return "\n".join((head, *lines, tail))


GROUPS: dict[str, type] = {
    "model": TransformerConfig,
    "recompute": RecomputeConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "lr": LRConfig,
    "precision": PrecisionConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "deepspeed": DeepSpeedConfig,
    "compat": CompatConfig,
}


def parser(prog: str | None = None) -> Parser:
    """The parser of a recipe, its help grouped by concern."""
    out = Parser(prog=prog, description="Pretrain a language model on any layout of ranks.")
    out.usage = f"{out.prog} [flags]     (torchrun --nproc-per-node N {out.prog} [flags] for N ranks)"
    for group in GROUPS.values():
        out.add_config(group)
    out.hints |= HINTS
    return out


def parse(argv: Sequence[str], defaults: Mapping[str, Any] | None = None, prog: str | None = None) -> Config:
    """Read a command line.

    Raises: ConfigError for the first thing in it that cannot be understood
    """
    reader = parser(prog)
    typed = reader.read(argv)
    groups: list[Any] = reader.build(list(GROUPS.values()), typed, defaults or {})
    names = {group.__name__: name for name, group in GROUPS.items()}
    paths = (key.split(".") for key in typed)
    given = frozenset(f"{names[group]}.{field}" for group, field in paths)
    return Config(**dict(zip(GROUPS, groups, strict=True)), typed=given)

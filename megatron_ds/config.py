"""The whole configuration: what was typed, one frozen group per concern."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ds.checkpoint.config import CheckpointConfig
from megatron_ds.cli import Parser
from megatron_ds.compat import HINTS, CompatConfig
from megatron_ds.data.config import DataConfig, TokenizerConfig
from megatron_ds.model.config import TransformerConfig
from megatron_ds.optim.config import LRConfig, OptimizerConfig, PrecisionConfig
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.training.config import LoggingConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every group of flags; constructible without a command line."""

    model: TransformerConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    lr: LRConfig
    precision: PrecisionConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    compat: CompatConfig

    def describe(self) -> str:
        """Every value, in Megatron's block of arguments."""
        groups = (getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "compat")
        values = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
        lines = [f"  {name} ".ljust(50, ".") + f" {values[name]}" for name in sorted(values, key=str.lower)]
        head = "------------------------ arguments ------------------------"
        tail = "-------------------- end of arguments ---------------------"
        return "\n".join((head, *lines, tail))


GROUPS: dict[str, type] = {
    "model": TransformerConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "lr": LRConfig,
    "precision": PrecisionConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
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
    groups: list[Any] = parser(prog).parse_configs(list(GROUPS.values()), argv, defaults or {})
    return Config(**dict(zip(GROUPS, groups, strict=True)))

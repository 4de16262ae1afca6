"""Flags of the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ds.cli import arg


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Layout: how ranks share the model and the batch."""

    tensor_model_parallel_size: int = arg(1, "Ranks that share every layer (tp).")
    pipeline_model_parallel_size: int = arg(1, "Ranks that share the stack of layers (pp).")
    pipeline_schedule: Literal["1f1b", "gpipe"] = arg("1f1b", "Order of forward and backward passes on each stage.")
    world_size: int | None = arg(None, "Ranks to plan for with --dry-run; otherwise the launcher says.")
    device: Literal["auto", "cpu", "cuda"] = arg("auto", "Where to train; auto takes a GPU when there is one.")
    distributed_backend: Literal["nccl", "gloo"] | None = arg(None, "Default: nccl on GPUs, gloo on CPUs.")
    distributed_timeout_minutes: float = arg(10.0, "A collective that takes longer ends the job.")

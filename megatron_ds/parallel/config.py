"""Flags of the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ds.cli import arg


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Layout: how ranks share the model and the batch."""

    tensor_model_parallel_size: int = arg(1, "Ranks that share every layer (tp).")
    sequence_parallel: bool = arg(False, "Between the layers' matrix products, cut activations over tp too (sp).")
    context_parallel_size: int = arg(1, "Ranks that share every sequence, by a ring of keys and values (cp).")
    ds_sequence_parallel_size: int = arg(
        1, "Ranks that share every sequence, by exchanging sequence for heads (Ulysses); instead of cp."
    )
    pipeline_model_parallel_size: int = arg(1, "Ranks that share the stack of layers (pp).")
    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved", "zbh1"] | None = arg(
        None, "Order of passes on each stage. Default: 1f1b; interleaved with virtual stages."
    )
    num_layers_per_virtual_pipeline_stage: int | None = arg(
        None, "Layers of a virtual stage; each rank holds several (the interleaved schedule)."
    )
    num_virtual_stages_per_pipeline_rank: int | None = arg(None, "Virtual stages of each rank, another way to ask.")
    enable_zbh1_pipeline: bool = arg(False, "The same as --pipeline-schedule zbh1 (zero bubble, arXiv:2401.10241).")
    decoder_first_pipeline_num_layers: int | None = arg(None, "Layers of the first stage; the others share the rest.")
    decoder_last_pipeline_num_layers: int | None = arg(None, "Layers of the last stage; the others share the rest.")
    pp_partition_method: str | None = arg(
        None,
        "What stages hold equal shares of: uniform (layers), parameters, type:transformer, "
        "or type:transformer|embedding, which counts embedding and head as a layer each.",
    )
    pipeline_model_parallel_split_rank: int | None = arg(
        None, "T5: the first stage of the decoder. Default: stages of about equal work, cut anywhere."
    )
    world_size: int | None = arg(None, "Ranks to plan for with --dry-run; otherwise the launcher says.")
    device: Literal["auto", "cpu", "cuda"] = arg("auto", "Where to train; auto takes a GPU when there is one.")
    cpu_threads_per_rank: int | None = arg(
        None,
        "Threads of a rank on CPUs. Default: OMP_NUM_THREADS; an equal share of the cores where that is not set, or is "
        "the 1 that torchrun sets beside several ranks.",
    )
    distributed_backend: Literal["nccl", "gloo"] | None = arg(None, "Default: nccl on GPUs, gloo on CPUs.")
    distributed_timeout_minutes: float = arg(10.0, "A collective that takes longer ends the job.")

    @property
    def context_size(self) -> int:
        """Ranks that share a sequence, in either way."""
        return max(self.context_parallel_size, self.ds_sequence_parallel_size)

    @property
    def schedule_name(self) -> Literal["1f1b", "gpipe", "interleaved", "zbh1"]:
        """The schedule that was asked for under any name."""
        if self.enable_zbh1_pipeline:
            return "zbh1"
        virtual = self.num_layers_per_virtual_pipeline_stage or (self.num_virtual_stages_per_pipeline_rank or 1) > 1
        return self.pipeline_schedule or ("interleaved" if virtual else "1f1b")

    def virtual_stages(self, num_layers: int) -> int:
        """Chunks of layers that each stage holds; 1 unless interleaved."""
        if self.num_layers_per_virtual_pipeline_stage:
            return max(1, num_layers // self.pipeline_model_parallel_size // self.num_layers_per_virtual_pipeline_stage)
        return self.num_virtual_stages_per_pipeline_rank or 1

"""Flags of Megatron-LM and Megatron-DeepSpeed that ask for nothing here, and those that we do not have.

A no-op is accepted so that launch scripts run unchanged, and is named once at start; everything else that those systems
know and this version lacks is refused with a sentence, never ignored.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_ds.cli import arg, flags_of, whole
from megatron_ds.errors import ConfigError

_MOE = "mixture-of-experts models are not supported; leave it out for a dense model"
_DENSE = "the model is dense"


def _noop(reason: str, *flags: str, value: bool = False) -> Any:
    """A switch (or, with `value`, a flag with one value) that changes nothing, and why."""
    return arg(None if value else False, f"No effect: {reason}.", *flags)


def _one(flag: str, default: tuple[int, ...] | None) -> Any:
    """A flag that scripts of dense models pass with the value 1; the only one that we can serve."""

    def parse(text: str) -> int:
        if whole(text) != 1:
            raise ConfigError(flag, found=text, expected="1", fix=_MOE)
        return 1

    return arg(default, f"No effect: {_DENSE}. Only 1 is accepted.", flag, parse=parse)


@dataclass(frozen=True, kw_only=True)
class CompatConfig:
    """Accepted for compatibility, without effect."""

    use_mcore_models: bool = _noop("there is one model")
    no_position_embedding: bool = _noop("--position-embedding-type says it")
    no_query_key_layer_scaling: bool = _noop("scores are not scaled by layer in fp32 and bf16")
    no_async_tensor_model_parallel_allreduce: bool = _noop("the result is the same")
    cross_entropy_loss_fusion: bool = _noop("the loss never gathers the vocabulary")
    cross_entropy_fusion_impl: str | None = _noop("there is one loss", value=True)
    abort_on_unmet_fused_kernel_constraints: bool = _noop("no kernel has to be there")
    disable_mem_efficient_ln: bool = _noop("the norm is torch's own")
    accumulate_allreduce_grads_in_fp32: bool = _noop("gradients always are")
    overlap_grad_reduce_on: bool = _noop("on unless --no-overlap-grad-reduce", "--overlap-grad-reduce")
    no_contiguous_buffers_in_local_ddp: bool = _noop("gradients always live in buckets")
    no_check_for_nan_in_loss_and_grad: bool = _noop("the check costs nothing")
    attention_softmax_in_fp32: bool = _noop("softmax always is")
    sync_tp_duplicated_parameters: bool = _noop("replicas cannot drift apart")
    calculate_per_token_loss: bool = _noop("the loss always is")
    exit_signal_handler: bool = _noop("SIGTERM always saves and leaves")
    no_create_attention_mask_in_dataloader: bool = _noop("there is no mask in the batch")
    use_cpu_initialization: bool = _noop("initial weights depend on names and the seed only")
    empty_unused_memory_level: int | None = _noop("torch's allocator keeps what it has", value=True)
    mmap_warmup: bool = _noop("the page cache does that")
    no_pipeline_parallel: bool = _noop("--pipeline-model-parallel-size says it")
    no_load_rng: bool = _noop("random streams are functions of the seed")
    no_save_rng: bool = _noop("random streams are functions of the seed")
    no_load_lr_state: bool = _noop("the learning rate is a function of samples")
    override_opt_param_scheduler: bool = _noop(
        "the learning rate follows the flags", "--override-opt-param-scheduler", "--override-lr-scheduler"
    )
    log_throughput: bool = _noop("the log line always has it")
    no_log_loss_scale_to_tensorboard: bool = _noop("it is written with --fp16 only")
    overlap_p2p_communication: bool = _noop("messages always move while other work is done")
    no_overlap_p2p_communication: bool = _noop("the result is the same")
    no_scatter_gather_tensors_in_pipeline: bool = _noop("--sequence-parallel cuts what stages send")
    enable_zbh1_exact_semantics: bool = _noop("every schedule waits for all gradients before it updates")
    apply_query_key_layer_scaling: bool = _noop("scores are not scaled by layer; softmax is always fp32")
    deepspeed_activation_checkpointing: bool = _noop("--recompute-granularity or --checkpoint-activations asks for it")
    contigious_checkpointing: bool = _noop("the allocator decides where kept inputs lie")
    synchronize_each_layer: bool = _noop("nothing waits for it")
    profile_backward: bool = _noop("--timing-log-level 2 times the backward")
    zero_reduce_scatter: bool = _noop("ZeRO 1 and 2 always reduce into shards")
    zero_contigious_gradients: bool = _noop("gradients always live in buckets")
    zero_reduce_bucket_size: str | None = _noop("--reduce-bucket-size or ds_config.json says it", value=True)
    zero_allgather_bucket_size: str | None = _noop("parameters are gathered bucket by bucket", value=True)
    scattered_embeddings: bool = _noop("embeddings are split over tp")
    split_transformers: bool = _noop("layers are split over tp")
    memory_centric_tiled_linear: bool = _noop("linear layers are not tiled")
    tile_factor: str | None = _noop("linear layers are not tiled", value=True)
    use_pin_memory: bool = _noop("nothing is offloaded")
    deepspeed_mpi: bool = _noop("the launcher's environment says who is who")
    ds_fused_adam: bool = _noop("there is one Adam")
    force_ds_sequence_parallel: bool = _noop("--ds-sequence-parallel-size says it")
    no_barrier_with_level_1_timing: bool = _noop("timers never wait for other ranks")
    logging_level: int | None = _noop("messages have no levels", value=True)
    data_impl: str | None = _noop("files are mapped (mmap)", value=True)
    DDP_impl: str | None = _noop("gradients are reduced in buckets", "--DDP-impl", value=True)
    transformer_impl: str | None = _noop("layers are ours; tools/doctor.py says what serves them", value=True)
    ckpt_format: str | None = _noop("there is one format", value=True)
    dist_ckpt_strictness: str | None = _noop("a checkpoint that does not fit is refused", value=True)
    use_dist_ckpt: bool = _noop("there is one format")
    universal_checkpoint: bool = _noop("every checkpoint loads on every layout")
    auto_detect_ckpt_format: bool = _noop("there is one format")
    local_rank: int | None = _noop("the launcher's environment says it", value=True)
    num_experts: tuple[int, ...] = _one("--num-experts", ())
    moe_expert_parallel_size: int | None = _one("--moe-expert-parallel-size", None)
    expert_model_parallel_size: int | None = _one("--expert-model-parallel-size", None)
    mlp_type: str | None = _noop(_DENSE, value=True)
    topk: str | None = _noop(_DENSE, value=True)
    expert_interval: str | None = _noop(_DENSE, value=True)
    moe_train_capacity_factor: str | None = _noop(_DENSE, value=True)
    moe_eval_capacity_factor: str | None = _noop(_DENSE, value=True)
    moe_min_capacity: str | None = _noop(_DENSE, value=True)
    moe_loss_coeff: str | None = _noop(_DENSE, value=True)
    create_moe_param_group: bool = _noop(_DENSE)
    disable_moe_token_dropping: bool = _noop(_DENSE)
    disable_moe_top2_2nd_expert_sampling: bool = _noop(_DENSE)
    use_tutel: bool = _noop(_DENSE)
    enable_expert_tensor_parallelism: bool = _noop(_DENSE)

    def used(self) -> list[str]:
        """The flags that were given."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [flag.names[0] for flag in flags_of(CompatConfig) if getattr(self, flag.field) != defaults[flag.field]]


_LATER = "not supported yet"

_TOKENS = f"lengths in tokens are {_LATER}; samples = tokens / --seq-length"
_OFFLOAD = f"offload to the host is {_LATER}; --zero-stage 1 or 2 shares the optimizer state among data-parallel ranks"
_ZERO3 = f"sharing parameters (ZeRO-3, FSDP) is {_LATER}; the nearest is --zero-stage 2"
_DATA = f"DeepSpeed's data efficiency is {_LATER}; leave it out to train on all tokens of every sample"
_DISTILL = f"distillation from a teacher is {_LATER}"
_VARIANT = f"this variant of the model is {_LATER}"
_TENSORBOARD = "not written to TensorBoard yet; leave it out"

HINTS: dict[str, str] = {
    "--batch-size": "renamed long ago: use --micro-batch-size",
    "--warmup": "renamed long ago: use --lr-warmup-fraction",
    "--model-parallel-size": "renamed long ago: use --tensor-model-parallel-size",
    "--load-tag": "use --ckpt-step N",
    "--eval-only": "use --skip-train",
    "--no-deepspeed": "leave --deepspeed out: without it no ds_config.json is read",
    "--train-tokens": f"{_TOKENS}: use --train-samples",
    "--lr-decay-tokens": f"{_TOKENS}: use --lr-decay-samples",
    "--lr-warmup-tokens": f"{_TOKENS}: use --lr-warmup-samples",
    "--encoder-pipeline-model-parallel-size": "use --pipeline-model-parallel-split-rank: the decoder's first stage",
    "--encoder-tensor-model-parallel-size": "encoder and decoder share --tensor-model-parallel-size",
    "--kill-switch-file": f"kill switches are {_LATER}; SIGTERM saves and leaves",
    "--kill-switch-path": f"kill switches are {_LATER}; SIGTERM saves and leaves",
    **dict.fromkeys(("--remote-device", "--use-torch-fsdp2", "--use-megatron-fsdp"), _ZERO3),
    **dict.fromkeys(
        (
            "--cpu-optimizer",
            "--cpu-torch-adam",
            "--optimizer-cpu-offload",
            "--optimizer-offload-fraction",
            "--cpu-offloading-num-layers",
            "--fine-grained-activation-offloading",
        ),
        _OFFLOAD,
    ),
    "--fp8-param-gather": "parameters are gathered in their own precision; leave it out",
    **dict.fromkeys(
        ("--moe-router-topk", "--moe-grouped-gemm", "--moe-token-dispatcher-type", "--moe-aux-loss-coeff"), _MOE
    ),
    **dict.fromkeys(("--data-efficiency-curriculum-learning", "--random-ltd"), _DATA),
    **dict.fromkeys(("--kd", "--mos", "--load-teacher", "--num-layers-teacher"), _DISTILL),
    **dict.fromkeys(("--quick-geglu", "--rotary-interleaved", "--window-attn-skip-freq"), _VARIANT),
    **dict.fromkeys(("--log-optimizer-states-to-tensorboard", "--log-memory-to-tensorboard"), _TENSORBOARD),
}
"""Flags of Megatron that this version refuses, and what to do instead."""

"""Flags of Megatron-LM and Megatron-DeepSpeed that ask for nothing here, and those that we do not have.

A no-op is accepted so that launch scripts run unchanged, and is named once at start; everything else that those systems
know and this version lacks is refused with a sentence, never ignored.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_ds.cli import arg, flags_of


def _noop(reason: str, *flags: str, value: bool = False) -> Any:
    """A switch (or, with `value`, a flag with one value) that changes nothing, and why."""
    return arg(None if value else False, f"No effect: {reason}.", *flags)


@dataclass(frozen=True, kw_only=True)
class CompatConfig:
    """Accepted for compatibility, without effect."""

    use_mcore_models: bool = _noop("there is one model")
    use_flash_attn: bool = _noop(
        "torch's scaled_dot_product_attention takes the flash path by itself",
        "--use-flash-attn",
        "--use-flash-attn-v1",
        "--use-flash-attn-v2",
        "--use-flash-attn-triton",
        "--use-flash-attn-builder",
    )
    attention_backend: str | None = _noop("torch's scaled_dot_product_attention chooses", value=True)
    no_masked_softmax_fusion: bool = _noop("attention has no separate softmax")
    no_query_key_layer_scaling: bool = _noop("scores are not scaled by layer in fp32 and bf16")
    no_bias_gelu_fusion: bool = _noop("bias and activation are torch's own")
    no_bias_swiglu_fusion: bool = _noop("bias and activation are torch's own")
    no_bias_dropout_fusion: bool = _noop("bias, dropout and add are torch's own")
    no_rope_fusion: bool = _noop("rope is written in torch")
    no_persist_layer_norm: bool = _noop("the norm is torch's own")
    no_gradient_accumulation_fusion: bool = _noop("weight gradients are not fused")
    no_async_tensor_model_parallel_allreduce: bool = _noop("the result is the same")
    cross_entropy_loss_fusion: bool = _noop("the loss never gathers the vocabulary")
    cross_entropy_fusion_impl: str | None = _noop("there is one loss", value=True)
    abort_on_unmet_fused_kernel_constraints: bool = _noop("no kernel has to be there")
    disable_mem_efficient_ln: bool = _noop("the norm is torch's own")
    accumulate_allreduce_grads_in_fp32: bool = _noop("gradients always are")
    overlap_grad_reduce_on: bool = _noop("on unless --no-overlap-grad-reduce", "--overlap-grad-reduce")
    overlap_param_gather: bool = _noop("parameters are gathered at the end of the step")
    no_contiguous_buffers_in_local_ddp: bool = _noop("gradients always live in buckets")
    no_check_for_nan_in_loss_and_grad: bool = _noop("the check costs nothing")
    loss_scale: float | None = _noop("acts on float16 only", value=True)
    initial_loss_scale: float | None = _noop("acts on float16 only", value=True)
    min_loss_scale: float | None = _noop("acts on float16 only", value=True)
    loss_scale_window: float | None = _noop("acts on float16 only", value=True)
    hysteresis: int | None = _noop("acts on float16 only", value=True)
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
    no_log_loss_scale_to_tensorboard: bool = _noop("there is none to write")
    no_barrier_with_level_1_timing: bool = _noop("timers never wait for other ranks")
    logging_level: int | None = _noop("messages have no levels", value=True)
    data_impl: str | None = _noop("files are mapped (mmap)", value=True)
    DDP_impl: str | None = _noop("gradients are reduced in buckets", "--DDP-impl", value=True)
    transformer_impl: str | None = _noop("there is one model", value=True)
    ckpt_format: str | None = _noop("there is one format", value=True)
    dist_ckpt_strictness: str | None = _noop("a checkpoint that does not fit is refused", value=True)
    use_dist_ckpt: bool = _noop("there is one format")
    universal_checkpoint: bool = _noop("every checkpoint loads on every layout")
    auto_detect_ckpt_format: bool = _noop("there is one format")
    local_rank: int | None = _noop("the launcher's environment says it", value=True)

    def used(self) -> list[str]:
        """The flags that were given."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [flag.names[0] for flag in flags_of(CompatConfig) if getattr(self, flag.field) != defaults[flag.field]]


_MOE = "mixture-of-experts models are not supported; leave it out for a dense model"
_LATER = "not supported yet"

_RECOMPUTE = f"activation recomputation is {_LATER}; use a smaller --micro-batch-size"
_DEEPSPEED = f"ds_config.json is {_LATER}; use --zero-stage, --bf16, --clip-grad and the batch-size flags"
_TOKENS = f"lengths in tokens are {_LATER}; samples = tokens / --seq-length"

HINTS: dict[str, str] = {
    "--batch-size": "renamed long ago: use --micro-batch-size",
    "--warmup": "renamed long ago: use --lr-warmup-fraction",
    "--model-parallel-size": "renamed long ago: use --tensor-model-parallel-size",
    "--load-tag": "use --ckpt-step N",
    "--eval-only": "use --skip-train",
    "--train-tokens": f"{_TOKENS}: use --train-samples",
    "--lr-decay-tokens": f"{_TOKENS}: use --lr-decay-samples",
    "--lr-warmup-tokens": f"{_TOKENS}: use --lr-warmup-samples",
    "--sequence-parallel": f"sequence parallelism is {_LATER}; without it the same model trains in more memory",
    "--context-parallel-size": f"context parallelism is {_LATER}",
    "--ds-sequence-parallel-size": f"sequence parallelism (Ulysses) is {_LATER}",
    "--num-layers-per-virtual-pipeline-stage": f"interleaved schedules are {_LATER}; leave it out for 1F1B",
    "--rampup-batch-size": f"batch size ramp-up is {_LATER}; use a constant --global-batch-size",
    "--reset-attention-mask": f"document masks are {_LATER}",
    "--kill-switch-file": f"kill switches are {_LATER}; SIGTERM saves and leaves",
    "--kill-switch-path": f"kill switches are {_LATER}; SIGTERM saves and leaves",
    **dict.fromkeys(("--deepspeed", "--deepspeed-config", "--no-deepspeed"), _DEEPSPEED),
    **dict.fromkeys(
        (
            "--recompute-granularity",
            "--recompute-method",
            "--recompute-num-layers",
            "--recompute-activations",
            "--checkpoint-activations",
            "--checkpoint-num-layers",
            "--activations-checkpoint-method",
            "--deepspeed-activation-checkpointing",
            "--partition-activations",
            "--checkpoint-in-cpu",
        ),
        _RECOMPUTE,
    ),
    **dict.fromkeys(("--num-experts", "--expert-model-parallel-size", "--moe-expert-parallel-size"), _MOE),
}
"""Flags of Megatron that this version refuses, and what to do instead."""

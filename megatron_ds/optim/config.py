"""Flags of the optimizer, of its precision and of the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ds.cli import arg


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer."""

    optimizer: Literal["adam"] = arg("adam", "Update rule: Adam with decoupled weight decay (AdamW).")
    lr: float | None = arg(None, "Peak learning rate.")
    weight_decay: float = arg(0.01, "Decay of weight matrices; biases and norms are not decayed.")
    adam_beta1: float = arg(0.9, "Decay of the mean of gradients.")
    adam_beta2: float = arg(0.999, "Decay of the mean of squared gradients.")
    adam_eps: float = arg(1e-8, "Added to the root of the mean of squared gradients.")
    clip_grad: float = arg(1.0, "Limit of the global L2 norm of the gradient; 0 does not clip.")
    zero_stage: Literal[0, 1, 2] | None = arg(
        None, "What data-parallel ranks share. 0: nothing; 1: the optimizer state; 2: the gradients too."
    )
    use_distributed_optimizer: bool = arg(False, "Megatron's name for --zero-stage 1.")
    reduce_bucket_size: int | None = arg(
        None,
        "Gradient elements that are reduced together. Default, and the most with --zero-stage 2: an eighth of the "
        "rank's parameters, 1 to 40 million.",
        "--reduce-bucket-size",
        "--ddp-bucket-size",
        metavar="ELEMENTS",
    )
    overlap_grad_reduce: bool = arg(True, "Reduce gradients after the backward instead of during it; not with ZeRO-2.")
    overlap_param_gather: bool = arg(False, "Gather updated parameters during the next forward instead of before it.")

    @property
    def effective_zero_stage(self) -> int:
        """The stage that was asked for under either name."""
        return self.zero_stage if self.zero_stage is not None else int(self.use_distributed_optimizer)


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Precision."""

    bf16: bool = arg(False, "Compute in bfloat16; gradients and master weights stay in fp32.")
    fp16: bool = arg(False, "Compute in float16 with loss scaling; gradients and master weights stay in fp32.")
    loss_scale: float | None = arg(None, "Constant loss scale of --fp16. Default: dynamic.")
    initial_loss_scale: float = arg(2.0**32, "Where the dynamic loss scale starts.")
    min_loss_scale: float = arg(1.0, "The dynamic loss scale never falls below this.")
    loss_scale_window: int = arg(1000, "Steps without overflow after which the dynamic loss scale doubles.")
    hysteresis: int = arg(2, "Overflows before the dynamic loss scale halves.")
    grad_reduce_in_bf16: bool = arg(False, "Accumulate and reduce gradients in bfloat16 instead of fp32.")
    fp32_residual_connection: bool = arg(False, "Keep the residual stream in fp32 beside --bf16 or --fp16.")
    deepspeed_loss_scaling: bool = False
    """Follow DeepSpeed's rule for the dynamic loss scale instead of Megatron's; set by ds_config.json."""


@dataclass(frozen=True, kw_only=True)
class LRConfig:
    """Learning rate and weight decay over time."""

    min_lr: float = arg(0.0, "Learning rate at the end of the decay.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = arg(
        "linear", "Shape of the decay after the warm-up."
    )
    lr_decay_iters: int | None = arg(None, "Iterations until --min-lr is reached; --train-iters if not given.")
    lr_decay_samples: int | None = arg(None, "Samples until --min-lr is reached; --train-samples if not given.")
    lr_warmup_fraction: float | None = arg(None, "Linear warm-up over this share of the decay.")
    lr_warmup_iters: int = arg(0, "Iterations of linear warm-up.")
    lr_warmup_samples: int = arg(0, "Samples of linear warm-up.")
    lr_warmup_init: float = arg(0.0, "Learning rate at the start of the warm-up.")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = arg(
        "exponential", "Shape of the final decay of style WSD."
    )
    lr_wsd_decay_iters: int | None = arg(None, "Iterations of the final decay of style WSD.")
    lr_wsd_decay_samples: int | None = arg(None, "Samples of the final decay of style WSD.")
    start_weight_decay: float | None = arg(None, "Weight decay at the start of training.")
    end_weight_decay: float | None = arg(None, "Weight decay at the end of training.")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = arg(
        "constant", "How weight decay moves from --start-weight-decay to --end-weight-decay."
    )

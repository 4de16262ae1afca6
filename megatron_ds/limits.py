"""What each flag may be by itself: the required ones given, every number where it means something."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_ds.config import Config
from megatron_ds.errors import ConfigError


def check_required(config: Config) -> Iterator[ConfigError]:
    """Flags that have no sensible default."""
    is_t5 = config.model.model_type == "T5"
    wanted = {
        "--num-layers 12": _first_given(config.model.num_layers, config.model.encoder_num_layers if is_t5 else None),
        "--hidden-size 768": config.model.hidden_size,
        "--num-attention-heads 12": config.model.num_attention_heads,
        "--encoder-seq-length 512" if is_t5 else "--seq-length 1024": config.data.seq_length,
        "--decoder-seq-length 128": config.data.decoder_seq_length if is_t5 else 0,
        "--micro-batch-size 4": config.training.micro_batch_size,
        "--lr 3e-4": config.optimizer.lr,
        "--train-iters 1000": _first_given(config.training.train_iters, config.training.train_samples),
    }
    missing = [example for example, value in wanted.items() if value is None]
    if missing:
        flags = " ".join(example.split()[0] for example in missing)
        yield ConfigError(flags, "not given", "a value for each", f"for instance {' '.join(missing)}")


def _first_given(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def check_numbers(config: Config) -> Iterator[ConfigError]:
    """Every number lies where it means something."""
    model, parallel, training, optimizer = config.model, config.parallel, config.training, config.optimizer
    precision = config.precision
    positive = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--ffn-hidden-size": model.ffn_hidden_size,
        "--kv-channels": model.kv_channels,
        "--num-query-groups": model.num_query_groups,
        "--num-key-value-heads": model.num_key_value_heads,
        "--max-position-embeddings": model.max_position_embeddings,
        "--seq-length": config.data.seq_length,
        "--micro-batch-size": training.micro_batch_size,
        "--global-batch-size": training.global_batch_size,
        "--train-iters": training.train_iters,
        "--train-samples": training.train_samples,
        "--tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "--context-parallel-size": parallel.context_parallel_size,
        "--ds-sequence-parallel-size": parallel.ds_sequence_parallel_size,
        "--num-layers-per-virtual-pipeline-stage": parallel.num_layers_per_virtual_pipeline_stage,
        "--num-virtual-stages-per-pipeline-rank": parallel.num_virtual_stages_per_pipeline_rank,
        "--decoder-first-pipeline-num-layers": parallel.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": parallel.decoder_last_pipeline_num_layers,
        "--recompute-num-layers": config.recompute.recompute_num_layers,
        "--loss-scale-window": precision.loss_scale_window,
        "--hysteresis": precision.hysteresis,
        "--world-size": parallel.world_size,
        "--cpu-threads-per-rank": parallel.cpu_threads_per_rank,
        "--make-vocab-size-divisible-by": config.tokenizer.make_vocab_size_divisible_by,
        "--reduce-bucket-size": optimizer.reduce_bucket_size,
        "--eval-interval": training.eval_interval,
        "--save-interval": config.checkpoint.save_interval,
    }
    not_negative = {
        "--eval-iters": training.eval_iters,
        "--exit-interval": training.exit_interval,
        "--exit-duration-in-mins": training.exit_duration_in_mins,
        "--manual-gc-interval": training.manual_gc_interval,
        "--num-workers": config.data.num_workers,
        "--vocab-extra-ids": config.tokenizer.vocab_extra_ids,
        "--ckpt-step": config.checkpoint.ckpt_step,
        "--init-method-std": model.init_method_std,
        "--norm-epsilon": model.norm_epsilon,
        "--clip-grad": optimizer.clip_grad,
        "--weight-decay": optimizer.weight_decay,
        "--adam-eps": optimizer.adam_eps,
    }
    for least, values in ((1, positive), (0, not_negative)):
        for flag, value in values.items():
            if value is not None and not value >= least:  # NaN is not
                yield ConfigError(flag, str(value), f"at least {least}", f"{flag} {least} or more")
    yield from _check_variants(config)
    yield from _check_bounded(config)


def _check_variants(config: Config) -> Iterator[ConfigError]:
    """Numbers of one kind of model or data."""
    model, data = config.model, config.data
    for flag, number, least in (
        ("--encoder-num-layers", model.encoder_num_layers, 1),
        ("--decoder-num-layers", model.decoder_num_layers, 1),
        ("--decoder-seq-length", data.decoder_seq_length, 1),
        ("--relative-attention-num-buckets", model.relative_attention_num_buckets, 1),
        ("--relative-attention-max-distance", model.relative_attention_max_distance, 1),
        ("--rope-scaling-original-max-position-embeddings", model.rope_scaling_original_max_position_embeddings, 1),
        ("--window-size", model.window_size, 0),
        ("--mean-noise-span-length", data.mean_noise_span_length, 1),
    ):
        if number is not None and not least <= number < math.inf:
            yield ConfigError(flag, str(number), f"at least {least}", f"{flag} {least} or more")
    for flag, share, usual in (("--mask-prob", data.mask_prob, 0.15), ("--noise-density", data.noise_density, 0.15)):
        if share is not None and not 0 < share < 1:
            yield ConfigError(flag, str(share), "more than 0, less than 1", f"{flag} {usual}")
    if not 0 <= data.short_seq_prob <= 1:
        yield ConfigError("--short-seq-prob", str(data.short_seq_prob), "0 to 1", "--short-seq-prob 0.1")
    for flag, factor, usual in (
        ("--rotary-seq-len-interpolation-factor", model.rotary_seq_len_interpolation_factor, 2),
        ("--rope-scaling-factor", model.rope_scaling_factor, 8),
        ("--rope-scaling-low-freq-factor", model.rope_scaling_low_freq_factor, 1),
        ("--rope-scaling-high-freq-factor", model.rope_scaling_high_freq_factor, 4),
        ("--softmax-scale", model.softmax_scale, 1),
    ):
        if factor is not None and not 0 < factor < math.inf:
            yield ConfigError(flag, str(factor), "more than 0, and finite", f"{flag} {usual}")


def _check_bounded(config: Config) -> Iterator[ConfigError]:
    """Numbers with two ends, and those that must be above 0."""
    for flag, share, usual in (
        ("--hidden-dropout", config.model.hidden_dropout, 0.1),
        ("--attention-dropout", config.model.attention_dropout, 0.1),
        ("--adam-beta1", config.optimizer.adam_beta1, 0.9),
        ("--adam-beta2", config.optimizer.adam_beta2, 0.999),
    ):
        if not 0 <= share < 1:
            yield ConfigError(flag, str(share), "at least 0, less than 1", f"{flag} {usual}")
    for flag, size, usual in (
        ("--rotary-base", config.model.rotary_base, 10000),
        ("--distributed-timeout-minutes", config.parallel.distributed_timeout_minutes, 10),
        ("--initial-loss-scale", config.precision.initial_loss_scale, 2**32),
        ("--min-loss-scale", config.precision.min_loss_scale, 1),
    ):
        if not 0 < size < math.inf:
            yield ConfigError(flag, str(size), "more than 0, and finite", f"{flag} {usual}")
    if not 0 <= (config.precision.loss_scale or 0) < math.inf:
        yield ConfigError(
            "--loss-scale", str(config.precision.loss_scale), "0, which is dynamic, or more", "leave it out"
        )
    ramp = config.training.rampup_batch_size
    if ramp and not (len(ramp) == 3 and min(ramp[:2]) >= 1 and ramp[2] >= 0):
        yield ConfigError(
            "--rampup-batch-size",
            " ".join(map(str, ramp)),
            "START and INCREMENT of at least 1, SAMPLES of at least 0",
            "for instance --rampup-batch-size 32 32 1000000",
        )
    if not math.isfinite(config.optimizer.lr or 0.0):
        yield ConfigError("--lr", str(config.optimizer.lr), "a finite number", "--lr 3e-4")
    if not 0 <= config.training.seed < 2**32:
        yield ConfigError("--seed", str(config.training.seed), f"0 to {2**32 - 1}", "--seed 1234")

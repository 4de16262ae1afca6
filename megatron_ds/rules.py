"""Every rule between flags: one small `check_*` each, and all that are broken are told at once, each with a way out.

What a flag may be by itself stands in limits.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_ds.config import Config
from megatron_ds.data.splits import parse_split
from megatron_ds.errors import ConfigError, ConfigErrors
from megatron_ds.layouts import LAYOUT_CHECKS, find_ways, is_legal
from megatron_ds.limits import check_numbers, check_required
from megatron_ds.optim.lr import lr_errors
from megatron_ds.rules_batch import check_growth
from megatron_ds.rules_layout import check_pipeline_names, fitting_heads, kv_flag
from megatron_ds.rules_model import check_masking, check_positions, check_readers, check_stack_names, check_variants
from megatron_ds.rules_recompute import check_recompute
from megatron_ds.training.config import logging_errors
from megatron_ds.ways import NO_WAYS, divisors, either, nearest


def check_config(config: Config, world_size: int) -> None:
    """Look at every rule; at those between flags only once each flag makes sense by itself.

    Raises: ConfigErrors with every broken rule
    """
    errors = [error for check in (check_required, check_numbers) for error in check(config)]
    if not errors:
        # Only rules that are broken need ways out, and these need a search.
        ways = NO_WAYS if is_legal(config, world_size) else find_ways(config, world_size)
        errors = [*check_launcher(config, world_size)]
        broken = [error for check in LAYOUT_CHECKS for error in check(config, world_size, ways)]
        errors += _named_once(broken, ways.layouts)
        errors += [error for check in CHECKS for error in check(config)]
    if errors:
        raise ConfigErrors(errors)


def _named_once(errors: list[ConfigError], layouts: str) -> Iterator[ConfigError]:
    """The first error names the layouts that mend it and all others."""
    named = False
    for error in errors:
        if layouts and layouts in error.fix:
            fix = error.fix.replace(layouts, "a layout named above")
            yield ConfigError(error.subject, error.found, error.expected, fix) if named else error
            named = True
        else:
            yield error


def check_kernels(config: Config) -> Iterator[ConfigError]:
    """8-bit products are made beside bf16; a format and an attention have one name."""
    kernels = config.kernels
    asked = [
        flag
        for flag, given in (
            ("--fp8-format", kernels.fp8_format),
            ("--fp8-e4m3", kernels.fp8_e4m3),
            ("--fp8-hybrid", kernels.fp8_hybrid),
        )
        if given
    ]
    if len(asked) > 1:
        yield ConfigError(" and ".join(asked), "several formats", "one", f"{asked[0]} alone")
    if asked and not config.precision.bf16:
        yield ConfigError(asked[0], "no --bf16 beside it", "--bf16: all but the products", f"--bf16 {asked[0]}")
    if "kernels.fp8_recipe" in config.typed and not asked:
        yield ConfigError(
            "--fp8-recipe",
            "no format beside it",
            "--fp8-format",
            f"--fp8-format hybrid --fp8-recipe {kernels.fp8_recipe}",
        )
    if kernels.use_flash_attn and kernels.attention_backend not in ("auto", "flash"):
        yield ConfigError(
            "--use-flash-attn",
            f"--attention-backend {kernels.attention_backend} beside it",
            "one attention",
            "--attention-backend flash, or leave --use-flash-attn out",
        )


def check_launcher(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Only a dry run chooses the number of ranks."""
    if not config.training.dry_run and config.parallel.world_size not in (None, world_size):
        yield ConfigError(
            "--world-size",
            f"{config.parallel.world_size}, and the launcher started {world_size}",
            "--dry-run beside it",
            "leave it out: the launcher says how many ranks there are",
        )


def check_model(config: Config) -> Iterator[ConfigError]:
    """Heads share the hidden size, query heads share key/value heads, and an MLP has a width."""
    model = config.model
    heads, hidden, kv = model.num_attention_heads or 1, model.hidden_size or 1, model.kv_heads
    if model.group_query_attention and model.num_key_value_heads not in (None, model.num_query_groups):
        yield ConfigError(
            "--num-query-groups and --num-key-value-heads",
            f"{model.num_query_groups} and {model.num_key_value_heads}",
            "one number: they are two names of the same thing",
            f"leave --num-key-value-heads out, or make it {model.num_query_groups}",
        )
    if model.num_query_groups != 1 and not model.group_query_attention:
        yield ConfigError(
            "--num-query-groups",
            f"{model.num_query_groups} without --group-query-attention, which would leave it unread",
            "both or neither",
            "add --group-query-attention",
        )
    if model.kv_channels is None and hidden % heads:
        yield ConfigError(
            "--num-attention-heads",
            f"{heads} heads for --hidden-size {hidden}",
            "a divisor of the hidden size",
            either(fitting_heads(config), f"--kv-channels {max(1, hidden // heads)}"),
        )
    if heads % kv:
        tp, flag = config.parallel.tensor_model_parallel_size, kv_flag(config)
        yield ConfigError(
            flag,
            f"{kv} key/value heads for {heads} query heads",
            "a divisor of the query heads",
            f"{flag} {nearest([d for d in divisors(heads) if d % tp == 0] or divisors(heads), kv)}",
        )
    if model.ffn_size < 1:
        yield ConfigError("--ffn-hidden-size", f"{model.ffn_size}", "at least 1", f"--ffn-hidden-size {4 * hidden}")


def check_rope(config: Config) -> Iterator[ConfigError]:
    """Rope turns pairs of features."""
    model = config.model
    uneven = model.kv_channels is None and (model.hidden_size or 1) % (model.num_attention_heads or 1)
    if not model.uses_rope or uneven:  # uneven heads are check_model's matter
        return
    if not 0 < model.rotary_percent <= 1 or model.rotated < 2 or model.rotated % 2:
        even = model.head_size % 2 == 0
        yield ConfigError(
            "--rotary-percent",
            f"{model.rotary_percent} of a head of {model.head_size} turns {model.rotated} features",
            "an even number of features, at least 2",
            "--rotary-percent 1.0" if even else f"--kv-channels {model.head_size + 1} --rotary-percent 1.0",
        )


def check_duration(config: Config) -> Iterator[ConfigError]:
    """One unit of duration."""
    if config.training.train_iters and config.training.train_samples:
        yield ConfigError("--train-iters and --train-samples", "both", "one of them", "leave one of them out")


def check_checkpoint(config: Config) -> Iterator[ConfigError]:
    """When to save, and nothing asked of a checkpoint that is not loaded."""
    options = config.checkpoint
    if options.save and options.save_interval is None:
        yield ConfigError(
            "--save-interval", "--save without it", "iterations between two saves", "--save-interval 1000"
        )
    for flag, given in (
        ("--ckpt-step", options.ckpt_step is not None),
        ("--finetune", options.finetune),
        ("--use-checkpoint-args", options.use_checkpoint_args),
        ("--exit-on-missing-checkpoint", options.exit_on_missing_checkpoint),
    ):
        if given and options.load is None:
            yield ConfigError(flag, "no --load", "the checkpoint that it is about", f"--load DIR, or leave {flag} out")
    if options.use_checkpoint_args and config.preset.model_preset:
        yield ConfigError("--use-checkpoint-args and --model-preset", "both", "one of them", "leave --model-preset out")


def check_data(config: Config) -> Iterator[ConfigError]:
    """Something to train on, unless this is only a plan, and a split that can be read."""
    data, training = config.data, config.training
    apart = data.train_data_path or data.valid_data_path or data.test_data_path
    if not (data.data_path or apart or data.mock_data or training.dry_run):
        yield ConfigError(
            "--data-path",
            "not given",
            "what to train on",
            "--data-path PREFIX, as written by tools/preprocess_data.py, or --mock-data",
        )
    if apart and not (data.train_data_path or data.data_path or data.mock_data or training.skip_train):
        yield ConfigError(
            "--train-data-path",
            "not given, though validation or test data are",
            "what to train on",
            "--train-data-path PREFIX, or --skip-train",
        )
    try:
        parse_split(data.split)
    except ConfigError as error:
        yield error


def check_norm(config: Config) -> Iterator[ConfigError]:
    """The norm's name is known."""
    name = config.model.normalization
    if name not in ("LayerNorm", "RMSNorm"):
        yield ConfigError("--normalization", name, "LayerNorm or RMSNorm", "--normalization LayerNorm")


def check_precision(config: Config) -> Iterator[ConfigError]:
    """One half precision at most, and what only makes sense beside one."""
    precision = config.precision
    if precision.fp16 and precision.bf16:
        yield ConfigError("--fp16 and --bf16", "both", "one of them", "--bf16: it needs no loss scaling")
    if precision.fp32_residual_connection and not (precision.fp16 or precision.bf16):
        yield ConfigError(
            "--fp32-residual-connection",
            "fp32, where everything is",
            "--bf16 or --fp16",
            "--bf16, or leave --fp32-residual-connection out",
        )
    if precision.grad_reduce_in_bf16 and not precision.bf16:
        yield ConfigError(
            "--grad-reduce-in-bf16",
            f"gradients of {'fp16' if precision.fp16 else 'fp32'} training",
            "--bf16",
            "--bf16, or leave --grad-reduce-in-bf16 out",
        )
    if precision.initial_loss_scale < precision.min_loss_scale:
        yield ConfigError(
            "--initial-loss-scale",
            f"{precision.initial_loss_scale:g}, below --min-loss-scale {precision.min_loss_scale:g}",
            "at least the minimum",
            f"--initial-loss-scale {precision.min_loss_scale:g}",
        )


def check_optimizer(config: Config) -> Iterator[ConfigError]:
    """ZeRO under one name; the learning rate's own rules."""
    optimizer = config.optimizer
    if optimizer.use_distributed_optimizer and optimizer.zero_stage == 0:
        yield ConfigError("--use-distributed-optimizer and --zero-stage 0", "both", "one of them", "--zero-stage 1")
    if optimizer.overlap_param_gather and optimizer.effective_zero_stage == 0:
        yield ConfigError(
            "--overlap-param-gather",
            "ZeRO stage 0, which gathers no parameters",
            "--zero-stage 1 or 2",
            "--zero-stage 1, or leave --overlap-param-gather out",
        )
    training = config.training
    batch = training.global_batch_size or training.micro_batch_size or 1  # only the ratios of lengths matter here
    yield from lr_errors(config.lr, optimizer, training.train_samples, batch, training.train_iters)


def check_logging(config: Config) -> Iterator[ConfigError]:
    """What is to be logged can be."""
    yield from logging_errors(config.logging)


CHECKS: tuple[Callable[[Config], Iterator[ConfigError]], ...] = (
    check_readers,
    check_model,
    check_variants,
    check_positions,
    check_rope,
    check_stack_names,
    check_masking,
    check_pipeline_names,
    check_recompute,
    check_growth,
    check_duration,
    check_checkpoint,
    check_data,
    check_norm,
    check_precision,
    check_optimizer,
    check_kernels,
    check_logging,
)
"""Rules that have nothing to do with the number of ranks."""

"""Every rule between flags: one small `check_*` each, and all that are broken are told at once, each with a way out.

What a flag may be by itself stands in limits.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from megatron_ds.config import Config
from megatron_ds.data.splits import parse_split
from megatron_ds.errors import ConfigError, ConfigErrors
from megatron_ds.limits import check_numbers, check_required
from megatron_ds.optim.lr import lr_errors
from megatron_ds.training.config import logging_errors


def check_config(config: Config, world_size: int) -> None:
    """Look at every rule; at those between flags only once each flag makes sense by itself.

    Raises: ConfigErrors with every broken rule
    """
    _raise(check(config) for check in (check_required, check_numbers))
    _raise(check(config, world_size) for check in CHECKS)


def _raise(found: Iterator[Iterator[ConfigError]]) -> None:
    errors = [error for check in found for error in check]
    if errors:
        raise ConfigErrors(errors)


def check_world(config: Config, world_size: int) -> Iterator[ConfigError]:
    """tp x pp must divide the number of ranks, which only a dry run may choose."""
    parallel = config.parallel
    if not config.training.dry_run and parallel.world_size not in (None, world_size):
        yield ConfigError(
            "--world-size",
            f"{parallel.world_size}, and the launcher started {world_size}",
            "--dry-run beside it",
            "leave it out: the launcher says how many ranks there are",
        )
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        yield ConfigError(
            "--tensor-model-parallel-size x --pipeline-model-parallel-size",
            f"{tp} x {pp} = {tp * pp}, with {world_size} rank{'s' * (world_size > 1)}",
            "a product that divides the number of ranks; the rest is data-parallel",
            f"{_nearest_layout(config, world_size)}, or start {_nearest_world(config, world_size)} ranks",
        )


def check_heads(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Heads share the hidden size and the tensor-parallel ranks evenly."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    heads, hidden, kv = model.num_attention_heads or 1, model.hidden_size or 1, model.kv_heads
    kv_flag = "--num-query-groups" if model.group_query_attention else "--num-key-value-heads"
    layout = _nearest_layout(config, world_size)
    if model.group_query_attention and model.num_key_value_heads not in (None, model.num_query_groups):
        yield ConfigError(
            "--num-query-groups and --num-key-value-heads",
            f"{model.num_query_groups} and {model.num_key_value_heads}",
            "one number: they are two names of the same thing",
            f"leave --num-key-value-heads out, or make it {model.num_query_groups}",
        )
    if model.kv_channels is None and hidden % heads:
        yield ConfigError(
            "--num-attention-heads",
            f"{heads} heads for --hidden-size {hidden}",
            "a divisor of the hidden size",
            _ways(_fitting_heads(config), f"--kv-channels {max(1, hidden // heads)}"),
        )
    if heads % tp:
        yield ConfigError(
            "--num-attention-heads",
            f"{heads} heads over --tensor-model-parallel-size {tp}",
            "heads divisible by tp",
            _ways(layout, _fitting_heads(config)),
        )
    if heads % kv:
        divisors = _divisors(heads)
        yield ConfigError(
            kv_flag,
            f"{kv} key/value heads for {heads} query heads",
            "a divisor of the query heads",
            f"{kv_flag} {_nearest([d for d in divisors if d % tp == 0] or divisors, kv)}",
        )
    elif kv % tp and not heads % tp:
        multiples = [d for d in _divisors(heads) if d % tp == 0]
        yield ConfigError(
            kv_flag,
            f"{kv} key/value heads over --tensor-model-parallel-size {tp}",
            "heads divisible by tp",
            _ways(layout, f"{kv_flag} {_nearest(multiples, kv)}"),
        )


def check_rope(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Rope turns pairs of features."""
    model = config.model
    uneven = model.kv_channels is None and (model.hidden_size or 1) % (model.num_attention_heads or 1)
    if not model.uses_rope or uneven:  # uneven heads are check_heads' matter
        return
    if not 0 < model.rotary_percent <= 1 or model.rotated < 2 or model.rotated % 2:
        even = model.head_size % 2 == 0
        yield ConfigError(
            "--rotary-percent",
            f"{model.rotary_percent} of a head of {model.head_size} turns {model.rotated} features",
            "an even number of features, at least 2",
            "--rotary-percent 1.0" if even else f"--kv-channels {model.head_size + 1} --rotary-percent 1.0",
        )


def check_mlp(config: Config, world_size: int) -> Iterator[ConfigError]:
    """The MLP is split over tp."""
    tp, ffn = config.parallel.tensor_model_parallel_size, config.model.ffn_size
    if ffn < 1 or ffn % tp:
        yield ConfigError(
            "--ffn-hidden-size",
            f"{ffn} over --tensor-model-parallel-size {tp}",
            "a positive multiple of tp",
            f"--ffn-hidden-size {max(1, -(-ffn // tp)) * tp}",
        )


def check_layers(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Every stage holds the same number of layers."""
    layers, pp = config.model.num_layers or 1, config.parallel.pipeline_model_parallel_size
    if layers % pp:
        yield ConfigError(
            "--num-layers",
            f"{layers} layers over --pipeline-model-parallel-size {pp}",
            "layers divisible by pp",
            _ways(_nearest_layout(config, world_size), f"--num-layers {-(-layers // pp) * pp}"),
        )


def check_batch(config: Config, world_size: int) -> Iterator[ConfigError]:
    """The global batch is a whole number of micro-batches on every data-parallel rank."""
    training = config.training
    shared = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    if world_size % shared or not training.micro_batch_size:
        return
    dp = world_size // shared
    step = training.micro_batch_size * dp
    wanted = training.global_batch_size or step
    if wanted % step:
        below, above = wanted // step * step, (wanted // step + 1) * step
        yield ConfigError(
            "--global-batch-size",
            f"{wanted}, with --micro-batch-size {training.micro_batch_size} on {dp} data-parallel rank{'s' * (dp > 1)}",
            f"a multiple of {step}",
            _ways(f"--global-batch-size {below}" if below else "", f"--global-batch-size {above}"),
        )
    if training.train_samples and training.train_samples < wanted:
        yield ConfigError(
            "--train-samples",
            f"{training.train_samples}, with a global batch of {wanted}",
            "at least one batch",
            f"--train-samples {max(1, wanted // step) * step}",
        )


def check_duration(config: Config, world_size: int) -> Iterator[ConfigError]:
    """One unit of duration."""
    if config.training.train_iters and config.training.train_samples:
        yield ConfigError("--train-iters and --train-samples", "both", "one of them", "leave one of them out")


def check_checkpoint(config: Config, world_size: int) -> Iterator[ConfigError]:
    """When to save, and nothing asked of a checkpoint that is not loaded."""
    options = config.checkpoint
    if options.save and options.save_interval is None:
        yield ConfigError(
            "--save-interval", "--save without it", "iterations between two saves", "--save-interval 1000"
        )
    for flag, given in (("--ckpt-step", options.ckpt_step is not None), ("--finetune", options.finetune)):
        if given and options.load is None:
            yield ConfigError(flag, "no --load", "the checkpoint that it is about", f"--load DIR, or leave {flag} out")


def check_data(config: Config, world_size: int) -> Iterator[ConfigError]:
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


def check_positions(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Every position of a sample has a row in the table of positions; names are known."""
    model, seq = config.model, config.data.seq_length or 1
    if model.position_embedding_type not in ("learned_absolute", "rope"):
        yield ConfigError(
            "--position-embedding-type",
            model.position_embedding_type,
            "learned_absolute or rope",
            "--position-embedding-type rope",
        )
    if model.normalization not in ("LayerNorm", "RMSNorm"):
        yield ConfigError("--normalization", model.normalization, "LayerNorm or RMSNorm", "--normalization LayerNorm")
    if not model.uses_rope and (model.max_position_embeddings or seq) < seq:
        yield ConfigError(
            "--max-position-embeddings",
            f"{model.max_position_embeddings}, with --seq-length {seq}",
            "at least the sequence length",
            f"--max-position-embeddings {seq}",
        )


def check_precision(config: Config, world_size: int) -> Iterator[ConfigError]:
    """One half precision at most."""
    if config.precision.fp16 and config.precision.bf16:
        yield ConfigError("--fp16 and --bf16", "both", "one of them", "--bf16: it needs no loss scaling")
    elif config.precision.fp16:
        yield ConfigError("--fp16", "float16, which is not supported yet", "--bf16, or neither for fp32", "--bf16")


def check_optimizer(config: Config, world_size: int) -> Iterator[ConfigError]:
    """ZeRO under one name; the learning rate's own rules."""
    optimizer = config.optimizer
    if optimizer.use_distributed_optimizer and optimizer.zero_stage == 0:
        yield ConfigError("--use-distributed-optimizer and --zero-stage 0", "both", "one of them", "--zero-stage 1")
    training = config.training
    batch = training.global_batch_size or training.micro_batch_size or 1  # only the ratios of lengths matter here
    yield from lr_errors(config.lr, optimizer, training.train_samples, batch, training.train_iters)


def check_logging(config: Config, world_size: int) -> Iterator[ConfigError]:
    """What is to be logged can be."""
    yield from logging_errors(config.logging)


CHECKS: tuple[Callable[[Config, int], Iterator[ConfigError]], ...] = (
    check_world,
    check_heads,
    check_rope,
    check_mlp,
    check_layers,
    check_batch,
    check_duration,
    check_checkpoint,
    check_data,
    check_positions,
    check_precision,
    check_optimizer,
    check_logging,
)


def _nearest_layout(config: Config, world_size: int) -> str:
    """The flags nearest to those given by which ranks, model and, if possible, batch can be cut."""
    model, parallel, training = config.model, config.parallel, config.training
    wanted = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    legal = [
        (tp, pp)
        for tp in _divisors(world_size)
        for pp in _divisors(world_size // tp)
        if not any(extent % tp for extent in (model.num_attention_heads or 1, model.kv_heads, model.ffn_size))
        and not (model.num_layers or 1) % pp
    ]
    batch, micro = training.global_batch_size or 0, training.micro_batch_size or 1
    fitting = [(tp, pp) for tp, pp in legal if not batch % (micro * (world_size // (tp * pp)))] or legal
    tp, pp = min(fitting, key=lambda layout: abs(layout[0] - wanted[0]) + abs(layout[1] - wanted[1]))
    flags = ("--tensor-model-parallel-size", tp), ("--pipeline-model-parallel-size", pp)
    changed = [f"{flag} {size}" for (flag, size), old in zip(flags, wanted, strict=True) if size != old]
    return " ".join(changed)


def _nearest_world(config: Config, world_size: int) -> int:
    """The number of ranks nearest to those started on which layout and batch come out even."""
    parallel, training = config.parallel, config.training
    shared = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    batch, micro = training.global_batch_size, training.micro_batch_size or 1
    if batch is None or batch % micro:
        return -(-world_size // shared) * shared
    return _nearest([dp * shared for dp in _divisors(batch // micro)], world_size)


def _fitting_heads(config: Config) -> str:
    """The number of query heads nearest to the one given that hidden size, tp, key/value heads and rope allow."""
    model, tp, hidden = config.model, config.parallel.tensor_model_parallel_size, config.model.hidden_size or 1
    fitting = []
    for heads in range(tp, hidden + 1, tp):
        other = dataclasses.replace(model, num_attention_heads=heads)
        even = model.kv_channels is not None or hidden % heads == 0
        shared = heads % other.kv_heads == 0 and other.kv_heads % tp == 0
        if even and shared and not (model.uses_rope and other.rotated % 2):
            fitting.append(heads)
    return f"--num-attention-heads {_nearest(fitting, model.num_attention_heads or 1)}" if fitting else ""


def _ways(*options: str) -> str:
    return ", or ".join(option for option in options if option)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(numbers: Sequence[int], wanted: int) -> int:
    return min(numbers, key=lambda n: (abs(n - wanted), n))

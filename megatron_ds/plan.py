"""What a configuration implies on a given number of ranks: pure arithmetic, no device, no process group.

Every rule that ties several flags together is a small `check_*` function here, and all that are broken are reported at
once, each with a way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.config import Config
from megatron_ds.errors import ConfigError, ConfigErrors
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.gpt import Stage
from megatron_ds.optim.lr import lr_errors
from megatron_ds.pipeline.schedule import Actions, build
from megatron_ds.training.config import logging_errors


class SampleCounts(NamedTuple):
    """Samples that a run needs of each dataset."""

    train: int
    valid: int
    test: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Layout, batch arithmetic, stages and schedule; everything that the flags leave to be worked out."""

    world_size: int
    sizes: dict[str, int]
    """Extent of every axis: pp, dp, cp, tp."""
    vocab: Vocab
    seq_length: int
    max_positions: int
    micro_batch_size: int
    global_batch_size: int
    num_microbatches: int
    train_iters: int
    samples: SampleCounts
    zero_stage: int
    stages: tuple[Stage, ...]
    actions: tuple[Actions, ...]
    eval_actions: tuple[Actions, ...]

    @property
    def tokens_per_batch(self) -> int:
        """Positions in one global batch."""
        return self.global_batch_size * self.seq_length


def make_plan(config: Config, world_size: int, vocab_size: int) -> Plan:
    """Work everything out.

    Raises: ConfigErrors with every broken rule
    """
    _raise(check(config) for check in (check_required, check_numbers))
    _raise(check(config, world_size) for check in CHECKS)
    model, training = config.model, config.training
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    dp = world_size // (tp * pp)
    assert config.data.seq_length and training.micro_batch_size and model.num_layers
    global_batch = training.global_batch_size or training.micro_batch_size * dp
    num_microbatches = global_batch // (training.micro_batch_size * dp)
    train_iters = training.train_iters or (training.train_samples or 0) // global_batch
    evaluations = train_iters // training.eval_interval + 1 if training.eval_interval else 0
    return Plan(
        world_size=world_size,
        sizes={"pp": pp, "dp": dp, "cp": 1, "tp": tp},
        vocab=Vocab(vocab_size, pad_vocabulary(vocab_size, config.tokenizer.make_vocab_size_divisible_by * tp)),
        seq_length=config.data.seq_length,
        max_positions=model.max_position_embeddings or config.data.seq_length,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=global_batch,
        num_microbatches=num_microbatches,
        train_iters=train_iters,
        samples=SampleCounts(
            training.train_samples or train_iters * global_batch,
            evaluations * training.eval_iters * global_batch,
            training.eval_iters * global_batch,
        ),
        zero_stage=config.optimizer.effective_zero_stage,
        stages=cut_layers(model.num_layers, pp),
        actions=build(config.parallel.pipeline_schedule, pp, num_microbatches),
        eval_actions=build("forward", pp, num_microbatches),
    )


def pad_vocabulary(size: int, multiple: int) -> int:
    """The smallest multiple that holds the vocabulary."""
    return -(-size // multiple) * multiple


def cut_layers(num_layers: int, num_stages: int) -> tuple[Stage, ...]:
    """Equal shares of the layers, in order."""
    share = num_layers // num_stages
    return tuple(
        Stage(i * share, (i + 1) * share, is_first=i == 0, is_last=i == num_stages - 1) for i in range(num_stages)
    )


def _raise(found: Iterator[Iterator[ConfigError]]) -> None:
    errors = [error for check in found for error in check]
    if errors:
        raise ConfigErrors(errors)


def check_required(config: Config) -> Iterator[ConfigError]:
    """Flags that have no sensible default."""
    wanted = {
        "--num-layers": config.model.num_layers,
        "--hidden-size": config.model.hidden_size,
        "--num-attention-heads": config.model.num_attention_heads,
        "--seq-length": config.data.seq_length,
        "--micro-batch-size": config.training.micro_batch_size,
        "--lr": config.optimizer.lr,
        "--train-iters": config.training.train_iters or config.training.train_samples,
    }
    missing = [flag for flag, value in wanted.items() if value is None]
    if missing:
        yield ConfigError(" ".join(missing), "not given", "a value for each", "see --help for every flag")


def check_numbers(config: Config) -> Iterator[ConfigError]:
    """Counts that must be at least 1."""
    model, parallel, training = config.model, config.parallel, config.training
    counts = {
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
        "--make-vocab-size-divisible-by": config.tokenizer.make_vocab_size_divisible_by,
        "--reduce-bucket-size": config.optimizer.reduce_bucket_size,
        "--eval-interval": training.eval_interval,
        "--save-interval": config.checkpoint.save_interval,
    }
    for flag, value in counts.items():
        if value is not None and value < 1:
            yield ConfigError(flag, str(value), "at least 1", f"{flag} 1 or more")
    for flag, dropout in (
        ("--hidden-dropout", model.hidden_dropout),
        ("--attention-dropout", model.attention_dropout),
    ):
        if not 0 <= dropout < 1:
            yield ConfigError(flag, str(dropout), "at least 0, less than 1", f"{flag} 0.1")


def check_world(config: Config, world_size: int) -> Iterator[ConfigError]:
    """tp x pp must divide the number of ranks."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        legal = [f"tp {t} x pp {p}" for t in _divisors(world_size) for p in _divisors(world_size // t)]
        near = sorted(legal, key=lambda text: abs(int(text.split()[1]) - tp) + abs(int(text.split()[4]) - pp))[:3]
        up = -(-world_size // (tp * pp)) * tp * pp
        yield ConfigError(
            "--tensor-model-parallel-size x --pipeline-model-parallel-size",
            f"tp {tp} x pp {pp} = {tp * pp} on a world size of {world_size} rank{'s' * (world_size > 1)}",
            "a product that divides the number of ranks",
            f"start {up} ranks, or {', '.join(near)} (the rest is data-parallel)",
        )


def check_heads(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Heads share the hidden size and the tensor-parallel ranks evenly."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    heads, hidden, kv = model.num_attention_heads or 1, model.hidden_size or 1, model.kv_heads
    if model.kv_channels is None and hidden % heads:
        yield ConfigError(
            "--num-attention-heads", f"{heads} heads for --hidden-size {hidden}", "a divisor of the hidden size",
            f"--num-attention-heads {_nearest_divisor(hidden, heads)}, or give --kv-channels",
        )  # fmt: skip
    if heads % tp:
        yield ConfigError(
            "--num-attention-heads", f"{heads} heads over --tensor-model-parallel-size {tp}", "heads divisible by tp",
            f"--tensor-model-parallel-size {_nearest_divisor(heads, tp)}, or --num-attention-heads {-(-heads // tp) * tp}",
        )  # fmt: skip
    if heads % kv:
        yield ConfigError(
            "--num-query-groups", f"{kv} key/value heads for {heads} query heads", "a divisor of the query heads",
            f"--num-query-groups {_nearest_divisor(heads, kv)}",
        )  # fmt: skip
    elif kv % tp and not heads % tp:
        yield ConfigError(
            "--num-query-groups", f"{kv} key/value heads over --tensor-model-parallel-size {tp}",
            "key/value heads divisible by tp", f"--tensor-model-parallel-size {_nearest_divisor(kv, tp)}",
        )  # fmt: skip
    if model.uses_rope and (model.rotated % 2 or not 0 < model.rotary_percent <= 1):
        yield ConfigError(
            "--rotary-percent", f"{model.rotary_percent} of a head of {model.head_size} turns {model.rotated} features",
            "an even number of features", "--rotary-percent 1.0",
        )  # fmt: skip


def check_mlp(config: Config, world_size: int) -> Iterator[ConfigError]:
    """The MLP is split over tp."""
    tp, ffn = config.parallel.tensor_model_parallel_size, config.model.ffn_size
    if ffn < 1 or ffn % tp:
        yield ConfigError(
            "--ffn-hidden-size", f"{ffn} over --tensor-model-parallel-size {tp}", "a positive multiple of tp",
            f"--ffn-hidden-size {max(1, -(-ffn // tp)) * tp}",
        )  # fmt: skip


def check_layers(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Every stage holds the same number of layers."""
    layers, pp = config.model.num_layers or 1, config.parallel.pipeline_model_parallel_size
    if layers % pp:
        yield ConfigError(
            "--num-layers", f"{layers} layers over --pipeline-model-parallel-size {pp}", "layers divisible by pp",
            f"--pipeline-model-parallel-size {_nearest_divisor(layers, pp)}, or --num-layers {-(-layers // pp) * pp}",
        )  # fmt: skip


def check_batch(config: Config, world_size: int) -> Iterator[ConfigError]:
    """The global batch is a whole number of micro-batches on every data-parallel rank."""
    training = config.training
    shared = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    if world_size % shared or not training.micro_batch_size:
        return
    step = training.micro_batch_size * (world_size // shared)
    wanted = training.global_batch_size or step
    if wanted % step:
        below, above = wanted // step * step, (wanted // step + 1) * step
        yield ConfigError(
            "--global-batch-size",
            f"{wanted}, with --micro-batch-size {training.micro_batch_size} on {world_size // shared} data-parallel ranks",
            f"a multiple of {step}",
            f"--global-batch-size {f'{below} or {above}' if below else above}",
        )


def check_duration(config: Config, world_size: int) -> Iterator[ConfigError]:
    """One unit of duration."""
    if config.training.train_iters and config.training.train_samples:
        yield ConfigError(
            "--train-iters and --train-samples", "both", "one of them", "leave one out: samples = iterations x global batch"
        )
    if config.checkpoint.save and config.checkpoint.save_interval is None:
        yield ConfigError(
            "--save-interval", "--save without it", "iterations between two saves", "--save-interval 1000, say"
        )


def check_positions(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Every position of a sample has a row in the table of positions; names are known."""
    model, seq = config.model, config.data.seq_length or 1
    if model.position_embedding_type not in ("learned_absolute", "rope"):
        yield ConfigError("--position-embedding-type", model.position_embedding_type, "learned_absolute or rope")
    if model.normalization not in ("LayerNorm", "RMSNorm"):
        yield ConfigError("--normalization", model.normalization, "LayerNorm or RMSNorm")
    if not model.uses_rope and (model.max_position_embeddings or seq) < seq:
        yield ConfigError(
            "--max-position-embeddings", f"{model.max_position_embeddings}, with --seq-length {seq}",
            "at least the sequence length", f"--max-position-embeddings {seq}",
        )  # fmt: skip


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
        yield ConfigError(
            "--use-distributed-optimizer and --zero-stage 0", "both", "one of them", "leave --zero-stage out, or make it 1"
        )
    training = config.training
    batch = training.global_batch_size or training.micro_batch_size or 1  # only the ratios of lengths matter here
    yield from lr_errors(config.lr, optimizer, training.train_samples, batch, training.train_iters)


def check_logging(config: Config, world_size: int) -> Iterator[ConfigError]:
    """What is to be logged can be."""
    yield from logging_errors(config.logging)


CHECKS: tuple[Callable[[Config, int], Iterator[ConfigError]], ...] = (
    check_world, check_heads, check_mlp, check_layers, check_batch, check_duration, check_positions, check_precision,
    check_optimizer, check_logging,
)  # fmt: skip


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest_divisor(n: int, wanted: int) -> int:
    return min(_divisors(n), key=lambda d: (abs(d - wanted), d))

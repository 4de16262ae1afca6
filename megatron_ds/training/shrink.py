"""A user's model made tiny, with everything kept that a layout can get wrong: what --verify-parallel trains."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from megatron_ds.checkpoint.config import CheckpointConfig
from megatron_ds.config import Config
from megatron_ds.data.config import DataConfig
from megatron_ds.data.tokenizer import planned_vocab_size
from megatron_ds.model.config import RecomputeConfig, TransformerConfig
from megatron_ds.optim.config import LRConfig, PrecisionConfig
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.training.config import LoggingConfig

STEPS = 3
POSITIONS, VOCABULARY, HEAD_SIZES = 16, 48, (8, 16, 32, 64)
"""About so many positions and tokens, and the smallest of these head sizes that rope can turn."""
PAD_TO = 8
BUCKET_ELEMENTS = 8000
"""Small enough for several buckets."""
ADAM_EPS = 1e-4
"""With the usual 1e-8 an element whose gradient is all rounding moves as far as any, and three steps amplify it."""


class Small(NamedTuple):
    """The tiny configuration, its vocabulary, and what differs from the user's: flag, value before, value now."""

    config: Config
    vocab_size: int
    changes: list[tuple[str, str, str]]


def shrink(config: Config, world_size: int) -> Small:
    """The smallest model that keeps every way in which ranks share this one; fp32, no dropout, mock data."""
    layers = _layers(config)
    tokens = _multiple(PAD_TO * config.parallel.tensor_model_parallel_size, VOCABULARY)
    asked, _ = planned_vocab_size(config.tokenizer, "GPT2BPETokenizer")
    vocab_size = tokens - 3 if asked % _padding(config) else tokens
    micro = min(2, config.training.micro_batch_size or 1)
    small = dataclasses.replace(
        config,
        model=_model(config, layers),
        recompute=_recompute(config.recompute, layers),
        parallel=_parallel(config, layers),
        training=dataclasses.replace(
            config.training,
            micro_batch_size=micro,
            global_batch_size=2 * micro * world_size,  # whole micro-batches wherever dp may take up the ranks
            train_iters=STEPS,
            train_samples=None,
            rampup_batch_size=(),
            step_batch_size_schedule=None,
        ),
        optimizer=dataclasses.replace(config.optimizer, lr=1e-3, adam_eps=ADAM_EPS, reduce_bucket_size=BUCKET_ELEMENTS),
        lr=LRConfig(lr_decay_style="constant"),
        precision=PrecisionConfig(),
        data=_data(config),
        tokenizer=dataclasses.replace(config.tokenizer, make_vocab_size_divisible_by=PAD_TO),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
    )
    return Small(small, vocab_size, [("vocabulary", str(asked), str(vocab_size)), *_changes(config, small)])


def plain(config: Config) -> Config:
    """The same model and batch for one process that does nothing clever."""
    parallel = ParallelConfig(
        device=config.parallel.device, distributed_timeout_minutes=config.parallel.distributed_timeout_minutes
    )
    optimizer = dataclasses.replace(
        config.optimizer, zero_stage=0, use_distributed_optimizer=False, overlap_param_gather=False
    )
    return dataclasses.replace(config, parallel=parallel, recompute=RecomputeConfig(), optimizer=optimizer)


class _Layers(NamedTuple):
    """Of the tiny model; `share` is what a chunk holds unless the flags of the first or last stage say otherwise.

    encoder: those of T5's encoder.
    """

    total: int
    share: int
    first: int | None = None
    last: int | None = None
    encoder: int | None = None


def _layers(config: Config) -> _Layers:
    """A layer for every chunk; two where one could not show what the flags ask for."""
    parallel, recompute = config.parallel, config.recompute
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_stages(config.model.total_layers)
    wanted = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if config.model.model_type == "T5":
        return _two_stacks(config, stages * virtual)
    method = (parallel.pp_partition_method or "uniform").lower()
    grouped = recompute.granularity == "full" and recompute.num_layers > 1
    needs_two = wanted != (None, None) or method != "uniform" or grouped or stages * virtual == 1
    share, average = 1 + needs_two, config.model.total_layers / stages
    ends = [None if n is None else (share + (n > average) - (n < average)) * virtual for n in wanted]
    given = [n for n in ends if n is not None]
    return _Layers(sum(given) + (stages - len(given)) * share * virtual, share, ends[0], ends[1])


def _two_stacks(config: Config, chunks: int) -> _Layers:
    """About half of the layers for each stack, so that some chunk lies on the border or on either side of it."""
    recompute, split = config.recompute, config.parallel.pipeline_model_parallel_split_rank
    share = 1 + (chunks == 1 or (recompute.granularity == "full" and recompute.num_layers > 1))
    encoder = share * max(1, chunks // 2 if split is None else split)
    return _Layers(encoder + max(1, share * chunks - encoder), share, encoder=encoder)


def _data(config: Config) -> DataConfig:
    """Random samples, the decoder's a little shorter than the encoder's."""
    share = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    decoder = config.data.decoder_seq_length
    return dataclasses.replace(
        config.data,
        seq_length=_positions(config),
        decoder_seq_length=None if decoder is None else min(decoder, _multiple(share, POSITIONS - 4)),
        mock_data=True,
    )


def _model(config: Config, layers: _Layers) -> TransformerConfig:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    assert model.hidden_size and model.num_attention_heads and config.data.seq_length
    heads, kv_heads = _heads(config)
    size = next((d for d in HEAD_SIZES if d <= model.head_size and _rope_fits(model, d)), model.head_size)
    width = heads * size
    wider = model.hidden_size > _width(model)  # only with --kv-channels can the two differ
    hidden = 2 * width if wider else width if model.hidden_size == _width(model) else _multiple(8, width // 2)
    data, rows = _data(config), model.max_position_embeddings
    positions = max(data.seq_length or 0, data.decoder_seq_length or 0)
    stacks = (None, layers.encoder, layers.total - layers.encoder) if layers.encoder else (layers.total, None, None)
    spare = 4 if (rows or 0) > config.data.seq_length else 0
    return dataclasses.replace(
        model,
        num_layers=stacks[0],
        encoder_num_layers=stacks[1],
        decoder_num_layers=stacks[2],
        hidden_size=hidden,
        ffn_hidden_size=_multiple(tp, min(model.ffn_size, hidden * model.ffn_size // model.hidden_size)),
        num_attention_heads=heads,
        kv_channels=None if model.kv_channels is None else size,
        num_query_groups=kv_heads if model.group_query_attention else model.num_query_groups,
        num_key_value_heads=None if model.num_key_value_heads is None else kv_heads,
        max_position_embeddings=None if rows is None else positions + spare,
        window_size=None if model.window_size is None else min(model.window_size, 5),
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def _heads(config: Config) -> tuple[int, int]:
    """Query and key/value heads in the same ratio: two key/value heads per rank, one where that gets many."""
    model, parallel = config.model, config.parallel
    assert model.num_attention_heads
    shared = parallel.tensor_model_parallel_size * parallel.ds_sequence_parallel_size
    ratio = model.num_attention_heads // model.kv_heads
    kv_heads = min(model.kv_heads, shared * (2 if ratio <= 4 else 1))
    return kv_heads * ratio, kv_heads


def _rope_fits(model: TransformerConfig, head_size: int) -> bool:
    rotated = int(head_size * model.rotary_percent)
    return not model.uses_rope or (rotated >= 2 and rotated % 2 == 0)


def _recompute(config: RecomputeConfig, layers: _Layers) -> RecomputeConfig:
    if config.recompute_num_layers is None:
        return config
    return dataclasses.replace(config, recompute_num_layers=min(config.recompute_num_layers, layers.share))


def _parallel(config: Config, layers: _Layers) -> ParallelConfig:
    per_virtual = config.parallel.num_layers_per_virtual_pipeline_stage
    return dataclasses.replace(
        config.parallel,
        num_layers_per_virtual_pipeline_stage=layers.share if per_virtual else None,
        decoder_first_pipeline_num_layers=layers.first,
        decoder_last_pipeline_num_layers=layers.last,
    )


def _positions(config: Config) -> int:
    """A sequence that still comes out even for every rank that shares it."""
    parallel = config.parallel
    assert config.data.seq_length
    unit = max(2 * parallel.context_parallel_size, parallel.ds_sequence_parallel_size)
    unit *= parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return min(config.data.seq_length, _multiple(unit, POSITIONS))


def _padding(config: Config) -> int:
    return config.tokenizer.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size


def _width(model: TransformerConfig) -> int:
    assert model.num_attention_heads
    return model.num_attention_heads * model.head_size


def _multiple(unit: int, least: int) -> int:
    """The smallest positive multiple that is not below `least`."""
    return max(1, -(-least // unit)) * unit


SHOWN = {
    "model": (
        "total_layers",
        "hidden_size",
        "num_attention_heads",
        "kv_heads",
        "head_size",
        "ffn_size",
        "attention_dropout",
        "hidden_dropout",
    ),
    "parallel": ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    "data": ("seq_length", "decoder_seq_length"),
    "recompute": ("num_layers",),
    "training": ("micro_batch_size", "global_batch_size"),
    "precision": ("bf16", "fp16"),
    "optimizer": ("lr", "adam_eps"),
}


def _changes(before: Config, after: Config) -> list[tuple[str, str, str]]:
    """What a reader wants to know, where it differs."""
    out: list[tuple[str, str, str]] = []
    for group, names in SHOWN.items():
        for name in names:
            values: list[Any] = [getattr(getattr(config, group), name) for config in (before, after)]
            if values[0] != values[1]:
                out.append((name.replace("_", " "), str(values[0]), str(values[1])))
    return out

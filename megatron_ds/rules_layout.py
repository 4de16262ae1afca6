"""Rules between the layout and the model: what every axis has to divide."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_ds.config import Config
from megatron_ds.errors import ConfigError
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.stages import weights
from megatron_ds.ways import Ways, divisors, either, nearest, nearest_multiple, plural


def ranks_per_replica(parallel: ParallelConfig) -> int:
    """tp x cp x pp: ranks that share one copy of the model and its sequences."""
    return parallel.tensor_model_parallel_size * parallel.context_size * parallel.pipeline_model_parallel_size


def check_world(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """tp x cp x pp divides the number of ranks."""
    parallel, shared = config.parallel, ranks_per_replica(config.parallel)
    if world_size % shared:
        names = {
            "--tensor-model-parallel-size": parallel.tensor_model_parallel_size,
            context_flag(parallel): parallel.context_size,
            "--pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        }
        if parallel.context_size == 1:
            del names[context_flag(parallel)]
        yield ConfigError(
            " x ".join(names),
            f"{' x '.join(map(str, names.values()))} = {shared}, with {plural(world_size, 'rank')}",
            "a product that divides the number of ranks; the rest is data-parallel",
            either(ways.layouts, ways.world) or f"sizes whose product divides {world_size}",
        )


def context_flag(parallel: ParallelConfig) -> str:
    """The flag by which sequences are shared."""
    return "--ds-sequence-parallel-size" if parallel.ds_sequence_parallel_size > 1 else "--context-parallel-size"


def check_heads(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """Query and key/value heads are shared evenly by tp, and by Ulysses within that."""
    model, parallel = config.model, config.parallel
    tp, ulysses = parallel.tensor_model_parallel_size, parallel.ds_sequence_parallel_size
    heads, kv = model.num_attention_heads or 1, model.kv_heads
    if heads % kv:
        return  # the model's own rules tell that
    over = f"--tensor-model-parallel-size {tp}" + (f" x --ds-sequence-parallel-size {ulysses}" if ulysses > 1 else "")
    expected = f"heads divisible by {'tp x the Ulysses size' if ulysses > 1 else 'tp'}"
    if heads % (tp * ulysses):
        yield ConfigError(
            "--num-attention-heads", f"{heads} heads over {over}", expected, either(ways.layouts, fitting_heads(config))
        )
    elif kv % (tp * ulysses):
        flag = kv_flag(config)
        multiples = [d for d in divisors(heads) if d % (tp * ulysses) == 0]
        yield ConfigError(
            flag,
            f"{kv} key/value heads over {over}",
            expected,
            either(ways.layouts, f"{flag} {nearest(multiples, kv)}"),
        )


def kv_flag(config: Config) -> str:
    """The flag that says how many key/value heads there are."""
    return "--num-query-groups" if config.model.group_query_attention else "--num-key-value-heads"


def fitting_heads(config: Config) -> str:
    """The number of query heads nearest to the one given that hidden size, layout, key/value heads and rope allow."""
    model, hidden, wanted = config.model, config.model.hidden_size or 1, config.model.num_attention_heads or 1
    unit = config.parallel.tensor_model_parallel_size * config.parallel.ds_sequence_parallel_size
    free = model.kv_channels is not None
    candidates = range(unit, max(hidden, 2 * wanted) + 1, unit) if free else divisors(hidden)
    shareable = (heads for heads in candidates if heads % unit == 0)
    for heads in sorted(shareable, key=lambda heads: (abs(heads - wanted), heads)):
        other = dataclasses.replace(model, num_attention_heads=heads)
        shared = heads % other.kv_heads == 0 and other.kv_heads % unit == 0
        if shared and not (model.uses_rope and other.rotated % 2):
            return f"--num-attention-heads {heads}"
    return ""


def check_mlp(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """The MLP is split over tp."""
    tp, ffn = config.parallel.tensor_model_parallel_size, config.model.ffn_size
    if ffn % tp:
        yield ConfigError(
            "--ffn-hidden-size",
            f"{ffn} over --tensor-model-parallel-size {tp}",
            "a positive multiple of tp",
            either(ways.layouts, f"--ffn-hidden-size {-(-ffn // tp) * tp}"),
        )


def check_sequence(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """One way to share sequences, and lengths that come out even."""
    parallel, seq = config.parallel, config.data.seq_length or 1
    ring, ulysses = parallel.context_parallel_size, parallel.ds_sequence_parallel_size
    tp, cut_by_tp = parallel.tensor_model_parallel_size, parallel.sequence_parallel
    if ring > 1 and ulysses > 1:
        yield ConfigError(
            "--context-parallel-size and --ds-sequence-parallel-size",
            f"{ring} and {ulysses}",
            "one way of sharing a sequence",
            either(ways.layouts, "leave one of them out"),
        )
        return
    if ulysses > 1 and cut_by_tp and tp > 1:
        yield ConfigError(
            "--ds-sequence-parallel-size and --sequence-parallel",
            f"both, with --tensor-model-parallel-size {tp}",
            "one of them: both cut the activations between the layers",
            either(ways.layouts, "leave one of them out"),
        )
    unit = 2 * ring if ring > 1 else ulysses
    if seq % unit:
        yield ConfigError(
            "--seq-length",
            f"{seq} positions with {context_flag(parallel)} {parallel.context_size}",
            f"a multiple of {unit}" + (": every rank holds one piece of each half" if ring > 1 else ""),
            either(ways.layouts, f"--seq-length {nearest_multiple(_even_length(config), seq)}"),
        )
    elif tp > 1 and cut_by_tp and seq // parallel.context_size % tp:
        yield ConfigError(
            "--sequence-parallel",
            f"{seq // parallel.context_size} positions on a rank, with --tensor-model-parallel-size {tp}",
            "positions divisible by tp",
            either(ways.layouts, f"--seq-length {nearest_multiple(_even_length(config), seq)}"),
        )


def _even_length(config: Config) -> int:
    """The sequence length of which every multiple can be shared."""
    parallel = config.parallel
    by_tp = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    ring = parallel.context_parallel_size
    if ring == 1:
        return parallel.ds_sequence_parallel_size * by_tp
    return ring * (by_tp if by_tp % 2 == 0 else 2 * by_tp)


def check_virtual(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """Virtual stages go with the interleaved schedule, with stages to interleave, and by one number."""
    parallel, layers = config.parallel, config.model.total_layers
    pp, named = parallel.pipeline_model_parallel_size, parallel.pipeline_schedule
    per_chunk, per_rank = parallel.num_layers_per_virtual_pipeline_stage, parallel.num_virtual_stages_per_pipeline_rank
    virtual = f"--num-virtual-stages-per-pipeline-rank {per_rank}"
    if per_chunk:
        virtual = f"--num-layers-per-virtual-pipeline-stage {per_chunk}"
    interleaves = bool(per_chunk) or (per_rank or 1) > 1
    if interleaves and (parallel.enable_zbh1_pipeline or named in ("1f1b", "gpipe", "zbh1")):
        other = "--enable-zbh1-pipeline" if parallel.enable_zbh1_pipeline else f"--pipeline-schedule {named}"
        yield ConfigError(
            virtual.split()[0],
            f"{other} beside it",
            "--pipeline-schedule interleaved, or none",
            either(ways.layouts, f"leave {other} out"),
        )
    elif named == "interleaved" and not interleaves:
        yield ConfigError(
            "--pipeline-schedule interleaved",
            "one virtual stage on every rank, which is 1f1b",
            "several virtual stages",
            either(ways.layouts, "--pipeline-schedule 1f1b"),
        )
    elif interleaves and pp == 1:
        yield ConfigError(
            virtual.split()[0],
            "--pipeline-model-parallel-size 1",
            "pipeline stages to interleave",
            either(ways.layouts, f"leave {virtual.split()[0]} out"),
        )
    if per_chunk and per_rank and per_chunk * per_rank * pp != layers:
        yield ConfigError(
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank",
            f"{per_chunk} layers x {per_rank} virtual stages x {plural(pp, 'stage')}, with {layers} layers",
            "two ways of saying the same",
            either(ways.layouts, "leave one of them out"),
        )


def check_layers(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """Every stage and virtual stage holds a layer, and the same number unless the flags say otherwise."""
    if config.model.model_type == "T5":
        return  # its two stacks have a rule of their own
    parallel, layers = config.parallel, config.model.total_layers
    pp, per_chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    chunks = parallel.num_virtual_stages_per_pipeline_rank or 1
    unit, share = pp * (per_chunk or chunks), ""
    if per_chunk:
        share = f" with --num-layers-per-virtual-pipeline-stage {per_chunk}"
    elif chunks > 1:
        share = f" with {chunks} virtual stages each"
    uneven = uneven_flags(parallel)
    if uneven and share:
        yield ConfigError(
            ", ".join(uneven),
            f"{pp} stages{share}",
            "equal shares with virtual stages",
            either(ways.layouts, f"leave {', '.join(uneven)} out"),
        )
    elif layers < pp or (not uneven and layers % unit):
        free = not share and not uneven and layers > pp
        yield ConfigError(
            "--num-layers",
            f"{layers} layers over --pipeline-model-parallel-size {pp}{share}",
            f"layers divisible by {unit}" if share else "layers divisible by pp, at least one on every stage",
            either(
                ways.layouts,
                "--pp-partition-method type:transformer" if free else "",
                f"--num-layers {-(-layers // unit) * unit}",
            ),
        )
    elif uneven and parallel.pp_partition_method is None:
        yield from _end_errors(config, ways, uneven)


def uneven_flags(parallel: ParallelConfig) -> list[str]:
    """The flags given by which stages hold different numbers of layers."""
    flags = {
        "--decoder-first-pipeline-num-layers": parallel.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": parallel.decoder_last_pipeline_num_layers,
        "--pp-partition-method": parallel.pp_partition_method,
    }
    return [flag for flag, value in flags.items() if value is not None]


def _end_errors(config: Config, ways: Ways, flags: list[str]) -> Iterator[ConfigError]:
    """What the ends leave is shared evenly by the stages between them."""
    parallel, layers, pp = config.parallel, config.model.total_layers, config.parallel.pipeline_model_parallel_size
    ends = (parallel.decoder_first_pipeline_num_layers or 0) + (parallel.decoder_last_pipeline_num_layers or 0)
    between, left = pp - len(flags), layers - ends
    if pp > 1 and (left == 0 if between == 0 else left >= between and left % between == 0):
        return
    yield ConfigError(
        ", ".join(flags),
        f"{plural(layers, 'layer')}, {ends} of them at the ends of {plural(pp, 'stage')}",
        "a rest that the other stages share evenly, at least one each",
        either(ways.layouts, f"leave {' and '.join(flags)} out for --pp-partition-method type:transformer"),
    )


def check_pipeline_names(config: Config) -> Iterator[ConfigError]:
    """One schedule under all its names, one way to cut the layers."""
    parallel, method = config.parallel, config.parallel.pp_partition_method
    named, uneven = parallel.pipeline_schedule, uneven_flags(config.parallel)
    if parallel.enable_zbh1_pipeline and named not in (None, "zbh1"):
        yield ConfigError(
            "--enable-zbh1-pipeline", f"--pipeline-schedule {named} beside it", "one schedule", "leave one of them out"
        )
    if method is None:
        return
    if len(uneven) > 1:
        yield ConfigError(
            "--pp-partition-method", f"{uneven[0]} beside it", "one way to cut", "leave --pp-partition-method out"
        )
    try:
        weights(method)
    except ConfigError as error:
        yield error

"""Rules of the model: what each of GPT, BERT and T5 can be, and what it leaves no other flag to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

from megatron_ds.cli import flags_of
from megatron_ds.config import GROUPS, Config
from megatron_ds.errors import ConfigError
from megatron_ds.model.config import TransformerConfig
from megatron_ds.rules_layout import context_flag, kv_flag
from megatron_ds.ways import Ways, either, nearest, nearest_multiple, plural

READERS: Mapping[str, tuple[str, ...]] = {
    "model.encoder_num_layers": ("T5",),
    "model.decoder_num_layers": ("T5",),
    "model.window_size": ("GPT",),
    "model.apply_residual_connection_post_layernorm": ("GPT", "BERT"),
    "model.use_parallel_residual": ("GPT",),
    "model.qk_layernorm": ("GPT", "BERT"),
    "model.lm_head_bias": ("BERT", "T5"),
    "model.scale_decoder_outputs": ("T5",),
    "model.bert_binary_head": ("BERT",),
    "parallel.pipeline_model_parallel_split_rank": ("T5",),
    "parallel.decoder_first_pipeline_num_layers": ("GPT", "BERT"),
    "parallel.decoder_last_pipeline_num_layers": ("GPT", "BERT"),
    "parallel.pp_partition_method": ("GPT", "BERT"),
    "data.decoder_seq_length": ("T5",),
    "data.mask_prob": ("BERT", "T5"),
    "data.short_seq_prob": ("BERT", "T5"),
    "data.noise_density": ("T5",),
    "data.mean_noise_span_length": ("T5",),
    "data.eod_mask_loss": ("GPT",),
    "data.reset_position_ids": ("GPT",),
    "data.reset_attention_mask": ("GPT",),
}
"""Which models read a flag, where not all do; the others refuse it."""

POSITIONS: Mapping[str, tuple[str, ...]] = {
    "GPT": ("learned_absolute", "rope", "alibi", "none"),
    "BERT": ("learned_absolute", "rope"),
    "T5": ("learned_absolute", "relative", "rope"),
}


def check_readers(config: Config) -> Iterator[ConfigError]:
    """Nothing is asked that this model does not read."""
    kind = config.model.model_type
    for name, readers in READERS.items():
        group, field = name.split(".")
        flag = next(flag for flag in flags_of(GROUPS[group]) if flag.field == field)
        if kind not in readers and config.value(name) != flag.default:
            yield ConfigError(
                flag.names[0], f"a {kind} model", f"{' or '.join(readers)}: no other reads it", "leave it out"
            )


def check_variants(config: Config) -> Iterator[ConfigError]:
    """Parts of the model that exclude each other."""
    model = config.model
    gated = f"--glu-activation {model.glu_activation}"
    asked = {
        "--swiglu": model.swiglu,
        gated: model.glu_activation is not None,
        "--relu": model.relu,
        "--squared-relu": model.squared_relu,
        "--openai-gelu": model.openai_gelu and model.glu_activation != "geglu",
    }
    activations = [flag for flag, given in asked.items() if given]
    if len(activations) > 1:
        yield ConfigError(" and ".join(activations), "both", "one activation", f"only {activations[0]}")
    if model.use_parallel_residual and model.apply_residual_connection_post_layernorm:
        yield ConfigError(
            "--use-parallel-residual and --apply-residual-connection-post-layernorm",
            "both",
            "one of them: side by side there is no single norm to leave after",
            "leave --apply-residual-connection-post-layernorm out",
        )
    if model.scale_decoder_outputs and model.untie_embeddings_and_output_weights:
        yield ConfigError(
            "--scale-decoder-outputs",
            "--untie-embeddings-and-output-weights beside it",
            "a tied head, which is what it scales for",
            "leave --scale-decoder-outputs out",
        )
    if model.model_type == "T5" and model.num_attention_heads and model.kv_heads != model.num_attention_heads:
        yield ConfigError(
            kv_flag(config),
            f"{model.kv_heads} key/value heads for {model.num_attention_heads} query heads",
            "as many in T5, whose decoder reads the encoder with all heads",
            "leave it out",
        )


def check_positions(config: Config) -> Iterator[ConfigError]:
    """Positions that this model knows, a table that holds all of them, and nothing said about others."""
    model, kinds = config.model, POSITIONS[config.model.model_type]
    if model.positions not in kinds:
        what = f"{model.positions}, in a {model.model_type} model"
        fix = f"--position-embedding-type {kinds[1]}"
        yield ConfigError("--position-embedding-type", what, f"one of {', '.join(kinds)}", fix)
        return
    lengths = {"--seq-length": config.data.seq_length or 1, "--decoder-seq-length": config.data.decoder_seq_length or 1}
    longest = max(lengths, key=lambda flag: lengths[flag])
    if model.positions == "learned_absolute" and (model.max_position_embeddings or lengths[longest]) < lengths[longest]:
        yield ConfigError(
            "--max-position-embeddings",
            f"{model.max_position_embeddings}, with {longest} {lengths[longest]}",
            "at least the sequence length",
            f"--max-position-embeddings {lengths[longest]}",
        )
    if model.positions == "learned_absolute" and config.compat.no_position_embedding:
        yield ConfigError(
            "--no-position-embedding",
            "learned positions",
            "another --position-embedding-type",
            f"--position-embedding-type {kinds[1]}",
        )
    yield from _rope_errors(config)
    yield from _bucket_errors(config)


def _rope_errors(config: Config) -> Iterator[ConfigError]:
    """Rope is stretched in one way, and only where it is."""
    model = config.model
    stretches = {
        "--rotary-seq-len-interpolation-factor": model.rotary_seq_len_interpolation_factor is not None,
        "--use-rope-scaling": model.use_rope_scaling,
    }
    for flag in (flag for flag, given in stretches.items() if given and not model.uses_rope):
        yield ConfigError(flag, f"positions by {model.positions}", "rope", f"leave {flag} out")
    if model.uses_rope and all(stretches.values()):
        yield ConfigError(" and ".join(stretches), "both", "one way to stretch rope", "leave --use-rope-scaling out")
    low, high = model.rope_scaling_low_freq_factor, model.rope_scaling_high_freq_factor
    if model.use_rope_scaling and low >= high:
        yield ConfigError(
            "--rope-scaling-low-freq-factor",
            f"{low:g}, with --rope-scaling-high-freq-factor {high:g}",
            "less than the other",
            f"--rope-scaling-low-freq-factor {high / 4:g}",
        )
    for name in [] if model.use_rope_scaling else _changed(model, "rope_scaling_"):
        yield ConfigError(name, "no --use-rope-scaling", "the scaling that it is about", f"leave {name} out")


def _changed(model: TransformerConfig, prefix: str) -> list[str]:
    """The flags of fields with this prefix that do not have their default."""
    flags = [flag for flag in flags_of(TransformerConfig) if flag.field.startswith(prefix)]
    return [flag.names[0] for flag in flags if getattr(model, flag.field) != flag.default]


def _bucket_errors(config: Config) -> Iterator[ConfigError]:
    """Half of the buckets tell the direction, half of those single distances, and the rest needs room."""
    model, flag = config.model, "--relative-attention-num-buckets"
    buckets, farthest = model.relative_attention_num_buckets, model.relative_attention_max_distance
    if model.positions != "relative":
        for name in _changed(model, "relative_attention_"):
            found = f"positions by {model.positions}"
            yield ConfigError(name, found, "--position-embedding-type relative", f"leave {name} out")
    elif buckets < 4 or buckets % 2:
        yield ConfigError(flag, str(buckets), "an even number, at least 4", f"{flag} {max(4, buckets + buckets % 2)}")
    elif farthest <= buckets // 2:
        yield ConfigError(
            "--relative-attention-max-distance",
            f"{farthest}, with {buckets} buckets",
            "more than half of the buckets",
            f"--relative-attention-max-distance {4 * buckets}",
        )


def check_masking(config: Config) -> Iterator[ConfigError]:
    """One way to choose what is masked."""
    data = config.data
    spans = {"--noise-density": data.noise_density, "--mean-noise-span-length": data.mean_noise_span_length}
    given = [flag for flag, value in spans.items() if value is not None]
    for flag in flags_of(GROUPS["data"]):
        unread = flag.field in ("mask_prob", "short_seq_prob") and config.value(f"data.{flag.field}") != flag.default
        if given and unread:
            yield ConfigError(
                flag.names[0],
                f"{' and '.join(given)} beside it",
                "one of them: spans as in T5's paper fill whole samples, and count by --noise-density",
                f"leave {flag.names[0]} out",
            )


def check_stack_names(config: Config) -> Iterator[ConfigError]:
    """T5's encoder has its layers from one flag."""
    model = config.model
    if model.model_type == "T5" and model.num_layers and model.encoder_num_layers:
        yield ConfigError(
            "--num-layers and --encoder-num-layers",
            f"{model.num_layers} and {model.encoder_num_layers}",
            "one of them",
            "leave --num-layers out",
        )


def check_stacks(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """T5: every stage and virtual stage holds a layer, and of its own stack where a stage is named to split at."""
    model, parallel = config.model, config.parallel
    if model.model_type != "T5":
        return
    pp, split = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_split_rank
    flag, encoder, decoder = "--pipeline-model-parallel-split-rank", model.encoder_layers, model.decoder_layers
    if split is None:
        yield from _total_errors(config, ways)
    elif not 0 < split < pp:
        yield ConfigError(
            flag,
            f"{split}, with --pipeline-model-parallel-size {pp}",
            f"1 to {pp - 1}: stages of the encoder, then of the decoder" if pp > 1 else "several stages",
            either(ways.layouts, f"leave {flag} out"),
        )
    elif parallel.num_layers_per_virtual_pipeline_stage or (parallel.num_virtual_stages_per_pipeline_rank or 1) > 1:
        yield ConfigError(
            flag,
            f"{split}, with virtual stages",
            "one of them: with virtual stages every rank holds layers of both stacks",
            either(ways.layouts, f"leave {flag} out"),
        )
    elif encoder < split or decoder < pp - split:
        possible = range(max(1, pp - decoder), min(pp - 1, encoder) + 1)
        yield ConfigError(
            flag,
            f"{plural(encoder, 'layer')} on {plural(split, 'stage')} of the encoder, "
            f"{plural(decoder, 'layer')} on {plural(pp - split, 'stage')} of the decoder",
            "a layer for every stage",
            either(ways.layouts, f"{flag} {nearest(possible, split)}" if possible else ""),
        )


def _total_errors(config: Config, ways: Ways) -> Iterator[ConfigError]:
    """Both stacks together are cut anywhere, in as many parts as there are virtual stages."""
    model, parallel = config.model, config.parallel
    pp, per_chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    chunks = parallel.num_virtual_stages_per_pipeline_rank or 1

    def fits(layers: int) -> bool:
        return layers % (pp * per_chunk) == 0 if per_chunk else layers >= pp * chunks

    if fits(model.total_layers):
        return
    flag = "--encoder-num-layers" if model.encoder_num_layers else "--num-layers"
    enough = next(n for n in count(model.encoder_layers) if fits(n + (model.decoder_num_layers or n)))
    share = f" with {chunks} virtual stages each" if chunks > 1 else ""
    if per_chunk:
        share = f" with --num-layers-per-virtual-pipeline-stage {per_chunk}"
    yield ConfigError(
        flag,
        f"{model.encoder_layers} + {model.decoder_layers} layers over --pipeline-model-parallel-size {pp}{share}",
        f"layers of both stacks divisible by {pp * per_chunk}" if per_chunk else "a layer for every stage",
        either(ways.layouts, f"{flag} {enough}"),
    )


def check_decoder_sequence(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """T5: the decoder's positions come out even as the encoder's do."""
    parallel, length = config.parallel, config.data.decoder_seq_length or 0
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and length % tp:
        yield ConfigError(
            "--sequence-parallel",
            f"{length} positions of the decoder, with --tensor-model-parallel-size {tp}",
            "decoder positions divisible by tp",
            either(ways.layouts, f"--decoder-seq-length {nearest_multiple(tp, length)}"),
        )


def check_context(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """Sequences are shared only where attention can be."""
    parallel = config.parallel
    if config.model.model_type == "T5":
        if parallel.context_size > 1:
            flag = context_flag(parallel)
            yield ConfigError(
                flag,
                f"{parallel.context_size}, in a T5 model, which has two sequences",
                "1; --tensor-model-parallel-size with --sequence-parallel shares activations too",
                either(ways.layouts, f"leave {flag} out"),
            )
    elif parallel.context_parallel_size > 1 and beyond_the_ring(config):
        yield ConfigError(
            "--context-parallel-size",
            f"{parallel.context_parallel_size}, with {', '.join(beyond_the_ring(config))}",
            "causal attention to all tokens before, the only kind that the ring computes; "
            "--ds-sequence-parallel-size shares sequences of every kind",
            either(ways.layouts, "leave --context-parallel-size out"),
        )


def beyond_the_ring(config: Config) -> list[str]:
    """What a ring of keys and values cannot compute of this model."""
    model = config.model
    asked = {
        f"a {model.model_type} model": model.model_type != "GPT",
        "--position-embedding-type alibi": model.positions == "alibi",
        "--window-size": model.window_size is not None,
        "--softmax-scale": model.softmax_scale is not None,
        "--reset-attention-mask": config.data.reset_attention_mask,
    }
    return [what for what, given in asked.items() if given]

"""Which layers each pipeline stage holds: equal shares, given ends, or shares of equal weight."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import NamedTuple

from megatron_ds.errors import ConfigError
from megatron_ds.model.chunk import Lengths, Stage
from megatron_ds.model.config import TransformerConfig

EMBEDDING, LAYER, NORM, HEAD = (
    "EmbeddingPipe",
    "ParallelTransformerLayerPipe",
    "LayerNorm RMSNorm",
    "EmbeddingPipe LMHead",
)
"""What `type:REGEX` looks at. A head bears the embedding's name too: it is a table of the same size, often the same."""

METHODS = "uniform, parameters, or type:REGEX such as type:transformer|embedding"


class Weights(NamedTuple):
    """What parts of the model weigh when it is cut: the embedding, one layer, all that follows the last layer."""

    embedding: int
    layer: int
    head: int


def cut_layers(
    num_layers: int,
    num_stages: int,
    num_chunks: int = 1,
    *,
    first: int | None = None,
    last: int | None = None,
    method: str | None = None,
    parameters: Weights | None = None,
) -> tuple[tuple[Stage, ...], ...]:
    """The chunks of each stage, for flags that passed the rules; virtual stage chunk * num_stages + stage.

    parameters: what the parts weigh with the method of that name.
    """
    if method is not None:
        counts = balance(num_layers, num_stages * num_chunks, weights(method, parameters))
    elif first is not None or last is not None:
        counts = _ends(num_layers, num_stages, first, last)
    else:
        counts = [num_layers // (num_stages * num_chunks)] * (num_stages * num_chunks)
    assert sum(counts) == num_layers
    return _deal(counts, num_stages)


def cut_two_stacks(
    model: TransformerConfig,
    lengths: Lengths,
    num_stages: int,
    num_chunks: int = 1,
    *,
    split: int | None = None,
    of_chunk: int | None = None,
) -> tuple[tuple[Stage, ...], ...]:
    """The chunks of each stage of an encoder and a decoder, one stack after the other.

    split: the first stage of the decoder; both sides are then shared evenly. of_chunk: layers of every chunk. Otherwise
    chunks do about equal work.
    """
    if of_chunk is not None:
        return _deal([of_chunk] * (num_stages * num_chunks), num_stages)
    work = _work(model, lengths)
    if split is None:
        return _deal(share_work(work, num_stages * num_chunks), num_stages)
    before = model.encoder_layers
    return _deal(share_work(work[:before], split) + share_work(work[before:], num_stages - split), num_stages)


def _deal(counts: list[int], num_stages: int) -> tuple[tuple[Stage, ...], ...]:
    """Chunks of so many layers, dealt out to the stages in turn."""
    stops = list(accumulate(counts))
    cut = [
        Stage(stop - count, stop, is_first=number == 0, is_last=number == len(counts) - 1)
        for number, (count, stop) in enumerate(zip(counts, stops, strict=True))
    ]
    return tuple(tuple(cut[stage::num_stages]) for stage in range(num_stages))


def _work(model: TransformerConfig, lengths: Lengths) -> list[int]:
    """What each layer multiplies per sample: its parameters, each as often as there are positions."""
    assert model.hidden_size
    # Of two of its four matrices.
    attention = 2 * model.hidden_size * model.head_size * (model.num_attention_heads or 1)
    mlp = model.hidden_size * model.ffn_size * (3 if model.gated else 2)
    encoder = lengths.tokens * (2 * attention + mlp)
    decoder = lengths.decoder * (3 * attention + mlp) + lengths.tokens * attention
    return [encoder] * model.encoder_layers + [decoder] * model.decoder_layers


def share_work(work: list[int], parts: int) -> list[int]:
    """Layers of each part, at least one, in order, so that the heaviest part is as light as can be."""
    low, high = max(work), sum(work)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(work, parts, middle)) <= parts else (middle + 1, high)
    return _fill(work, parts, low)


def _fill(work: list[int], parts: int, most: int) -> list[int]:
    """Layers of each part if none may do more than `most`; no part takes what later ones need at least."""
    counts, load = [0], 0
    for number, one in enumerate(work):
        left = len(work) - number
        if counts[-1] and (load + one > most or left <= parts - len(counts)):
            counts.append(0)
            load = 0
        counts[-1] += 1
        load += one
    return counts


def balance(num_layers: int, num_stages: int, weights: Weights) -> list[int]:
    """Layers of each stage, at least one, so that the heaviest stage is as light as can be, the others alike.

    Layers weigh the same, so giving each to the stage that is lightest by then does both.
    """
    counts = [1] * num_stages
    loads = [weights.layer] * num_stages
    loads[0] += weights.embedding
    loads[-1] += weights.head
    for _ in range(num_layers - num_stages):
        lightest = min(range(num_stages), key=lambda stage: (loads[stage], counts[stage], stage))
        counts[lightest] += 1
        loads[lightest] += weights.layer
    return counts


def _ends(num_layers: int, num_stages: int, first: int | None, last: int | None) -> list[int]:
    """Given ends, equal shares between them."""
    between = num_stages - (first is not None) - (last is not None)
    share = (num_layers - (first or 0) - (last or 0)) // max(1, between)
    head = [] if first is None else [first]
    return head + [share] * between + ([] if last is None else [last])


def weights(method: str, parameters: Weights | None = None) -> Weights:
    """What a --pp-partition-method counts.

    Raises: ConfigError for an unknown method, or a pattern that is none or fits nothing
    """
    if method.lower() == "uniform":
        return Weights(0, 1, 0)
    if method.lower() == "parameters":
        return parameters or Weights(0, 1, 0)
    kind, colon, pattern = method.partition(":")
    if kind.lower() != "type" or not colon:
        raise _method_error(method)
    try:
        counted = [int(re.search(pattern, name, re.IGNORECASE) is not None) for name in (EMBEDDING, LAYER, NORM, HEAD)]
    except re.error:
        raise _method_error(f"{method}, which is no regular expression") from None
    if not any(counted):
        raise _method_error(f"{method}, which fits no part of the model")
    return Weights(counted[0], counted[1], counted[2] + counted[3])


def _method_error(found: str) -> ConfigError:
    return ConfigError("--pp-partition-method", found, METHODS, "--pp-partition-method type:transformer")


def parameter_weights(model: TransformerConfig, padded_vocab: int, positions: int) -> Weights:
    """Parameters of the parts; a tied table counts at both ends, for both hold it."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    assert hidden and heads
    bias, qkv_bias = int(model.add_bias_linear), int(model.add_bias_linear or model.add_qkv_bias)
    norm = hidden * (2 if model.normalization == "LayerNorm" else 1)
    queries, qkv = heads * model.head_size, (heads + 2 * model.kv_heads) * model.head_size
    attention = (hidden + qkv_bias) * qkv + (queries + bias) * hidden
    up = model.ffn_size * (2 if model.gated else 1)
    mlp = (hidden + bias) * up + (model.ffn_size + bias) * hidden
    table = padded_vocab * hidden
    learned = positions * hidden if model.positions == "learned_absolute" else 0
    return Weights(table + learned, attention + mlp + 2 * norm, norm + table)

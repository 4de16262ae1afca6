"""The oracle of T5: Megatron's (learned positions, biases) and the published one (relative bias, RMSNorm, no biases).

Shapes: as in transformer.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tests.reference import training
from tests.reference.training import Trained
from tests.reference.transformer import (
    TransformerConfig,
    attend,
    by_head,
    causal,
    draw,
    linear,
    linear_shapes,
    mlp,
    mlp_shapes,
    norm,
    norm_shapes,
    queries_keys_values,
    self_attention_shapes,
    token_losses,
    under,
)

WORDS = "embedding.word_embeddings.weight"


@dataclass(frozen=True, kw_only=True)
class T5Config(TransformerConfig):
    """What defines the function."""

    encoder_layers: int
    decoder_layers: int
    positions: Literal["learned", "relative"] = "learned"
    """One learned table for both stacks, or a bias per distance and head on the scores of each stack."""
    buckets: int = 32
    max_distance: int = 128
    head_bias: bool = True
    scaled_output: bool = False
    """The last hidden state times h^-0.5 before the head."""
    lengths: tuple[int, int] = (32, 32)
    """Tokens of the encoder and of the decoder that it is trained on; no part of the function."""


class GlobalBatch(NamedTuple):
    """Shapes: encoder [global batch, s], decoder, labels and mask [global batch, t]; real: False at padding"""

    encoder_tokens: Tensor
    decoder_tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    real: Tensor


def parameter_shapes(c: T5Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model with its global shape, in the order of the forward pass."""
    h, width = c.hidden, c.heads * c.d
    shapes: dict[str, tuple[int, ...]] = {WORDS: (c.vocab, h)}
    if c.positions == "learned":
        shapes["embedding.position_embeddings.weight"] = (c.max_positions, h)
    else:
        shapes |= {f"embedding.{stack}_bias.weight": (c.buckets, c.heads) for stack in ("encoder", "decoder")}
    for stack, layers in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        for i in range(layers):
            at = f"{stack}.layers.{i}."
            shapes |= norm_shapes(at + "input_layernorm", c)
            shapes |= self_attention_shapes(at + "self_attention", c)
            if stack == "decoder":
                shapes |= norm_shapes(at + "pre_cross_attn_layernorm", c)
                shapes |= linear_shapes(at + "cross_attention.linear_q", width, h, c.qkv_bias)
                shapes |= linear_shapes(at + "cross_attention.linear_kv", 2 * width, h, c.qkv_bias)
                shapes |= linear_shapes(at + "cross_attention.linear_proj", h, width, c.bias)
            shapes |= norm_shapes(at + "pre_mlp_layernorm", c)
            shapes |= mlp_shapes(at + "mlp", c)
        shapes |= norm_shapes(f"{stack}.final_layernorm", c)
    if c.head_bias:
        shapes["lm_head.bias"] = (c.vocab,)
    return shapes if c.tied else shapes | {"output_layer.weight": (c.vocab, h)}


def random_params(
    c: T5Config, seed: int = 0, std: float = 0.1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Parameters that all have an influence."""
    return draw(parameter_shapes(c), c, seed, std, dtype)


def forward(
    params: Mapping[str, Tensor], c: T5Config, encoder_tokens: Tensor, decoder_tokens: Tensor, real: Tensor
) -> Tensor:
    """Logits of every decoder position; `real` says which encoder tokens are no padding.

    Shapes: [b, s], [b, t], [b, s] -> [b, t, v]
    """
    seen = real[:, None, None, :]
    x = embed(params, c, encoder_tokens)
    bias = relative_bias(params, c, "encoder", x.shape[1])
    for i in range(c.encoder_layers):
        p = under(params, f"encoder.layers.{i}.")
        x = x + self_attention(p, c, norm(p, "input_layernorm", c, x), seen, bias)
        x = x + mlp(p, c, norm(p, "pre_mlp_layernorm", c, x))
    memory = norm(params, "encoder.final_layernorm", c, x)

    y = embed(params, c, decoder_tokens)
    bias = relative_bias(params, c, "decoder", y.shape[1])
    for i in range(c.decoder_layers):
        p = under(params, f"decoder.layers.{i}.")
        y = y + self_attention(p, c, norm(p, "input_layernorm", c, y), causal(y.shape[1]), bias)
        y = y + cross_attention(p, c, norm(p, "pre_cross_attn_layernorm", c, y), memory, seen)
        y = y + mlp(p, c, norm(p, "pre_mlp_layernorm", c, y))
    y = norm(params, "decoder.final_layernorm", c, y)
    if c.scaled_output:
        y = y * c.hidden**-0.5
    logits = y @ params[WORDS if c.tied else "output_layer.weight"].T
    return logits + params["lm_head.bias"] if c.head_bias else logits


def embed(params: Mapping[str, Tensor], c: T5Config, tokens: Tensor) -> Tensor:
    """Shapes: [b, s] -> [b, s, h]"""
    x = params[WORDS][tokens]
    return x + params["embedding.position_embeddings.weight"][: tokens.shape[1]] if c.positions == "learned" else x


def self_attention(p: Mapping[str, Tensor], c: T5Config, x: Tensor, allowed: Tensor, bias: Tensor | float) -> Tensor:
    """Without rope: a position is in the embedding, or in the bias."""
    mixed = attend(c, *queries_keys_values(p, c, x), allowed, bias)
    return linear(p, "self_attention.linear_proj", c.bias, mixed)


def cross_attention(p: Mapping[str, Tensor], c: T5Config, y: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
    """Queries of the decoder, keys and values of the encoder."""
    q = by_head(linear(p, "cross_attention.linear_q", c.qkv_bias, y), c.d)
    k, v = linear(p, "cross_attention.linear_kv", c.qkv_bias, memory).chunk(2, dim=-1)
    mixed = attend(c, q, by_head(k, c.d), by_head(v, c.d), seen)
    return linear(p, "cross_attention.linear_proj", c.bias, mixed)


def relative_bias(params: Mapping[str, Tensor], c: T5Config, stack: str, s: int) -> Tensor | float:
    """The stack's table at the bucket of each distance.

    Shapes: -> [a, query, key]
    """
    if c.positions == "learned":
        return 0.0
    buckets = [[bucket(key - query, stack == "encoder", c) for key in range(s)] for query in range(s)]
    return params[f"embedding.{stack}_bias.weight"][torch.tensor(buckets)].permute(2, 0, 1)


def bucket(offset: int, both_ways: bool, c: T5Config) -> int:
    """Half of the buckets hold one distance each; bucket e + j holds those up from e * (max / e)^(j / (n - e)).

    In whole numbers, so that no logarithm can round a distance into its neighbour's bucket.
    """
    n = c.buckets // 2 if both_ways else c.buckets
    first = n if both_ways and offset > 0 else 0
    distance, e = abs(offset) if both_ways else max(-offset, 0), n // 2
    if distance < e:
        return first + distance
    j = sum(distance ** (n - e) * e**i >= c.max_distance**i * e ** (n - e) for i in range(1, n - e))
    return first + e + j


def loss(params: Mapping[str, Tensor], c: T5Config, *batch: Tensor) -> Tensor:
    """Mean loss over the decoder's targets."""
    goal = objective(c)
    return (goal.sums(params, *batch) / goal.counts(*batch)).sum()


def objective(c: T5Config) -> training.Objective:
    """One loss: over the decoder's targets."""

    def sums(params: Mapping[str, Tensor], *part: Tensor) -> Tensor:
        batch = GlobalBatch(*part)
        logits = forward(params, c, batch.encoder_tokens, batch.decoder_tokens, batch.real)
        return (token_losses(logits, batch.labels) * batch.loss_mask).sum()[None]

    return training.Objective(sums, lambda *part: GlobalBatch(*part).loss_mask.sum()[None])


def train(
    params: Mapping[str, Tensor], c: T5Config, global_batches: Sequence[GlobalBatch], **optimizer: Any
) -> Trained:
    """See training.train."""
    return training.train(params, objective(c), global_batches, **optimizer)

"""The oracle of GPT and its kin: a decoder-only transformer and its loss.

Shapes: as in transformer.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tests.reference import training
from tests.reference.training import GlobalBatch, Trained
from tests.reference.transformer import (
    TransformerConfig,
    attend,
    causal,
    draw,
    linear,
    mlp,
    mlp_shapes,
    norm,
    norm_shapes,
    queries_keys_values,
    self_attention_shapes,
    token_losses,
    under,
)


@dataclass(frozen=True)
class Llama3Scaling:
    """Rope of Llama 3.1: wavelengths longer than the original context are stretched, the short ones stay."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True, kw_only=True)
class OracleConfig(TransformerConfig):
    """What defines the function; the defaults are GPT-2's style."""

    num_layers: int
    positions: Literal["learned", "rope", "alibi"] = "learned"
    rotary_percent: float = 1.0
    rotary_base: float = 10000.0
    rope_interpolation: float = 1.0
    """Positions are divided by it."""
    llama3: Llama3Scaling | None = None
    parallel_residual: bool = False
    window: int | None = None
    """Tokens seen to the left of the own one."""
    qk_norm: bool = False
    embed_norm: bool = False


def parameter_shapes(c: OracleConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model with its global shape, in the order of the forward pass."""
    h = c.hidden
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (c.vocab, h)}
    if c.positions == "learned":
        shapes["embedding.position_embeddings.weight"] = (c.max_positions, h)
    if c.embed_norm:
        shapes |= norm_shapes("embedding.norm", c)
    for i in range(c.num_layers):
        at = f"layers.{i}."
        shapes |= norm_shapes(at + "input_layernorm", c)
        shapes |= self_attention_shapes(at + "self_attention", c)
        if c.qk_norm:
            shapes |= norm_shapes(at + "self_attention.q_layernorm", c, c.d)
            shapes |= norm_shapes(at + "self_attention.k_layernorm", c, c.d)
        shapes |= norm_shapes(at + "pre_mlp_layernorm", c)
        shapes |= mlp_shapes(at + "mlp", c)
    shapes |= norm_shapes("final_layernorm", c)
    return shapes if c.tied else shapes | {"output_layer.weight": (c.vocab, h)}


def random_params(
    c: OracleConfig, seed: int = 0, std: float = 0.1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Parameters that all have an influence."""
    return draw(parameter_shapes(c), c, seed, std, dtype)


def forward(
    params: Mapping[str, Tensor],
    c: OracleConfig,
    tokens: Tensor,
    positions: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Logits of a decoder-only transformer; tokens see those of their own document, if there are any documents.

    Shapes: tokens, positions, documents [b, s] -> [b, s, v]
    """
    s = tokens.shape[1]
    place = torch.arange(s)
    positions = place.expand_as(tokens) if positions is None else positions
    allowed = causal(s)
    if c.window is not None:
        allowed = allowed & (place[:, None] - place <= c.window)
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    words = params["embedding.word_embeddings.weight"]
    x = words[tokens]
    if c.positions == "learned":
        x = x + params["embedding.position_embeddings.weight"][positions]
    if c.embed_norm:
        x = norm(params, "embedding.norm", c, x)
    for i in range(c.num_layers):
        p = under(params, f"layers.{i}.")
        mixed = attention(p, c, norm(p, "input_layernorm", c, x), positions, allowed)
        if c.parallel_residual:
            x = x + mixed + mlp(p, c, norm(p, "pre_mlp_layernorm", c, x))
        else:
            x = x + mixed
            x = x + mlp(p, c, norm(p, "pre_mlp_layernorm", c, x))
    x = norm(params, "final_layernorm", c, x)
    return x @ (words if c.tied else params["output_layer.weight"]).T


def attention(p: Mapping[str, Tensor], c: OracleConfig, x: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
    """Causal self-attention."""
    q, k, v = queries_keys_values(p, c, x)
    if c.qk_norm:
        q, k = norm(p, "self_attention.q_layernorm", c, q), norm(p, "self_attention.k_layernorm", c, k)
    if c.positions == "rope":
        q, k = rotate(q, c, positions), rotate(k, c, positions)
    bias = alibi(c.heads, x.shape[1]).to(x.dtype) if c.positions == "alibi" else 0.0
    return linear(p, "self_attention.linear_proj", c.bias, attend(c, q, k, v, allowed, bias))


def alibi(heads: int, s: int) -> Tensor:
    """-slope * distance; slopes 2^(-8i/a), and beyond a power of two the odd ones of twice as many heads.

    Shapes: -> [a, query, key]
    """
    whole = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    slopes += [2 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole), 2)]
    place = torch.arange(s, dtype=torch.float64)
    return torch.tensor(slopes, dtype=torch.float64)[:, None, None] * (place - place[:, None])


def rotate(x: Tensor, c: OracleConfig, positions: Tensor | None = None) -> Tensor:
    """Turn the feature pair (i, i + r/2) at position t by the angle t * base^(-2i/r); the features beyond r stay.

    Shapes: x [b, heads, s, d], positions [b, s]
    """
    r = int(x.shape[-1] * c.rotary_percent)
    if positions is None:
        positions = torch.arange(x.shape[2])[None]
    turns = c.rotary_base ** (-torch.arange(0, r, 2, dtype=torch.float64) / r) / c.rope_interpolation
    if c.llama3:
        turns = torch.stack([_stretched(turn, c.llama3) for turn in turns])
    angles = positions[:, None, :, None].double() * turns  # [b, 1, s, r/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second, rest = torch.split(x, [r // 2, r // 2, x.shape[-1] - r], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _stretched(turn: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Between the two limits, on the number of turns within the original context, from turn / factor to turn."""
    turns_in_context = scaling.original * turn / (2 * math.pi)
    share = ((turns_in_context - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return share * turn + (1 - share) * turn / scaling.factor


def loss(params: Mapping[str, Tensor], c: OracleConfig, *batch: Tensor) -> Tensor:
    """Mean loss over the tokens that the mask keeps; batch: tokens, labels, loss mask[, positions, documents]."""
    return (objective(c).sums(params, *batch) / _counts(*batch)).sum()


def objective(c: OracleConfig) -> training.Objective:
    """One loss: over target tokens."""

    def sums(
        params: Mapping[str, Tensor], tokens: Tensor, labels: Tensor, loss_mask: Tensor, *packing: Tensor
    ) -> Tensor:
        return (token_losses(forward(params, c, tokens, *packing), labels) * loss_mask).sum()[None]

    return training.Objective(sums, _counts)


def _counts(tokens: Tensor, labels: Tensor, loss_mask: Tensor, *packing: Tensor) -> Tensor:
    return loss_mask.sum()[None]


def train(
    params: Mapping[str, Tensor], c: OracleConfig, global_batches: Sequence[GlobalBatch], **optimizer: Any
) -> Trained:
    """See training.train."""
    return training.train(params, objective(c), global_batches, **optimizer)

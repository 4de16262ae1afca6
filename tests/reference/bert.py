"""The oracle of BERT: masked tokens and sentence order, with pre-LN or post-LN layers.

Shapes: as in transformer.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.reference import training
from tests.reference.training import Trained
from tests.reference.transformer import (
    ACTIVATIONS,
    TransformerConfig,
    attend,
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


@dataclass(frozen=True, kw_only=True)
class BertConfig(TransformerConfig):
    """What defines the function."""

    num_layers: int
    post_ln: bool = False
    """The residual is taken after the norm, as in the first BERT."""
    binary_head: bool = True
    """Sentence order: token types, pooler and head."""
    head_activation: str = "gelu"
    """In the masked-LM head; Megatron's is by erf even where the layers' is not."""


class GlobalBatch(NamedTuple):
    """Shapes: [global batch, s], is_random [global batch]; real: False at padding; labels -1 where nothing is asked"""

    tokens: Tensor
    token_types: Tensor
    labels: Tensor
    loss_mask: Tensor
    real: Tensor
    is_random: Tensor


def parameter_shapes(c: BertConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model with its global shape, in the order of the forward pass."""
    h = c.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (c.vocab, h),
        "embedding.position_embeddings.weight": (c.max_positions, h),
    }
    if c.binary_head:
        shapes["embedding.tokentype_embeddings.weight"] = (2, h)
    for i in range(c.num_layers):
        at = f"layers.{i}."
        shapes |= norm_shapes(at + "input_layernorm", c)
        shapes |= self_attention_shapes(at + "self_attention", c)
        shapes |= norm_shapes(at + "pre_mlp_layernorm", c)
        shapes |= mlp_shapes(at + "mlp", c)
    shapes |= norm_shapes("final_layernorm", c)
    shapes |= linear_shapes("lm_head.dense", h, h, True) | norm_shapes("lm_head.norm", c) | {"lm_head.bias": (c.vocab,)}
    if c.binary_head:
        shapes |= linear_shapes("pooler", h, h, True) | linear_shapes("binary_head", 2, h, True)
    return shapes if c.tied else shapes | {"output_layer.weight": (c.vocab, h)}


def random_params(
    c: BertConfig, seed: int = 0, std: float = 0.1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Parameters that all have an influence."""
    return draw(parameter_shapes(c), c, seed, std, dtype)


def forward(
    params: Mapping[str, Tensor], c: BertConfig, tokens: Tensor, token_types: Tensor, real: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits of every token, and of the order of the two segments.

    Shapes: all [b, s] -> [b, s, v], [b, 2]
    """
    words = params["embedding.word_embeddings.weight"]
    x = words[tokens] + params["embedding.position_embeddings.weight"][: tokens.shape[1]]
    if c.binary_head:
        x = x + params["embedding.tokentype_embeddings.weight"][token_types]
    for i in range(c.num_layers):
        p = under(params, f"layers.{i}.")
        y = norm(p, "input_layernorm", c, x)
        mixed = attend(c, *queries_keys_values(p, c, y), real[:, None, None, :])
        x = (y if c.post_ln else x) + linear(p, "self_attention.linear_proj", c.bias, mixed)
        y = norm(p, "pre_mlp_layernorm", c, x)
        x = (y if c.post_ln else x) + mlp(p, c, y)
    x = norm(params, "final_layernorm", c, x)
    y = norm(params, "lm_head.norm", c, ACTIVATIONS[c.head_activation](linear(params, "lm_head.dense", True, x)))
    logits = y @ (words if c.tied else params["output_layer.weight"]).T + params["lm_head.bias"]
    if not c.binary_head:
        return logits, None
    return logits, linear(params, "binary_head", True, torch.tanh(linear(params, "pooler", True, x[:, 0])))


def losses(params: Mapping[str, Tensor], c: BertConfig, *batch: Tensor) -> Tensor:
    """Mean loss over masked tokens; mean loss over samples of their segments' order."""
    goal = objective(c)
    return goal.sums(params, *batch) / goal.counts(*batch)


def objective(c: BertConfig) -> training.Objective:
    """Loss over masked tokens; loss over samples, if there is a binary head."""

    def sums(params: Mapping[str, Tensor], *part: Tensor) -> Tensor:
        batch = GlobalBatch(*part)
        logits, order = forward(params, c, batch.tokens, batch.token_types, batch.real)
        lm = (token_losses(logits, batch.labels) * batch.loss_mask).sum()
        return lm[None] if order is None else torch.stack([lm, token_losses(order, batch.is_random).sum()])

    def counts(*part: Tensor) -> Tensor:
        batch = GlobalBatch(*part)
        masked = batch.loss_mask.sum()
        return torch.stack([masked, torch.tensor(float(len(part[0])))]) if c.binary_head else masked[None]

    return training.Objective(sums, counts)


def train(
    params: Mapping[str, Tensor], c: BertConfig, global_batches: Sequence[GlobalBatch], **optimizer: Any
) -> Trained:
    """See training.train."""
    return training.train(params, objective(c), global_batches, **optimizer)

"""One transformer layer, of an encoder or a decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_ds.kernels.mask import Mask
from megatron_ds.model.attention import CrossAttention, SelfAttention
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.mlp import MLP
from megatron_ds.model.norm import Norm
from megatron_ds.model.recompute import recomputed
from megatron_ds.model.runtime import Runtime


class Shared(NamedTuple):
    """What all layers of a stack look at besides the residual stream, and what needs no gradient.

    Shapes: rope [2, s, b, 1, rotated], mask [b or 1, heads or 1, s, s], cross_mask [b, 1, sd, se]
    """

    rope: torch.Tensor | None = None
    mask: Mask | None = None
    cross_mask: Mask | None = None


class TransformerLayer(nn.Module):
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x)); a decoder's attends to memory between.

    With the residual after the norm (the original BERT's, there seen from one place further on): x = norm(x), then
    x + attention(x). With parallel residuals x + attention(norm(x)) + mlp(norm'(x)).
    number: over all stacks; it names the streams of dropout.
    Shapes: x [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h])
    """

    def __init__(
        self,
        config: TransformerConfig,
        number: int,
        *,
        causal: bool,
        crosses: bool = False,
        runtime: Runtime,
        **factory: Any,
    ):
        super().__init__()
        self.number, self.runtime, self.dropout = number, runtime, config.hidden_dropout
        self.after_norm = config.apply_residual_connection_post_layernorm
        self.parallel = config.use_parallel_residual
        shared = {"runtime": runtime, **factory}
        self.input_layernorm = Norm(config, **shared)
        self.self_attention = SelfAttention(config, number, causal=causal, **shared)
        if crosses:
            self.pre_cross_attn_layernorm = Norm(config, **shared)
            self.cross_attention = CrossAttention(config, number, **shared)
        self.pre_mlp_layernorm = Norm(config, **shared)
        self.mlp = MLP(config, **shared)
        recompute = runtime.recompute
        self.recomputes_mlp = recompute.granularity == "selective" and "mlp" in recompute.recompute_modules

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor | None, bias: torch.Tensor | None, shared: Shared
    ) -> torch.Tensor:
        """All residual branches; `bias` is a learned one of the self-attention, in place of its mask."""
        normed = self.input_layernorm(x)
        branch = self.self_attention(normed, shared.rope, shared.mask, bias)
        start = x
        x = self._add(branch, self.self_attention.linear_proj.bias, self._residual(x, normed), "proj")
        if memory is not None:
            normed = self.pre_cross_attn_layernorm(x)
            branch = self.cross_attention(normed, memory, shared.cross_mask)
            x = self._add(branch, self.cross_attention.linear_proj.bias, self._residual(x, normed), "cross")
        normed = self.pre_mlp_layernorm(start if self.parallel else x)
        branch = recomputed(self.mlp, self.runtime, normed) if self.recomputes_mlp else self.mlp(normed)
        return self._add(branch, self.mlp.linear_fc2.bias, self._residual(x, normed), "mlp")

    def _residual(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return normed.to(x.dtype) if self.after_norm else x

    def _add(self, branch: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, site: str) -> torch.Tensor:
        """x + dropout(branch + bias)."""
        dropout = self.dropout if self.training else 0.0
        if dropout:
            self.runtime.streams.enter(self.number, site, self.runtime.shards.sequence_shard)
        return self.runtime.kernels.bias_dropout_add(branch, bias, x, dropout)

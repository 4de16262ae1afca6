"""Self-attention on the heads of this tensor-parallel rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from megatron_ds.kernels.table import Kernels
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.parallel.spec import Init


class SelfAttention(nn.Module):
    """Causal self-attention; query, key and value rows lie one after the other in one matrix.

    Shapes: x [s, b, h] -> [s, b, h] without the output bias
    Comm:   forward one all-reduce, backward one, both over tp
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer: int,
        *,
        tp: Axis,
        kernels: Kernels,
        streams: DropoutStreams,
        **factory: Any,
    ):
        super().__init__()
        assert config.hidden_size and config.num_attention_heads and config.num_layers
        self.layer, self.kernels, self.streams, self.tp = layer, kernels, streams, tp
        self.head_size, self.dropout = config.head_size, config.attention_dropout
        self.width = config.num_attention_heads * config.head_size
        self.heads, self.kv_heads = config.num_attention_heads // tp.size, config.kv_heads // tp.size
        parts = (self.width, config.kv_heads * config.head_size, config.kv_heads * config.head_size)
        std = config.init_method_std
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            parts,
            bias=config.add_bias_linear or config.add_qkv_bias,
            init=Init("normal", std),
            tp=tp,
            **factory,
        )
        self.linear_proj = RowParallelLinear(
            self.width,
            config.hidden_size,
            bias=config.add_bias_linear,
            init=Init("normal", std / math.sqrt(2 * config.num_layers)),
            tp=tp,
            **factory,
        )

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """Attend to earlier positions."""
        s, b, _ = x.shape
        local = self.head_size * self.heads, self.head_size * self.kv_heads, self.head_size * self.kv_heads
        q, k, v = (t.view(s, b, -1, self.head_size) for t in self.linear_qkv(x).split(local, dim=-1))
        if rope is not None:
            q, k = self.kernels.rope(q, rope), self.kernels.rope(k, rope)
        dropout = self.dropout if self.training else 0.0
        if dropout:
            self.streams.enter(self.layer, "attention", per_head=True)
        out: torch.Tensor = self.linear_proj(self.kernels.attention(q, k, v, dropout))
        return out

    def attention_flops(self, seq_length: int) -> int:
        """Forward FLOPs per token of q k^T and p v, all ranks together, counted without the causal half."""
        return 2 * 2 * seq_length * self.width

"""Self-attention on the heads of this tensor-parallel rank, and on its part of the sequence."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.context_attention import ring_attention, ulysses_attention
from megatron_ds.model.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.model.recompute import recomputed
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.spec import Init


class SelfAttention(nn.Module):
    """Causal self-attention; query, key and value rows lie one after the other in one matrix.

    Shapes: x [s/cp, b, h] -> [s/cp, b, h] without the output bias (sequence parallel: both [s/cp/tp, b, h])
    Comm:   that of a column- and a row-parallel linear; over cp keys and values, or all-to-all
    """

    def __init__(self, config: TransformerConfig, layer: int, *, runtime: Runtime, **factory: Any):
        super().__init__()
        assert config.hidden_size and config.num_attention_heads and config.num_layers
        self.layer, self.runtime = layer, runtime
        self.head_size, self.dropout_probability = config.head_size, config.attention_dropout
        self.width = config.num_attention_heads * config.head_size
        tp = runtime.shards.tp.size
        self.heads, self.kv_heads = config.num_attention_heads // tp, config.kv_heads // tp
        parts = (self.width, config.kv_heads * config.head_size, config.kv_heads * config.head_size)
        std = config.init_method_std
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            parts,
            bias=config.add_bias_linear or config.add_qkv_bias,
            init=Init("normal", std),
            runtime=runtime,
            **factory,
        )
        self.linear_proj = RowParallelLinear(
            self.width,
            config.hidden_size,
            bias=config.add_bias_linear,
            init=Init("normal", std / math.sqrt(2 * config.num_layers)),
            runtime=runtime,
            **factory,
        )
        recompute = runtime.recompute
        self.recomputes = recompute.granularity == "selective" and "core_attn" in recompute.recompute_modules

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """Attend to earlier positions."""
        fused = self.linear_qkv(x)
        s, b, _ = fused.shape
        local = self.head_size * self.heads, self.head_size * self.kv_heads, self.head_size * self.kv_heads
        q, k, v = (t.view(s, b, -1, self.head_size) for t in fused.split(local, dim=-1))
        if rope is not None:
            q, k = self.runtime.kernels.rope(q, rope), self.runtime.kernels.rope(k, rope)
        core = recomputed(self._core, self.runtime, q, k, v) if self.recomputes else self._core(q, k, v)
        out: torch.Tensor = self.linear_proj(core)
        return out

    def _core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(q k^T) v over the whole sequence.

        Shapes: q [s/cp, b, a/tp, d], k and v [s/cp, b, k/tp, d] -> [s/cp, b, a*d/tp]
        """
        shards = self.runtime.shards
        if shards.cp.size == 1:
            return self._attend(q, k, v)
        if shards.ulysses:
            return ulysses_attention(q, k, v, shards.cp, self._attend)
        # The backward draws the masks again, when the streams stand at another micro-batch.
        return ring_attention(q, k, v, shards.cp, self._dropout, partial(self._enter, self.runtime.streams.sample))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention over a sequence that is all here."""
        if self._dropout:
            self._enter(self.runtime.streams.sample, 0)
        return self.runtime.kernels.attention(q, k, v, self._dropout)

    def _enter(self, sample: int, block: int) -> None:
        """Begin the stream of the probabilities' dropout: each rank has its own heads, queries and blocks of keys."""
        shards, streams = self.runtime.shards, self.runtime.streams
        streams.sample = sample
        streams.enter(self.layer, "attention", (shards.tp.rank, shards.cp.rank, block))

    @property
    def _dropout(self) -> float:
        return self.dropout_probability if self.training else 0.0

    def attention_flops(self, seq_length: int) -> int:
        """Forward FLOPs per token of q k^T and p v, all ranks together, counted without the causal half."""
        return 2 * 2 * seq_length * self.width

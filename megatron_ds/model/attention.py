"""Attention on the heads of this tensor-parallel rank, and on its part of the sequence."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_ds.kernels.attention import Pattern
from megatron_ds.kernels.mask import Mask
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.context_attention import ring_attention, ulysses_attention
from megatron_ds.model.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.model.norm import Norm
from megatron_ds.model.recompute import recomputed
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.spec import Init


class Attention(nn.Module):
    """What self- and cross-attention share: everything behind queries, keys and values.

    Shapes: q [sq/cp, b, a/tp, d], k and v [sk/cp, b, k/tp, d] -> [sq/cp, b, h] without the output bias (sequence
            parallel: [sq/cp/tp, b, h])
    Comm:   that of a row-parallel linear; over cp keys and values, or all-to-all
    """

    linear_proj: RowParallelLinear
    site = "attention"

    def __init__(self, config: TransformerConfig, layer: int, *, causal: bool, runtime: Runtime):
        super().__init__()
        assert config.hidden_size and config.num_attention_heads
        self.layer, self.runtime = layer, runtime
        self.pattern = Pattern(causal, config.softmax_scale)
        self.head_size, self.dropout_probability = config.head_size, config.attention_dropout
        self.width = config.num_attention_heads * config.head_size
        self.kv_width = config.kv_heads * config.head_size
        recompute = runtime.recompute
        self.recomputes = recompute.granularity == "selective" and "core_attn" in recompute.recompute_modules

    def _column(self, config: TransformerConfig, parts: tuple[int, ...], **factory: Any) -> ColumnParallelLinear:
        """The projection to queries, keys, values, one after the other in one matrix."""
        assert config.hidden_size
        bias, init = config.add_bias_linear or config.add_qkv_bias, Init("normal", config.init_method_std)
        return ColumnParallelLinear(config.hidden_size, parts, bias=bias, init=init, runtime=self.runtime, **factory)

    def _row(self, config: TransformerConfig, **factory: Any) -> RowParallelLinear:
        """The projection back to h."""
        assert config.hidden_size
        init = Init("normal", config.init_method_std / math.sqrt(2 * config.total_layers))
        bias = config.add_bias_linear
        return RowParallelLinear(self.width, config.hidden_size, bias=bias, init=init, runtime=self.runtime, **factory)

    def _heads(self, fused: torch.Tensor, *widths: int) -> list[torch.Tensor]:
        """[s, b, (sum of widths)/tp] -> for each of them [s, b, heads, d]."""
        s, b, _ = fused.shape
        shares = [width // self.runtime.shards.tp.size for width in widths]
        return [t.view(s, b, -1, self.head_size) for t in fused.split(shares, dim=-1)]

    def _project(self, mask: Mask | None, *tensors: torch.Tensor | None) -> torch.Tensor:
        run = partial(self._core, mask)
        core = recomputed(run, self.runtime, *tensors) if self.recomputes else run(*tensors)  # type: ignore[arg-type]
        out: torch.Tensor = self.linear_proj(core)
        return out

    def _core(
        self,
        mask: Mask | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """softmax(q k^T + mask) v over the whole sequence; a bias has the mask in it.

        Shapes: q [sq/cp, b, a/tp, d], k and v [sk/cp, b, k/tp, d] -> [sq/cp, b, a*d/tp]
        """
        shards = self.runtime.shards
        mask = mask if bias is None else bias
        if shards.cp.size == 1:
            return self._attend(mask, q, k, v)
        if shards.ulysses:
            return ulysses_attention(q, k, v, shards.cp, partial(self._attend, mask))
        assert mask is None and self.pattern == Pattern()
        # The backward draws the masks again, when the streams stand at another micro-batch.
        return ring_attention(q, k, v, shards.cp, self._dropout, partial(self._enter, self.runtime.streams.sample))

    def _attend(self, mask: Mask | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention over a sequence that is all here."""
        if self._dropout:
            self._enter(self.runtime.streams.sample, 0)
        return self.runtime.kernels.attention(q, k, v, mask, self.pattern, self._dropout)

    def _enter(self, sample: int, block: int) -> None:
        """Begin the stream of the probabilities' dropout: each rank has its own heads, queries and blocks of keys."""
        shards, streams = self.runtime.shards, self.runtime.streams
        streams.sample = sample
        streams.enter(self.layer, self.site, (shards.tp.rank, shards.cp.rank, block))

    @property
    def _dropout(self) -> float:
        return self.dropout_probability if self.training else 0.0

    def attention_flops(self, queries: int, keys: int) -> int:
        """Forward FLOPs per sample of q k^T and p v, all ranks together, counted without the causal half."""
        return 2 * 2 * queries * keys * self.width


class SelfAttention(Attention):
    """Self-attention; query, key and value rows lie one after the other in one matrix.

    Shapes: x [s/cp, b, h] -> [s/cp, b, h] without the output bias (sequence parallel: both [s/cp/tp, b, h])
    Comm:   that of a column- and a row-parallel linear; over cp keys and values, or all-to-all
    """

    def __init__(self, config: TransformerConfig, layer: int, *, causal: bool, runtime: Runtime, **factory: Any):
        super().__init__(config, layer, causal=causal, runtime=runtime)
        self.linear_qkv = self._column(config, (self.width, self.kv_width, self.kv_width), **factory)
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            # Every rank has other heads, so that each sees a part of the gradient only.
            head = {"size": config.head_size, "partial_over": ("tp",), "runtime": runtime, **factory}
            self.q_layernorm, self.k_layernorm = Norm(config, **head), Norm(config, **head)
        self.linear_proj = self._row(config, **factory)

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor | None, mask: Mask | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend to what the mask leaves, or, with a learned bias, to what that leaves."""
        q, k, v = self._heads(self.linear_qkv(x), self.width, self.kv_width, self.kv_width)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if rope is not None:
            q, k = self.runtime.kernels.rope(q, rope), self.runtime.kernels.rope(k, rope)
        return self._project(mask, q, k, v, bias)


class CrossAttention(Attention):
    """Attention of a decoder's positions to an encoder's output.

    Shapes: x [sd, b, h], memory [se, b, h] -> [sd, b, h] without the output bias (sequence parallel: all cut over tp)
    Comm:   that of two column-parallel linears and a row-parallel one
    """

    site = "cross attention"

    def __init__(self, config: TransformerConfig, layer: int, *, runtime: Runtime, **factory: Any):
        super().__init__(config, layer, causal=False, runtime=runtime)
        self.linear_q = self._column(config, (self.width,), **factory)
        self.linear_kv = self._column(config, (self.kv_width, self.kv_width), **factory)
        self.linear_proj = self._row(config, **factory)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: Mask | None) -> torch.Tensor:
        """Attend to the positions of `memory` that the mask leaves."""
        (q,) = self._heads(self.linear_q(x), self.width)
        k, v = self._heads(self.linear_kv(memory), self.kv_width, self.kv_width)
        return self._project(mask, q, k, v)

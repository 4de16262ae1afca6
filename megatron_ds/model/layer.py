"""One transformer layer, and the norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_ds.model.attention import SelfAttention
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.mlp import MLP
from megatron_ds.model.recompute import recomputed
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.spec import Init, ParamSpec


class Norm(nn.Module):
    """LayerNorm or RMSNorm, replicated over tp; what it gives has the parameters' precision.

    Shapes: x [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h])
    """

    def __init__(self, config: TransformerConfig, *, runtime: Runtime, **factory: Any):
        super().__init__()
        assert config.hidden_size
        centred, kernels = config.normalization == "LayerNorm", runtime.kernels
        self.call, self.eps = kernels.layer_norm if centred else kernels.rms_norm, config.norm_epsilon
        self.weight = nn.Parameter(torch.empty(config.hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(config.hidden_size, **factory)) if centred else None
        self.partial_over = runtime.shards.partial_over

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dim."""
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return self.call(x, self.weight.to(x.dtype), bias, self.eps).to(self.weight.dtype)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        shape, over = tuple(self.weight.shape), self.partial_over
        rows = [ParamSpec("weight", shape, Init("ones"), decay=False, partial_over=over)]
        bias = ParamSpec("bias", shape, Init("zeros"), decay=False, partial_over=over)
        return rows + ([bias] if self.bias is not None else [])


class TransformerLayer(nn.Module):
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Shapes: x [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h])
    """

    def __init__(self, config: TransformerConfig, number: int, *, runtime: Runtime, **factory: Any):
        super().__init__()
        self.number, self.runtime, self.dropout = number, runtime, config.hidden_dropout
        self.input_layernorm = Norm(config, runtime=runtime, **factory)
        self.self_attention = SelfAttention(config, number, runtime=runtime, **factory)
        self.pre_mlp_layernorm = Norm(config, runtime=runtime, **factory)
        self.mlp = MLP(config, runtime=runtime, **factory)
        recompute = runtime.recompute
        self.recomputes_mlp = recompute.granularity == "selective" and "mlp" in recompute.recompute_modules

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """Both residual branches."""
        branch = self.self_attention(self.input_layernorm(x), rope)
        x = self._add(branch, self.self_attention.linear_proj.bias, x, "proj")
        normed = self.pre_mlp_layernorm(x)
        branch = recomputed(self.mlp, self.runtime, normed) if self.recomputes_mlp else self.mlp(normed)
        return self._add(branch, self.mlp.linear_fc2.bias, x, "mlp")

    def _add(self, branch: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, site: str) -> torch.Tensor:
        """x + dropout(branch + bias)."""
        dropout = self.dropout if self.training else 0.0
        if dropout:
            self.runtime.streams.enter(self.number, site, self.runtime.shards.sequence_shard)
        return self.runtime.kernels.bias_dropout_add(branch, bias, x, dropout)

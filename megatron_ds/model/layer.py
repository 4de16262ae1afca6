"""One transformer layer, and the norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_ds.kernels.table import Kernels
from megatron_ds.model.attention import SelfAttention
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.mlp import MLP
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.parallel.spec import Init, ParamSpec


class Norm(nn.Module):
    """LayerNorm or RMSNorm, replicated over tp.

    Shapes: x [s, b, h] -> [s, b, h]
    """

    def __init__(self, config: TransformerConfig, kernels: Kernels, **factory: Any):
        super().__init__()
        assert config.hidden_size
        centred = config.normalization == "LayerNorm"
        self.call, self.eps = kernels.layer_norm if centred else kernels.rms_norm, config.norm_epsilon
        self.weight = nn.Parameter(torch.empty(config.hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(config.hidden_size, **factory)) if centred else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dim."""
        return self.call(x, self.weight, self.bias, self.eps)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        rows = [ParamSpec("weight", tuple(self.weight.shape), Init("ones"), decay=False)]
        bias = ParamSpec("bias", tuple(self.weight.shape), Init("zeros"), decay=False)
        return rows + ([bias] if self.bias is not None else [])


class TransformerLayer(nn.Module):
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Shapes: x [s, b, h] -> [s, b, h]
    """

    def __init__(
        self,
        config: TransformerConfig,
        number: int,
        *,
        tp: Axis,
        kernels: Kernels,
        streams: DropoutStreams,
        **factory: Any,
    ):
        super().__init__()
        self.number, self.kernels, self.streams, self.dropout = number, kernels, streams, config.hidden_dropout
        self.input_layernorm = Norm(config, kernels, **factory)
        self.self_attention = SelfAttention(config, number, tp=tp, kernels=kernels, streams=streams, **factory)
        self.pre_mlp_layernorm = Norm(config, kernels, **factory)
        self.mlp = MLP(config, tp=tp, kernels=kernels, **factory)

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """Both residual branches."""
        x = self.add(
            self.self_attention(self.input_layernorm(x), rope), self.self_attention.linear_proj.bias, x, "proj"
        )
        return self.add(self.mlp(self.pre_mlp_layernorm(x)), self.mlp.linear_fc2.bias, x, "mlp")

    def add(self, branch: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, site: str) -> torch.Tensor:
        """x + dropout(branch + bias)."""
        dropout = self.dropout if self.training else 0.0
        if dropout:
            self.streams.enter(self.number, site)
        return self.kernels.bias_dropout_add(branch, bias, x, dropout)

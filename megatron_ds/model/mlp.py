"""The MLP: h -> f -> h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.spec import Init


class MLP(nn.Module):
    """One of several activations; gated ones have gate and up rows one after the other in one matrix.

    Shapes: x [s, b, h] -> [s, b, h] without the output bias (sequence parallel: both [s/tp, b, h])
    Comm:   that of a column- and a row-parallel linear
    """

    def __init__(self, config: TransformerConfig, *, runtime: Runtime, **factory: Any):
        super().__init__()
        assert config.hidden_size
        f, std = config.ffn_size, config.init_method_std
        self.activation = runtime.kernels.activations[config.kernel]
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            (f, f) if config.gated else (f,),
            bias=config.add_bias_linear,
            init=Init("normal", std),
            runtime=runtime,
            adds_bias=False,
            **factory,
        )
        self.linear_fc2 = RowParallelLinear(
            f,
            config.hidden_size,
            bias=config.add_bias_linear,
            init=Init("normal", std / math.sqrt(2 * config.total_layers)),
            runtime=runtime,
            **factory,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """fc2(activation(fc1(x)))."""
        out: torch.Tensor = self.linear_fc2(self.activation(self.linear_fc1(x), self.linear_fc1.bias))
        return out

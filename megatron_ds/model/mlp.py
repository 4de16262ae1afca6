"""The MLP: h -> f -> h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from megatron_ds.kernels.table import Kernels
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Init


class MLP(nn.Module):
    """GELU, or SwiGLU with gate and up rows one after the other in one matrix.

    Shapes: x [s, b, h] -> [s, b, h] without the output bias
    Comm:   forward one all-reduce, backward one, both over tp
    """

    def __init__(self, config: TransformerConfig, *, tp: Axis, kernels: Kernels, **factory: Any):
        super().__init__()
        assert config.hidden_size and config.num_layers
        f, std = config.ffn_size, config.init_method_std
        self.activation = kernels.swiglu if config.swiglu else kernels.gelu
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            (f, f) if config.swiglu else (f,),
            bias=config.add_bias_linear,
            init=Init("normal", std),
            tp=tp,
            **factory,
        )
        self.linear_fc2 = RowParallelLinear(
            f,
            config.hidden_size,
            bias=config.add_bias_linear,
            init=Init("normal", std / math.sqrt(2 * config.num_layers)),
            tp=tp,
            **factory,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """fc2(activation(fc1(x)))."""
        out: torch.Tensor = self.linear_fc2(self.activation(self.linear_fc1(x)))
        return out

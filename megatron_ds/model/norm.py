"""LayerNorm and RMSNorm as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.spec import Init, ParamSpec


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dim, replicated over tp; what it gives has the parameters' precision.

    size: of that dim, h unless given. partial_over: axes over which the gradient is a partial sum, if others than those
    of everything that is replicated.
    Shapes: x [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        runtime: Runtime,
        size: int | None = None,
        partial_over: tuple[str, ...] | None = None,
        **factory: Any,
    ):
        super().__init__()
        size = size or config.hidden_size
        assert size
        centred, kernels = config.normalization == "LayerNorm", runtime.kernels
        self.call, self.eps = kernels.layer_norm if centred else kernels.rms_norm, config.norm_epsilon
        self.one_plus = config.apply_layernorm_1p
        self.weight = nn.Parameter(torch.empty(size, **factory))
        self.bias = nn.Parameter(torch.empty(size, **factory)) if centred else None
        self.partial_over = runtime.shards.partial_over if partial_over is None else partial_over

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dim."""
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        weight = self.weight.to(x.dtype)
        return self.call(x, weight + 1 if self.one_plus else weight, bias, self.eps).to(self.weight.dtype)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        shape, over = tuple(self.weight.shape), self.partial_over
        init = Init("zeros" if self.one_plus else "ones")
        rows = [ParamSpec("weight", shape, init, decay=False, partial_over=over)]
        bias = ParamSpec("bias", shape, Init("zeros"), decay=False, partial_over=over)
        return rows + ([bias] if self.bias is not None else [])

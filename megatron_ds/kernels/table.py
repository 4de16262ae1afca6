"""The table of operations that the model calls, chosen once at start; the model itself never asks what is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ds.kernels import activation, attention, dropout_add, norm, rope

Tensor = torch.Tensor


@dataclass(frozen=True)
class Kernels:
    """One callable per operation; each is described where it is defined."""

    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = norm.layer_norm
    rms_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = norm.rms_norm
    gelu: Callable[[Tensor], Tensor] = activation.gelu
    swiglu: Callable[[Tensor], Tensor] = activation.swiglu
    rope: Callable[[Tensor, Tensor], Tensor] = rope.apply_rope
    attention: Callable[[Tensor, Tensor, Tensor, float], Tensor] = attention.attention
    bias_dropout_add: Callable[[Tensor, Tensor | None, Tensor, float], Tensor] = dropout_add.bias_dropout_add

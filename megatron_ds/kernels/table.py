"""The table of operations that the model calls, chosen once at start; the model itself never asks what is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from megatron_ds.kernels import activation, attention, dropout_add, flex, norm, rope
from megatron_ds.kernels import mask as masks

Tensor = torch.Tensor
Activations = Mapping[str, Callable[[Tensor], Tensor]]


def _activations() -> Activations:
    return MappingProxyType(
        {
            "gelu_tanh": activation.gelu_tanh,
            "gelu": activation.gelu,
            "relu": activation.relu,
            "squared_relu": activation.squared_relu,
            "swiglu": activation.swiglu,
            "geglu_tanh": activation.geglu_tanh,
            "geglu": activation.geglu,
            "reglu": activation.reglu,
            "liglu": activation.liglu,
        }
    )


@dataclass(frozen=True)
class Kernels:
    """One callable per operation; each is described where it is defined."""

    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = norm.layer_norm
    rms_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = norm.rms_norm
    activations: Activations = field(default_factory=_activations)
    rope: Callable[[Tensor, Tensor], Tensor] = rope.apply_rope
    mask: Callable[[masks.Rule], masks.Mask | None] = masks.visible
    attention: Callable[[Tensor, Tensor, Tensor, masks.Mask | None, attention.Pattern, float], Tensor] = (
        attention.attention
    )
    bias_dropout_add: Callable[[Tensor, Tensor | None, Tensor, float], Tensor] = dropout_add.bias_dropout_add

    @classmethod
    def on(cls, device: torch.device, attention_dropout: float) -> Kernels:
        """The table for a device; FlexAttention has no dropout."""
        flexes = not attention_dropout and flex.can_compile(device)
        return cls(mask=flex.flex_mask, attention=flex.flex) if flexes else cls()

"""The table of operations that the model and the optimizer call; they never ask what is installed.

`Kernels()` is made of torch's operators alone, as fast as these allow; kernels/choose.py fills in what a machine has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from megatron_ds.kernels import activation, adamw, attention, cross_entropy, dropout_add, norm, products, rope
from megatron_ds.kernels import mask as masks

Tensor = torch.Tensor


@dataclass(frozen=True)
class Kernels:
    """One entry per operation; each is described where it is defined."""

    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = norm.exact_layer_norm
    rms_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = norm.rms_norm
    activations: Mapping[str, activation.Activation] = field(default_factory=lambda: activation.FUSED)
    rope: Callable[[Tensor, Tensor], Tensor] = rope.apply_rope
    mask: Callable[[masks.Rule], masks.Mask | None] = masks.visible
    attention: attention.Attention = attention.attention
    bias_dropout_add: Callable[[Tensor, Tensor | None, Tensor, float], Tensor] = dropout_add.fused_bias_dropout_add
    cross_entropy: cross_entropy.CrossEntropy = cross_entropy.BY_BLOCKS
    linear: products.Products = products.FUSED
    head: products.Products = products.FUSED
    """Of the projection to the vocabulary, which is never made in FP8."""
    adamw: adamw.AdamW = adamw.fused

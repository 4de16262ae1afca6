"""Liger's kernels where they say what the table says.

The others do not. Its LayerNorm keeps mean and deviation in x's precision, not in fp32. Its GEGLU and older SwiGLU take
gate and up apart, which means copies. Its rope turns queries and keys together, heads before positions, and whole heads
only. Its cross-entropies sum over the vocabulary themselves. All this as of Liger 0.8.5.

Source: liger_kernel/ops/rms_norm.py, swiglu.py, layer_norm.py, geglu.py, rope.py, cross_entropy.py
"""

from __future__ import annotations

import importlib

import torch

from megatron_ds.kernels.installed import trouble

WIDEST = 65536
"""Features of a row that its kernels take."""


def lacks(operation: str) -> str | None:
    """Why an operation of this module cannot be used here; None where it can."""
    module, name = {
        "rms_norm": ("liger_kernel.ops.rms_norm", "LigerRMSNormFunction"),
        "swiglu": ("liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction"),
    }[operation]
    why = trouble("triton") or trouble(module)
    if why is None and not hasattr(importlib.import_module(module), name):
        return f"this Liger has no {name} yet"
    return why


def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """As kernels/norm.py's.

    Shapes: x [..., h] -> [..., h]; h <= 65536
    """
    assert bias is None
    ops = importlib.import_module("liger_kernel.ops.rms_norm")
    # "gemma" is its name for all in fp32, rounded once; in place it would overwrite a gradient that others read.
    out: torch.Tensor = ops.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
    return out


def swiglu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up of x + bias.

    Shapes: x [..., 2f] -> [..., f]; f <= 65536
    """
    ops = importlib.import_module("liger_kernel.ops.swiglu")
    y = x if bias is None else x + bias
    # Its gradient comes in two dims, whatever it was given.
    out: torch.Tensor = ops.LigerFusedGateUpSiLUMulFunction.apply(y.reshape(-1, y.shape[-1]), False)
    return out.view(*y.shape[:-1], y.shape[-1] // 2)

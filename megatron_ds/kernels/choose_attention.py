"""Which attention serves a run: what was asked for, what the device has, what masks need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend

from megatron_ds.errors import ConfigError
from megatron_ds.kernels import attention, flash_attn, flex
from megatron_ds.kernels.config import AttentionBackend
from megatron_ds.kernels.mask import Mask, Rule, visible

Tensor = torch.Tensor
MakeMask = Callable[[Rule], "Mask | None"]
Found = tuple[MakeMask, attention.Attention, tuple[str, str]]
"""What makes a mask of a rule, what takes it, and where the two come from and why."""

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
HOPPER = (9, 0)


def choose_attention(
    asked: AttentionBackend,
    plain: bool,
    device: torch.device,
    dtype: torch.dtype,
    dropout: float,
    head_size: int,
    softmax: Callable[[Tensor, Tensor | None, float, bool], Tensor],
) -> Found:
    """The attention of a device; `plain`: torch's own call, unless another is asked for.

    Raises: ConfigError if a backend is asked for that the device does not have
    """
    if asked in ("unfused", "local"):
        return visible, attention.unfused(softmax), ("unfused", "asked for")
    if asked == "fused" and (device.type != "cuda" or dtype == torch.float32):
        raise ConfigError(
            "--attention-backend",
            f"fused (cuDNN's) in {dtype} on {device.type}",
            "half precision on a GPU",
            "--attention-backend auto",
        )
    if device.type == "cpu":
        flash = plain or asked == "flash"
        call = attention.torch_attention if flash else attention.attention
        return visible, call, ("torch SDPA" if flash else "torch, by blocks of rows", "flash for long sequences")
    if plain:
        return visible, attention.torch_attention, ("torch SDPA", "asked for")
    return _on_gpu(asked, device, dtype, dropout, head_size)


def _on_gpu(asked: AttentionBackend, device: torch.device, dtype: torch.dtype, dropout: float, head_size: int) -> Found:
    """torch's backends in order of speed; masks through FlexAttention, or flash-attn's kernels where that is there."""
    capability = torch.cuda.get_device_capability(device)
    first = {"flash": [FLASH], "fused": [CUDNN]}.get(asked)
    order = first or ([CUDNN, FLASH] if capability >= HOPPER else [FLASH, CUDNN])
    call: attention.Attention = attention.by_backends([*order, *OTHERS])
    mask: MakeMask = visible
    name, reasons = f"torch SDPA, {order[0].name.lower()} first", []
    flexes = flex.can_compile(device)
    if flexes and not dropout:
        mask, call, name = flex.flex_mask, flex.through(call), f"{name}; masks by FlexAttention"
    else:
        lacking = "has no dropout" if flexes else "needs Triton and a C compiler"
        reasons.append(f"FlexAttention: {lacking}, so that masks are whole matrices")
    if asked != "fused":
        # cuDNN's attention, which torch has, is the faster one on Hopper beside version 2.
        for version in (3, 2) if asked == "flash" or capability < HOPPER else (3,):
            why = flash_attn.lacks(version) or flash_attn.refuses(version, dtype, head_size, dropout, capability)
            if why is None:
                flash = flash_attn.flash_attention(version, mask, call)
                return flash.mask, flash.attention, (f"flash-attn {version}", "; ".join(reasons))
            reasons.append(f"flash-attn {version}: {why}")
    return mask, call, (name, "; ".join(reasons))

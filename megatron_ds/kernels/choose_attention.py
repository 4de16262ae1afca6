"""Which attention serves a run: what was asked for, what the device has, what masks need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend

from megatron_ds.errors import ConfigError
from megatron_ds.kernels import attention, flash_attn, flex, installed, proof
from megatron_ds.kernels.config import AttentionBackend
from megatron_ds.kernels.mask import Mask, Rule, visible

Tensor = torch.Tensor
MakeMask = Callable[[Rule], "Mask | None"]
Found = tuple[MakeMask, attention.Attention, str, tuple[str, ...]]
"""What makes a mask of a rule, what takes it, where the two come from, and what was passed over for which reason."""

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
HOPPER = (9, 0)
FLEX = "FlexAttention"


def choose_attention(
    asked: AttentionBackend,
    plain: bool,
    device: torch.device,
    dtype: torch.dtype,
    dropout: float,
    head_size: int,
    masks: bool,
    softmax: Callable[[Tensor, Tensor | None, float, bool], Tensor],
    slow: str | None = None,
) -> Found:
    """The attention of a device; `plain`: torch's own call, unless another is asked for; `masks`: whether any come.

    slow: why a CPU is not to multiply in `dtype` but in fp32.

    Raises: ConfigError if a backend is asked for that the device does not have, or that fails its trial there
    """
    if asked in ("unfused", "local"):
        return visible, attention.unfused(softmax), "two products and a softmax", ()
    if asked == "fused" and (device.type != "cuda" or dtype == torch.float32):
        raise ConfigError(
            "--attention-backend",
            f"fused (cuDNN's) in {dtype} on {device.type}",
            "half precision on a GPU",
            "--attention-backend auto",
        )
    if (asked == "auto" and plain) or (asked == "flash" and device.type == "cpu"):
        return visible, attention.torch_attention, "torch SDPA", ()
    if device.type == "cpu":
        call = attention.attention_in_fp32 if slow else attention.attention
        name = f"blocks of rows up to {attention.LONGEST} positions, torch SDPA beyond"
        name += ", in fp32" if slow else ""
        said = f"torch SDPA with dropout; without, {name}" if dropout else name
        return visible, call, said, (slow,) if slow else ()
    return _on_gpu(asked, device, dtype, dropout, head_size, masks)


def _on_gpu(
    asked: AttentionBackend, device: torch.device, dtype: torch.dtype, dropout: float, head_size: int, masks: bool
) -> Found:
    """torch's backends in order of speed; masks through FlexAttention, or flash-attn's kernels where that is there."""
    capability = torch.cuda.get_device_capability(device)
    reasons: list[str] = []

    def works(name: str, mask: MakeMask, call: attention.Attention, case: str = "attention") -> bool:
        right = proof.Attending(visible, attention.torch_attention, head_size)
        why = proof.disagreement(case, proof.Attending(mask, call, head_size), right, device, dtype)
        reasons.extend([f"{name}: {why}"] if why else [])
        return not why

    fast = {"flash": [FLASH], "fused": [CUDNN]}.get(asked) or [CUDNN, FLASH][:: 1 if capability >= HOPPER else -1]
    half = dtype != torch.float32  # for which alone they are
    order = []
    for backend in fast if half else ():
        name, alone, together = backend.name.lower(), *map(attention.by_backends, ([backend], [backend, *OTHERS]))
        # Alone first: among others it would not be seen that it takes nothing. Masks may be for the others.
        if works(name, visible, alone, "causal attention") and works(name, visible, together):
            order.append(backend)
    has_own = bool(order)
    order += OTHERS
    call: attention.Attention = attention.by_backends(order)
    mask: MakeMask = visible
    name = f"torch SDPA, {order[0].name.lower()} first"
    compiles = flex.can_compile(device)
    if masks and (dropout or not compiles):
        reasons.append(f"{FLEX}: {'has no dropout' if compiles else installed.triton().why}")
    elif masks:
        if works(FLEX, flex.flex_mask, flex.through(call)):
            mask, call, name = flex.flex_mask, flex.through(call), f"{name}, {FLEX} for masks"
        flex.forget()
    if asked != "fused":
        # cuDNN's attention, which torch has, is the faster one on Hopper beside version 2.
        for version in (3, 2) if asked == "flash" or capability < HOPPER else (3,):
            why = flash_attn.lacks(version) or flash_attn.refuses(version, dtype, head_size, dropout, capability)
            if why is not None:
                reasons.append(f"flash-attn {version}: {why}")
                continue
            flash = flash_attn.flash_attention(version, mask, call)
            if works(f"flash-attn {version}", flash.mask, flash.attention):
                return flash.mask, flash.attention, f"flash-attn {version}", tuple(reasons)
    if asked != "auto" and not has_own:
        found = "; ".join([f"{asked} in {dtype}", *(why for why in reasons if not why.startswith(FLEX))])
        raise ConfigError("--attention-backend", found, "what works on this device", "--attention-backend auto")
    return mask, call, name, tuple(reasons)

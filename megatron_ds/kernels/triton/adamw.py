"""AdamW on flat shards: unscaling, update and the model's copy in one pass over the memory.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch.autograd.graph import increment_version

from megatron_ds.kernels.adamw import Hyper, Part
from megatron_ds.kernels.triton.launch import ELEMENTS, jit

Tensor = torch.Tensor


def adamw(parts: Sequence[Part], step: Tensor, scale: Tensor, hyper: Hyper) -> None:
    """Update number `step` (the first is 1) of every part, in place, with gradients times `scale`.

    Neither number leaves the device. One launch per part. A scale of 0 changes nothing.
    Shapes: every tensor of a part [n]; step and scale 0-dim fp32
    """
    lr, weight_decay, beta1, beta2, eps = hyper
    # 1 - beta^step in fp64: in fp32 the first steps of a beta near 1 would lose four digits of it.
    wide = step.double()
    first, second = (-torch.expm1(wide * math.log(beta)) if beta else wide.clamp(max=1) for beta in (beta1, beta2))
    rates = torch.stack((lr / first, second.rsqrt())).float()
    for part in parts:
        n = part[0].numel()
        assert all(t is None or (t.is_contiguous() and t.numel() == n) for t in part)
        if n:
            _update[(-(-n // ELEMENTS),)](
                *part, rates, scale, n, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
                BLOCK=ELEMENTS, num_warps=4,
            )  # fmt: skip
    # As torch's own operators in place do: autograd is to notice.
    increment_version([t for p in parts for t in (p.master, p.exp_avg, p.exp_avg_sq, p.model) if t is not None])


@jit
def _update(
    master: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    model: tl.tensor,
    rates: tl.tensor,
    scale: tl.tensor,
    n: tl.tensor,
    decay: tl.tensor,
    beta1: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    inside = at < tl.where(factor != 0.0, n, 0)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
    m = tl.load(exp_avg + at, mask=inside, other=0.0) * beta1 + g * rest1
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0) * beta2 + g * g * rest2
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    p = tl.load(master + at, mask=inside, other=0.0) * decay
    p -= tl.load(rates) * m / (tl.sqrt(v) * tl.load(rates + 1) + eps)
    tl.store(master + at, p, mask=inside)
    if model is not None:
        tl.store(model + at, p.to(model.dtype.element_ty), mask=inside)

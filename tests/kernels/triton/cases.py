"""What the cases share. They run in a process of their own: see test_triton.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

Tensor = torch.Tensor
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = "cpu" if INTERPRETED else "cuda"
SINGLE = 2e-6 if INTERPRETED else 5e-6
"""What sums and elementary functions in fp32 may lose, of the largest number around; a GPU's are approximations."""
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers that `dtype` holds exactly, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def close(got: Tensor, want: Tensor, noise: Tensor | float = 0.0) -> None:
    """`got` is `want` (fp64) rounded to its precision, give or take fp32's own errors and `noise`.

    A whole unit in the last place is allowed, since Triton's interpreter cuts off what bf16 does not hold.
    """
    assert want.dtype == torch.float64
    assert got.shape == want.shape
    largest = want.abs().max().item() if want.numel() else 0.0
    slack = torch.finfo(got.dtype).eps * want.abs() + SINGLE * max(1.0, largest) + noise
    if got.dtype == torch.float16:
        slack = slack + 2**-24  # its smallest number
    off = (got.double() - want).abs()
    worst = (off / slack).max().item() if want.numel() else 0.0
    assert worst <= 1, f"{worst:.3g} times the allowed difference, at most {off.max().item():.3g}"


def gradients(f: Callable[..., Tensor], inputs: list[Tensor | None], upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    """f's value, and the gradients of those inputs that there are."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = f(*leaves)
    y.backward(upstream.to(y.dtype))
    return y.detach(), [t.grad for t in leaves if t is not None]


def wide(t: Tensor | None) -> Tensor | None:
    """In fp64."""
    return None if t is None else t.double()

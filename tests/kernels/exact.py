"""Kernels beside formulas in fp64, there and back, for inputs that lie in memory in any way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "whole": (lambda t: t, lambda t: t),
    "transposed": (lambda t: t.transpose(0, 1), lambda t: t.transpose(0, 1).contiguous()),
    "part": (lambda t: t[..., : t.shape[-1] // 2], lambda t: torch.cat((t, t), -1)),
}
"""How a kernel sees a leaf, and a leaf that it sees as a given tensor."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64.

    Shapes: -> shape
    """
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def compare(
    call: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtypes: torch.dtype | Sequence[torch.dtype],
    *,
    out: torch.dtype | None = None,
    slack: float = 4.0,
    layout: str = "whole",
) -> None:
    """Output and all gradients are those of the formula, but for a few units in the last place of the largest.

    inputs: fp64, of which the first lies as `layout` says
    """
    dtypes = [dtypes] * len(inputs) if isinstance(dtypes, torch.dtype) else dtypes
    see, lay = LAYOUTS[layout]
    places = [lay(inputs[0]), *inputs[1:]]
    leaves = [t.to(dtype).requires_grad_() for t, dtype in zip(places, dtypes, strict=True)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found, expected = call(see(leaves[0]), *leaves[1:]), formula(see(wide[0]), *wide[1:])
    kept = [leaf.detach().clone() for leaf in leaves]
    assert found.dtype == (out or dtypes[0]) and found.shape == expected.shape
    upstream = see(lay(normal(*found.shape, seed=7))).to(found.dtype) if found.dim() > 1 else torch.ones_like(found)
    before = upstream.clone()
    found.backward(upstream)
    expected.backward(before.double())
    assert torch.equal(upstream, before), "others read the gradient too"
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, kept, strict=True)), "inputs are others' too"
    near("output", found, expected, slack, max(torch.finfo(dtype).eps for dtype in dtypes))
    for i, (leaf, exact) in enumerate(zip(leaves, wide, strict=True)):
        assert leaf.grad is not None and exact.grad is not None and leaf.grad.dtype == leaf.dtype
        near(f"gradient of input {i}", leaf.grad, exact.grad, slack, max(torch.finfo(dtype).eps for dtype in dtypes))


def near(what: str, found: Tensor, expected: Tensor, slack: float, eps: float) -> None:
    """Equal, but for `slack` times eps of the largest."""
    if not found.numel():
        return
    error = (found.detach().double() - expected.detach()).abs().max().item()
    limit = slack * eps * max(1.0, expected.detach().abs().max().item())
    assert error <= limit, f"{what} is off by {error:.1e}, more than {limit:.1e}"

"""Norms against their formulas in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_ds.kernels.norm import exact_layer_norm, layer_norm, rms_norm
from tests.kernels.exact import DTYPES, compare, normal

Tensor = torch.Tensor
EPS = 1e-3
SHAPES = [(1, 1, 1), (5, 3, 7), (9, 2, 513)]


def layer_formula(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def rms_formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("layout", ["whole", "transposed", "part"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", [layer_norm, exact_layer_norm], ids=["plain", "exact"])
def test_layer_norm(call: Callable[..., Tensor], dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        x, weight, bias = 2 * normal(*shape) + 0.5, normal(shape[-1]), normal(shape[-1], seed=1)
        slack = 16 if dtype == torch.float32 else 4
        compare(lambda x, w, b: call(x, w, b, EPS), layer_formula, [x, weight, bias], dtype, slack=slack, layout=layout)
        compare(lambda x, w: call(x, w, None, EPS), layer_formula, [x, weight], dtype, slack=slack, layout=layout)


@pytest.mark.parametrize("layout", ["whole", "transposed", "part"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        slack = 16 if dtype == torch.float32 else 6
        inputs = [2 * normal(*shape), normal(shape[-1])]
        compare(lambda x, w: rms_norm(x, w, None, EPS), rms_formula, inputs, dtype, slack=slack, layout=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_many_rows_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """All of one sign, so that a sum in x's precision stops growing."""
    x, weight, bias = (t.to(dtype).requires_grad_() for t in (normal(4096, 1, 8), normal(8), normal(8, seed=1)))
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    signs = (layer_formula(*wide) - wide[2]).detach().sign() * wide[1].detach().sign()
    upstream = signs.to(dtype)
    exact_layer_norm(x, weight, bias, EPS).backward(upstream)
    layer_formula(*wide).backward(upstream.double())
    for leaf, exact in zip((x, weight, bias), wide, strict=True):
        assert leaf.grad is not None and exact.grad is not None
        error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_second_derivative_is_refused(dtype: torch.dtype) -> None:
    x, weight = normal(4, 1, 8).to(dtype).requires_grad_(), normal(8).to(dtype)
    (grad,) = torch.autograd.grad(exact_layer_norm(x, weight, None, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("device", "node"), [("cpu", "_LayerNorm"), ("meta", "NativeLayerNorm")])
def test_another_way_is_for_cpus_only(device: str, node: str) -> None:
    x, weight = (torch.empty(*shape, 8, device=device, dtype=torch.bfloat16) for shape in ((4, 1), ()))
    out = exact_layer_norm(x.requires_grad_(), weight, None, EPS)
    assert type(out.grad_fn).__name__.startswith(node)


@pytest.mark.parametrize("call", [layer_norm, exact_layer_norm], ids=["plain", "exact"])
def test_rows_far_from_zero(call: Callable[..., Tensor]) -> None:
    """A mean of a thousand deviations, as large as fp32 bears."""
    x = normal(4, 2, 64) + 1000
    compare(lambda x, w: call(x, w, None, EPS), layer_formula, [x, normal(64)], torch.float32, slack=2000)

"""residual + dropout(x + bias) against the formula in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_ds.kernels.dropout_add import bias_dropout_add, fused_bias_dropout_add
from tests.kernels.exact import DTYPES, compare, normal

Tensor = torch.Tensor
Call = Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
BOTH = pytest.mark.parametrize("call", [bias_dropout_add, fused_bias_dropout_add], ids=["plain", "fused"])


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=["same residual", "fp32 residual"])
def test_without_dropout(call: Call, dtype: torch.dtype, residual_dtype: torch.dtype | None) -> None:
    residual_dtype = residual_dtype or dtype
    for shape in ((1, 1, 1), (5, 3, 7), (9, 2, 513)):
        x, bias, residual = normal(*shape), normal(shape[-1]), normal(*shape, seed=1)
        for layout in ("whole", "transposed", "part"):
            compare(
                lambda x, bias, residual: call(x, bias, residual, 0.0),
                lambda x, bias, residual: x + bias + residual,
                [x, bias, residual],
                [dtype, dtype, residual_dtype],
                out=residual_dtype,
                layout=layout,
            )
        compare(
            lambda x, residual: call(x, None, residual, 0.0),
            torch.add,
            [x, residual],
            [dtype, residual_dtype],
            out=residual_dtype,
        )


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(call: Call, dtype: torch.dtype) -> None:
    """What is kept is seen in the output; the gradients are those of that."""
    torch.manual_seed(0)
    x, bias, residual = (
        t.to(dtype).requires_grad_() for t in (torch.ones(50, 4, 33), torch.ones(33), normal(50, 4, 33))
    )
    out = call(x, bias, residual, 0.2)
    added = out.detach().double() - residual.detach().double()
    kept = added > 1
    assert abs(kept.double().mean() - 0.8) < 0.02
    assert torch.allclose(added, 2.5 * kept.double(), rtol=0.0, atol=8 * torch.finfo(dtype).eps)
    upstream = normal(50, 4, 33, seed=3).to(dtype)
    out.backward(upstream)
    expected = upstream.double() * kept / 0.8
    rtol = 2 * torch.finfo(dtype).eps
    assert x.grad is not None and torch.allclose(x.grad.double(), expected, rtol=rtol, atol=1e-7)
    assert residual.grad is not None and torch.equal(residual.grad, upstream)
    assert bias.grad is not None and torch.allclose(
        bias.grad.double(), expected.sum((0, 1)), rtol=4 * rtol, atol=60 * rtol
    )


def test_a_second_derivative_is_refused() -> None:
    x, bias = torch.randn(2, 3, 4).requires_grad_(), torch.randn(4)
    (grad,) = torch.autograd.grad(fused_bias_dropout_add(x, bias, x, 0.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@BOTH
def test_gradients_of_leaves_share_no_memory(call: Call) -> None:
    x, residual = (torch.randn(2, 3, 4).requires_grad_() for _ in range(2))
    bias = torch.randn(4).requires_grad_()
    call(x, bias, residual, 0.0).sum().backward()
    assert x.grad is not None and residual.grad is not None
    x.grad.zero_()
    assert bool(residual.grad.all())

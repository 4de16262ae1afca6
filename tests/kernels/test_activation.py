"""Activations and their slopes against formulas in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megatron_ds.kernels import activation
from megatron_ds.kernels.activation import FUSED, REFERENCE
from tests.kernels.exact import DTYPES, compare, normal

Tensor = torch.Tensor


def erf_form(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def tanh_form(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def ramp(x: Tensor) -> Tensor:
    return x * (x > 0)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": lambda x: x * torch.sigmoid(x),
    "geglu_tanh": tanh_form,
    "geglu": erf_form,
    "reglu": ramp,
    "liglu": lambda x: x,
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": tanh_form,
    "gelu": erf_form,
    "relu": ramp,
    "squared_relu": lambda x: ramp(x) ** 2,
}
SHAPES = [(1, 1, 1), (3, 2, 7), (5, 1, 513), (40, 3, 32)]


def formula(name: str) -> Callable[..., Tensor]:
    def gated(x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        x = x + bias
        half = x.shape[-1] // 2
        return GATES[name](x[..., :half]) * x[..., half:]

    return gated if name in GATES else lambda x, bias=0.0: PLAIN[name](x + bias)


def test_all_names_are_there() -> None:
    assert set(REFERENCE) == set(FUSED) == {*GATES, *PLAIN}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*GATES, *PLAIN])
@pytest.mark.parametrize("table", [REFERENCE, FUSED], ids=["reference", "fused"])
def test_values_and_gradients(
    table: dict[str, activation.Activation], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation, "BLOCK", 100)  # of rows of 32 three, of 513 one
    call = table[name]
    for s, b, width in SHAPES:
        width = 2 * width if name in GATES else width
        x, bias = normal(s, b, width), normal(width)
        compare(call, formula(name), [x, bias], dtype, slack=8)
        compare(lambda x: call(x, None), formula(name), [x], dtype, slack=8)


@pytest.mark.parametrize("layout", ["transposed", "part"])
@pytest.mark.parametrize("name", [*GATES, *PLAIN])
def test_inputs_that_are_not_contiguous(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "BLOCK", 100)
    compare(FUSED[name], formula(name), [normal(7, 3, 26), normal(26)], torch.float32, slack=8, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_slope_of_gelu(dtype: torch.dtype) -> None:
    """The plain formula that is compiled, with and without a bias."""
    x, bias = normal(5, 2, 33), normal(33)
    call = activation.with_slope(activation.gelu_tanh_and_slope)
    compare(call, formula("gelu_tanh"), [x, bias], dtype, slack=8)
    compare(lambda x: call(x, None), formula("gelu_tanh"), [x], dtype, slack=8)


@pytest.mark.parametrize("name", ["gelu_tanh", "swiglu"])
def test_far_from_zero(name: str) -> None:
    """Where exp overflows and slopes are 0 or 1."""
    x = torch.tensor([-1e4, -90, -20, -0.0, 20, 90, 1e4, 1.0], dtype=torch.float64).view(1, 8)
    for dtype in DTYPES[:2]:
        compare(lambda x: FUSED[name](x, None), formula(name), [x], dtype)


@pytest.mark.parametrize("name", [*GATES, *PLAIN])
def test_blocks_are_for_cpus_only(name: str) -> None:
    """The table's defaults serve any device."""
    x = torch.empty(4, 2, 6, device="meta", requires_grad=True)
    out = FUSED[name](x, torch.empty(6, device="meta"))
    assert out.device.type == "meta" and out.shape == (4, 2, 3 if name in GATES else 6)
    assert "_WithSlope" not in type(out.grad_fn).__name__


@pytest.mark.parametrize("name", ["gelu_tanh", "swiglu"])
def test_a_second_derivative_is_refused(name: str) -> None:
    x = normal(4, 2, 6).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(FUSED[name](x, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", [*GATES, *PLAIN])
def test_nothing_is_kept_where_no_gradient_is_wanted(name: str) -> None:
    x = normal(4, 2, 6).float()
    with torch.no_grad():
        out = FUSED[name](x, None)
    assert out.grad_fn is None and torch.allclose(out.double(), formula(name)(x.double()), atol=1e-6)

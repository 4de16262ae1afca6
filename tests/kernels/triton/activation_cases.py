"""Activations against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megatron_ds.kernels.triton.activation import ACTIVATIONS
from tests.kernels.triton.cases import DEVICE, close, each_dtype, gradients, normal, wide

Tensor = torch.Tensor
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": torch.relu,
    "squared_relu": lambda x: torch.relu(x) ** 2,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "geglu_tanh": PLAIN["gelu_tanh"],
    "geglu": PLAIN["gelu"],
    "reglu": PLAIN["relu"],
    "liglu": lambda x: x,
}


def formula(name: str, x: Tensor, bias: Tensor | None) -> Tensor:
    x = x if bias is None else x + bias
    if name in PLAIN:
        return PLAIN[name](x)
    f = x.shape[-1] // 2
    return GATES[name](x[..., :f]) * x[..., f:]


@each_dtype
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("name", [*PLAIN, *GATES])
@pytest.mark.parametrize("shape", [(3, 2, 1), (2, 5, 7), (2, 1030)], ids=str)
def test_activation(name: str, shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    width = shape[-1] * (2 if name in GATES else 1)
    x = normal(*shape[:-1], width, dtype=dtype) * 2
    bias = normal(width, dtype=dtype, seed=1) if biased else None
    dy = normal(*shape, dtype=dtype, seed=2)
    y, found = gradients(ACTIVATIONS[name], [x] + [bias] * biased + [None] * (not biased), dy)
    want, expected = gradients(lambda x, b=None: formula(name, x, b), [wide(x), wide(bias)], dy.double())
    assert y.dtype == dtype
    close(y, want)
    close(found[0], expected[0])
    if biased:
        # It sums gradients that were rounded.
        rounding = torch.finfo(dtype).eps * expected[0].abs().flatten(0, -2).sum(0)
        assert found[1].dtype == dtype
        close(found[1], expected[1], noise=rounding)


@pytest.mark.parametrize("name", [*PLAIN, *GATES])
def test_far_from_zero(name: str) -> None:
    x = torch.tensor([[-200.0, -30.0, -10.0, -5.0, 0.0, 5.0, 10.0, 30.0, 200.0, 200.0]], device=DEVICE)
    dy = normal(1, 5 if name in GATES else 10)
    y, (dx,) = gradients(ACTIVATIONS[name], [x, None], dy)
    want, (wide_dx,) = gradients(lambda x, b=None: formula(name, x, None), [x.double(), None], dy.double())
    # GELU's tail is a difference from 1, and of that a multiple: of 5 * 200 for one gate.
    noise = 1e-4 if "geglu" in name else 0.0
    close(y, want, noise)
    close(dx, wide_dx, noise)


def test_relu_has_no_slope_at_zero() -> None:
    x = torch.zeros(2, 4, device=DEVICE)
    assert not gradients(ACTIVATIONS["relu"], [x, None], torch.ones_like(x))[1][0].any()


@pytest.mark.parametrize("name", [*PLAIN, *GATES])
def test_a_nan_stays_one(name: str) -> None:
    x = torch.full((2, 4), torch.nan, device=DEVICE)
    assert ACTIVATIONS[name](x, None).isnan().all()


def test_bias_of_a_single_row_and_none_at_all() -> None:
    x, bias = normal(6), normal(6, seed=1)
    y, (dx, db) = gradients(ACTIVATIONS["gelu"], [x, bias], normal(6))
    close(y, formula("gelu", x.double(), bias.double()))
    assert torch.equal(dx, db)
    y, (dx, db) = gradients(ACTIVATIONS["swiglu"], [normal(0, 6), bias], normal(0, 3))
    assert y.shape == (0, 3) and dx.shape == (0, 6)
    assert db.tolist() == [0.0] * 6


def test_input_that_is_not_contiguous() -> None:
    x, dy = normal(12, 5).t(), normal(6, 5, seed=1).t()
    y, (dx,) = gradients(ACTIVATIONS["geglu"], [x, None], dy)
    want, (wide_dx,) = gradients(lambda x, b=None: formula("geglu", x, None), [x.double(), None], dy.double())
    close(y, want)
    close(dx, wide_dx)

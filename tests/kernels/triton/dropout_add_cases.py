"""Bias, dropout, add against the formula, with the mask that the output itself shows."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels.triton.dropout_add import bias_dropout_add
from tests.kernels.triton.cases import close, each_dtype, gradients, normal

Tensor = torch.Tensor


@each_dtype
@pytest.mark.parametrize("single", [False, True], ids=["same", "fp32_residual"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 7), (2, 1030)], ids=str)
def test_value_and_gradients(
    shape: tuple[int, ...], dropout: float, biased: bool, single: bool, dtype: torch.dtype
) -> None:
    residual_dtype = torch.float32 if single else dtype
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=residual_dtype, seed=1)
    bias = normal(shape[-1], dtype=dtype, seed=2) if biased else None
    dy = normal(*shape, dtype=residual_dtype, seed=3)
    dy[dy == 0] = 1
    torch.manual_seed(5)
    inputs = [x, residual] + [bias] * biased
    y, (dx, dr, *db) = gradients(lambda x, r, b=None: bias_dropout_add(x, b, r, dropout), inputs, dy)
    kept = (dx != 0).double() / (1 - dropout) if dropout < 1 else torch.zeros_like(dx).double()
    branch = x.double() + (bias.double() if biased else 0.0)
    assert y.dtype == dr.dtype == residual_dtype and dx.dtype == dtype
    close(y, residual.double() + branch * kept)
    close(dx, dy.double() * kept)
    assert torch.equal(dr, dy)
    if biased:
        rounding = torch.finfo(dtype).eps * (dy.double() * kept).abs().flatten(0, -2).sum(0)
        assert db[0].dtype == dtype
        close(db[0], (dy.double() * kept).flatten(0, -2).sum(0), noise=rounding)


def mask(seed: int, shape: tuple[int, ...] = (40, 100)) -> Tensor:
    torch.manual_seed(seed)
    one = normal(*shape) * 0 + 1
    return bias_dropout_add(one, None, one * 0, 0.25)


def test_torchs_generator_decides_the_mask() -> None:
    assert torch.equal(mask(1), mask(1))
    assert not torch.equal(mask(1), mask(2))
    torch.manual_seed(1)
    one = normal(40, 100) * 0 + 1
    first, second = (bias_dropout_add(one, None, one * 0, 0.25) for _ in range(2))
    assert not torch.equal(first, second)


def test_share_that_is_dropped() -> None:
    dropped = (mask(3) == 0).double()
    # 4000 draws: their share has a standard deviation of 0.007, that of a row of 100 one of 0.043.
    assert abs(dropped.mean() - 0.25) < 0.03
    assert (dropped.mean(1) - 0.25).abs().max() < 0.22
    assert (dropped.mean(0) - 0.25).abs().max() < 0.35
    assert len(set(map(tuple, dropped.tolist()))) == 40


def test_nothing_to_add() -> None:
    x = normal(0, 8)
    y, (dx, dr, db) = gradients(lambda x, r, b: bias_dropout_add(x, b, r, 0.5), [x, x, normal(8)], x)
    assert y.shape == dx.shape == dr.shape == (0, 8)
    assert db.tolist() == [0.0] * 8


def test_input_that_is_not_contiguous() -> None:
    x, residual = normal(5, 3).t(), normal(3, 5, 2)[..., 0]
    dy = normal(5, 3, seed=1).t()
    y, (dx, dr) = gradients(lambda x, r: bias_dropout_add(x, None, r, 0.5), [x, residual], dy)
    close(y, residual.double() + x.double() * (dx != 0) * 2)
    close(dx, dy.double() * (dx != 0) * 2)
    assert torch.equal(dr, dy)

"""LayerNorm and RMSNorm against their formulas."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels.triton.norm import layer_norm, rms_norm
from tests.kernels.triton.cases import close, each_dtype, gradients, normal, wide

Tensor = torch.Tensor
EPS = 1e-5


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, centred: bool) -> Tensor:
    if centred:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return y if bias is None else y + bias


@each_dtype
@pytest.mark.parametrize("kind", ["layer", "layer_without_bias", "rms"])
@pytest.mark.parametrize("shape", [(3, 2, 1), (2, 5, 7), (23, 100), (2, 3, 513), (1025,)], ids=str)
def test_norm(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    h, centred = shape[-1], kind != "rms"
    x, weight = normal(*shape, dtype=dtype) + 1, normal(h, dtype=dtype, seed=1)
    bias = normal(h, dtype=dtype, seed=2) if kind == "layer" else None
    dy = normal(*shape, dtype=dtype, seed=3)
    norm = layer_norm if centred else rms_norm
    y, found = gradients(lambda x, w, b=None: norm(x, w, b, EPS), [x, weight, bias], dy)
    want, expected = gradients(
        lambda x, w, b=None: formula(x, w, b, centred), [wide(x), wide(weight), wide(bias)], dy.double()
    )
    assert y.dtype == dtype
    close(y, want)
    # A row of one number is its own mean: what is divided by is sqrt(eps), and so are the errors.
    close(found[0], expected[0], noise=1e-3 if h == 1 else 0.0)
    for grad, other in zip(found[1:], expected[1:], strict=True):
        assert grad.dtype == dtype
        close(grad, other)


def test_rows_far_from_zero_keep_their_variance() -> None:
    x, one = 1000 + normal(4, 300), normal(300) * 0 + 1
    close(layer_norm(x, one, None, EPS), formula(x.double(), one.double(), None, True), noise=1e-4)


def test_input_that_is_not_contiguous() -> None:
    x, weight = normal(6, 10, 2).transpose(0, 1)[..., 0], normal(6)
    y, (dx, dw) = gradients(lambda x, w: rms_norm(x, w, None, EPS), [x, weight], normal(6, 10).t())
    want, (wide_dx, wide_dw) = gradients(
        lambda x, w: formula(x, w, None, False), [x.double(), weight.double()], normal(6, 10).t().double()
    )
    close(y, want)
    close(dx, wide_dx)
    close(dw, wide_dw)


def test_weight_without_gradient() -> None:
    x, weight, bias = normal(4, 8).requires_grad_(), normal(8), normal(8).requires_grad_()
    layer_norm(x, weight, bias, EPS).sum().backward()
    assert weight.grad is None
    close(bias.grad, torch.full_like(bias, 4).double())


def test_no_rows() -> None:
    x, weight = normal(0, 8), normal(8)
    y, (dx, dw) = gradients(lambda x, w: layer_norm(x, w, None, EPS), [x, weight], x)
    assert y.shape == dx.shape == (0, 8)
    assert dw.tolist() == [0.0] * 8


def test_runs_repeat_bit_by_bit() -> None:
    x, weight, bias, dy = normal(200, 33), normal(33), normal(33, seed=1), normal(200, 33, seed=2)
    one, two = (gradients(lambda *t: layer_norm(*t, EPS), [x, weight, bias], dy)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

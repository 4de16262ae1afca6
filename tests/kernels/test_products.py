"""The products of linear layers against einsum in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels import products as kernel
from megatron_ds.kernels.products import FUSED, IN_FP32, REFERENCE, Products, add_rows
from tests.kernels.exact import DTYPES, near, normal

Tensor = torch.Tensor
ALL = pytest.mark.parametrize("products", [REFERENCE, FUSED, IN_FP32], ids=["reference", "fused", "in fp32"])
SHAPES = [(1, 1, 1), (7, 1, 513), (33, 48, 7), (0, 3, 2)]
"""n, i, o"""


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["whole", "transposed"])
def test_the_three_products(
    products: Products, shape: tuple[int, ...], turned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "WIDENED", 100)
    n, i, o = shape

    def made(rows: int, width: int) -> Tensor:
        t = normal(rows, width).to(dtype)
        return t.t().contiguous().t() if turned else t

    x, weight, grad, bias = made(n, i), made(o, i), made(n, o), normal(o).to(dtype)
    wide_x, wide_w, wide_g = (t.double() for t in (x, weight, grad))
    eps = torch.finfo(dtype).eps
    y = torch.einsum("ni,oi->no", wide_x, wide_w)
    for name, found, expected in (
        ("forward", products.forward(x, weight, None), y),
        ("with bias", products.forward(x, weight, bias), y + bias.double()),
        ("grad_input", products.grad_input(grad, weight), torch.einsum("no,oi->ni", wide_g, wide_w)),
        ("grad_weight", products.grad_weight(grad, x), torch.einsum("no,ni->oi", wide_g, wide_x)),
    ):
        assert found.dtype == dtype and found.shape == expected.shape
        near(name, found, expected, 16 if dtype == torch.float32 else 2, eps)


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("total_dtype", [torch.float32, None], ids=["fp32 total", "same total"])
@pytest.mark.parametrize("beta", [0, 1])
def test_weight_gradients_add_up_in_place(
    products: Products, beta: int, total_dtype: torch.dtype | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """beta: of the first of three products."""
    monkeypatch.setattr(kernel, "BLOCK", 100)
    monkeypatch.setattr(kernel, "WIDENED", 100)
    total_dtype = total_dtype or dtype
    for n, i, o in SHAPES:
        buffer = normal(2 * o, i).to(total_dtype)
        total, beside = buffer[:o], buffer[o:].clone()
        expected = total.double() * beta
        if not beta:
            total.fill_(torch.nan)
        for batch in range(3):
            x, grad = normal(n, i, seed=batch).to(dtype), normal(n, o, seed=10 + batch).to(dtype)
            expected = expected + torch.einsum("no,ni->oi", grad.double(), x.double())
            products.add_grad_weight(total, grad, x, beta if batch == 0 else 1)
        near("total", total, expected, 16 if dtype == torch.float32 else 4, torch.finfo(dtype).eps)
        assert torch.equal(buffer[o:], beside)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_add_up_where_ids_repeat(dtype: torch.dtype) -> None:
    ids = torch.tensor([3, 0, 3, 3, 5])
    rows = normal(5, 7).to(dtype)
    total = normal(6, 7).float()
    expected = total.double()
    for position, number in enumerate(ids.tolist()):
        expected[number] += rows[position].double()
    add_rows(total, ids, rows)
    near("total", total, expected, 4, torch.finfo(torch.float32).eps)

"""Rotary embedding against a multiplication of complex numbers, its gradient against one by the conjugate."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels.triton.rope import apply_rope
from tests.kernels.triton.cases import close, each_dtype, gradients, normal

Tensor = torch.Tensor


def table(s: int, b: int, rotated: int, dtype: torch.dtype) -> Tensor:
    angles = normal(s, b, 1, rotated // 2) * 3
    angles = torch.cat((angles, angles), -1)
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def turn(x: Tensor, table: Tensor, back: bool) -> Tensor:
    half, table = table.shape[-1] // 2, table.double()
    by = torch.complex(table[0, ..., :half], -table[1, ..., :half] if back else table[1, ..., :half])
    turned = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * by
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :].double()), -1)


@each_dtype
@pytest.mark.parametrize(
    ("shape", "rotated"),
    [((3, 2, 1, 2), 2), ((2, 3, 5, 10), 10), ((3, 1, 4, 13), 6), ((2, 2, 3, 80), 80), ((2, 1, 33, 64), 16)],
    ids=str,
)
def test_rope(shape: tuple[int, int, int, int], rotated: int, dtype: torch.dtype) -> None:
    x, dy = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    angles = table(*shape[:2], rotated, dtype)
    y, (dx,) = gradients(lambda x: apply_rope(x, angles), [x], dy)
    assert y.dtype == dx.dtype == dtype and y.is_contiguous()
    close(y, turn(x, angles, False))
    close(dx, turn(dy, angles, True))
    assert torch.equal(y[..., rotated:], x[..., rotated:])


def test_slices_and_gradients_lie_anywhere() -> None:
    x = normal(4, 2, 3, 3 * 8).requires_grad_()
    angles = table(4, 2, 8, torch.float32)
    queries = apply_rope(x[..., 8:16], angles)
    queries.backward(normal(8, 3, 2, 4).permute(3, 2, 1, 0))
    close(queries, turn(x[..., 8:16].detach(), angles, False))
    close(x.grad[..., 8:16], turn(normal(8, 3, 2, 4).permute(3, 2, 1, 0), angles, True))
    assert not x.grad[..., :8].any() and not x.grad[..., 16:].any()


def test_one_table_for_all_samples() -> None:
    x, angles = normal(4, 3, 2, 6), table(4, 1, 6, torch.float32)
    close(apply_rope(x, angles), turn(x, angles, False))
    x = normal(6, 2, 3, 4).permute(3, 2, 1, 0)
    close(apply_rope(x, angles.transpose(-1, -2).contiguous().transpose(-1, -2)), turn(x, angles, False))


def test_halves_of_the_table_may_differ() -> None:
    x, dy, angles = normal(2, 1, 1, 4), normal(2, 1, 1, 4, seed=2), normal(2, 2, 1, 1, 4, seed=1)
    cos, sin = angles.double()

    def formula(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    y, (dx,) = gradients(lambda x: apply_rope(x, angles), [x], dy)
    want, (wide_dx,) = gradients(formula, [x.double()], dy.double())
    close(y, want)
    close(dx, wide_dx)


def test_no_positions() -> None:
    y, (dx,) = gradients(
        lambda x: apply_rope(x, table(0, 2, 4, torch.float32)), [normal(0, 2, 3, 4)], normal(0, 2, 3, 4)
    )
    assert y.shape == dx.shape == (0, 2, 3, 4)

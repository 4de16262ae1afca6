"""Rotary positions against complex numbers in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels.rope import apply_rope, rope_frequencies, rope_table
from tests.kernels.exact import DTYPES, compare, normal

Tensor = torch.Tensor


@pytest.mark.parametrize("layout", ["whole", "part"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "rotated"), [(2, 2), (12, 12), (12, 4), (65, 64)])
def test_features_turn_in_pairs(d: int, rotated: int, dtype: torch.dtype, layout: str) -> None:
    """Feature i and feature i + rotated/2 are a complex number, turned by position times frequency; the rest stays."""
    s, b, half = 5, 3, rotated // 2
    positions = torch.tensor([[0, 7, 1], [1, 8, 2], [2, 9, 0], [3, 0, 1], [4, 1, 2]])
    frequencies = rope_frequencies(rotated, 100.0)
    table = rope_table(positions, frequencies, dtype)
    assert table.shape == (2, s, b, 1, rotated)
    exactly = 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    assert torch.allclose(frequencies.double(), exactly, rtol=1e-6)
    turn = torch.polar(torch.ones(s, b, 1, half, dtype=torch.float64), (positions.unsqueeze(-1) * exactly).unsqueeze(2))

    def formula(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., :half], x[..., half:rotated]) * turn
        return torch.cat((turned.real, turned.imag, x[..., rotated:]), -1)

    slack = 32 if dtype == torch.float32 else 4  # an angle near 10 has an error of 1e-6 in fp32
    inputs = [normal(s, b, 4, d)]
    compare(lambda x: apply_rope(x, table), formula, inputs, dtype, slack=slack, layout=layout)

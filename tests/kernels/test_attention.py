"""Attention in blocks of rows against the definition in fp64, and against torch's own in its own precision."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ds.kernels.attention import ROWS, attention, causal_attention


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, row by row."""
    s, b, a, d = q.shape
    out = torch.empty_like(q)
    for row in range(s):
        scores = torch.einsum("bad,tbad->tba", q[row], k[: row + 1]) / math.sqrt(d)
        out[row] = torch.einsum("tba,tbad->bad", scores.softmax(0), v[: row + 1])
    return out.reshape(s, b, a * d)


@pytest.mark.parametrize(
    ("s", "b", "a", "d"), [(1, 1, 1, 8), (37, 2, 3, 24), (ROWS, 1, 2, 16), (2 * ROWS + 5, 2, 2, 64)]
)
def test_bf16_blocks_are_as_good_as_torchs(s: int, b: int, a: int, d: int) -> None:
    torch.manual_seed(0)
    fused = torch.randn(s, b, 3 * a * d).bfloat16()
    upstream = torch.randn(s, b, a * d).bfloat16()

    def run(function, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        x = fused.detach().to(dtype).requires_grad_()
        q, k, v = (t.view(s, b, a, d) for t in x.split(a * d, dim=-1))
        out = function(q, k, v)
        out.backward(upstream.to(dtype))
        assert x.grad is not None
        return out.detach().double(), x.grad.double()

    true = run(by_definition, torch.float64)
    ours = run(lambda q, k, v: attention(q, k, v, 0.0), torch.bfloat16)
    torchs = run(lambda q, k, v: causal_attention(q, k, v, 0.0), torch.bfloat16)
    for found, peer, expected in zip(ours, torchs, true, strict=True):
        error, peers_error = ((t - expected).norm() / expected.norm() for t in (found, peer))
        assert error < 6e-3
        assert error < 2 * peers_error + 1e-4


def test_blocks_are_taken_for_short_bf16_on_cpu_only() -> None:
    def taken(s: int, dtype: torch.dtype, kv_heads: int, dropout: float) -> bool:
        q = torch.randn(s, 1, 2, 8, dtype=dtype, requires_grad=True)
        k = torch.randn(s, 1, kv_heads, 8, dtype=dtype)
        node = attention(q, k, k, dropout).grad_fn
        assert node is not None
        return "Blocks" in type(node).__name__

    assert taken(64, torch.bfloat16, 2, 0.0)
    for other in (
        (64, torch.float32, 2, 0.0),
        (1024, torch.bfloat16, 2, 0.0),
        (64, torch.bfloat16, 1, 0.0),
        (64, torch.bfloat16, 2, 0.1),
    ):
        assert not taken(*other)

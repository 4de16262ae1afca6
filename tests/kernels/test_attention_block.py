"""One block of attention against softmax written out in fp64, which autograd differentiates."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ds.kernels import attention_block
from megatron_ds.kernels.attention_block import FLASH_CPU, PLAIN, BlockKernel, block_backward, block_forward

Tensor = torch.Tensor
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SHAPES = [(4, 4, 7, 7, 5), (6, 2, 5, 12, 16), (4, 1, 70, 33, 24)]
"""Query heads, key heads, queries, keys, head size."""


def inputs(a: int, k: int, sq: int, sk: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient, laid out as the model has them: a transposed view with the position outermost."""
    generator = torch.Generator().manual_seed(a + 10 * sq + 100 * d)
    shapes = [(sq, 2, a, d), (sk, 2, k, d), (sk, 2, k, d), (sq, 2, a, d)]
    return [torch.randn(shape, generator=generator).to(dtype).permute(1, 2, 0, 3) for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool, keep: Tensor | float = 1.0) -> list[Tensor]:
    """Output, log-sum-exp and the three gradients in fp64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    all_k, all_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, all_k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None], -1e30)
    out = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1) * keep, all_v)
    grads = torch.autograd.grad(out, (q, k, v), grad.double())
    return [out.detach(), scores.logsumexp(-1).detach(), *grads]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        error = (x.double() - y).abs().max() / y.abs().max()
        assert x.shape == y.shape and error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", [FLASH_CPU, PLAIN], ids=["flash_cpu", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], kernel: BlockKernel, dtype: torch.dtype) -> None:
    for causal in {False, shape[2] == shape[3]}:
        q, k, v, grad = inputs(*shape, dtype)
        out, lse = kernel.forward(q, k, v, causal, 0.0)
        grads = kernel.backward(grad, q, k, v, out, lse, causal, 0.0)
        assert {t.dtype for t in (out, *grads)} == {dtype} and lse.dtype == torch.float32
        close([out, lse, *grads], dense(q, k, v, grad, causal), TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", [FLASH_CPU, PLAIN], ids=["flash_cpu", "plain"])
def test_blocks_of_keys_share_the_whole_rows_output_and_log_sum_exp(kernel: BlockKernel) -> None:
    q, k, v, grad = inputs(6, 2, 9, 14, 8, torch.float32)
    expected = dense(q, k, v, grad, causal=False)
    out, lse = expected[0].float(), expected[1].float()
    left, right = (
        kernel.backward(grad, q, k[:, :, cut], v[:, :, cut], out, lse, False, 0.0)
        for cut in (slice(None, 5), slice(5, None))
    )
    dk, dv = (torch.cat((left[i], right[i]), dim=2) for i in (1, 2))
    close([out, lse, left[0] + right[0], dk, dv], expected, 1e-5)


@pytest.mark.parametrize("kernel", [FLASH_CPU, PLAIN], ids=["flash_cpu", "plain"])
def test_some_of_the_queries(kernel: BlockKernel) -> None:
    """Slices of the whole rows' output and log-sum-exp are not contiguous."""
    q, k, v, grad = inputs(4, 2, 12, 6, 8, torch.float32)
    out, lse, *_ = (t.float() for t in dense(q, k, v, grad, causal=False))
    q, grad, out, lse = (t[:, :, 5:] for t in (q, grad, out, lse))
    grads = kernel.backward(grad, q, k, v, out, lse, False, 0.0)
    close([out, lse, *grads], dense(q, k, v, grad, causal=False), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_drops_the_same_in_both_directions(causal: bool, dtype: torch.dtype) -> None:
    q, k, v, grad = inputs(6, 2, 40, 40, 5, dtype)
    torch.manual_seed(7)
    out, lse = block_forward(q, k, v, causal, 0.3)
    torch.manual_seed(7)
    grads = block_backward(grad, q, k, v, out, lse, causal, 0.3)
    torch.manual_seed(7)
    keep = torch.empty(2, 6, 40, 40).bernoulli_(0.7) / 0.7
    close([out, lse, *grads], dense(q, k, v, grad, causal, keep), TOLERANCE[dtype])


def test_what_is_chosen() -> None:
    q, k, v, _ = inputs(4, 4, 8, 8, 8, torch.float32)
    assert attention_block.choose(q, k, v, 0.0) is FLASH_CPU
    assert attention_block.choose(q, k, v, 0.1) is PLAIN


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_shapes_without_memory(dropout: float) -> None:
    with FakeTensorMode():
        q, k = torch.empty(2, 64, 2**14, 128, dtype=torch.bfloat16), torch.empty(2, 8, 2**14, 128, dtype=torch.bfloat16)
        out, lse = block_forward(q, k, k, True, dropout)
        grads = block_backward(q, q, k, k, out, lse, True, dropout)
    assert out.shape == q.shape and lse.shape == (2, 64, 2**14)
    assert [t.shape for t in grads] == [q.shape, k.shape, k.shape]

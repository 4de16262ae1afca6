"""Cross-entropy over one rank's columns against torch's in fp64 over all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_ds.kernels import cross_entropy
from megatron_ds.kernels.cross_entropy import BY_BLOCKS, REFERENCE, CrossEntropy
from tests.kernels.exact import DTYPES, near, normal

Tensor = torch.Tensor
BOTH = pytest.mark.parametrize("kernel", [REFERENCE, BY_BLOCKS], ids=["reference", "by blocks"])
ROWS = 11


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four rows of a width of 100, of one row where a row is longer than a block."""
    monkeypatch.setattr(cross_entropy, "BLOCK", 400)


def columns(width: int, seed: int = 0) -> Tensor:
    return torch.randint(width, (ROWS,), generator=torch.Generator().manual_seed(seed + width))


def exact(logits: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of the logits, in fp64."""
    wide = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(wide, target, reduction="none")
    (losses * upstream.double()).sum().backward()
    assert wide.grad is not None
    return losses.detach(), wide.grad


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "valid"), [(1, 1), (7, 7), (7, 1), (100, 100), (100, 37), (513, 512)])
def test_one_rank(kernel: CrossEntropy, width: int, valid: int, dtype: torch.dtype) -> None:
    logits, column, upstream = 4 * normal(ROWS, width).to(dtype), columns(valid), normal(ROWS).float()
    losses, gradient = exact(logits[:, :valid], column, upstream)
    logits[:, valid:] = torch.nan  # whatever padding holds
    before = logits.clone()
    log_sum, target = kernel.statistics(logits, column, valid)
    assert torch.equal(logits[:, :valid], before[:, :valid])
    assert log_sum.dtype == target.dtype == torch.float32
    near("loss", log_sum - target, losses, 16, torch.finfo(torch.float32).eps)
    out = kernel.gradient(logits, column, valid, log_sum, log_sum, upstream)
    assert out.data_ptr() == logits.data_ptr() and out.dtype == dtype and out.shape == logits.shape
    near("gradient", logits[:, :valid], gradient, 8 if dtype == torch.float32 else 1, torch.finfo(dtype).eps)
    assert torch.equal(logits[:, valid:], torch.zeros_like(logits[:, valid:]))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(50, 50), (50, 13), (50, 1), (50, 0), (3, 513)], ids=str)
@pytest.mark.parametrize("apart", [0.0, 30.0, -300.0])
def test_two_ranks_merge_by_hand(
    kernel: CrossEntropy, sizes: tuple[int, int], apart: float, dtype: torch.dtype
) -> None:
    """The second holds padding behind its columns, or nothing else; its logits may be far from the first's."""
    width, padded = sum(sizes), max(sizes[1], 50)
    logits = 3 * normal(ROWS, width)
    logits[:, sizes[0] :] += apart
    logits, column, upstream = logits.to(dtype), columns(width), normal(ROWS).float()
    losses, gradient = exact(logits, column, upstream)
    first = logits[:, : sizes[0]].clone()
    second = torch.full((ROWS, padded), 9.0, dtype=dtype)
    second[:, : sizes[1]] = logits[:, sizes[0] :]
    here = column < sizes[0]
    parts = (
        (first, torch.where(here, column, -1), sizes[0]),
        (second, torch.where(here, -1, column - sizes[0]), sizes[1]),
    )
    (sum_1, target_1), (sum_2, target_2) = (kernel.statistics(*part) for part in parts)
    assert bool((target_1[~here] == 0).all()) and bool((target_2[here] == 0).all())
    if not sizes[1]:
        assert bool((sum_2 == -torch.inf).all())
    total = torch.logaddexp(sum_1, sum_2)
    near("loss", total - target_1 - target_2, losses, 16, torch.finfo(torch.float32).eps)
    for part, log_sum, expected in zip(parts, (sum_1, sum_2), gradient.split(sizes, 1), strict=True):
        grad = kernel.gradient(*part, log_sum, total, upstream)
        # Numbers near 300 have an error of 2e-5 in fp32, and so have their exponentials.
        slack = 300 if dtype == torch.float32 else 1
        near("gradient", grad[:, : part[2]], expected, slack, torch.finfo(dtype).eps)
        assert not bool(grad[:, part[2] :].any())


@BOTH
def test_no_rows(kernel: CrossEntropy) -> None:
    logits, column = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    log_sum, target = kernel.statistics(logits, column, 7)
    assert log_sum.shape == target.shape == (0,)
    assert kernel.gradient(logits, column, 7, log_sum, log_sum, torch.empty(0)).shape == (0, 7)


@BOTH
def test_logits_at_the_end_of_fp16(kernel: CrossEntropy) -> None:
    logits = torch.tensor([[6e4, -6e4, 6e4], [-6e4, -6e4, -6e4]]).half()
    column = torch.tensor([0, 1])
    log_sum, target = kernel.statistics(logits, column, 3)
    assert torch.allclose(log_sum - target, torch.tensor([2.0, 3.0]).log(), atol=4e-3)  # 6e4 has 2e-3 in fp32
    grad = kernel.gradient(logits, column, 3, log_sum, log_sum, torch.ones(2))
    assert torch.allclose(grad, torch.tensor([[-1 / 2, 0, 1 / 2], [1 / 3, -2 / 3, 1 / 3]]).half(), atol=3e-3)


@BOTH
def test_logits_that_are_part_of_a_larger_tensor(kernel: CrossEntropy) -> None:
    whole = normal(ROWS, 40).float()
    logits, column, upstream = whole[:, 3:20], columns(17), normal(ROWS).float()
    losses, gradient = exact(logits, column, upstream)
    outside = whole[:, 20:].clone()
    log_sum, target = kernel.statistics(logits, column, 17)
    kernel.gradient(logits, column, 17, log_sum, log_sum, upstream)
    near("loss", log_sum - target, losses, 16, torch.finfo(torch.float32).eps)
    near("gradient", whole[:, 3:20], gradient, 8, torch.finfo(torch.float32).eps)
    assert torch.equal(whole[:, 20:], outside)

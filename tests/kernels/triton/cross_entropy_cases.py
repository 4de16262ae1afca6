"""Cross-entropy, forward and backward half, against log-sum-exp and softmax in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels.triton.cross_entropy import gradient, statistics
from tests.kernels.triton.cases import DEVICE, close, each_dtype, normal

Tensor = torch.Tensor


def columns(n: int, valid: int) -> Tensor:
    """Targets; every third lies on another rank."""
    column = torch.arange(n, device=DEVICE) * 7 % max(valid, 1)
    column[2::3] = -1
    return column if valid else torch.full_like(column, -1)


def onehot(column: Tensor, w: int) -> Tensor:
    return (column[:, None] == torch.arange(w, device=DEVICE)).double()


@each_dtype
@pytest.mark.parametrize(
    ("n", "w", "valid"),
    [(3, 1, 1), (5, 7, 7), (4, 100, 93), (4, 513, 1), (3, 8, 0), (4, 5001, 4500), (2, 9000, 8192)],
    ids=str,
)
def test_statistics_and_gradient(n: int, w: int, valid: int, dtype: torch.dtype) -> None:
    logits, column, upstream = normal(n, w, dtype=dtype) * 4, columns(n, valid), normal(n, seed=1)
    real = logits[:, :valid].double()
    log_sum, target = statistics(logits, column, valid)
    assert log_sum.dtype == target.dtype == torch.float32
    if valid:
        close(log_sum, real.logsumexp(-1))
    else:
        assert (log_sum == -torch.inf).all()
    close(target, (logits.double() * onehot(column, w)).sum(-1))
    # As if another rank held as much again, so that the sum is not this rank's alone.
    total = (real.logsumexp(-1) if valid else torch.zeros(n, device=DEVICE).double()) + 0.7
    share = torch.exp(logits.double() - total[:, None])
    share[:, valid:] = 0
    want = (share - onehot(column, w)) * upstream.double()[:, None]
    found = gradient(logits, column, valid, log_sum, total.float(), upstream)
    assert found is logits
    close(logits, want)
    assert not logits[:, valid:].any()


def test_a_loss_and_its_gradient_are_torchs() -> None:
    logits, target = normal(6, 50), torch.arange(6, device=DEVICE)
    wide = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide, target, reduction="sum")
    loss.backward()
    log_sum, at_target = statistics(logits, target, 50)
    close((log_sum - at_target).sum(), loss.detach())
    close(gradient(logits, target, 50, log_sum, log_sum, torch.ones_like(log_sum)), wide.grad)


def test_autograd_notices() -> None:
    leaf, column = normal(3, 8).requires_grad_(), columns(3, 8)
    logits = leaf * 1
    kept = (logits * logits).sum()
    log_sum, _ = statistics(logits.detach(), column, 8)
    gradient(logits.detach(), column, 8, log_sum, log_sum, torch.ones_like(log_sum))
    with pytest.raises(RuntimeError, match="inplace operation"):
        kept.backward()


def test_large_and_missing_logits() -> None:
    logits = normal(3, 9000)
    logits[0] += 3e4
    logits[1, :5000] = -torch.inf  # a whole block of them before the first number
    logits[2] = -torch.inf
    log_sum, _ = statistics(logits, columns(3, 9000), 9000)
    close(log_sum[:2], logits[:2].double().logsumexp(-1))
    assert log_sum[2] == -torch.inf


def test_padding_may_hold_anything() -> None:
    logits, column = normal(2, 40), columns(2, 30)
    logits[:, 30:] = torch.tensor([torch.nan, torch.inf] * 5, device=DEVICE)
    log_sum, _ = statistics(logits, column, 30)
    close(log_sum, logits[:, :30].double().logsumexp(-1))
    gradient(logits, column, 30, log_sum, log_sum, torch.ones_like(log_sum))
    assert not logits[:, 30:].any() and logits.isfinite().all()


def test_a_nan_reaches_the_loss() -> None:
    logits = normal(2, 5000)
    logits[1, 4999] = torch.nan
    log_sum, _ = statistics(logits, columns(2, 5000), 5000)
    assert log_sum.isnan().tolist() == [False, True]


def test_rows_of_a_wider_matrix_and_none_at_all() -> None:
    whole = normal(4, 40)
    before, part, column = whole.clone(), whole[:, 8:30], columns(4, 22)
    log_sum, target = statistics(part, column, 22)
    close(log_sum, part.double().logsumexp(-1))
    close(target, (part.double() * onehot(column, 22)).sum(-1))
    want = part.double().softmax(-1) - onehot(column, 22)
    close(gradient(part, column, 22, log_sum, log_sum, torch.ones_like(log_sum)), want)
    assert torch.equal(whole[:, :8], before[:, :8]) and torch.equal(whole[:, 30:], before[:, 30:])
    none = normal(0, 9)
    assert [t.shape for t in statistics(none, columns(0, 9), 9)] == [(0,), (0,)]
    assert gradient(none, columns(0, 9), 9, normal(0), normal(0), normal(0)) is none

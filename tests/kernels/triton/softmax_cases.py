"""Scaled masked softmax against the formula."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels.triton.softmax import softmax
from tests.kernels.triton.cases import DEVICE, close, each_dtype, gradients, normal

Tensor = torch.Tensor
SCALE = 0.7


def seen_keys(mask: Tensor | None, shape: tuple[int, ...], causal: bool) -> Tensor:
    sq, sk = shape[-2:]
    seen = torch.ones(sq, sk, dtype=torch.bool, device=DEVICE).tril() if causal else torch.tensor(True, device=DEVICE)
    return (seen if mask is None else seen & mask).expand(shape)


def formula(scores: Tensor, seen: Tensor) -> Tensor:
    weight = torch.exp(SCALE * scores) * seen
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total == 0, 1.0, total)


@each_dtype
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("masked", ["none", "padding", "heads", "whole"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 2, 7, 7), (2, 1, 3, 100), (1, 2, 2, 1030)], ids=str)
def test_softmax(shape: tuple[int, ...], masked: str, causal: bool, dtype: torch.dtype) -> None:
    b, a, sq, sk = shape
    lead = {"none": None, "padding": (b, 1), "heads": (1, a), "whole": (b, a)}[masked]
    mask = None if lead is None else normal(*lead, sq, sk, seed=4) > -0.5
    if mask is not None:
        mask[:, :, -1] = False  # a query that sees nothing
    scores, dp = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    seen = seen_keys(mask, shape, causal)
    p, (ds,) = gradients(lambda t: softmax(t, mask, SCALE, causal), [scores], dp)
    want, (wide_ds,) = gradients(lambda t: formula(t, seen), [scores.double()], dp.double())
    assert p.dtype == ds.dtype == dtype
    close(p, want)
    assert not p[~seen].any() and not ds[~seen].any()
    # The backward starts from the rounded result: each share p, and the sum of p dp.
    inner = (want * dp.double()).abs().sum(-1, keepdim=True)
    close(ds, wide_ds, noise=torch.finfo(dtype).eps * want * (dp.double().abs() + 2 * inner))


def test_large_scores() -> None:
    scores = normal(1, 1, 4, 50) * 1e4
    want = (scores.double() * SCALE).softmax(-1)
    close(softmax(scores, None, SCALE, False), want, noise=1e-3)


def test_hidden_scores_may_hold_anything() -> None:
    scores, mask = normal(1, 1, 9, 9), normal(1, 1, 9, 9, seed=1) > 0
    seen = seen_keys(mask, (1, 1, 9, 9), True)
    hidden = torch.where(seen, scores, torch.nan)
    close(softmax(hidden, mask, SCALE, True), formula(scores.double(), seen))


def test_scores_and_masks_lie_anywhere() -> None:
    scores, mask = normal(6, 5, 3, 2).permute(3, 2, 1, 0), (normal(6, 5, 1, 2) > 0).permute(3, 2, 1, 0)
    want = formula(scores.double(), seen_keys(mask, (2, 3, 5, 6), False))
    close(softmax(scores, mask, SCALE, False), want)


def test_no_keys() -> None:
    p, (ds,) = gradients(lambda t: softmax(t, None, 1.0, False), [normal(1, 2, 3, 0)], normal(1, 2, 3, 0))
    assert p.shape == ds.shape == (1, 2, 3, 0)

"""The scaled masked softmax against its formula in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels.softmax import softmax
from tests.kernels.exact import DTYPES, compare, normal

Tensor = torch.Tensor
MASKS: dict[str, tuple[int, int] | None] = {
    "none": None,
    "all": (1, 1),
    "samples": (2, 1),
    "heads": (1, 3),
    "each": (2, 3),
}


def formula(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """exp / sum of exp over what is seen, 0 where nothing is."""
    sq, sk = scores.shape[-2:]
    seen = torch.ones(1, 1, sq, sk, dtype=torch.bool) if mask is None else mask
    if causal:
        seen = seen & (torch.arange(sk) <= torch.arange(sq).unsqueeze(1))
    weights = torch.exp(scale * scores) * seen
    return weights / (weights.sum(-1, keepdim=True) + ~seen.any(-1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_values_and_gradients(kind: str, causal: bool, dtype: torch.dtype) -> None:
    for sq, sk in ((1, 1), (7, 7), (5, 33), (12, 7)):
        leading = MASKS[kind]
        mask = None if leading is None else normal(*leading, sq, sk) > 0
        if mask is not None:
            mask[0, 0, 0] = False  # a row that sees nothing
        compare(
            lambda scores: softmax(scores, mask, 0.7, causal),  # noqa: B023
            lambda scores: formula(scores, mask, 0.7, causal),  # noqa: B023
            [2 * normal(2, 3, sq, sk)],
            dtype,
        )


def test_scores_that_are_not_contiguous() -> None:
    for layout in ("transposed", "part"):
        compare(
            lambda scores: softmax(scores, None, 0.5, True),
            lambda scores: formula(scores, None, 0.5, True),
            [normal(3, 2, 5, 6)],
            torch.float32,
            layout=layout,
        )


def test_large_scores_do_not_overflow() -> None:
    scores = torch.tensor([[[[6e4, 6e4, -6e4]]]]).half()
    assert softmax(scores, None, 10.0, False).tolist() == [[[[0.5, 0.5, 0.0]]]]

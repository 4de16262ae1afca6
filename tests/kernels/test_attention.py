"""Attention in blocks of rows against the definition in fp64, and against torch's own in its own precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from megatron_ds.kernels import attention as kernel
from megatron_ds.kernels.attention import (
    ROWS,
    Attention,
    Pattern,
    attention,
    attention_in_fp32,
    by_backends,
    torch_attention,
    unfused,
)
from megatron_ds.kernels.flex import flex_mask, through
from megatron_ds.kernels.mask import Rule, alibi_bias, alibi_slopes, relative_buckets, visible, with_bias
from megatron_ds.kernels.softmax import softmax
from tests.kernels.exact import compare, normal

Seen = Callable[[int, int, int], bool]
"""(sample, query, key) -> whether it is seen."""


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen = lambda n, i, j: j <= i, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale q k^T) v, row by row over the keys that a row sees."""
    s, b, a, d = q.shape
    out = torch.empty_like(q)
    for n, row in itertools.product(range(b), range(s)):
        keys = [j for j in range(len(k)) if seen(n, row, j)]
        scores = torch.einsum("ad,tad->ta", q[row, n], k[keys, n]) * (scale or 1 / math.sqrt(d))
        out[row, n] = torch.einsum("ta,tad->ad", scores.softmax(0), v[keys, n])
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
    ours = run(lambda q, k, v: attention(q, k, v, None, Pattern(), 0.0), torch.bfloat16)
    torchs = run(lambda q, k, v: torch_attention(q, k, v, None, Pattern(), 0.0), torch.bfloat16)
    for found, peer, expected in zip(ours, torchs, true, strict=True):
        error, peers_error = ((t - expected).norm() / expected.norm() for t in (found, peer))
        assert error < 6e-3
        assert error < 2 * peers_error + 1e-4


def test_blocks_are_taken_for_short_sequences_on_cpu_only() -> None:
    def taken(s: int, dtype: torch.dtype, kv_heads: int, dropout: float) -> bool:
        q = torch.randn(s, 1, 2, 8, dtype=dtype, requires_grad=True)
        k = torch.randn(s, 1, kv_heads, 8, dtype=dtype)
        node = attention(q, k, k, None, Pattern(), dropout).grad_fn
        assert node is not None
        return "Blocks" in type(node).__name__

    for short in ((64, torch.bfloat16, 2, 0.0), (64, torch.float32, 2, 0.0), (64, torch.bfloat16, 1, 0.0)):
        assert taken(*short)
    for other in ((64, torch.float64, 2, 0.0), (1024, torch.bfloat16, 2, 0.0), (64, torch.bfloat16, 2, 0.1)):
        assert not taken(*other)


DOCUMENTS = torch.tensor([[0] * 150, [0] * 100 + [1] * 50, [0, 0, 1] + [2] * 147])
MASKS: dict[str, tuple[bool, int | None, torch.Tensor | None, Seen]] = {
    "both ways": (False, None, None, lambda n, i, j: True),
    "window": (True, 7, None, lambda n, i, j: 0 <= i - j <= 7),
    "padding": (False, None, DOCUMENTS, lambda n, i, j: bool(DOCUMENTS[n, i] == DOCUMENTS[n, j])),
    "documents": (True, None, DOCUMENTS, lambda n, i, j: j <= i and bool(DOCUMENTS[n, i] == DOCUMENTS[n, j])),
    "all": (True, 7, DOCUMENTS, lambda n, i, j: 0 <= i - j <= 7 and bool(DOCUMENTS[n, i] == DOCUMENTS[n, j])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_and_scales_equal_the_definition(kind: str, dtype: torch.dtype) -> None:
    causal, window, documents, seen = MASKS[kind]
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(150, 3, 2, 8, dtype=torch.float64) for _ in range(4))
    mask = visible(Rule(150, 150, causal, window, documents, documents))

    def run(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        out = function(*leaves)
        out.backward(upstream.to(dtype).flatten(2))
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]

    true = run(lambda q, k, v: by_definition(q, k, v, seen, 0.7), torch.float64)
    found = run(lambda q, k, v: attention(q, k, v, mask, Pattern(causal, 0.7), 0.0), dtype)
    limit = 1e-6 if dtype == torch.float32 else 2e-2
    for ours, expected in zip(found, true, strict=True):
        assert (ours - expected).norm() / expected.norm() < limit


def flash_in_fp32(*arguments: Any) -> torch.Tensor:
    """What sequences get that are longer than blocks serve."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernel, "LONGEST", 0)
        out = attention_in_fp32(*arguments)
    if arguments[0].dtype != torch.float32:
        assert "Flash" in type(out.grad_fn).__name__
    return out


ATTENTIONS: dict[str, Attention] = {
    "blocks": attention,
    "blocks in fp32": attention_in_fp32,
    "flash in fp32": flash_in_fp32,
    "torch": torch_attention,
    "unfused": unfused(softmax),
    "by backends": by_backends([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
}


def added(kind: str, sq: int, sk: int) -> torch.Tensor | None:
    """A mask of a kind: numbers, or booleans that show every query at least itself, or the last key."""
    seen = (normal(2, 1, sq, sk) > 0).index_fill_(3, torch.tensor([sk - 1]), True) | torch.eye(sq, sk, dtype=torch.bool)
    numbers = normal(1, 6, sq, sk).float().masked_fill(~seen[:1], -math.inf)
    return {"booleans": seen, "numbers": numbers}.get(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "both ways", "booleans", "numbers"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_key_heads_that_are_shared(name: str, kind: str, dtype: torch.dtype) -> None:
    """Six query heads on six, two and one; several blocks, the last cut short; fewer or more keys than queries."""
    pattern = Pattern(kind == "causal", 0.4)
    for heads, sq, sk in ((6, 9, 9), (2, ROWS + 7, ROWS + 7), (1, 2 * ROWS, 2 * ROWS), (2, ROWS + 3, 20), (2, 5, 70)):
        if kind == "causal" and sq != sk:
            continue
        mask = added(kind, sq, sk)

        def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k, v = (t.repeat_interleave(6 // t.shape[2], 2) for t in (k, v))
            scores = 0.4 * torch.einsum("ibad,jbad->baij", q, k)
            if mask is not None:  # noqa: B023
                scores = scores + (mask if kind == "numbers" else torch.zeros(()).masked_fill(~mask, -math.inf))  # noqa: B023
            if kind == "causal":
                scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
            return torch.einsum("baij,jbad->ibad", scores.softmax(-1), v).flatten(2)

        inputs = [normal(sq, 2, 6, 8), normal(sk, 2, heads, 8, seed=1), normal(sk, 2, heads, 8, seed=2)]
        call = ATTENTIONS[name]
        for layout in ("whole", "part"):
            compare(
                lambda q, k, v: call(q, k, v, mask, pattern, 0.0),  # noqa: B023
                formula,
                inputs,
                dtype,
                slack=16 if dtype == torch.float32 else 6,
                layout=layout,
            )


@pytest.mark.parametrize("name", ["torch", "unfused"])
def test_dropout_hides_a_share_of_the_keys(name: str) -> None:
    """All keys are alike and values are unit vectors: a row of the output shows what was kept, and by what factor."""
    torch.manual_seed(0)
    q, k = torch.randn(40, 1, 2, 40), torch.zeros(40, 1, 2, 40)
    v = torch.eye(40).view(40, 1, 1, 40).expand(40, 1, 2, 40)
    out = ATTENTIONS[name](q, k, v, None, Pattern(causal=False), 0.25) * 40
    kept = out > 0
    assert torch.allclose(out, kept / 0.75, atol=1e-5) and abs(kept.float().mean() - 0.75) < 0.03


def test_fp16_scores_that_overflow_unless_queries_are_scaled_first() -> None:
    """q k^T is 40 * 40 * 64 = 102400, more than fp16 holds; times 1/8 it is 12800."""
    v = normal(3, 1, 1, 64)
    q, k = torch.full((3, 1, 1, 64), 40.0), torch.full((3, 1, 1, 64), 40.0)
    k[1] = 39.98
    for mask in (None, torch.zeros(1, 1, 3, 3)):
        compare(
            lambda q, k, v: ATTENTIONS["unfused"](q, k, v, mask, Pattern(False), 0.0),  # noqa: B023
            lambda q, k, v: by_definition(q, k, v, lambda n, i, j: True),
            [q.double(), k.double(), v],
            torch.float16,
            slack=16,
        )


@pytest.mark.parametrize("call", [torch_attention, by_backends([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH])])
def test_a_mask_that_is_learned_is_given_to_backends_with_a_gradient_of_it(
    call: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, seen = torch.backends.cuda, list[tuple[bool, ...]]()

    def look(q: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        seen.append((cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()))
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    q, mask = torch.randn(5, 1, 2, 4), torch.zeros(1, 2, 5, 5)
    call(q, q, q, mask.clone().requires_grad_(), Pattern(), 0.0)
    assert seen == [(True, True), (False, False)]
    call(q, q, q, mask, Pattern(), 0.0)
    assert seen[3][0], "cuDNN's for others"


def test_no_mask_where_a_flag_says_it_all() -> None:
    assert visible(Rule(5, 5, causal=True)) is None
    assert visible(Rule(5, 5, causal=True, window=4)) is None
    assert visible(Rule(5, 5, causal=False)) is None
    assert visible(Rule(5, 5, causal=True, window=3)) is not None


def test_alibi_slopes_by_hand() -> None:
    assert alibi_slopes(4).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    # Three heads: those of two, then the first of every second of four.
    assert alibi_slopes(3).tolist() == [2**-4, 2**-8, 2**-2]
    assert alibi_bias(torch.tensor([0.5]), 3, 3).tolist() == [[[[0, 0.5, 1], [-0.5, 0, 0.5], [-1, -0.5, 0]]]]


def test_buckets_by_hand() -> None:
    """Eight buckets up to 16: 0 1 2 3 exact; 4-5, 6-7, 8-11 and 12 on by powers of sqrt(2) from 4."""
    causal = relative_buckets(40, 40, bidirectional=False, buckets=8, max_distance=16, device=torch.device("cpu"))
    assert causal[39].flip(0).tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6] + [7] * 28
    assert not causal.triu().any()
    both = relative_buckets(9, 9, bidirectional=True, buckets=8, max_distance=8, device=torch.device("cpu"))
    # Four buckets each way: 0 1 exact; 2-3 and 4 on. Later keys have the upper four.
    assert both[4].tolist() == [3, 2, 2, 1, 0, 5, 6, 6, 7]


def test_a_bias_is_hidden_where_nothing_is_seen() -> None:
    bias = torch.arange(4.0).view(1, 1, 2, 2).requires_grad_()
    masked = with_bias(None, bias, causal=True)
    assert masked.tolist() == [[[[0, -math.inf], [2, 3]]]]
    masked[masked > -math.inf].sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [[[[1, 0], [1, 1]]]]


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "both ways"])
def test_flex_attention_equals_the_mask(kind: str) -> None:
    """Uncompiled, as it runs on a CPU; there it has a forward only."""
    causal, window, documents, _ = MASKS[kind]
    torch.manual_seed(0)
    q, k, v = torch.randn(150, 3, 4, 16), torch.randn(150, 3, 2, 16), torch.randn(150, 3, 2, 16)
    rule = Rule(150, 150, causal, window, documents, documents)
    with torch.no_grad():
        found = through(attention)(q, k, v, flex_mask(rule), Pattern(causal, 0.7), 0.0)
        expected = torch_attention(q, k, v, visible(rule), Pattern(causal, 0.7), 0.0)
    assert torch.allclose(found, expected, atol=1e-5)


def test_gradients_of_any_layout() -> None:
    """Batch first, as a transposed consumer hands them back, and one number for all."""
    for upstream in (torch.randn(2, 70, 32).transpose(0, 1), torch.ones(()).expand(70, 2, 32)):
        found = []
        for grad in (upstream, upstream.contiguous()):
            torch.manual_seed(0)
            leaves = [torch.randn(70, 2, 4, 8, requires_grad=True) for _ in range(3)]
            out = attention(*leaves, None, Pattern(), 0.0)
            found.append(torch.autograd.grad(out, leaves, grad))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

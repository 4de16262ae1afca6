"""flash-attn behind the table's signature: every rule against the definition, through stand-ins for both versions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from megatron_ds.kernels import flash_attn
from megatron_ds.kernels.attention import Pattern, attention
from megatron_ds.kernels.flash_attn import FlashAttention, FlashMask
from megatron_ds.kernels.installed import trouble
from megatron_ds.kernels.mask import Rule, visible
from tests.kernels.stand_ins import flash, install

Seen = Callable[[int, int, int], bool]
PACKED = torch.tensor([[0] * 9 + [1] * 3, [0, 1, 1, 2, 2, 2, 2, 5, 5, 5, 5, 5], [0] * 12])
PADDED = torch.tensor([[0] * 12, [0] * 7 + [1] * 5, [0] + [1] * 11])
LONE = torch.arange(12).repeat(3, 1)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    trouble.cache_clear()
    yield
    trouble.cache_clear()


def no_other(*_: object) -> torch.Tensor:
    raise AssertionError("handed on")


def made(monkeypatch: pytest.MonkeyPatch, version: int, **options: bool) -> tuple[FlashAttention, SimpleNamespace]:
    noted = SimpleNamespace(kernel=None)
    install(monkeypatch, flash_attn.MODULES[version], **flash(version, noted, **options))
    assert flash_attn.lacks(version) is None
    return flash_attn.flash_attention(version, no_other, no_other), noted


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float | None) -> torch.Tensor:
    """softmax(scale q k^T) v in fp64 over the keys that a query sees; 0 where it sees none."""
    (sq, b, a, d), sk = q.shape, k.shape[0]
    k, v = (t.repeat_interleave(a // t.shape[2], 2) for t in (k, v))
    allowed = torch.tensor([[[seen(n, i, j) for j in range(sk)] for i in range(sq)] for n in range(b)]).unsqueeze(1)
    scores = torch.einsum("qbad,kbad->baqk", q, k) * (scale or 1 / math.sqrt(d))
    weights = scores.exp() * allowed
    return torch.einsum("baqk,kbad->qbad", weights / weights.sum(-1, keepdim=True).clamp(min=1e-300), v).flatten(2)


def check(
    kernel: FlashAttention, rule: Rule, seen: Seen, scale: float | None, heads: tuple[int, int], pattern: Pattern
) -> None:
    torch.manual_seed(0)
    (a, kv), b = heads, 3
    q = torch.randn(rule.queries, b, a, 8).half()
    fused = torch.randn(rule.keys, b, kv, 2, 8).half()
    upstream = torch.randn(rule.queries, b, a * 8).half()

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, fused)]
        k, v = leaves[1].unbind(3)
        out = function(leaves[0], k, v)
        out.backward(upstream.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    mask = kernel.mask(rule)
    ours = run(lambda q, k, v: kernel.attention(q, k, v, mask, pattern, 0.0), torch.float16)
    true = run(lambda q, k, v: by_definition(q, k, v, seen, scale), torch.float64)
    for found, expected in zip(ours, true, strict=True):
        assert found.is_contiguous() and found.shape == expected.shape
        assert (found.double() - expected).norm() < 1e-3 * expected.norm() + 1e-9


def together(documents: torch.Tensor, n: int, i: int, j: int) -> bool:
    return bool(documents[n, i] == documents[n, j])


RULES: dict[str, tuple[bool, int | None, torch.Tensor | None, Seen]] = {
    "causal": (True, None, None, lambda n, i, j: j <= i),
    "both ways": (False, None, None, lambda n, i, j: True),
    "window": (True, 4, None, lambda n, i, j: 0 <= i - j <= 4),
    "window both ways": (False, 4, None, lambda n, i, j: i - j <= 4),
    "documents": (True, None, PACKED, lambda n, i, j: j <= i and together(PACKED, n, i, j)),
    "documents, window": (True, 2, PACKED, lambda n, i, j: 0 <= i - j <= 2 and together(PACKED, n, i, j)),
    "padding": (False, None, PADDED, lambda n, i, j: together(PADDED, n, i, j)),
    "a token each": (True, None, LONE, lambda n, i, j: i == j),
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", RULES)
def test_rules_equal_the_definition(monkeypatch: pytest.MonkeyPatch, kind: str, version: int) -> None:
    causal, window, documents, seen = RULES[kind]
    kernel, noted = made(monkeypatch, version)
    # Beside a mask a pattern's causal has no meaning.
    pattern = Pattern(causal if kind in ("causal", "both ways") else not causal, 0.3)
    check(kernel, Rule(12, 12, causal, window, documents, documents), seen, 0.3, (4, 2), pattern)
    assert noted.kernel == ("dense" if documents is None else "varlen")


def test_queries_of_one_stack_see_the_tokens_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, noted = made(monkeypatch, 2)
    rule = Rule.of_padding(torch.zeros(3, 5, dtype=torch.long), PADDED)
    check(kernel, rule, lambda n, i, j: bool(PADDED[n, j] == 0), None, (2, 2), Pattern(False))
    assert noted.kernel == "varlen"
    check(kernel, Rule(5, 12, False), lambda n, i, j: True, None, (2, 2), Pattern(False))
    assert noted.kernel == "dense"


def test_queries_without_keys_get_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, _ = made(monkeypatch, 2)
    queries = torch.tensor([[0, 0, 1, 3, 3]]).repeat(3, 1)
    rule = Rule.of_padding(queries, PADDED)
    check(kernel, rule, lambda n, i, j: bool(queries[n, i] == PADDED[n, j]), None, (2, 1), Pattern(False))


def test_the_earlier_version_3_returns_more(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, _ = made(monkeypatch, 3, returns_lse=True)
    for kind in ("causal", "documents"):
        causal, window, documents, seen = RULES[kind]
        check(kernel, Rule(12, 12, causal, window, documents, documents), seen, None, (2, 2), Pattern())


def test_lengths_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, _ = made(monkeypatch, 2)
    mask = kernel.mask(Rule(12, 12, True, None, PACKED, PACKED))
    assert isinstance(mask, FlashMask) and mask.queries is not None and mask.keys is not None
    assert mask.queries.ends.tolist() == mask.keys.ends.tolist() == [0, 9, 12, 13, 15, 19, 24, 36]
    assert mask.queries.longest == 12
    lone = kernel.mask(Rule(12, 12, True, None, LONE, LONE))
    assert isinstance(lone, FlashMask) and lone.queries is not None and lone.queries.longest == 2


def test_what_it_cannot_say_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = SimpleNamespace(kernel=None)
    install(monkeypatch, "flash_attn", **flash(2, noted))
    kernel = flash_attn.flash_attention(2, visible, attention)
    torn = torch.tensor([[0, 1, 0, 0, 1, 1]])
    halves, thirds = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 0, 1, 1]])
    for rule in (
        Rule(6, 6, False, None, torn, torn),
        Rule(6, 6, True, None, halves, thirds),
        Rule(4, 6, True, 2),
    ):
        assert isinstance(kernel.mask(rule), torch.Tensor)
    q, k = torch.randn(4, 1, 2, 8).half(), torch.randn(6, 1, 2, 8).half()
    numbers = torch.randn(1, 2, 4, 6).half()
    for mask, pattern in ((numbers, Pattern(False)), (None, Pattern(True))):
        out = kernel.attention(q, k, k, mask, pattern, 0.0)
        assert torch.equal(out, attention(q, k, k, mask, pattern, 0.0))
    assert noted.kernel is None


def test_dropout_and_determinism_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, noted = made(monkeypatch, 2)
    q = torch.randn(4, 1, 2, 8).half()
    kernel.attention(q, q, q, None, Pattern(), 0.25)
    assert (noted.dropout, noted.deterministic) == (0.25, False)
    torch.use_deterministic_algorithms(True)
    try:
        kernel.attention(q, q, q, None, Pattern(), 0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (noted.dropout, noted.deterministic) == (0.0, True)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((2, torch.bfloat16, 128, 0.1, (8, 0)), None),
        ((2, torch.float32, 128, 0.0, (8, 0)), "float32"),
        ((2, torch.bfloat16, 264, 0.0, (9, 0)), "264"),
        ((2, torch.bfloat16, 128, 0.0, (7, 5)), "Ampere"),
        ((3, torch.bfloat16, 128, 0.0, (9, 0)), None),
        ((3, torch.bfloat16, 128, 0.1, (9, 0)), "dropout"),
        ((3, torch.bfloat16, 100, 0.0, (9, 0)), "multiple of 8"),
        ((3, torch.bfloat16, 128, 0.0, (10, 0)), "Hopper"),
    ],
)
def test_refusals(arguments: tuple[int, torch.dtype, int, float, tuple[int, int]], word: str | None) -> None:
    found = flash_attn.refuses(*arguments)
    assert found is None if word is None else word in (found or "")

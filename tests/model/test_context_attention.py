"""Ring and all-to-all attention against softmax over the whole sequence, written out in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ds.model import context_attention
from megatron_ds.model.context_attention import ring_attention, ulysses_attention
from megatron_ds.parallel import context
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.parallel.context import Axis
from tests.helpers.ranks import run_ranks

Tensor = torch.Tensor
B = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """c ranks, s positions, a query heads, k key heads, head size d."""

    c: int
    s: int
    a: int
    k: int
    d: int
    ulysses: bool = False
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0


class Found(NamedTuple):
    """What one rank has to say: its share of the values, its bytes and calls, and the blocks it entered."""

    tensors: list[Tensor]
    sent_forward: dict[str, int]
    sent_backward: dict[str, int]
    entered: list[list[int]]


def whole(case: Case) -> list[Tensor]:
    """q, k, v and the gradient of the output over the whole sequence: [s, b, heads, d]."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(case.s, B, heads, case.d, generator=generator).to(case.dtype)
        for heads in (case.a, case.k, case.k, case.a)
    ]


def share(t: Tensor, rank: int, case: Case) -> Tensor:
    """The positions of one rank."""
    if case.ulysses:
        return t.chunk(case.c)[rank]
    chunks = t.chunk(2 * case.c)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


def dense(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | float = 1.0) -> Tensor:
    """[s, b, a, d] -> [s, b, a*d], in the precision of q."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * q.shape[-1] ** -0.5
    later = torch.arange(q.shape[0]) > torch.arange(q.shape[0])[:, None]
    probabilities = scores.masked_fill(later, -1e30).softmax(-1) * keep
    return torch.einsum("bhqk,kbhd->qbhd", probabilities, v).flatten(2)


def expected(case: Case, keep: Tensor | float = 1.0) -> list[Tensor]:
    q, k, v, grad = (t.double() for t in whole(case))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = dense(q, k, v, keep)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.flatten(2))]


def on_ranks(case: Case, swapped: bool = False) -> Found:
    sizes = {"pp": 1, "dp": 1, "cp": case.c, "tp": 1}
    cp = context.start(ParallelConfig(), sizes, torch.device("cpu")).cp
    if swapped:
        right = context_attention.visible
        context_attention.visible = lambda rank, owner, half: right(owner, rank, half)  # type: ignore[assignment]
    found = attend(case, cp)
    context.stop()
    return found


def attend(case: Case, cp: Axis) -> Found:
    """Forward and backward on the share of one rank, whose q, k and v are views of one matrix, as in the model."""
    q, k, v, grad = (share(t, cp.rank, case) for t in whole(case))
    fused = torch.cat([t.flatten(2) for t in (q, k, v)], dim=-1).requires_grad_()
    widths = [t.shape[2] * case.d for t in (q, k, v)]
    q, k, v = (t.unflatten(2, (-1, case.d)) for t in fused.split(widths, dim=-1))
    entered: list[int] = []

    def enter(block: int) -> None:
        entered.append(block)
        torch.manual_seed(block)

    if case.ulysses:
        out = ulysses_attention(q, k, v, cp, lambda *qkv: dense(*(t.float() for t in qkv)).to(case.dtype))
    else:
        out = ring_attention(q, k, v, cp, case.dropout, enter)
    sent_forward, entered_forward = dict(cp.traffic.sent_bytes), entered.copy()
    cp.traffic.clear()
    entered.clear()
    torch.manual_seed(99)
    out.backward(grad.flatten(2))
    assert fused.grad is not None and out.dtype == case.dtype
    grads = [t.unflatten(2, (-1, case.d)) for t in fused.grad.split(widths, dim=-1)]
    return Found([out.detach(), *grads], sent_forward, dict(cp.traffic.sent_bytes), [entered_forward, entered])


def check(case: Case, found: list[Found], keep: Tensor | float = 1.0) -> None:
    """Every rank's share of the output and of the three gradients."""
    wanted = expected(case, keep)
    for rank, one in enumerate(found):
        for name, x, y in zip(("out", "dq", "dk", "dv"), one.tensors, wanted, strict=True):
            y = share(y, rank, case)
            error = (x.double() - y).norm() / y.norm()
            assert x.shape == y.shape and error < TOLERANCE[case.dtype], f"rank {rank}, {name}: {error:.1e}"


RING = [Case(1, 7, 4, 4, 8), Case(2, 20, 4, 4, 8), Case(2, 36, 6, 2, 5), Case(4, 8, 4, 1, 16), Case(4, 48, 6, 2, 9)]
ULYSSES = [Case(1, 7, 4, 4, 8), Case(2, 10, 4, 4, 8), Case(2, 18, 6, 2, 5), Case(4, 12, 4, 4, 16), Case(4, 24, 8, 4, 9)]
CASES = RING + [replace(case, ulysses=True) for case in ULYSSES]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_gradients_and_bytes(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    found = run_ranks(on_ranks, case.c, case)
    check(case, found)
    for one in found:
        check_bytes(case, one)


def check_bytes(case: Case, found: Found) -> None:
    """Counted against the whole sequence: the ring sends (c-1)/c of K and V, then twice that."""
    element = torch.empty(0, dtype=case.dtype).element_size()
    kv_bytes, q_bytes = (n * case.s * B * case.d * element for n in (2 * case.k, case.a))
    if case.c == 1:
        forward, backward = {}, {}
    elif case.ulysses:
        share_bytes = (q_bytes + kv_bytes + q_bytes) // case.c
        forward = backward = {"all-to-all": share_bytes * (case.c - 1) // case.c}
    else:
        forward = {"send": kv_bytes * (case.c - 1) // case.c}
        backward = {"send": 2 * forward["send"]}
    assert (found.sent_forward, found.sent_backward) == (forward, backward)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [Case(1, 24, 4, 2, 5), Case(2, 24, 4, 2, 5), Case(4, 48, 4, 4, 8)], ids=str)
def test_dropout(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dropout=0.2, dtype=dtype)
    found = run_ranks(on_ranks, case.c, case)
    for one in found:
        assert one.entered[0] == one.entered[1], "the backward must draw the forward's masks"
    blocks = [block for one in found for block in one.entered[0]]
    assert len(blocks) == case.c**2 == len(set(blocks))
    check(case, found, masks(case, [one.entered[0] for one in found]))


def masks(case: Case, entered: list[list[int]]) -> Tensor:
    """The whole sequence's mask, put together from those of the blocks: rank r enters r's own, r-1's, r-2's ..."""
    keep = torch.zeros(B, case.a, case.s, case.s)
    half = case.s // case.c // 2
    places = [share(torch.arange(case.s), rank, case) for rank in range(case.c)]
    for rank, blocks in enumerate(entered):
        for hop, block in enumerate(blocks):
            owner = (rank - hop) % case.c
            rows = places[rank][half:] if owner > rank else places[rank]
            columns = places[owner][:half] if owner < rank else places[owner]
            torch.manual_seed(block)
            drawn = torch.empty(B, case.a, len(rows), len(columns)).bernoulli_(1 - case.dropout)
            keep[:, :, rows[:, None], columns] = drawn / (1 - case.dropout)
    return keep


@pytest.mark.parametrize("c", [2, 4])
def test_earlier_and_later_ranks_swapped_are_found(c: int) -> None:
    case = Case(c, 8 * c, 4, 4, 8)
    found = run_ranks(on_ranks, c, case, True)
    with pytest.raises(AssertionError, match="rank 0, out"):
        check(case, found)


def test_only_inputs_output_and_log_sum_exp_are_kept() -> None:
    case = Case(4, 64, 6, 2, 5)
    q, k, v, _ = (share(t, 0, case).requires_grad_() for t in whole(case))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        out = ring_attention(q, k, v, Axis("cp", 4, 0, on_paper=True), 0.0, lambda block: None)
    assert sorted(kept) == sorted([q.shape, k.shape, v.shape, out.shape, (B, 6, 16)])


@pytest.mark.parametrize("ulysses", [False, True])
def test_on_paper_without_memory(ulysses: bool) -> None:
    case = Case(8, 2**17, 64, 8, 128, ulysses, torch.bfloat16)
    cp = Axis("cp", case.c, 5, on_paper=True)
    with FakeTensorMode():
        q, k = (
            torch.empty(case.s // case.c, B, n, case.d, dtype=case.dtype, requires_grad=True) for n in (case.a, case.k)
        )
        if ulysses:
            out = ulysses_attention(q, k, k, cp, lambda q, k, v: q.flatten(2) + 0 * (k.sum() + v.sum()))
        else:
            out = ring_attention(q, k, k, cp, 0.0, lambda block: None)
        sent_forward = dict(cp.traffic.sent_bytes)
        cp.traffic.clear()
        out.sum().backward()
    assert out.shape == (case.s // case.c, B, case.a * case.d)
    check_bytes(case, Found([], sent_forward, dict(cp.traffic.sent_bytes), []))

"""Vocab-parallel cross-entropy against torch's own on the gathered, unpadded logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_ds.model.embedding import Vocab
from megatron_ds.model.loss import vocab_parallel_cross_entropy
from megatron_ds.parallel import context
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.parallel.context import Axis
from tests.helpers.ranks import run_ranks


def case(vocab: Vocab, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with large values among them and garbage in the padding, targets at both ends, uneven upstream."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 2, vocab.padded, generator=generator) * 20).to(dtype)
    logits[..., vocab.size :] = 1e4
    targets = torch.randint(0, vocab.size, (6, 2), generator=generator)
    targets[0, 0], targets[1, 0] = 0, vocab.size - 1
    return logits, targets, torch.rand(6, 2, generator=generator)


def sharded(vocab: Vocab, dtype: torch.dtype, tp_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    parallel = context.start(ParallelConfig(), {"pp": 1, "dp": 1, "cp": 1, "tp": tp_size}, torch.device("cpu"))
    out = losses_and_gradient(vocab, dtype, parallel.tp)
    context.stop()
    return out


def losses_and_gradient(vocab: Vocab, dtype: torch.dtype, tp: Axis) -> tuple[torch.Tensor, torch.Tensor]:
    logits, targets, upstream = case(vocab, dtype)
    mine = logits.chunk(tp.size, dim=-1)[tp.rank].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(mine * 1, targets, vocab, tp)
    losses.backward(upstream)
    assert mine.grad is not None
    return losses.detach(), mine.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab", "tp"), [(Vocab(131, 256), 1), (Vocab(131, 256), 2), (Vocab(131, 512), 4), (Vocab(128, 128), 2)]
)
def test_losses_and_gradients_equal_torchs(vocab: Vocab, tp: int, dtype: torch.dtype) -> None:
    logits, targets, upstream = case(vocab, dtype)
    whole = logits[..., : vocab.size].double().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="none").view(6, 2)
    expected.backward(upstream.double())
    assert whole.grad is not None
    found = run_ranks(sharded, tp, vocab, dtype, tp)
    gradient = torch.cat([share[1] for share in found], dim=-1)
    assert (gradient[..., vocab.size :] == 0).all(), "padding must get no gradient"
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for losses, _ in found:
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient[..., : vocab.size].double(), whole.grad, rtol=tolerance, atol=tolerance)


def test_fp16_gradient_is_scaled_before_it_is_rounded() -> None:
    """A probability of 1.5e-8 is 0 in fp16; times a loss scale of 2^16 it is not."""
    logits = torch.full((1, 1, 8), -18.0).half()
    logits[..., 0] = 0.0
    logits.requires_grad_()
    loss = vocab_parallel_cross_entropy(logits * 1, torch.tensor([[0]]), Vocab(8, 8), Axis.solo("tp"))
    (loss.sum() * 2.0**16).backward()
    assert logits.grad is not None
    expected = torch.softmax(logits.detach().double(), -1)[0, 0, 1:] * 2.0**16
    assert torch.allclose(logits.grad[0, 0, 1:].double(), expected, rtol=1e-3, atol=0)

"""Fifty steps of each recipe beside a plain loop of transformers and AdamW, from the same weights and batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.ranks import run_ranks
from tests.parity.harness import train_without_gradients
from tests.parity.models import arguments, batches, oracle_of
from tests.reference.bert import BertConfig
from tests.reference.gpt import OracleConfig
from tests.reference.t5 import T5Config
from tests.reference.training import GlobalBatch
from tests.reference.transformer import TransformerConfig

pytest.importorskip("transformers")

from tests.parity import published

STEPS, WARMUP, PEAK, LOWEST, DECAY, CLIP = 50, 5, 1e-3, 1e-4, 0.1, 1.0
FLAGS = f"""--train-iters {STEPS} --lr {PEAK} --min-lr {LOWEST} --lr-decay-style cosine --lr-warmup-iters {WARMUP}
    --weight-decay {DECAY} --clip-grad {CLIP} --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8"""

GPT2 = OracleConfig(num_layers=2, hidden=32, heads=4, kv_heads=4, ffn=128, vocab=131, max_positions=32)
BERT = BertConfig(
    num_layers=2,
    hidden=32,
    heads=4,
    kv_heads=4,
    ffn=128,
    vocab=131,
    max_positions=32,
    norm_eps=1e-12,
    activation="gelu",
    post_ln=True,
)
T5 = T5Config(
    encoder_layers=2,
    decoder_layers=2,
    hidden=32,
    heads=4,
    kv_heads=4,
    ffn=64,
    vocab=131,
    max_positions=32,
    lengths=(32, 16),
    norm="rmsnorm",
    norm_eps=1e-6,
    activation="relu",
    bias=False,
    qkv_bias=False,
    softmax_scale=1.0,
    positions="relative",
    head_bias=False,
    scaled_output=True,
)

Loss = Callable[..., tuple[Tensor, ...]]
"""Model and batch -> losses."""


def gpt_loss(model: nn.Module, tokens: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Mean over the kept targets."""
    wanted = labels.where(mask > 0, -100)
    return (F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), wanted.flatten()),)


def bert_losses(
    model: nn.Module, tokens: Tensor, types: Tensor, labels: Tensor, mask: Tensor, real: Tensor, order: Tensor
) -> tuple[Tensor, ...]:
    """The two parts of BertForPreTraining's loss."""
    out = model(input_ids=tokens, attention_mask=real.long(), token_type_ids=types)
    words = F.cross_entropy(out.prediction_logits.flatten(0, 1), labels.where(mask > 0, -100).flatten())
    return words, F.cross_entropy(out.seq_relationship_logits, order)


def t5_loss(
    model: nn.Module, source: Tensor, target: Tensor, labels: Tensor, mask: Tensor, real: Tensor
) -> tuple[Tensor, ...]:
    """T5ForConditionalGeneration's own loss."""
    wanted = labels.where(mask > 0, -100)
    return (model(input_ids=source, attention_mask=real.long(), decoder_input_ids=target, labels=wanted).loss,)


def lr_at(step: int) -> float:
    """Megatron's: the first update of a warm-up is by nothing."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    share = (step - WARMUP) / (STEPS - WARMUP)
    return LOWEST + (PEAK - LOWEST) * (math.cos(math.pi * share) + 1) / 2


def plain_loop(model: nn.Module, loss: Loss, data: list[GlobalBatch]) -> list[tuple[float, ...]]:
    """What anybody would write: losses and norm of every step; biases and vectors do not decay."""
    groups: list[dict[str, object]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    history = []
    for step, batch in enumerate(data):
        losses = loss(model, *batch)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        optimizer.step()
        history.append((*(value.item() for value in losses), norm.item()))
    return history


@pytest.mark.parametrize(
    ("c", "build", "loss", "seed"),
    [
        pytest.param(GPT2, published.gpt2, gpt_loss, 0, id="gpt2"),
        pytest.param(BERT, published.bert, bert_losses, 0, id="bert"),
        pytest.param(
            replace(BERT, post_ln=False, activation="gelu_tanh", head_activation="gelu_tanh"),
            published.bert,
            bert_losses,
            0,
            id="megatron-bert",
        ),
        # ReLU bends at 0. With most seeds some input comes within rounding of it in fifty steps, and the plain loop
        # leaves itself by 2 % of a norm when its weights change by 1e-7; with this one not even at 4e-7.
        pytest.param(T5, published.t5, t5_loss, 2, id="t5-1.0"),
        pytest.param(
            replace(T5, activation="geglu", tied=False, scaled_output=False), published.t5, t5_loss, 0, id="t5-1.1"
        ),
    ],
)
def test_fifty_steps_follow_a_plain_loop(
    c: TransformerConfig, build: Callable[..., nn.Module], loss: Loss, seed: int
) -> None:
    params = oracle_of(c).random_params(c, seed, std=0.1)
    data = batches(c, 5) * (STEPS // 5)  # seen again and again, so that there is something to learn
    found = run_ranks(train_without_gradients, 1, arguments(c, *FLAGS.split()), params, data)[0].history
    expected = plain_loop(build(c, params).float(), loss, data)
    errors = (torch.tensor(found).double() / torch.tensor(expected).double() - 1).abs()
    assert expected[-1][0] < expected[0][0] - 0.01
    assert errors[:, :-1].max() < 2e-5, "loss"
    assert errors[:, -1].max() < 5e-5, "gradient norm"

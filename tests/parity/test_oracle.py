"""The oracle against what shares nothing with it: torch's own layers, finite differences, numpy, and identities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import gpt
from tests.reference.gpt import OracleConfig

GPT2 = OracleConfig(num_layers=2, hidden=12, heads=3, kv_heads=3, ffn=20, vocab=17, max_positions=9)
LLAMA = replace(
    GPT2,
    hidden=24,
    kv_heads=1,
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    qkv_bias=False,
    positions="rope",
    tied=False,
)
MIXED = replace(LLAMA, heads=4, kv_heads=2, hidden=32, qkv_bias=True, rotary_percent=0.5, rotary_base=500.0, tied=True)
STYLES = pytest.mark.parametrize("c", [GPT2, LLAMA, MIXED], ids=["gpt2", "llama", "mixed"])


def doubles(c: OracleConfig, seed: int = 0) -> dict[str, Tensor]:
    return gpt.random_params(c, seed, std=0.3, dtype=torch.float64)


def batch(c: OracleConfig, b: int = 4, s: int = 7, seed: int = 1) -> gpt.GlobalBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(c.vocab, (2, b, s), generator=generator)
    mask = (torch.rand(b, s, generator=generator) < 0.7).float()
    mask[0] = 0  # one sequence that counts for nothing: micro-batches must not be averaged with equal weight
    return tokens, labels, mask


def torch_gpt2(p: Mapping[str, Tensor], c: OracleConfig, tokens: Tensor) -> Tensor:
    """The same weights inside torch.nn.TransformerEncoder."""
    layer = nn.TransformerEncoderLayer(
        c.hidden,
        c.heads,
        c.ffn,
        0.0,
        lambda x: F.gelu(x, approximate="tanh"),
        c.norm_eps,
        True,
        True,
        dtype=torch.float64,
    )
    model = nn.TransformerEncoder(layer, c.num_layers, nn.LayerNorm(c.hidden, c.norm_eps, dtype=torch.float64), False)
    theirs = {
        "self_attn.in_proj_": "self_attention.linear_qkv.",
        "self_attn.out_proj.": "self_attention.linear_proj.",
        "linear1.": "mlp.linear_fc1.",
        "linear2.": "mlp.linear_fc2.",
        "norm1.": "input_layernorm.",
        "norm2.": "pre_mlp_layernorm.",
        "norm.": "final_layernorm.",
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for old, new in theirs.items():
                name = name.replace(old, new, 1) if f".{old}" in f".{name}" else name
            weight.copy_(p[name])
    x = p["embedding.word_embeddings.weight"][tokens] + p["embedding.position_embeddings.weight"][: tokens.shape[1]]
    x = model(x, nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=torch.float64), is_causal=True)
    return F.linear(x, p["embedding.word_embeddings.weight"])


def torch_llama(p: Mapping[str, Tensor], c: OracleConfig, tokens: Tensor) -> Tensor:
    """Fused torch operators, and rotation as a product of complex numbers."""
    h, d, s = c.hidden, c.hidden // c.heads, tokens.shape[1]
    r = int(d * c.rotary_percent)
    angles = torch.outer(torch.arange(s).double(), c.rotary_base ** (-torch.arange(r // 2).double() * 2 / r))
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : r // 2].contiguous(), x[..., r // 2 : r].contiguous()) * turn
        return torch.cat([pairs.real, pairs.imag, x[..., r:]], -1)

    x = F.embedding(tokens, p["embedding.word_embeddings.weight"])
    for i in range(c.num_layers):
        at = f"layers.{i}."
        y = F.rms_norm(x, (h,), p[at + "input_layernorm.weight"], c.norm_eps)
        rows = torch.unflatten(p[at + "self_attention.linear_qkv.weight"], 0, (-1, d))
        bias = p.get(at + "self_attention.linear_qkv.bias", torch.zeros(len(rows) * d).double()).view(-1, d)
        q, k, v = (
            torch.einsum("bsh,ndh->bnsd", y, rows[part]) + bias[part][:, None]
            for part in (slice(c.heads), slice(c.heads, c.heads + c.kv_heads), slice(c.heads + c.kv_heads, None))
        )
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).flatten(2), p[at + "self_attention.linear_proj.weight"])
        y = F.rms_norm(x, (h,), p[at + "pre_mlp_layernorm.weight"], c.norm_eps)
        fc1, fc2 = p[at + "mlp.linear_fc1.weight"], p[at + "mlp.linear_fc2.weight"]
        x = x + F.linear(F.silu(F.linear(y, fc1[: c.ffn])) * F.linear(y, fc1[c.ffn :]), fc2)
    head = p["embedding.word_embeddings.weight" if c.tied else "output_layer.weight"]
    return F.linear(F.rms_norm(x, (h,), p["final_layernorm.weight"], c.norm_eps), head)


def test_gpt2_style_is_torchs_transformer_encoder() -> None:
    p, (tokens, _, _) = doubles(GPT2), batch(GPT2)
    torch.testing.assert_close(gpt.forward(p, GPT2, tokens), torch_gpt2(p, GPT2, tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("c", [LLAMA, MIXED], ids=["llama", "mixed"])
def test_llama_style_is_torchs_fused_operators(c: OracleConfig) -> None:
    p, (tokens, _, _) = doubles(c), batch(c)
    torch.testing.assert_close(gpt.forward(p, c, tokens), torch_llama(p, c, tokens), rtol=1e-12, atol=1e-12)


@STYLES
def test_float32_is_float64_within_rounding(c: OracleConfig) -> None:
    p, sample = doubles(c), batch(c)
    single = {name: value.float() for name, value in p.items()}
    assert gpt.loss(single, c, *sample).item() == pytest.approx(gpt.loss(p, c, *sample).item(), rel=2e-6)


@STYLES
def test_gradients_are_finite_differences(c: OracleConfig) -> None:
    p, sample, step = doubles(c), batch(c), 1e-5
    found = gpt.train(p, c, [sample], lr_at=lambda _: 0.0, keep_gradients=True).gradients[0]
    for name, weight in p.items():
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
        above, below = (gpt.loss({**p, name: weight + sign * step * direction}, c, *sample) for sign in (1, -1))
        slope = ((above - below) / (2 * step)).item()
        assert (found[name] * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-9), name
        assert abs(slope) > 1e-5, f"{name} has no influence"


@STYLES
def test_a_later_token_changes_no_earlier_logit(c: OracleConfig) -> None:
    p, (tokens, _, _) = doubles(c), batch(c)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % c.vocab
    before, after = gpt.forward(p, c, tokens), gpt.forward(p, c, changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-13)
    assert ((before - after)[:, 4:].abs().amax(-1) > 1e-4).all()


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 6, 8)  # one vector at six positions
    products = (gpt.rotate(q, LLAMA) @ gpt.rotate(k, LLAMA).transpose(-1, -2))[0, 0]
    for distance in range(-5, 6):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=0, atol=1e-13)
    assert len(set(products[0].tolist())) == 6


def test_partial_rotation_leaves_the_rest_and_position_zero() -> None:
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    y = gpt.rotate(x, MIXED)
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[..., 0, :], x[..., 0, :])
    # Position 3, second pair: 3 / 500^(2/4) radians, worked out by hand.
    angle = 3 / 500**0.5
    expected = x[0, 0, 3, 1] * np.cos(angle) - x[0, 0, 3, 3] * np.sin(angle)
    assert y[0, 0, 3, 1].item() == pytest.approx(expected.item(), rel=1e-12)


def test_grouped_queries_are_full_heads_with_repeated_keys_and_values() -> None:
    p, (tokens, _, _) = doubles(MIXED), batch(MIXED)
    full, rows = dict(p), [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7]  # 4 queries, 2 keys, 2 values -> 4, 4, 4 heads
    for name in [name for name in p if "linear_qkv" in name]:
        full[name] = torch.unflatten(p[name], 0, (8, 8))[rows].flatten(0, 1)
    expected = gpt.forward(full, replace(MIXED, kv_heads=4), tokens)
    torch.testing.assert_close(gpt.forward(p, MIXED, tokens), expected, rtol=0, atol=1e-13)


def test_a_tied_head_is_an_equal_head_with_added_gradients() -> None:
    apart, p, sample = replace(GPT2, tied=False), doubles(GPT2), batch(GPT2)
    words = "embedding.word_embeddings.weight"
    both = {**p, "output_layer.weight": p[words]}
    one = gpt.train(p, GPT2, [sample], lr_at=lambda _: 0.0, keep_gradients=True)
    two = gpt.train(both, apart, [sample], lr_at=lambda _: 0.0, keep_gradients=True)
    assert one.history[0][0] == two.history[0][0]
    added = two.gradients[0][words] + two.gradients[0]["output_layer.weight"]
    torch.testing.assert_close(one.gradients[0][words], added, rtol=0, atol=1e-13)


def test_loss_is_the_mean_cross_entropy_of_the_kept_tokens() -> None:
    p, (tokens, labels, mask) = doubles(GPT2), batch(GPT2)
    logits = gpt.forward(p, GPT2, tokens).detach().numpy()
    logs = np.log(np.exp(logits).sum(-1))
    kept = [(i, j) for i in range(4) for j in range(7) if mask[i, j]]
    expected = sum(logs[i, j] - logits[i, j, labels[i, j]] for i, j in kept) / len(kept)
    assert gpt.loss(p, GPT2, tokens, labels, mask).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_change_nothing(micro_batch: int) -> None:
    p, sample = doubles(GPT2), batch(GPT2)
    whole = gpt.train(p, GPT2, [sample] * 2, lr_at=lambda _: 0.01)
    parts = gpt.train(p, GPT2, [sample] * 2, lr_at=lambda _: 0.01, micro_batch=micro_batch)
    np.testing.assert_allclose(whole.history, parts.history, rtol=1e-12)
    assert whole.history[0][0] == pytest.approx(gpt.loss(p, GPT2, *sample).item(), rel=1e-13)


@pytest.mark.parametrize("clip_grad", [0.0, 0.05, 1e6])
def test_steps_are_adamw_by_its_definition(clip_grad: float) -> None:
    p, batches = doubles(LLAMA), [batch(LLAMA, seed=seed) for seed in (1, 2, 3)]
    rates, (beta1, beta2), eps, decay = [0.02, 0.01, 0.03], (0.9, 0.95), 1e-8, 0.1
    run = gpt.train(
        p,
        LLAMA,
        batches,
        lr_at=rates.__getitem__,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=decay,
        clip_grad=clip_grad,
        keep_gradients=True,
    )
    w = {name: value.numpy().copy() for name, value in p.items()}
    m, v = ({name: np.zeros_like(value) for name, value in w.items()} for _ in range(2))
    for step, (rate, gradients) in enumerate(zip(rates, run.gradients, strict=True), start=1):
        size = np.sqrt(sum(np.square(g.numpy()).sum() for g in gradients.values()))
        assert run.history[step - 1][1] == pytest.approx(size, rel=1e-12)
        scale = min(1.0, clip_grad / (size + 1e-6)) if clip_grad else 1.0
        for name, gradient in gradients.items():
            g = gradient.numpy() * scale
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            update = (m[name] / (1 - beta1**step)) / (np.sqrt(v[name] / (1 - beta2**step)) + eps)
            w[name] = w[name] - rate * update - rate * decay * (w[name] if w[name].ndim == 2 else 0)
    for name, value in run.params.items():
        np.testing.assert_allclose(value.numpy(), w[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert not torch.equal(run.params["final_layernorm.weight"], p["final_layernorm.weight"])


def test_train_leaves_its_input_alone() -> None:
    p = doubles(GPT2)
    before = {name: value.clone() for name, value in p.items()}
    gpt.train(p, GPT2, [batch(GPT2)], lr_at=lambda _: 0.1)
    assert all(torch.equal(p[name], before[name]) and p[name].grad is None for name in p)

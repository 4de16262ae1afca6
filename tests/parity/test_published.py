"""The oracles against transformers: the published models with the same weights give the same logits and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.reference import bert, gpt, t5
from tests.reference.bert import BertConfig
from tests.reference.gpt import Llama3Scaling, OracleConfig
from tests.reference.t5 import T5Config

pytest.importorskip("transformers")

from tests.parity import published

GPT2 = OracleConfig(num_layers=3, hidden=24, heads=4, kv_heads=4, ffn=40, vocab=37, max_positions=40)
NEOX = replace(
    GPT2,
    activation="gelu",
    positions="rope",
    rotary_percent=0.67,
    rotary_base=500.0,
    parallel_residual=True,
    tied=False,
)
BLOOM = replace(GPT2, hidden=36, heads=6, kv_heads=6, ffn=144, positions="alibi", embed_norm=True)
LLAMA = replace(
    GPT2, kv_heads=2, norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias=False, qkv_bias=False, positions="rope",
    tied=False,
)  # fmt: skip
LLAMA3 = replace(LLAMA, head_size=16, rotary_base=50.0, llama3=Llama3Scaling(4.0, 1.0, 4.0, 20))
LINEAR = replace(LLAMA, rope_interpolation=4.0, tied=True)
MISTRAL = replace(LLAMA, window=6, head_size=8)
QWEN2 = replace(LLAMA, head_size=6, qkv_bias=True)
QWEN3 = replace(LLAMA, qk_norm=True, head_size=10, tied=True)
BERT = BertConfig(
    num_layers=3, hidden=24, heads=4, kv_heads=4, ffn=40, vocab=37, max_positions=40, norm_eps=1e-12, activation="gelu"
)
T5_10 = T5Config(
    encoder_layers=2, decoder_layers=3, hidden=24, heads=4, kv_heads=4, head_size=10, ffn=40, vocab=37,
    max_positions=150, norm="rmsnorm", norm_eps=1e-6, activation="relu", bias=False, qkv_bias=False, softmax_scale=1.0,
    positions="relative", head_bias=False, scaled_output=True,
)  # fmt: skip
T5_11 = replace(T5_10, activation="geglu", tied=False, scaled_output=False)
T5_MEGATRON = replace(
    T5_10, head_size=None, norm="layernorm", norm_eps=1e-5, activation="gelu", bias=True, qkv_bias=True,
    softmax_scale=None, positions="learned", head_bias=True, scaled_output=False,
)  # fmt: skip

DOUBLE, ROUNDED = 1e-9, 2e-6
"""Where transformers keeps fp64; where it goes through fp32 for angles, means or softmax."""

Build = Callable[..., nn.Module]
mistral = partial(published.llama, kind="Mistral", sliding_window=7)
qwen2, qwen3 = (partial(published.llama, kind=kind) for kind in ("Qwen2", "Qwen3"))


def assert_close(found: Tensor, expected: Tensor, limit: float) -> None:
    assert ((found - expected).abs().max() / expected.abs().max()).item() < limit


def ragged(tokens: Tensor) -> Tensor:
    """False at the ends of all sequences but the first."""
    lengths = torch.tensor([tokens.shape[1], tokens.shape[1] // 2, 3])
    return torch.arange(tokens.shape[1]) < lengths[:, None]


@pytest.mark.parametrize(
    ("c", "build", "limit"),
    [
        pytest.param(GPT2, published.gpt2, DOUBLE, id="gpt2"),
        pytest.param(replace(GPT2, activation="gelu"), published.gpt2, DOUBLE, id="gpt2-erf"),
        pytest.param(replace(GPT2, activation="relu"), published.gpt2, DOUBLE, id="gpt2-relu"),
        pytest.param(NEOX, published.gpt_neox, ROUNDED, id="neox"),
        pytest.param(replace(NEOX, parallel_residual=False), published.gpt_neox, ROUNDED, id="neox-one-by-one"),
        pytest.param(BLOOM, published.bloom, ROUNDED, id="bloom"),
        pytest.param(LLAMA3, published.llama, ROUNDED, id="llama3"),
        pytest.param(LINEAR, published.llama, ROUNDED, id="llama-linear"),
        pytest.param(MISTRAL, mistral, ROUNDED, id="mistral"),
        pytest.param(QWEN2, qwen2, ROUNDED, id="qwen2"),
        pytest.param(QWEN3, qwen3, ROUNDED, id="qwen3"),
    ],
)
def test_gpt_is_the_published_model(c: OracleConfig, build: Build, limit: float) -> None:
    params = gpt.random_params(c, std=0.3, dtype=torch.float64)
    text = torch.randint(c.vocab, (3, 30), generator=torch.Generator().manual_seed(1))
    theirs = build(c, params)(input_ids=text, labels=text)
    assert_close(gpt.forward(params, c, text), theirs.logits, limit)
    loss = gpt.loss(params, c, text[:, :-1], text[:, 1:], torch.ones(3, 29))
    assert_close(loss, theirs.loss, ROUNDED)


@pytest.mark.parametrize("post_ln", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_bert_is_the_published_model(post_ln: bool, activation: str) -> None:
    c = replace(BERT, post_ln=post_ln, activation=activation, head_activation=activation)
    params = bert.random_params(c, std=0.3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(1, c.vocab, (2, 3, 30), generator=generator)
    token_types = torch.randint(2, (3, 30), generator=generator)
    real, is_random = ragged(tokens), torch.tensor([0, 1, 1])
    masked = (torch.rand(3, 30, generator=generator) < 0.3) & real
    theirs = published.bert(c, params)(
        input_ids=tokens,
        attention_mask=real.long(),
        token_type_ids=token_types,
        labels=labels.where(masked, -100),
        next_sentence_label=is_random,
    )
    logits, order = bert.forward(params, c, tokens, token_types, real)
    assert order is not None
    assert_close(logits[real], theirs.prediction_logits[real], DOUBLE)
    assert_close(order, theirs.seq_relationship_logits, DOUBLE)
    losses = bert.losses(params, c, tokens, token_types, labels.where(masked, -1), masked.double(), real, is_random)
    assert_close(losses.sum(), theirs.loss, DOUBLE)


@pytest.mark.parametrize(
    ("c", "build", "limit"),
    [
        pytest.param(T5_10, published.t5, ROUNDED, id="t5-1.0"),
        pytest.param(replace(T5_10, buckets=8, max_distance=20), published.t5, ROUNDED, id="t5-1.0-few-buckets"),
        pytest.param(T5_11, published.t5, ROUNDED, id="t5-1.1"),
        pytest.param(T5_MEGATRON, published.blenderbot, DOUBLE, id="megatron"),
    ],
)
def test_t5_is_the_published_model(c: T5Config, build: Build, limit: float) -> None:
    params = t5.random_params(c, std=0.15, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    encoder_tokens = torch.randint(1, c.vocab, (3, 140), generator=generator)
    decoder_tokens, labels = torch.randint(1, c.vocab, (2, 3, 70), generator=generator)
    real, kept = ragged(encoder_tokens), ragged(labels)
    theirs = build(c, params)(
        input_ids=encoder_tokens,
        attention_mask=real.long(),
        decoder_input_ids=decoder_tokens,
        labels=labels.where(kept, -100),
    )
    assert_close(t5.forward(params, c, encoder_tokens, decoder_tokens, real), theirs.logits, limit)
    loss = t5.loss(params, c, encoder_tokens, decoder_tokens, labels.where(kept, -1), kept.double(), real)
    assert_close(loss, theirs.loss, limit)


def test_documents_are_sequences_of_their_own() -> None:
    """Packed with their masks and positions, or each alone."""
    lengths = [7, 1, 12]
    for c in (GPT2, replace(NEOX, window=4), BLOOM, LLAMA):
        params = gpt.random_params(c, std=0.3, dtype=torch.float64)
        text = torch.randint(c.vocab, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        documents = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
        packed = gpt.forward(params, c, text, positions, documents)
        alone = torch.cat([gpt.forward(params, c, part) for part in text.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(packed, alone, rtol=1e-11, atol=1e-11)
        assert not torch.allclose(gpt.forward(params, c, text)[:, 7:], alone[:, 7:], rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("squared_relu", lambda x: torch.relu(x).square()),
        ("swiglu", torch.nn.functional.silu),
        ("geglu", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("reglu", torch.relu),
        ("liglu", lambda x: x),
    ],
)
def test_activations_are_torchs(name: str, function: Callable[[Tensor], Tensor]) -> None:
    c = replace(GPT2, activation=name, bias=False)
    p = gpt.under(gpt.random_params(c, dtype=torch.float64), "layers.1.")
    x = torch.randn(2, 5, c.hidden, dtype=torch.float64)
    y = x @ p["mlp.linear_fc1.weight"].T
    middle = function(y[..., : c.ffn]) * y[..., c.ffn :] if c.gated else function(y)
    torch.testing.assert_close(gpt.mlp(p, c, x), middle @ p["mlp.linear_fc2.weight"].T, rtol=1e-12, atol=1e-12)


def test_a_norm_of_1p_is_one_more() -> None:
    c = replace(LLAMA, norm_1p=True)
    params = gpt.random_params(c, dtype=torch.float64)
    whole = {name: value + name.endswith("norm.weight") for name, value in params.items()}
    text = torch.randint(c.vocab, (2, 9))
    assert torch.equal(gpt.forward(params, c, text), gpt.forward(whole, LLAMA, text))


def test_one_direction_changes_nothing_beyond_the_window() -> None:
    """Three layers that see two tokens back see six."""
    c = replace(GPT2, window=2)
    params = gpt.random_params(c, std=0.3, dtype=torch.float64)
    text = torch.randint(c.vocab, (1, 20), generator=torch.Generator().manual_seed(1))
    changed = text.clone()
    changed[:, 5] = (changed[:, 5] + 1) % c.vocab
    moved = (gpt.forward(params, c, text) - gpt.forward(params, c, changed)).abs().amax(-1)[0] > 1e-9
    assert moved.nonzero().flatten().tolist() == list(range(5, 12))


def test_padding_is_never_seen() -> None:
    """What stands where there is padding changes no loss and gets no gradient."""
    b = bert.random_params(BERT, std=0.3, dtype=torch.float64)
    tokens = torch.randint(1, BERT.vocab - 1, (3, 9))
    real, types, order = ragged(tokens), torch.zeros_like(tokens), torch.zeros(3, dtype=torch.long)
    other = tokens.where(real, BERT.vocab - 1)
    found = [bert.losses(b, BERT, ids, types, tokens, real.double(), real, order) for ids in (tokens, other)]
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)
    p = t5.random_params(T5_11, dtype=torch.float64)
    found = [t5.loss(p, T5_11, ids, tokens, tokens, real.double(), real) for ids in (tokens, other)]
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)


def slopes(params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], loss: Callable[..., Tensor]) -> None:
    """Every parameter's gradient along a random direction is a finite difference."""
    for name, weight in params.items():
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
        above, below = (loss({**params, name: weight + sign * 1e-5 * direction}) for sign in (1, -1))
        slope = ((above - below) / 2e-5).item()
        assert (gradients[name] * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-10), name
        assert abs(slope) > 1e-8, f"{name} has no influence"


def test_gradients_are_finite_differences() -> None:
    c, m = replace(BERT, num_layers=1), replace(T5_MEGATRON, encoder_layers=1, decoder_layers=1)
    tokens, labels = torch.randint(1, c.vocab, (2, 3, 9), generator=torch.Generator().manual_seed(1))
    real = ragged(tokens)
    sample = bert.GlobalBatch(tokens, labels % 2, labels, real.double(), real, torch.tensor([0, 1, 1]))
    params = bert.random_params(c, std=0.3, dtype=torch.float64)
    run = bert.train(params, c, [sample], lr_at=lambda _: 0.0, keep_gradients=True, micro_batch=2)
    slopes(params, run.gradients[0], lambda p: bert.losses(p, c, *sample).sum())
    for model in (m, replace(T5_11, encoder_layers=1, decoder_layers=1)):
        pair = t5.GlobalBatch(tokens, labels, labels, real.double(), real)
        params = t5.random_params(model, std=0.3, dtype=torch.float64)
        found = t5.train(params, model, [pair], lr_at=lambda _: 0.0, keep_gradients=True, micro_batch=2)
        slopes(params, found.gradients[0], lambda p, model=model, pair=pair: t5.loss(p, model, *pair))  # type: ignore[misc]

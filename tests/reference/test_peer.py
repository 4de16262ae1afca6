"""The benchmark's peer trains the same function as the oracle: a comparison of speed compares like with like."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peer
from tests.reference import gpt

TINY = peer.Workload(name="tiny", layers=2, hidden=32, heads=4, seq=8, vocab=50, micro=2, global_=6)
CONFIG = gpt.OracleConfig(num_layers=2, hidden=32, heads=4, kv_heads=4, ffn=128, vocab=50, max_positions=8)
NAMES = {
    "words.": "embedding.word_embeddings.",
    "positions.": "embedding.position_embeddings.",
    "blocks.": "layers.",
    "ln_1.": "input_layernorm.",
    "qkv.": "self_attention.linear_qkv.",
    ".proj.": ".self_attention.linear_proj.",
    "ln_2.": "pre_mlp_layernorm.",
    "fc_1.": "mlp.linear_fc1.",
    "fc_2.": "mlp.linear_fc2.",
    "ln_f.": "final_layernorm.",
}


def renamed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The peer's weights under the oracle's names."""
    params = {}
    for name, weight in model.named_parameters():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        params[name] = weight.detach().clone()
    return params


def test_peer_trains_like_the_oracle_in_fp32() -> None:
    step = peer.PeerStep(TINY, torch.float32, seed=3)
    start = renamed(step.model)
    batches = [peer.random_batch(TINY, seed) for seed in range(3)]
    expected = gpt.train(
        start,
        CONFIG,
        [(tokens, labels, torch.ones(tokens.shape)) for tokens, labels in batches],
        lr_at=lambda _: peer.LEARNING_RATE,
        betas=peer.BETAS,
        eps=peer.EPS,
        weight_decay=peer.WEIGHT_DECAY,
        clip_grad=peer.CLIP_GRAD,
    )
    assert start.keys() == gpt.parameter_shapes(CONFIG).keys()
    for batch, (loss, grad_norm) in zip(batches, expected.history, strict=True):
        assert step.step(batch) == pytest.approx(loss, rel=1e-6)
        assert step.grad_norm == pytest.approx(grad_norm, rel=1e-5)


def test_peer_in_bf16_follows_fp32() -> None:
    full, half = (peer.PeerStep(TINY, dtype) for dtype in (torch.float32, torch.bfloat16))
    for seed in range(3):
        batch = peer.random_batch(TINY, seed)
        a, b = full.step(batch), half.step(batch)
        assert a == pytest.approx(b, rel=5e-3)
        assert a != b


def test_workloads_have_the_published_sizes() -> None:
    """42.2 and 44.8 million parameters, 2048 tokens a step."""
    for workload, millions in ((peer.W1, 44.8), (peer.W2, 42.2)):
        with torch.device("meta"):
            model = peer.PeerGPT(workload)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
        assert workload.tokens_per_step == 2048


def test_random_labels_are_the_next_tokens() -> None:
    tokens, labels = peer.random_batch(peer.W2, 5)
    assert tokens.shape == labels.shape == (8, 256)
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    assert int(tokens.max()) < 8192

"""FLOPs counted from modules equal those that torch counts while the model runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ds.kernels.attention import Pattern
from megatron_ds.kernels.table import Kernels
from megatron_ds.model.chunk import Lengths, Stage
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.runtime import Runtime
from megatron_ds.model.zoo import build_model

CONFIGS = {
    "gpt2": TransformerConfig(num_layers=3, hidden_size=64, num_attention_heads=4),
    "llama": TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, swiglu=True,
        normalization="RMSNorm", position_embedding_type="rope", add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
    ),
    "wide heads": TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, kv_channels=32),
    "bert": TransformerConfig(model_type="BERT", num_layers=2, hidden_size=64, num_attention_heads=4),
    "t5": TransformerConfig(
        model_type="T5", encoder_num_layers=2, decoder_num_layers=1, hidden_size=64, num_attention_heads=4,
        kv_channels=8, glu_activation="geglu",
    ),
}  # fmt: skip


def explicit_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, pattern: Pattern, dropout: float
) -> torch.Tensor:
    """The same matrix products without SDPA, whose CPU kernel torch's counter does not know."""
    s, b, a, d = q.shape
    k, v = (t.repeat_interleave(a // t.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).permute(2, 0, 1, 3).reshape(s, b, a * d)


@pytest.mark.parametrize("name", CONFIGS)
def test_counted_flops_equal_torchs(name: str) -> None:
    config, vocab, s, b = CONFIGS[name], Vocab(100, 128), 16, 2
    model = build_model(
        config, vocab, Stage(0, config.total_layers, True, True),
        runtime=Runtime(kernels=Kernels(attention=explicit_attention)), max_positions=s, device="meta",
    ).to_empty(device="cpu").eval()  # fmt: skip
    tokens, positions = torch.zeros(b, s, dtype=torch.int64), torch.arange(s).expand(b, -1)
    target = tokens[:, :12]
    inputs = {
        "GPT": ((tokens, positions), {"labels": tokens}),
        "BERT": ((tokens, tokens, tokens), {"labels": tokens, "is_random": tokens[:, 0]}),
        "T5": ((tokens, target, tokens), {"labels": target}),
    }[config.model_type]
    with FlopCounterMode(display=False) as counter:
        out = model(*inputs[0], **inputs[1])
        losses = out if isinstance(out, tuple) else (out,)
        torch.stack([loss.sum() for loss in losses]).sum().backward()
    lengths = Lengths(s, 12 if config.model_type == "T5" else 0)
    # A backward costs two forwards, except that nobody needs the gradient of the tokens.
    assert counter.get_total_flops() == 3 * model.flops_per_sample(lengths) * b

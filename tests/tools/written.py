"""Checkpoints of given weights, written without a training, and tools run in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ds.checkpoint.save import save
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.model.config import TransformerConfig
from megatron_ds.parallel.context import Axis
from tests.checkpoint.fake_world import whole_piece
from tests.helpers.recipe import Outcome, environment
from tests.reference.bert import BertConfig
from tests.reference.gpt import OracleConfig
from tests.reference.t5 import T5Config

VOCAB, POSITIONS = 61, 12
"""Both odd or nearly, so that tensor parallelism has to pad the vocabulary."""

_SIZES = {"hidden": 16, "heads": 4, "kv_heads": 4, "ffn": 24, "vocab": VOCAB, "max_positions": POSITIONS}
GPT = OracleConfig(num_layers=3, **_SIZES)
BERT = BertConfig(num_layers=2, post_ln=True, activation="gelu", norm_eps=1e-12, **_SIZES)
T5 = T5Config(
    encoder_layers=2, decoder_layers=1, head_size=6, norm="rmsnorm", norm_eps=1e-6, activation="relu", bias=False,
    qkv_bias=False, softmax_scale=1.0, positions="relative", head_bias=False, scaled_output=True, **_SIZES,
)  # fmt: skip

_OURS: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24}
MODELS: Mapping[str, TransformerConfig] = {
    "GPT": TransformerConfig(num_layers=3, **_OURS),
    "BERT": TransformerConfig(
        model_type="BERT", num_layers=2, apply_residual_connection_post_layernorm=True, bias_gelu_fusion=False,
        norm_epsilon=1e-12, **_OURS,
    ),
    "T5": TransformerConfig(
        model_type="T5", encoder_num_layers=2, decoder_num_layers=1, kv_channels=6, normalization="RMSNorm",
        norm_epsilon=1e-6, relu=True, add_bias_linear=False, softmax_scale=1.0, position_embedding_type="relative",
        lm_head_bias=False, scale_decoder_outputs=True, **_OURS,
    ),
}  # fmt: skip
"""What the oracles' configurations above are called here."""


def write_checkpoint(
    directory: Path,
    kind: str,
    params: Mapping[str, torch.Tensor],
    *,
    seq_length: int = 8,
    tokenizer: TokenizerConfig | None = None,
) -> Path:
    """An iteration 7 that holds these parameters; its tokenizer reads numbers unless another one is given."""
    tokenizer = tokenizer or TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB - 1)
    state = {
        "vocab_size": VOCAB,
        "max_positions": POSITIONS,
        "seq_length": seq_length,
        "decoder_seq_length": seq_length if kind == "T5" else None,
        "model": dataclasses.asdict(MODELS[kind]),
        "tokenizer": dataclasses.asdict(tokenizer),
        "dtype": str(next(iter(params.values())).dtype).removeprefix("torch."),
    }
    pieces = [whole_piece(f"model/{name}", tensor) for name, tensor in params.items()]
    save(directory, 7, pieces, state, Axis.solo("world"))
    return directory


def run_tool(main: Callable[[Sequence[str]], int], *words: object) -> Outcome:
    """Run a tool alone."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment())
    try:
        return _captured(main, words)
    finally:
        os.environ.clear()
        os.environ.update(before)


def as_rank(main: Callable[[Sequence[str]], int], *words: object) -> Outcome:
    """On a rank of `run_ranks`: run a tool with the environment as it is."""
    return _captured(main, words)


def _captured(main: Callable[[Sequence[str]], int], words: Sequence[object]) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Outcome(code, out.getvalue(), err.getvalue())

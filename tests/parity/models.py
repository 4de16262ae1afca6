"""What the parity suite trains: the oracles' models, the command lines that ask for them, and random batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from tests.reference import bert, gpt, t5
from tests.reference.bert import BertConfig
from tests.reference.gpt import OracleConfig
from tests.reference.t5 import T5Config
from tests.reference.training import GlobalBatch
from tests.reference.transformer import TransformerConfig

VOCAB = 131
"""No multiple of anything: every layout pads it, and with tp=4 the last ranks hold nothing but padding."""

SEQ, SAMPLES = 32, 8
"""Length of a sequence, unless a T5 says others; sequences of a global batch."""

MICRO = 2
"""Samples of a micro-batch, unless a layout asks for something else."""

Mask = Literal["full", "holes", "uneven", "packed"]

GPT2 = OracleConfig(num_layers=4, hidden=64, heads=8, kv_heads=8, ffn=256, vocab=VOCAB, max_positions=32)
LLAMA = replace(
    GPT2,
    kv_heads=4,
    ffn=96,
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    qkv_bias=False,
    positions="rope",
    tied=False,
)
STYLES = {"gpt2": GPT2, "llama": LLAMA}

MODEL_TYPES = {OracleConfig: "GPT", BertConfig: "BERT", T5Config: "T5"}
ORACLES: Mapping[str, ModuleType] = {"GPT": gpt, "BERT": bert, "T5": t5}

ACTIVATIONS = {
    "gelu_tanh": "",
    "gelu": "--no-bias-gelu-fusion",
    "relu": "--relu",
    "squared_relu": "--squared-relu",
    "swiglu": "--swiglu",
    "geglu": "--glu-activation geglu",
    "reglu": "--glu-activation reglu",
    "liglu": "--glu-activation liglu",
}
POSITIONS = {"learned": "absolute", "rope": "rope", "alibi": "alibi", "relative": "relative"}


def oracle_of(model: TransformerConfig) -> ModuleType:
    """The module that computes the model's function."""
    return ORACLES[MODEL_TYPES[type(model)]]


def arguments(model: TransformerConfig, *layout: str) -> list[str]:
    """The command line that asks for the oracle's model and optimizer; of a flag given twice the later one counts."""
    words = f"""--hidden-size {model.hidden} --num-attention-heads {model.heads}
        --ffn-hidden-size {model.ffn} --kv-channels {model.d}
        --max-position-embeddings {model.max_positions}
        --normalization {"RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"} --norm-epsilon {model.norm_eps}
        {ACTIVATIONS[model.activation]} {"--apply-layernorm-1p" * model.norm_1p}
        {"--disable-bias-linear" * (not model.bias)} {"--add-qkv-bias" * (model.qkv_bias and not model.bias)}
        {"" if model.softmax_scale is None else f"--softmax-scale {model.softmax_scale}"}
        {"--untie-embeddings-and-output-weights" * (not model.tied)}
        --hidden-dropout 0 --attention-dropout 0 --micro-batch-size {MICRO} --global-batch-size {SAMPLES}
        --train-iters 40 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 4 --weight-decay 0.1
        --clip-grad 0.5 --adam-beta2 0.95 --reduce-bucket-size 20000 --tokenizer-type NullTokenizer
        --vocab-size {model.vocab - 1} --mock-data --device cpu"""
    if isinstance(model, OracleConfig):
        words += _gpt_words(model)
    elif isinstance(model, BertConfig):
        words += f""" --num-layers {model.num_layers} --seq-length {SEQ}
            {"--bert-no-binary-head" * (not model.binary_head)}
            {"--apply-residual-connection-post-layernorm" * model.post_ln}
            {"--openai-gelu" * (model.head_activation == "gelu_tanh")}"""
    elif isinstance(model, T5Config):
        words += _t5_words(model)
    return [*words.split(), *layout]


def _gpt_words(model: OracleConfig) -> str:
    words = f""" --num-layers {model.num_layers} --num-key-value-heads {model.kv_heads} --seq-length {SEQ}
        --position-embedding-type {POSITIONS[model.positions]} --rotary-percent {model.rotary_percent}
        --rotary-base {model.rotary_base} {"--use-parallel-residual" * model.parallel_residual}
        {"" if model.window is None else f"--window-size {model.window}"} {"--qk-layernorm" * model.qk_norm}
        {"--embed-layernorm" * model.embed_norm}"""
    if model.rope_interpolation != 1.0:
        words += f" --rotary-seq-len-interpolation-factor {model.rope_interpolation}"
    if model.llama3:
        words += f""" --use-rope-scaling --rope-scaling-factor {model.llama3.factor}
            --rope-scaling-low-freq-factor {model.llama3.low} --rope-scaling-high-freq-factor {model.llama3.high}
            --rope-scaling-original-max-position-embeddings {model.llama3.original}"""
    return words


def _t5_words(model: T5Config) -> str:
    words = f""" --encoder-num-layers {model.encoder_layers} --decoder-num-layers {model.decoder_layers}
        --encoder-seq-length {model.lengths[0]} --decoder-seq-length {model.lengths[1]}
        --position-embedding-type {POSITIONS[model.positions]} {"--no-lm-head-bias" * (not model.head_bias)}
        {"--scale-decoder-outputs" * model.scaled_output}"""
    if model.positions == "relative":
        words += f""" --relative-attention-num-buckets {model.buckets}
            --relative-attention-max-distance {model.max_distance}"""
    return words


def batches(model: TransformerConfig, steps: int, mask: Mask = "uneven") -> list[Any]:
    """Global batches of random tokens.

    mask: full; holes, as many in every sequence; uneven: every sample has another number of target tokens and the
    third and fourth have none, so that there is a micro-batch without any (BERT, T5: the samples' lengths differ as
    well); packed: the same, in documents that do not see each other.
    """
    generator = torch.Generator().manual_seed(7)
    draw = {OracleConfig: _gpt_batch, BertConfig: _bert_batch, T5Config: _t5_batch}[type(model)]
    return [draw(model, mask, generator) for _ in range(steps)]


def _kept(length: int, mask: Mask, generator: torch.Generator) -> Tensor:
    """Which positions are targets."""
    if mask == "full":
        return torch.ones(SAMPLES, length)
    if mask == "holes":
        return (torch.rand(SAMPLES, length, generator=generator).argsort(1) < length * 3 // 4).float()
    kept = torch.randint(1, length, (SAMPLES, 1), generator=generator)
    kept[2:4] = 0
    return (torch.arange(length) < kept).float()


def _gpt_batch(model: OracleConfig, mask: Mask, generator: torch.Generator) -> GlobalBatch:
    text = torch.randint(0, model.vocab, (SAMPLES, SEQ + 1), generator=generator)
    whole = text[:, :-1], text[:, 1:], _kept(SEQ, mask, generator)
    if mask != "packed":
        return whole
    starts = torch.rand(SAMPLES, SEQ, generator=generator) < 0.12
    starts[:, 0] = True
    place = torch.arange(SEQ).expand_as(starts)
    return *whole, place - torch.where(starts, place, 0).cummax(1).values, starts.cumsum(1)


def _bert_batch(model: BertConfig, mask: Mask, generator: torch.Generator) -> bert.GlobalBatch:
    tokens, labels = torch.randint(1, model.vocab, (2, SAMPLES, SEQ), generator=generator)
    lengths = torch.randint(3, SEQ + 1, (SAMPLES, 1), generator=generator)
    place = torch.arange(SEQ).expand_as(tokens)
    real = place < lengths if mask == "uneven" else torch.ones_like(tokens, dtype=torch.bool)
    masked = torch.rand(SAMPLES, SEQ, generator=generator).argsort(1) < 5
    if mask == "uneven":
        masked[2:4] = False
        masked[0, 1] = True
    masked &= real
    types = ((place >= lengths // 2) & real).long()
    # Three to one, so that what the binary head's bias gets is no small rest of a sum.
    order = (torch.randperm(SAMPLES, generator=generator) >= SAMPLES // 4).long()
    return bert.GlobalBatch(tokens.where(real, 0), types, labels.where(masked, -1), masked.float(), real, order)


def _t5_batch(model: T5Config, mask: Mask, generator: torch.Generator) -> t5.GlobalBatch:
    source, target = model.lengths
    encoder_tokens = torch.randint(1, model.vocab, (SAMPLES, source), generator=generator)
    decoder_tokens, labels = torch.randint(1, model.vocab, (2, SAMPLES, target), generator=generator)
    lengths = torch.randint(1, source + 1, (SAMPLES, 1), generator=generator)
    real = torch.arange(source) < (lengths if mask == "uneven" else source)
    kept = _kept(target, mask, generator)
    tokens = encoder_tokens.where(real, 0), decoder_tokens.where(kept > 0, 0)
    return t5.GlobalBatch(*tokens, labels.where(kept > 0, -1), kept, real.expand_as(encoder_tokens))

"""Which class of Hugging Face can hold a model of ours, and which models have none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.config import parse, with_checkpoint_model
from megatron_ds.convert.homes import find_home, folded
from megatron_ds.convert.hub import load_hf
from megatron_ds.convert.weights import Weights
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.errors import CheckpointError
from megatron_ds.model.config import TransformerConfig
from megatron_ds.rules import check_config
from tests.convert import published

LLAMA = {"normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True, "add_bias_linear": False}
BERT = {"model_type": "BERT", "bias_gelu_fusion": False}
T5 = {
    "model_type": "T5", "position_embedding_type": "relative", "softmax_scale": 1.0, "normalization": "RMSNorm",
    "add_bias_linear": False, "lm_head_bias": False, "relu": True, "scale_decoder_outputs": True,
}  # fmt: skip


def weights(**options: Any) -> Weights:
    config = TransformerConfig(num_layers=2, hidden_size=24, num_attention_heads=4, **options)
    return Weights(
        config=config,
        vocab_size=17,
        max_positions=32,
        seq_length=32,
        dtype=torch.float32,
        iteration=0,
        tokenizer=None,
        names=(),
        read=lambda name: torch.full((3,), 0.25, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize(
    ("options", "home"),
    [
        ({}, "GPT2LMHeadModel"),
        ({"bias_gelu_fusion": False, "untie_embeddings_and_output_weights": True}, "GPT2LMHeadModel"),
        ({"position_embedding_type": "rope"}, "GPTNeoXForCausalLM"),
        ({"use_rotary_position_embeddings": True, "rotary_percent": 0.5}, "GPTNeoXForCausalLM"),
        (LLAMA, "LlamaForCausalLM"),
        (LLAMA | {"bias_gelu_fusion": False}, "LlamaForCausalLM"),
        (LLAMA | {"num_key_value_heads": 2, "kv_channels": 10}, "LlamaForCausalLM"),
        (LLAMA | {"add_bias_linear": True}, "LlamaForCausalLM"),
        (LLAMA | {"window_size": 5}, "MistralForCausalLM"),
        (LLAMA | {"add_qkv_bias": True, "window_size": 5}, "Qwen2ForCausalLM"),
        (LLAMA | {"qk_layernorm": True}, "Qwen3ForCausalLM"),
        ({"position_embedding_type": "alibi", "embed_layernorm": True}, "BloomForCausalLM"),
        ({"model_type": "BERT", "bias_gelu_fusion": False}, "MegatronBertForPreTraining"),
        ({"model_type": "BERT", "openai_gelu": True}, "MegatronBertForPreTraining"),
        (BERT | {"apply_residual_connection_post_layernorm": True}, "BertForPreTraining"),
        (BERT | {"bert_binary_head": False}, "MegatronBertForMaskedLM"),
        ({"model_type": "T5"}, "BlenderbotForConditionalGeneration"),
        (T5, "T5ForConditionalGeneration"),
        (T5 | {"relu": False, "glu_activation": "geglu", "kv_channels": 5}, "T5ForConditionalGeneration"),
    ],
)
def test_home(options: dict[str, Any], home: str) -> None:
    assert find_home(weights(**options)).name == home


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"squared_relu": True}, "squared_relu"),
        ({"add_bias_linear": False}, "--disable-bias-linear"),
        ({"position_embedding_type": "rope", "num_key_value_heads": 2}, "--num-query-groups"),
        ({"swiglu": True}, "swiglu"),
        ({"normalization": "RMSNorm"}, "--normalization"),
        (LLAMA | {"swiglu": False}, "gelu here, swiglu there"),
        (LLAMA | {"rotary_percent": 0.5}, "--rotary-percent"),
        (LLAMA | {"add_qkv_bias": True, "qk_layernorm": True}, "--qk-layernorm"),
        (LLAMA | {"softmax_scale": 1.0}, "--softmax-scale"),
        ({"position_embedding_type": "alibi"}, "--embed-layernorm"),
        ({"position_embedding_type": "none"}, "--position-embedding-type: none"),
        (BERT | {"swiglu": True}, "swiglu"),
        (BERT | {"relu": True}, "relu"),
        ({"model_type": "BERT"}, "Megatron's default"),
        ({"model_type": "T5", "lm_head_bias": False}, "--no-lm-head-bias"),
        (T5 | {"normalization": "LayerNorm"}, "--normalization"),
    ],
)
def test_homeless_models_are_refused_with_the_reason(options: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_home(weights(**options))
    assert word in caught.value.found


def test_the_class_it_came_from_goes_first() -> None:
    came = dataclasses.replace(weights(**LLAMA), home="MistralForCausalLM")
    assert find_home(came).name == "MistralForCausalLM"
    changed = dataclasses.replace(weights(**LLAMA, qk_layernorm=True), home="MistralForCausalLM")
    assert find_home(changed).name == "Qwen3ForCausalLM"


def test_norms_stored_less_one_are_folded() -> None:
    plain = folded(weights(apply_layernorm_1p=True))
    assert find_home(plain).name == "GPT2LMHeadModel"
    for name in ("layers.0.input_layernorm.weight", "final_layernorm.weight", "embedding.norm.weight"):
        assert plain.read(name).tolist() == [1.25] * 3 and plain.read(name).dtype == torch.float32
    for name in ("layers.0.input_layernorm.bias", "layers.0.mlp.linear_fc1.weight"):
        assert plain.read(name).tolist() == [0.25] * 3


@pytest.mark.parametrize("name", published.MODELS)
def test_an_import_can_be_trained_as_it_is(tmp_path: Path, name: str) -> None:
    """--use-checkpoint-args: no rule is broken by what nobody typed."""
    weights = load_hf(published.save(name, tmp_path))
    kind = weights.config.model_type
    words = "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --seq-length 16 --load x --use-checkpoint-args"
    config = parse(words.split() + ["--decoder-seq-length", "16"] * (kind == "T5"), {"model_type": kind})
    state = {
        "model": dataclasses.asdict(weights.config),
        "max_positions": weights.max_positions,
        "tokenizer": dataclasses.asdict(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=99)),
    }
    check_config(with_checkpoint_model(config, state), 1)

"""Tiny models of transformers, random weights, odd legal sizes: one of every class that we convert, and variants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers

LLAMA = {
    "vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 34, "max_position_embeddings": 96, "rms_norm_eps": 1e-6,
}  # fmt: skip
BERT = {
    "vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 38,
    "max_position_embeddings": 45,
}  # fmt: skip
T5 = {
    "vocab_size": 71, "d_model": 20, "d_kv": 6, "d_ff": 28, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 10, "relative_attention_max_distance": 19,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip

MODELS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "gpt2": ("GPT2", {"vocab_size": 61, "n_positions": 41, "n_embd": 20, "n_layer": 3, "n_head": 5, "n_inner": 28}),
        "gpt2-erf-untied": (
            "GPT2",
            {"vocab_size": 61, "n_positions": 41, "n_embd": 20, "n_layer": 2, "n_head": 5}
            | {"activation_function": "gelu", "tie_word_embeddings": False},
        ),
        "neox": (
            "GPTNeoX",
            {"vocab_size": 59, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
            | {"intermediate_size": 40, "max_position_embeddings": 64},
        ),
        "neox-serial-tied": (
            "GPTNeoX",
            {"vocab_size": 59, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
            | {"intermediate_size": 40, "max_position_embeddings": 64, "use_parallel_residual": False}
            | {"hidden_act": "gelu_new", "tie_word_embeddings": True}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}},
        ),
        "llama": ("Llama", LLAMA | {"rope_parameters": LLAMA3}),
        "llama-linear-tied": (
            "Llama",
            LLAMA
            | {"tie_word_embeddings": True, "head_dim": 10}
            | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
        ),
        "mistral": ("Mistral", LLAMA | {"sliding_window": 9, "head_dim": 6}),
        "qwen2": ("Qwen2", LLAMA),
        "qwen2-window-tied": (
            "Qwen2",
            LLAMA
            | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 0},
        ),
        "qwen3": ("Qwen3", LLAMA | {"head_dim": 10}),
        "bloom": ("Bloom", {"vocab_size": 57, "hidden_size": 20, "n_layer": 3, "n_head": 5}),
        "bert": ("BertForPreTraining", BERT),
        "megatron-bert": ("MegatronBertForPreTraining", BERT | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
        "bert-masked": ("BertForMaskedLM", BERT | {"type_vocab_size": 1}),
        "t5": ("T5", T5),
        "t5-1.1-tied": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        "blenderbot": (
            "Blenderbot",
            {"vocab_size": 49, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 3}
            | {"decoder_attention_heads": 3, "encoder_ffn_dim": 30, "decoder_ffn_dim": 30}
            | {"max_position_embeddings": 43},
        ),
    }
)
_SUFFIXES = {"GPT2": "LMHeadModel", "T5": "ForConditionalGeneration", "Blenderbot": "ForConditionalGeneration"}


def class_name(name: str) -> str:
    """The class of transformers."""
    stem = MODELS[name][0]
    return stem if "Bert" in stem else stem + _SUFFIXES.get(stem, "ForCausalLM")


def kind(name: str) -> str:
    """Our model."""
    stem = MODELS[name][0]
    return "BERT" if "Bert" in stem else "T5" if stem in _SUFFIXES and stem != "GPT2" else "GPT"


def build(name: str) -> Any:
    """A model all of whose parameters and saved buffers are random, norms and biases too."""
    stem, sizes = MODELS[name]
    config = getattr(transformers, stem.split("For")[0] + "Config")(**sizes)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = getattr(transformers, class_name(name))(config).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or "inv_freq" in key:
                continue
            around = 1.0 if "norm" in key.lower() or ".ln" in key or "ln_" in key else 0.0
            tensor.copy_(around + 0.2 * torch.randn(tensor.shape, generator=generator))
        if name == "bert-masked":
            model.bert.embeddings.token_type_embeddings.weight.zero_()
        if name == "blenderbot":
            tables = model.model.encoder.embed_positions, model.model.decoder.embed_positions
            tables[1].weight.copy_(tables[0].weight)
    return model


def save(name: str, directory: Path) -> Path:
    """Write one of them as transformers does."""
    build(name).save_pretrained(directory / name)
    return directory / name

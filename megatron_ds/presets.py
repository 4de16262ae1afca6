"""Published models by name: what `--model-preset` puts where nothing was typed.

Only what makes the architecture; sample lengths, vocabulary, dropout and training stay with the flags. Figures are
those of each model's own config.json. Two shapes in GPT-3's paper do not come out even (24 heads of 128 for a width of
2048, a width of 5140): 1.3B has 16 heads here and 13B a width of 5120, and attention is dense throughout.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from megatron_ds.errors import ConfigError
from megatron_ds.model.config import ModelType


class Preset(NamedTuple):
    """Fields of TransformerConfig, and the recipe that they belong to."""

    model_type: ModelType
    values: Mapping[str, Any]


def _shape(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}


def _gpt(layers: int, hidden: int, heads: int, positions: int) -> Preset:
    """GPT-2 and GPT-3: what the flags' defaults say."""
    return Preset("GPT", {**_shape(layers, hidden, heads), "max_position_embeddings": positions})


def _neox(layers: int, hidden: int, heads: int, **others: Any) -> Preset:
    """GPT-NeoX and Pythia."""
    values = {
        "max_position_embeddings": 2048,
        "position_embedding_type": "rope",
        "rotary_percent": 0.25,
        "use_parallel_residual": True,
        "untie_embeddings_and_output_weights": True,
    }
    return Preset("GPT", _shape(layers, hidden, heads) | values | others)


def _llama(layers: int, hidden: int, heads: int, ffn: int, positions: int, **others: Any) -> Preset:
    """Llama, and those that vary it: Mistral, Qwen."""
    values = {
        "ffn_hidden_size": ffn,
        "max_position_embeddings": positions,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    }
    return Preset("GPT", _shape(layers, hidden, heads) | values | others)


def _llama_3(layers: int, hidden: int, heads: int, ffn: int, positions: int = 8192, **others: Any) -> Preset:
    return _llama(layers, hidden, heads, ffn, positions, num_key_value_heads=8, rotary_base=500000.0, **others)


def _qwen(tied: bool) -> dict[str, Any]:
    return {"rotary_base": 1e6, "norm_epsilon": 1e-6, "untie_embeddings_and_output_weights": not tied}


def _qwen_2(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, tied: bool) -> Preset:
    others = {**_qwen(tied), "num_key_value_heads": kv_heads, "add_qkv_bias": True}
    return _llama(layers, hidden, heads, ffn, 131072, **others)


def _qwen_3(layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> Preset:
    others = {**_qwen(tied), "num_key_value_heads": 8, "kv_channels": 128, "qk_layernorm": True}
    return _llama(layers, hidden, heads, ffn, 40960, **others)


def _bloom(layers: int, hidden: int, heads: int) -> Preset:
    return Preset("GPT", {**_shape(layers, hidden, heads), "position_embedding_type": "alibi", "embed_layernorm": True})


def _bert(layers: int, hidden: int, heads: int) -> Preset:
    """The original, whose residuals leave after the norm."""
    values = {
        "max_position_embeddings": 512,
        "apply_residual_connection_post_layernorm": True,
        "bias_gelu_fusion": False,
        "norm_epsilon": 1e-12,
    }
    return Preset("BERT", _shape(layers, hidden, heads) | values)


def _t5(layers: int, hidden: int, heads: int, head_size: int, ffn: int, **others: Any) -> Preset:
    values = {
        "kv_channels": head_size,
        "ffn_hidden_size": ffn,
        "position_embedding_type": "relative",
        "softmax_scale": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "add_bias_linear": False,
        "lm_head_bias": False,
    }
    return Preset("T5", _shape(layers, hidden, heads) | values | others)


_STRETCHED: Mapping[str, Any] = {"positions": 131072, "use_rope_scaling": True}  # all else of it is the default
_ERF: Mapping[str, Any] = {"bias_gelu_fusion": False}
_T5_1_0: Mapping[str, Any] = {"relu": True, "scale_decoder_outputs": True}
_T5_1_1: Mapping[str, Any] = {"glu_activation": "geglu", "untie_embeddings_and_output_weights": True}

PRESETS: Mapping[str, Preset] = {
    "gpt2-124m": _gpt(12, 768, 12, 1024),
    "gpt2-355m": _gpt(24, 1024, 16, 1024),
    "gpt2-774m": _gpt(36, 1280, 20, 1024),
    "gpt2-1.5b": _gpt(48, 1600, 25, 1024),
    "gpt3-125m": _gpt(12, 768, 12, 2048),
    "gpt3-350m": _gpt(24, 1024, 16, 2048),
    "gpt3-760m": _gpt(24, 1536, 16, 2048),
    "gpt3-1.3b": _gpt(24, 2048, 16, 2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, 2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, 2048),
    "gpt3-13b": _gpt(40, 5120, 40, 2048),
    "gpt3-175b": _gpt(96, 12288, 96, 2048),
    "pythia-70m": _neox(6, 512, 8, **_ERF),
    "pythia-160m": _neox(12, 768, 12, **_ERF),
    "pythia-410m": _neox(24, 1024, 16, **_ERF),
    "pythia-1b": _neox(16, 2048, 8, **_ERF),
    "pythia-1.4b": _neox(24, 2048, 16, **_ERF),
    "pythia-2.8b": _neox(32, 2560, 32, **_ERF),
    "pythia-6.9b": _neox(32, 4096, 32, **_ERF),
    "pythia-12b": _neox(36, 5120, 40, **_ERF),
    "gpt-neox-20b": _neox(44, 6144, 64),
    "llama2-7b": _llama(32, 4096, 32, 11008, 4096),
    "llama2-13b": _llama(40, 5120, 40, 13824, 4096),
    "llama2-70b": _llama(80, 8192, 64, 28672, 4096, num_key_value_heads=8),
    "llama3-8b": _llama_3(32, 4096, 32, 14336),
    "llama3-70b": _llama_3(80, 8192, 64, 28672),
    "llama3.1-8b": _llama_3(32, 4096, 32, 14336, **_STRETCHED),
    "llama3.2-1b": _llama_3(
        16, 2048, 32, 8192, **_STRETCHED, rope_scaling_factor=32.0, untie_embeddings_and_output_weights=False
    ),
    "mistral-7b": _llama(32, 4096, 32, 14336, 32768, num_key_value_heads=8, window_size=4095),
    "qwen2-0.5b": _qwen_2(24, 896, 14, 2, 4864, tied=True),
    "qwen2-1.5b": _qwen_2(28, 1536, 12, 2, 8960, tied=True),
    "qwen2-7b": _qwen_2(28, 3584, 28, 4, 18944, tied=False),
    "qwen3-0.6b": _qwen_3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen_3(28, 2048, 16, 6144, tied=True),
    "qwen3-8b": _qwen_3(36, 4096, 32, 12288, tied=False),
    "bloom-560m": _bloom(24, 1024, 16),
    "bloom-1b1": _bloom(24, 1536, 16),
    "bloom-7b1": _bloom(30, 4096, 32),
    "bloom-176b": _bloom(70, 14336, 112),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "megatron-bert-345m": Preset("BERT", {**_shape(24, 1024, 16), "max_position_embeddings": 512}),
    "t5-small": _t5(6, 512, 8, 64, 2048, **_T5_1_0),
    "t5-base": _t5(12, 768, 12, 64, 3072, **_T5_1_0),
    "t5-large": _t5(24, 1024, 16, 64, 4096, **_T5_1_0),
    "t5-3b": _t5(24, 1024, 32, 128, 16384, **_T5_1_0),
    "t5-v1_1-small": _t5(8, 512, 6, 64, 1024, **_T5_1_1),
    "t5-v1_1-base": _t5(12, 768, 12, 64, 2048, **_T5_1_1),
    "t5-v1_1-large": _t5(24, 1024, 16, 64, 2816, **_T5_1_1),
    "t5-v1_1-xl": _t5(24, 2048, 32, 64, 5120, **_T5_1_1),
    "megatron-t5-220m": Preset("T5", {**_shape(12, 768, 12), "max_position_embeddings": 512}),
}

RIVALS: tuple[frozenset[str], ...] = (
    frozenset({"group_query_attention", "num_query_groups", "num_key_value_heads"}),
    frozenset({"swiglu", "glu_activation", "relu", "squared_relu"}),
    frozenset({"position_embedding_type", "use_rotary_position_embeddings"}),
    frozenset({"num_layers", "encoder_num_layers"}),
)
STRETCHED = frozenset(
    {"position_embedding_type", "use_rotary_position_embeddings", "rotary_seq_len_interpolation_factor"}
)
"""Where one of these was typed, a preset says nothing of rope's stretching."""
"""Fields that say one thing in several ways: where one was typed, a preset says nothing about the others."""


def preset_values(name: str, model_type: str, typed: Collection[str]) -> dict[str, Any]:
    """What the preset says about fields of TransformerConfig, beside those that were typed.

    Raises: ConfigError for a name that nobody knows, or that belongs to another recipe
    """
    key = name.lower()
    own = [other for other, preset in PRESETS.items() if preset.model_type == model_type]
    if key not in PRESETS:
        near = difflib.get_close_matches(key, own, n=1, cutoff=0.4)
        fix = f"--model-preset {(near or own)[0]}"
        raise ConfigError("--model-preset", f"{name}, which names no model", f"one of {', '.join(own)}", fix)
    preset = PRESETS[key]
    if preset.model_type != model_type:
        raise ConfigError(
            f"--model-preset {key}",
            f"a {preset.model_type} model, in a recipe for {model_type}",
            f"one of {', '.join(own)}",
            f"pretrain_{preset.model_type.lower()}.py --model-preset {key}",
        )
    silent = set(typed).union(*(group for group in RIVALS if not group.isdisjoint(typed)))
    if not STRETCHED.isdisjoint(typed):
        silent |= {field for field in preset.values if field.startswith(("rope_scaling", "use_rope_scaling"))}
    return {field: value for field, value in preset.values.items() if field not in silent}

"""LlamaForCausalLM and what differs in one thing: Mistral (window), Qwen2 (QKV bias), Qwen3 (norms on q and k)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from megatron_ds.convert.family import Family, Fields, read_rope, rope_fields
from megatron_ds.convert.rules import Rule, all_joined, both, same
from megatron_ds.model.config import TransformerConfig


def _common(fields: Fields, **options: Any) -> TransformerConfig:
    fields.only("hidden_act", "silu", "swish")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    config = TransformerConfig(
        num_layers=fields.size("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=fields.size("num_key_value_heads", default=heads),
        kv_channels=fields.size("head_dim", default=hidden // heads),
        ffn_hidden_size=fields.size("intermediate_size"),
        max_position_embeddings=fields.size("max_position_embeddings", default=2048),
        normalization="RMSNorm",
        norm_epsilon=fields.number("rms_norm_eps", default=1e-6),
        swiglu=True,
        attention_dropout=fields.number("attention_dropout", default=0.0),
        hidden_dropout=0.0,
        init_method_std=fields.number("initializer_range", default=0.02),
        untie_embeddings_and_output_weights=fields.untied,
        **{"add_bias_linear": False, **options},
        **read_rope(fields, default_percent=1.0),
    )
    if config.rotary_percent != 1:
        raise fields.misfit("partial_rotary_factor", config.rotary_percent, "1: this class turns whole heads")
    return config


def _common_fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
        **rope_fields(config),
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    assert config.num_layers and config.num_attention_heads
    bias, size, ffn = config.add_bias_linear, config.head_size, [config.ffn_size] * 2
    rows = [config.num_attention_heads * size, config.kv_heads * size, config.kv_heads * size]
    rules = [same("embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv = [f"{attention}.{part}_proj" for part in "qkv"]
        rules += both(same, f"{ours}.input_layernorm", f"{theirs}.input_layernorm", bias=False)
        rules += all_joined(f"{ours}.self_attention.linear_qkv", qkv, rows, bias=bias or config.add_qkv_bias)
        for part in "qk" if config.qk_layernorm else "":
            rules += both(same, f"{ours}.self_attention.{part}_layernorm", f"{attention}.{part}_norm", bias=False)
        rules += both(same, f"{ours}.self_attention.linear_proj", f"{attention}.o_proj", bias=bias)
        rules += both(same, f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm", bias=False)
        rules += all_joined(f"{ours}.mlp.linear_fc1", [f"{mlp}.gate_proj", f"{mlp}.up_proj"], ffn, bias=bias)
        rules += both(same, f"{ours}.mlp.linear_fc2", f"{mlp}.down_proj", bias=bias)
    rules += both(same, "final_layernorm", "model.norm", bias=False)
    if config.untie_embeddings_and_output_weights:
        rules.append(same("output_layer.weight", "lm_head.weight"))
    return rules


def _llama(fields: Fields) -> TransformerConfig:
    bias = fields.get("mlp_bias", default=False)
    fields.only("attention_bias", bias)
    config = _common(fields, add_bias_linear=bias)
    assert config.hidden_size and config.num_attention_heads
    if config.hidden_size % config.num_attention_heads:
        raise fields.misfit("hidden_size", config.hidden_size, f"a multiple of {config.num_attention_heads} heads")
    return config


def _llama_fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    bias = {"attention_bias": config.add_bias_linear, "mlp_bias": config.add_bias_linear}
    return {**_common_fields(config, max_positions), **bias}


def _mistral(fields: Fields) -> TransformerConfig:
    return _common(fields, window_size=_besides_itself(fields.values.get("sliding_window", 4096)))


def _mistral_fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    return {**_common_fields(config, max_positions), "sliding_window": _with_itself(config.window_size)}


def _qwen_window(fields: Fields) -> int | None:
    """The window that all layers have, or none has.

    Raises: CheckpointError where layers differ
    """
    if not fields.get("use_sliding_window", default=False):
        return None
    layers = fields.size("num_hidden_layers")
    kinds = set(fields.get("layer_types", default=[]))
    first = 0 if kinds == {"sliding_attention"} else fields.get("max_window_layers", default=28)
    if kinds == {"full_attention"} or (not kinds and first >= layers):
        return None
    if len(kinds) > 1 or first > 0:
        raise fields.misfit("max_window_layers", first, f"0 or {layers}: all layers with the window or none")
    return _besides_itself(fields.get("sliding_window", default=4096))


def _qwen_fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    windowed, layers = config.window_size is not None, config.num_layers or 0
    return {
        **_common_fields(config, max_positions),
        "use_sliding_window": windowed,
        "sliding_window": _with_itself(config.window_size),
        "max_window_layers": 0 if windowed else layers,
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * layers,
    }


def _qwen2(fields: Fields) -> TransformerConfig:
    return _common(fields, add_qkv_bias=True, window_size=_qwen_window(fields))


def _qwen3(fields: Fields) -> TransformerConfig:
    fields.only("attention_bias", False)
    fields = Fields({"head_dim": 128, **fields.values}, fields.where, fields.untied)
    return _common(fields, qk_layernorm=True, window_size=_qwen_window(fields))


def _qwen3_fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    return {**_qwen_fields(config, max_positions), "attention_bias": False}


def _besides_itself(window: int | None) -> int | None:
    return None if window is None else window - 1


def _with_itself(window: int | None) -> int | None:
    return None if window is None else window + 1


def _family(
    name: str,
    key: str,
    config: Callable[[Fields], TransformerConfig],
    fields: Callable[[TransformerConfig, int], dict[str, Any]],
) -> Family:
    return dataclasses.replace(LLAMA, name=name, key=key, config=config, fields=fields)


LLAMA = Family(
    name="LlamaForCausalLM",
    key="llama",
    of="GPT",
    config=_llama,
    fields=_llama_fields,
    rules=_rules,
    base="model.",
    ignored=r".*rotary_emb\.inv_freq|lm_head\.weight",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
)
MISTRAL = _family("MistralForCausalLM", "mistral", _mistral, _mistral_fields)
QWEN2 = _family("Qwen2ForCausalLM", "qwen2", _qwen2, _qwen_fields)
QWEN3 = _family("Qwen3ForCausalLM", "qwen3", _qwen3, _qwen3_fields)

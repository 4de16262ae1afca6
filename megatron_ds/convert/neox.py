"""GPTNeoXForCausalLM: rotary positions on a part of each head, LayerNorm, biases, residuals in parallel or not."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_ds.convert.family import Family, Fields, activation_name, read_activation, read_rope, rope_fields
from megatron_ds.convert.rules import Rule, both, interleaved, same
from megatron_ds.model.config import TransformerConfig


def _config(fields: Fields) -> TransformerConfig:
    fields.only("attention_bias", True)
    hidden = fields.size("hidden_size")
    return TransformerConfig(
        num_layers=fields.size("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=fields.size("num_attention_heads"),
        ffn_hidden_size=fields.size("intermediate_size", default=4 * hidden),
        max_position_embeddings=fields.size("max_position_embeddings", default=2048),
        norm_epsilon=fields.number("layer_norm_eps", default=1e-5),
        use_parallel_residual=fields.get("use_parallel_residual", default=True),
        attention_dropout=fields.number("attention_dropout", default=0.0),
        hidden_dropout=fields.number("hidden_dropout", default=0.0),
        init_method_std=fields.number("initializer_range", default=0.02),
        untie_embeddings_and_output_weights=fields.untied,
        **read_activation(fields, "hidden_act", "gelu"),
        **read_rope(fields, default_percent=0.25),
    )


def _fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    rope = rope_fields(config)
    rope["rope_parameters"]["partial_rotary_factor"] = config.rotary_percent  # left out it would mean a quarter
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": max_positions,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": activation_name(config),
        "use_parallel_residual": config.use_parallel_residual,
        "attention_bias": True,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
        "initializer_range": config.init_method_std,
        "rotary_pct": config.rotary_percent,
        "rotary_emb_base": config.rotary_base,
        **rope,
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    assert config.num_layers and config.num_attention_heads
    fused = partial(interleaved, heads=config.num_attention_heads)
    rules = [same("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight")]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        rules += both(same, f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
        rules += both(fused, f"{ours}.self_attention.linear_qkv", f"{theirs}.attention.query_key_value")
        rules += both(same, f"{ours}.self_attention.linear_proj", f"{theirs}.attention.dense")
        rules += both(same, f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm")
        rules += both(same, f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.dense_h_to_4h")
        rules += both(same, f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.dense_4h_to_h")
    rules += both(same, "final_layernorm", "gpt_neox.final_layer_norm")
    if config.untie_embeddings_and_output_weights:
        rules.append(same("output_layer.weight", "embed_out.weight"))
    return rules


NEOX = Family(
    name="GPTNeoXForCausalLM",
    key="gpt_neox",
    of="GPT",
    config=_config,
    fields=_fields,
    rules=_rules,
    base="gpt_neox.",
    ignored=r".*\.attention\.(masked_)?bias|.*rotary_emb\.inv_freq|embed_out\.weight",
    embedding="gpt_neox.embed_in.weight",
    head="embed_out.weight",
)

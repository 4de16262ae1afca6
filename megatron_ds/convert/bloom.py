"""BloomForCausalLM: ALiBi, a norm behind the embeddings, biases, f = 4h."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_ds.convert.family import Family, Fields
from megatron_ds.convert.rules import Rule, both, interleaved, same
from megatron_ds.model.config import TransformerConfig


def _config(fields: Fields) -> TransformerConfig:
    return TransformerConfig(
        num_layers=fields.size("n_layer", "num_hidden_layers"),
        hidden_size=fields.size("hidden_size", "n_embed"),
        num_attention_heads=fields.size("n_head", "num_attention_heads"),
        max_position_embeddings=fields.size("seq_length", default=2048),
        position_embedding_type="alibi",
        embed_layernorm=True,
        norm_epsilon=fields.number("layer_norm_epsilon", default=1e-5),
        apply_residual_connection_post_layernorm=fields.get("apply_residual_connection_post_layernorm", default=False),
        attention_dropout=fields.number("attention_dropout", default=0.0),
        hidden_dropout=fields.number("hidden_dropout", default=0.0),
        init_method_std=fields.number("initializer_range", default=0.02),
        untie_embeddings_and_output_weights=fields.untied,
    )


def _fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    return {
        "n_layer": config.num_layers,
        "hidden_size": config.hidden_size,
        "n_head": config.num_attention_heads,
        "seq_length": max_positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "apply_residual_connection_post_layernorm": config.apply_residual_connection_post_layernorm,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
        "initializer_range": config.init_method_std,
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    assert config.num_layers and config.num_attention_heads
    fused = partial(interleaved, heads=config.num_attention_heads)
    rules = [same("embedding.word_embeddings.weight", "transformer.word_embeddings.weight")]
    rules += both(same, "embedding.norm", "transformer.word_embeddings_layernorm")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        rules += both(same, f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
        rules += both(fused, f"{ours}.self_attention.linear_qkv", f"{theirs}.self_attention.query_key_value")
        rules += both(same, f"{ours}.self_attention.linear_proj", f"{theirs}.self_attention.dense")
        rules += both(same, f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm")
        rules += both(same, f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.dense_h_to_4h")
        rules += both(same, f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.dense_4h_to_h")
    rules += both(same, "final_layernorm", "transformer.ln_f")
    if config.untie_embeddings_and_output_weights:
        rules.append(same("output_layer.weight", "lm_head.weight"))
    return rules


BLOOM = Family(
    name="BloomForCausalLM",
    key="bloom",
    of="GPT",
    config=_config,
    fields=_fields,
    rules=_rules,
    base="transformer.",
    ignored=r"lm_head\.weight",
    embedding="transformer.word_embeddings.weight",
    head="lm_head.weight",
)

"""GPT2LMHeadModel: learned positions, LayerNorm, biases everywhere; matrices stored [in, out]."""

from __future__ import annotations

from typing import Any

from megatron_ds.convert.family import Family, Fields, activation_name, read_activation
from megatron_ds.convert.rules import Rule, both, same, transposed
from megatron_ds.model.config import TransformerConfig


def _config(fields: Fields) -> TransformerConfig:
    for name in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        fields.only(name, False)
    fields.only("scale_attn_weights", True)
    hidden = fields.size("n_embd", "hidden_size")
    return TransformerConfig(
        num_layers=fields.size("n_layer", "num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=fields.size("n_head", "num_attention_heads"),
        ffn_hidden_size=fields.size("n_inner", default=4 * hidden),
        max_position_embeddings=fields.size("n_positions", "max_position_embeddings", default=1024),
        norm_epsilon=fields.number("layer_norm_epsilon", default=1e-5),
        attention_dropout=fields.number("attn_pdrop", default=0.1),
        hidden_dropout=fields.number("resid_pdrop", default=0.1),
        init_method_std=fields.number("initializer_range", default=0.02),
        untie_embeddings_and_output_weights=fields.untied,
        **read_activation(fields, "activation_function", "gelu_new"),
    )


def _fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    return {
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_size,
        "n_positions": max_positions,
        "n_ctx": max_positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": activation_name(config),
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "initializer_range": config.init_method_std,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    assert config.num_layers
    rules = [
        same("embedding.word_embeddings.weight", "transformer.wte.weight"),
        same("embedding.position_embeddings.weight", "transformer.wpe.weight"),
    ]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        rules += both(same, f"{ours}.input_layernorm", f"{theirs}.ln_1")
        rules += _conv1d(f"{ours}.self_attention.linear_qkv", f"{theirs}.attn.c_attn")
        rules += _conv1d(f"{ours}.self_attention.linear_proj", f"{theirs}.attn.c_proj")
        rules += both(same, f"{ours}.pre_mlp_layernorm", f"{theirs}.ln_2")
        rules += _conv1d(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.c_fc")
        rules += _conv1d(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.c_proj")
    rules += both(same, "final_layernorm", "transformer.ln_f")
    if config.untie_embeddings_and_output_weights:
        rules.append(same("output_layer.weight", "lm_head.weight"))
    return rules


def _conv1d(ours: str, theirs: str) -> list[Rule]:
    return [transposed(f"{ours}.weight", f"{theirs}.weight"), same(f"{ours}.bias", f"{theirs}.bias")]


GPT2 = Family(
    name="GPT2LMHeadModel",
    key="gpt2",
    of="GPT",
    config=_config,
    fields=_fields,
    rules=_rules,
    base="transformer.",
    ignored=r".*\.attn\.(masked_)?bias|lm_head\.weight",
    embedding="transformer.wte.weight",
    head="lm_head.weight",
)

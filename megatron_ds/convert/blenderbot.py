"""BlenderbotForConditionalGeneration: Megatron's own T5, with learned positions, biases and LayerNorm."""

from __future__ import annotations

from typing import Any

from megatron_ds.convert.family import Family, Fields, activation_name, read_activation
from megatron_ds.convert.rules import Rule, all_joined, as_row, both, repeated, same
from megatron_ds.model.config import TransformerConfig


def _config(fields: Fields) -> TransformerConfig:
    fields.only("scale_embedding", False)
    fields.only("tie_word_embeddings", True)
    heads, ffn = fields.size("encoder_attention_heads"), fields.size("encoder_ffn_dim")
    fields.only("decoder_attention_heads", heads)
    fields.only("decoder_ffn_dim", ffn)
    layers = fields.size("encoder_layers")
    return TransformerConfig(
        model_type="T5",
        encoder_num_layers=layers,
        decoder_num_layers=fields.size("decoder_layers"),
        hidden_size=fields.size("d_model"),
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        max_position_embeddings=fields.size("max_position_embeddings", default=128),
        norm_epsilon=1e-5,  # the class has no field for it
        attention_dropout=fields.number("attention_dropout", default=0.0),
        hidden_dropout=fields.number("dropout", default=0.1),
        init_method_std=fields.number("init_std", default=0.02),
        **read_activation(fields, "activation_function", "gelu"),
    )


def _fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        sizes[f"{stack}_layers"] = layers
        sizes[f"{stack}_attention_heads"] = config.num_attention_heads
        sizes[f"{stack}_ffn_dim"] = config.ffn_size
    return {
        **sizes,
        "d_model": config.hidden_size,
        "max_position_embeddings": max_positions,
        "activation_function": activation_name(config),
        "scale_embedding": False,
        "attention_dropout": config.attention_dropout,
        "dropout": config.hidden_dropout,
        "activation_dropout": 0.0,
        "init_std": config.init_method_std,
        "is_encoder_decoder": True,
    }


def _layer(config: TransformerConfig, ours: str, theirs: str, is_decoder: bool) -> list[Rule]:
    assert config.hidden_size
    size = config.hidden_size
    qkv = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
    rules = both(same, f"{ours}.input_layernorm", f"{theirs}.self_attn_layer_norm")
    rules += all_joined(f"{ours}.self_attention.linear_qkv", qkv, [size] * 3)
    rules += both(same, f"{ours}.self_attention.linear_proj", f"{theirs}.self_attn.out_proj")
    if is_decoder:
        cross, other = f"{ours}.cross_attention", f"{theirs}.encoder_attn"
        rules += both(same, f"{ours}.pre_cross_attn_layernorm", f"{other}_layer_norm")
        rules += both(same, f"{cross}.linear_q", f"{other}.q_proj")
        rules += all_joined(f"{cross}.linear_kv", [f"{other}.k_proj", f"{other}.v_proj"], [size] * 2)
        rules += both(same, f"{cross}.linear_proj", f"{other}.out_proj")
    rules += both(same, f"{ours}.pre_mlp_layernorm", f"{theirs}.final_layer_norm")
    rules += both(same, f"{ours}.mlp.linear_fc1", f"{theirs}.fc1")
    return rules + both(same, f"{ours}.mlp.linear_fc2", f"{theirs}.fc2")


def _rules(config: TransformerConfig) -> list[Rule]:
    tables = [f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")]
    rules = [
        same("embedding.word_embeddings.weight", "model.shared.weight"),
        repeated("embedding.position_embeddings.weight", tables),
    ]
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for i in range(layers):
            rules += _layer(config, f"{stack}.layers.{i}", f"model.{stack}.layers.{i}", stack == "decoder")
        rules += both(same, f"{stack}.final_layernorm", f"model.{stack}.layer_norm")
    return [*rules, as_row("lm_head.bias", "final_logits_bias")]


BLENDERBOT = Family(
    name="BlenderbotForConditionalGeneration",
    key="blenderbot",
    of="T5",
    config=_config,
    fields=_fields,
    rules=_rules,
    base="",
    ignored=r"model\.(en|de)coder\.embed_tokens\.weight|lm_head\.weight",
    embedding="model.shared.weight",
)

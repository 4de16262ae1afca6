"""T5ForConditionalGeneration, as published 1.0 (ReLU, tied scaled head) and 1.1 (gated GELU, untied head)."""

from __future__ import annotations

from typing import Any

from megatron_ds.convert.family import Family, Fields
from megatron_ds.convert.rules import Rule, all_joined, both, same
from megatron_ds.model.config import TransformerConfig

_PROJECTIONS: dict[str, dict[str, Any]] = {
    "relu": {"relu": True},
    "gelu_new": {"openai_gelu": True},  # without a bias there is no fused GELU
    "gelu": {"bias_gelu_fusion": False},
    "gated-gelu": {"glu_activation": "geglu"},  # the class computes gelu_new for this name
    "gated-gelu_new": {"glu_activation": "geglu"},
    "gated-silu": {"glu_activation": "swiglu"},
    "gated-relu": {"glu_activation": "reglu"},
}
_NAMES = {
    "gelu_tanh": "gelu_new",
    "geglu": "gated-gelu",
    "swiglu": "gated-silu",
    "reglu": "gated-relu",
}


def _config(fields: Fields) -> TransformerConfig:
    projection = fields.get("feed_forward_proj", default="relu")
    if projection not in _PROJECTIONS:
        raise fields.misfit("feed_forward_proj", projection, f"one of {', '.join(_PROJECTIONS)}")
    layers = fields.size("num_layers", "num_hidden_layers")
    # transformers 5 ties and scales separately; before, one flag said both.
    scaled = fields.get("scale_decoder_outputs", default=fields.get("tie_word_embeddings", default=True))
    return TransformerConfig(
        model_type="T5",
        encoder_num_layers=layers,
        decoder_num_layers=fields.size("num_decoder_layers", default=layers),
        hidden_size=fields.size("d_model"),
        num_attention_heads=fields.size("num_heads"),
        kv_channels=fields.size("d_kv"),
        ffn_hidden_size=fields.size("d_ff"),
        max_position_embeddings=fields.size("n_positions", default=512),
        position_embedding_type="relative",
        relative_attention_num_buckets=fields.size("relative_attention_num_buckets", default=32),
        relative_attention_max_distance=fields.size("relative_attention_max_distance", default=128),
        softmax_scale=1.0,
        normalization="RMSNorm",
        norm_epsilon=fields.number("layer_norm_epsilon", default=1e-6),
        add_bias_linear=False,
        lm_head_bias=False,
        scale_decoder_outputs=scaled,
        attention_dropout=fields.number("dropout_rate", default=0.1),
        hidden_dropout=fields.number("dropout_rate", default=0.1),
        untie_embeddings_and_output_weights=fields.untied,
        **_PROJECTIONS[projection],
    )


def _fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    return {
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "d_model": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "d_kv": config.head_size,
        "d_ff": config.ffn_size,
        "n_positions": max_positions,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": _NAMES.get(config.activation, config.activation),
        "scale_decoder_outputs": config.scale_decoder_outputs,
        "dropout_rate": config.hidden_dropout,
        "is_encoder_decoder": True,
    }


def _layer(config: TransformerConfig, ours: str, theirs: str, is_decoder: bool) -> list[Rule]:
    assert config.num_attention_heads
    rows = config.num_attention_heads * config.head_size
    own, mlp = f"{theirs}.layer.0", f"{theirs}.layer.{1 + is_decoder}"
    qkv = [f"{own}.SelfAttention.{part}" for part in "qkv"]
    rules = both(same, f"{ours}.input_layernorm", f"{own}.layer_norm", bias=False)
    rules += all_joined(f"{ours}.self_attention.linear_qkv", qkv, [rows] * 3, bias=False)
    rules += both(same, f"{ours}.self_attention.linear_proj", f"{own}.SelfAttention.o", bias=False)
    if is_decoder:
        cross, other = f"{ours}.cross_attention", f"{theirs}.layer.1.EncDecAttention"
        rules += both(same, f"{ours}.pre_cross_attn_layernorm", f"{theirs}.layer.1.layer_norm", bias=False)
        rules += both(same, f"{cross}.linear_q", f"{other}.q", bias=False)
        rules += all_joined(f"{cross}.linear_kv", [f"{other}.k", f"{other}.v"], [rows] * 2, bias=False)
        rules += both(same, f"{cross}.linear_proj", f"{other}.o", bias=False)
    rules += both(same, f"{ours}.pre_mlp_layernorm", f"{mlp}.layer_norm", bias=False)
    dense, fc1 = f"{mlp}.DenseReluDense", f"{ours}.mlp.linear_fc1"
    if config.gated:
        rules += all_joined(fc1, [f"{dense}.wi_0", f"{dense}.wi_1"], [config.ffn_size] * 2, bias=False)
    else:
        rules += both(same, fc1, f"{dense}.wi", bias=False)
    return rules + both(same, f"{ours}.mlp.linear_fc2", f"{dense}.wo", bias=False)


def _rules(config: TransformerConfig) -> list[Rule]:
    rules = [same("embedding.word_embeddings.weight", "shared.weight")]
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules.append(same(f"embedding.{stack}_bias.weight", table))
        for i in range(layers):
            rules += _layer(config, f"{stack}.layers.{i}", f"{stack}.block.{i}", stack == "decoder")
        rules += both(same, f"{stack}.final_layernorm", f"{stack}.final_layer_norm", bias=False)
    if config.untie_embeddings_and_output_weights:
        rules.append(same("output_layer.weight", "lm_head.weight"))
    return rules


T5 = Family(
    name="T5ForConditionalGeneration",
    key="t5",
    of="T5",
    config=_config,
    fields=_fields,
    rules=_rules,
    base="",
    ignored=r"(en|de)coder\.embed_tokens\.weight|lm_head\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    embedding="shared.weight",
    head="lm_head.weight",
)

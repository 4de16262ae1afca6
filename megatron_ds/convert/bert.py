"""BERT with norms behind the residuals (BertFor...) or before the branches (MegatronBertFor...).

Ours is one code for both: with --apply-residual-connection-post-layernorm the residual leaves behind the norm, so that
the norm which BERT has behind a branch is the one that we have before the next.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_ds.convert.family import Family, Fields, activation_name, read_activation
from megatron_ds.convert.rules import Rule, all_joined, beside_zeros, both, same
from megatron_ds.model.config import TOKEN_TYPES, TransformerConfig


def _config(fields: Fields, post_norm: bool, binary_head: bool) -> TransformerConfig:
    fields.only("position_embedding_type", "absolute")
    fields.only("type_vocab_size", TOKEN_TYPES if binary_head else 1)
    fields.only("tie_word_embeddings", True)
    for name in ("is_decoder", "add_cross_attention"):
        fields.only(name, False)
    activation = read_activation(fields, "hidden_act", "gelu")
    if "relu" in activation:
        raise fields.misfit("hidden_act", "relu", "a GELU, which is what our head computes")
    return TransformerConfig(
        model_type="BERT",
        num_layers=fields.size("num_hidden_layers"),
        hidden_size=fields.size("hidden_size"),
        num_attention_heads=fields.size("num_attention_heads"),
        ffn_hidden_size=fields.size("intermediate_size"),
        max_position_embeddings=fields.size("max_position_embeddings", default=512),
        norm_epsilon=fields.number("layer_norm_eps", default=1e-12),
        apply_residual_connection_post_layernorm=post_norm,
        bert_binary_head=binary_head,
        attention_dropout=fields.number("attention_probs_dropout_prob", default=0.1),
        hidden_dropout=fields.number("hidden_dropout_prob", default=0.1),
        init_method_std=fields.number("initializer_range", default=0.02),
        openai_gelu=activation.get("bias_gelu_fusion", False),  # the head's GELU too: over there they are one
        **activation,
    )


def _fields(config: TransformerConfig, max_positions: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": max_positions,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": activation_name(config),
        "type_vocab_size": TOKEN_TYPES if config.bert_binary_head else 1,
        "position_embedding_type": "absolute",
        "attention_probs_dropout_prob": config.attention_dropout,
        "hidden_dropout_prob": config.hidden_dropout,
        "initializer_range": config.init_method_std,
    }


def _norms(layers: int, post_norm: bool) -> list[Rule]:
    """Each norm of ours is one of theirs."""
    rules = []
    for i in range(layers):
        theirs = f"bert.encoder.layer.{i}"
        before = f"bert.encoder.layer.{i - 1}.output.LayerNorm" if i else "bert.embeddings.LayerNorm"
        rules += both(same, f"layers.{i}.input_layernorm", before if post_norm else f"{theirs}.attention.ln")
        between = f"{theirs}.attention.output.LayerNorm" if post_norm else f"{theirs}.ln"
        rules += both(same, f"layers.{i}.pre_mlp_layernorm", between)
    last = f"bert.encoder.layer.{layers - 1}.output.LayerNorm" if post_norm else "bert.encoder.ln"
    return rules + both(same, "final_layernorm", last)


def _rules(config: TransformerConfig) -> list[Rule]:
    assert config.num_layers and config.hidden_size
    tables = [f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    rules = [same("embedding.word_embeddings.weight", tables[0])]
    if config.bert_binary_head:
        rules.append(same("embedding.position_embeddings.weight", tables[1]))
        rules.append(same("embedding.tokentype_embeddings.weight", tables[2]))
    else:
        rules.append(beside_zeros("embedding.position_embeddings.weight", tables[1], tables[2]))
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"bert.encoder.layer.{i}"
        qkv = [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")]
        rules += all_joined(f"{ours}.self_attention.linear_qkv", qkv, [config.hidden_size] * 3)
        rules += both(same, f"{ours}.self_attention.linear_proj", f"{theirs}.attention.output.dense")
        rules += both(same, f"{ours}.mlp.linear_fc1", f"{theirs}.intermediate.dense")
        rules += both(same, f"{ours}.mlp.linear_fc2", f"{theirs}.output.dense")
    rules += _norms(config.num_layers, config.apply_residual_connection_post_layernorm)
    rules += both(same, "lm_head.dense", "cls.predictions.transform.dense")
    rules += both(same, "lm_head.norm", "cls.predictions.transform.LayerNorm")
    if config.bert_binary_head:
        rules += both(same, "pooler", "bert.pooler.dense")
        rules += both(same, "binary_head", "cls.seq_relationship")
    return [*rules, same("lm_head.bias", "cls.predictions.bias")]


def _family(name: str, key: str, *, post_norm: bool, binary_head: bool = True) -> Family:
    return Family(
        name=name,
        key=key,
        of="BERT",
        config=partial(_config, post_norm=post_norm, binary_head=binary_head),
        fields=_fields,
        rules=_rules,
        base="",
        ignored=r"cls\.predictions\.decoder\.(weight|bias)|bert\.embeddings\.position_ids",
        embedding="bert.embeddings.word_embeddings.weight",
    )


BERT = _family("BertForPreTraining", "bert", post_norm=True)
MEGATRON_BERT = _family("MegatronBertForPreTraining", "megatron-bert", post_norm=False)
BERT_MASKED = _family("BertForMaskedLM", "bert", post_norm=True, binary_head=False)
MEGATRON_BERT_MASKED = _family("MegatronBertForMaskedLM", "megatron-bert", post_norm=False, binary_head=False)

"""The parameters that a model must have, and their shapes: what a checkpoint of others is held against."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ds.model.config import TOKEN_TYPES, TransformerConfig

Row = tuple[str, tuple[int, ...]]


def parameters(config: TransformerConfig, vocab: int, max_positions: int) -> dict[str, tuple[int, ...]]:
    """Global names and shapes of all parameters of a model, the vocabulary with so many rows."""
    h = config.hidden_size or 0
    rows: list[Row] = [("embedding.word_embeddings.weight", (vocab, h))]
    if config.positions == "learned_absolute":
        rows.append(("embedding.position_embeddings.weight", (max_positions, h)))
    if config.has_sentence_order:
        rows.append(("embedding.tokentype_embeddings.weight", (TOKEN_TYPES, h)))
    if config.embed_layernorm:
        rows += _norm(config, "embedding.norm", h)
    for prefix, layers in _stacks(config):
        for i in range(layers):
            rows += [(f"{prefix}layers.{i}.{name}", shape) for name, shape in _layer(config, prefix == "decoder.")]
        rows += _norm(config, f"{prefix}final_layernorm", h)
    if config.untie_embeddings_and_output_weights:
        rows.append(("output_layer.weight", (vocab, h)))
    rows += _heads(config, vocab, h)
    return dict(rows)


def _stacks(config: TransformerConfig) -> list[tuple[str, int]]:
    if config.model_type == "T5":
        return [("encoder.", config.encoder_layers), ("decoder.", config.decoder_layers)]
    return [("", config.num_layers or 0)]


def _heads(config: TransformerConfig, vocab: int, h: int) -> Iterator[Row]:
    if config.model_type == "BERT":
        yield from (("lm_head.dense.weight", (h, h)), ("lm_head.dense.bias", (h,)))
        yield from _norm(config, "lm_head.norm", h)
    if config.model_type != "GPT" and config.lm_head_bias:
        yield "lm_head.bias", (vocab,)
    if config.has_sentence_order:
        yield from (("pooler.weight", (h, h)), ("pooler.bias", (h,)))
        yield from (("binary_head.weight", (2, h)), ("binary_head.bias", (2,)))


def _norm(config: TransformerConfig, name: str, size: int) -> Iterator[Row]:
    yield f"{name}.weight", (size,)
    if config.normalization == "LayerNorm":
        yield f"{name}.bias", (size,)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[Row]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _layer(config: TransformerConfig, has_cross_attention: bool) -> Iterator[Row]:
    h, d, f = config.hidden_size or 0, config.head_size, config.ffn_size
    queries, keys, bias = (config.num_attention_heads or 0) * d, config.kv_heads * d, config.add_bias_linear
    yield from _norm(config, "input_layernorm", h)
    yield from _linear("self_attention.linear_qkv", queries + 2 * keys, h, bias or config.add_qkv_bias)
    if config.qk_layernorm:
        yield from _norm(config, "self_attention.q_layernorm", d)
        yield from _norm(config, "self_attention.k_layernorm", d)
    yield from _linear("self_attention.linear_proj", h, queries, bias)
    if has_cross_attention:
        yield from _norm(config, "pre_cross_attn_layernorm", h)
        yield from _linear("cross_attention.linear_q", queries, h, bias or config.add_qkv_bias)
        yield from _linear("cross_attention.linear_kv", 2 * queries, h, bias or config.add_qkv_bias)
        yield from _linear("cross_attention.linear_proj", h, queries, bias)
    yield from _norm(config, "pre_mlp_layernorm", h)
    yield from _linear("mlp.linear_fc1", 2 * f if config.gated else f, h, bias)
    yield from _linear("mlp.linear_fc2", h, f, bias)

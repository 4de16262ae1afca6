"""What Megatron, in all its versions, calls the parameters that we have names for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from megatron_ds.model.config import ModelType

_IGNORED = re.compile(r"(.*\.)?(_extra_state\w*|inv_freq|word_embeddings_for_head\.weight)|rotary_pos_emb\..*")
"""State of fp8 kernels, buffers, the last stage's copy of a tied table."""
_LAYER = re.compile(r"(encoder|decoder|transformer)\.layers\.(\d+)\.(.+)")
_OUTSIDE = (
    (r"(?:encoder|transformer)\.final_(?:layer)?norm\.(weight|bias)", r"{encoder}final_layernorm.\1"),
    (r"decoder\.final_(?:layer)?norm\.(weight|bias)", r"{decoder}final_layernorm.\1"),
    (r"(?:embedding\.)?(word|position|tokentype)_embeddings\.weight", r"embedding.\1_embeddings.weight"),
    (r"(?:embedding\.)?position_embeddings\.local_embeddings\.weight", r"embedding.position_embeddings.weight"),
    (r"(?:embedding\.)?word_embeddings\.norm\.(weight|bias)", r"embedding.norm.\1"),
    (r"output_layer\.weight", r"output_layer.weight"),
    (r"lm_head\.weight", r"output_layer.weight"),
    (r"lm_head\.dense\.(weight|bias)", r"lm_head.dense.\1"),
    (r"lm_head\.(?:layernorm|layer_norm|norm)\.(weight|bias)", r"lm_head.norm.\1"),
    (r"(?:lm_head\.|output_layer\.|lm_head\.output_layer\.)bias", r"lm_head.bias"),
    (r"pooler\.dense\.(weight|bias)", r"pooler.\1"),
    (r"binary_head\.(weight|bias)", r"binary_head.\1"),
)
_IN_LAYER = (
    (r"input_(?:layer)?norm\.(weight|bias)", r"input_layernorm.\1"),
    (r"(?:self_)?attention\.(?:query_key_value|linear_qkv)\.(weight|bias)", r"self_attention.linear_qkv.\1"),
    (r"self_attention\.linear_qkv\.layer_norm_(weight|bias)", r"input_layernorm.\1"),
    (r"(?:self_)?attention\.(?:dense|linear_proj)\.(weight|bias)", r"self_attention.linear_proj.\1"),
    (r"self_attention\.([qk])_(?:layer)?norm\.(weight|bias)", r"self_attention.\1_layernorm.\2"),
    (r"post_attention_(?:layer)?norm\.(weight|bias)", r"{after_attention}.\1"),
    (r"post_inter_attention_(?:layer)?norm\.(weight|bias)", r"pre_mlp_layernorm.\1"),
    (r"pre_cross_attn_layernorm\.(weight|bias)", r"pre_cross_attn_layernorm.\1"),
    (r"pre_mlp_layernorm\.(weight|bias)", r"pre_mlp_layernorm.\1"),
    (r"(?:inter_attention\.query|cross_attention\.linear_q)\.(weight|bias)", r"cross_attention.linear_q.\1"),
    (r"cross_attention\.linear_q\.layer_norm_(weight|bias)", r"pre_cross_attn_layernorm.\1"),
    (r"(?:inter_attention\.key_value|cross_attention\.linear_kv)\.(weight|bias)", r"cross_attention.linear_kv.\1"),
    (r"(?:inter_attention\.dense|cross_attention\.linear_proj)\.(weight|bias)", r"cross_attention.linear_proj.\1"),
    (r"mlp\.(?:dense_h_to_4h|linear_fc1)\.(weight|bias)", r"mlp.linear_fc1.\1"),
    (r"mlp\.linear_fc1\.layer_norm_(weight|bias)", r"pre_mlp_layernorm.\1"),
    (r"mlp\.(?:dense_4h_to_h|linear_fc2)\.(weight|bias)", r"mlp.linear_fc2.\1"),
)


class Place(NamedTuple):
    """Where a parameter belongs: a layer of a stack, counted from the start of its chunk, or (layer None) outside."""

    prefix: str
    layer: int | None
    name: str

    def after(self, layers: int) -> str:
        """The global name, when so many layers of the stack come before the chunk."""
        return self.name if self.layer is None else f"{self.prefix}layers.{self.layer + layers}.{self.name}"


def place(name: str, model_type: ModelType) -> Place | None:
    """Where Megatron's parameter belongs, None for what is no weight of the model.

    Raises: LookupError for a name that no Megatron known to us writes
    """
    short = re.sub(r"^(module\.)*(language_model\.)?", "", name)
    if _IGNORED.fullmatch(short):
        return None
    layer = _LAYER.fullmatch(short)
    prefixes = {"encoder": "encoder.", "decoder": "decoder."} if model_type == "T5" else {"encoder": "", "decoder": ""}
    if layer is None:
        return Place("", None, _translate(short, name, _OUTSIDE).format(**prefixes))
    stack = "decoder" if layer[1] == "decoder" else "encoder"
    return Place(prefixes[stack], int(layer[2]), in_layer(layer[3], is_t5_decoder=prefixes[stack] == "decoder."))


def in_layer(name: str, *, is_t5_decoder: bool = False) -> str:
    """Our name, within a layer, of what Megatron calls `name` there.

    Raises: LookupError
    """
    after_attention = "pre_cross_attn_layernorm" if is_t5_decoder else "pre_mlp_layernorm"
    return _translate(name, name, _IN_LAYER).format(after_attention=after_attention)


def _translate(short: str, name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in table:
        match = re.fullmatch(pattern, short)
        if match:
            return match.expand(ours)
    raise LookupError(name)


def flatten(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of nested dicts, under its path joined by dots."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")

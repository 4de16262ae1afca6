"""Flags of the transformer, under Megatron's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ds.cli import arg


def _position_type(text: str) -> str:
    return {"absolute": "learned_absolute", "rotary": "rope"}.get(text.lower(), text.lower())


def _norm_type(text: str) -> str:
    return {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}.get(text.lower(), text)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Model: shape, variants, dropout, initial weights."""

    num_layers: int | None = arg(None, "Transformer layers.")
    hidden_size: int | None = arg(None, "Width of the residual stream (h).")
    ffn_hidden_size: int | None = arg(None, "Width of the MLP (f). Default: 4h; with --swiglu 8h/3 in whole 64s.")
    num_attention_heads: int | None = arg(None, "Query heads (a).")
    kv_channels: int | None = arg(None, "Size of a head (d). Default: h/a.")
    group_query_attention: bool = arg(False, "Share key/value heads between query heads; see --num-query-groups.")
    num_query_groups: int = arg(1, "Key/value heads with --group-query-attention.")
    num_key_value_heads: int | None = arg(None, "Key/value heads, Megatron-DeepSpeed's spelling. Default: a.")
    max_position_embeddings: int | None = arg(None, "Rows of the learned position table. Default: --seq-length.")
    position_embedding_type: str = arg(
        "learned_absolute", "learned_absolute or rope (also: absolute, rotary).", parse=_position_type
    )
    use_rotary_position_embeddings: bool = arg(False, "The same as --position-embedding-type rope.")
    rotary_percent: float = arg(1.0, "Share of each head's features that rope turns.")
    rotary_base: float = arg(
        10000.0, "Base of rope's wavelengths.", "--rotary-base", "--rotary-position-embeddings-theta"
    )
    normalization: str = arg("LayerNorm", "LayerNorm or RMSNorm.", parse=_norm_type)
    norm_epsilon: float = arg(1e-5, "Epsilon of the norms.", "--norm-epsilon", "--layernorm-epsilon")
    swiglu: bool = arg(False, "Gated MLP silu(gate) * up instead of GELU.")
    add_bias_linear: bool = arg(True, "No biases in linear layers.", "--disable-bias-linear")
    add_qkv_bias: bool = arg(False, "A bias on queries, keys and values even with --disable-bias-linear.")
    untie_embeddings_and_output_weights: bool = arg(False, "Give the output layer a matrix of its own.")
    attention_dropout: float = arg(0.1, "Dropout of attention probabilities.")
    hidden_dropout: float = arg(0.1, "Dropout of embeddings and of every residual branch.")
    init_method_std: float = arg(0.02, "Standard deviation of initial weights; output projections get it / sqrt(2L).")

    @property
    def head_size(self) -> int:
        """d"""
        assert self.hidden_size and self.num_attention_heads
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads; as many as query heads unless grouped."""
        if self.group_query_attention:
            return self.num_query_groups
        return self.num_key_value_heads or self.num_attention_heads or 1

    @property
    def ffn_size(self) -> int:
        """f"""
        assert self.hidden_size is not None
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return int(4 * self.hidden_size * 2 / 3 / 64) * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def uses_rope(self) -> bool:
        """True for rotary positions."""
        return self.use_rotary_position_embeddings or self.position_embedding_type == "rope"

    @property
    def rotated(self) -> int:
        """Features of a head that rope turns."""
        return int(self.head_size * self.rotary_percent)

    def architecture(self) -> dict[str, object]:
        """What weights mean, flag by flag with all defaults resolved; a checkpoint fits only where these are equal."""
        rope = (self.rotary_percent, self.rotary_base) if self.uses_rope else None
        return {
            "--num-layers": self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.ffn_size,
            "--num-attention-heads": self.num_attention_heads,
            "--num-query-groups": self.kv_heads,
            "--kv-channels": self.head_size,
            "--position-embedding-type": "rope" if self.uses_rope else "learned_absolute",
            "--rotary-percent, --rotary-base": rope,
            "--normalization": self.normalization,
            "--norm-epsilon": self.norm_epsilon,
            "--swiglu": self.swiglu,
            "--disable-bias-linear": not self.add_bias_linear,
            "--add-qkv-bias": self.add_bias_linear or self.add_qkv_bias,
            "--untie-embeddings-and-output-weights": self.untie_embeddings_and_output_weights,
        }

    @classmethod
    def from_state(cls, stored: Mapping[str, Any]) -> TransformerConfig:
        """Read back from a checkpoint's state.

        Raises: ValueError for a model that this version does not know, or that nobody could have trained
        """
        unknown = sorted(set(stored) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown model options {', '.join(unknown)}")
        config = cls(**stored)
        for name in ("num_layers", "hidden_size", "num_attention_heads"):
            value = getattr(config, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} {value!r}")
        return config


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activation memory: what is computed again in the backward instead of being kept."""

    recompute_granularity: Literal["full", "selective"] | None = arg(
        None, "full: whole layers, of which only the input is kept; selective: what --recompute-modules names."
    )
    recompute_method: Literal["uniform", "block"] | None = arg(
        None, "uniform: all layers, in groups of --recompute-num-layers; block: the first so many of each chunk."
    )
    recompute_num_layers: int | None = arg(
        None,
        "Layers of a group (uniform) or of each chunk (block). Default: 1.",
        "--recompute-num-layers",
        "--checkpoint-num-layers",
        "--activations-checkpoint-num-layers",
    )
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = arg(
        ("core_attn",), "What selective recomputation covers: core_attn, mlp."
    )
    recompute_activations: bool = arg(False, "The same as --recompute-granularity selective.")
    checkpoint_activations: bool = arg(False, "The same as --recompute-granularity full, Megatron-DeepSpeed's name.")
    activations_checkpoint_method: Literal["uniform", "block"] | None = arg(
        None, "Full recomputation by this method, an old name."
    )
    distribute_saved_activations: bool = arg(
        False,
        "Cut the kept inputs over tp, each rank keeping its part.",
        "--distribute-saved-activations",
        "--distribute-checkpointed-activations",
        "--partition-activations",
    )
    checkpoint_in_cpu: bool = arg(False, "Keep the inputs of recomputed layers in the memory of the host.")

    @property
    def granularity(self) -> Literal["full", "selective"] | None:
        """What was asked for under any name."""
        if self.recompute_granularity:
            return self.recompute_granularity
        if self.checkpoint_activations or self.activations_checkpoint_method:
            return "full"
        return "selective" if self.recompute_activations else None

    @property
    def method(self) -> Literal["uniform", "block"]:
        """How full recomputation goes about it."""
        return self.recompute_method or self.activations_checkpoint_method or "uniform"

    @property
    def num_layers(self) -> int:
        """Layers of a group, or of each chunk."""
        return self.recompute_num_layers or 1

"""Flags of the transformer, under Megatron's names."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ds.cli import arg


def _position_type(text: str) -> str:
    return {"absolute": "learned_absolute", "rotary": "rope"}.get(text.lower(), text.lower())


def _norm_type(text: str) -> str:
    return {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}.get(text.lower(), text)


def _window(text: str) -> int:
    """W, or W,0 as Megatron-LM has it."""
    left, _, right = text.strip("()").partition(",")
    if right.strip() not in ("", "0", "-1"):
        raise argparse.ArgumentTypeError(f"{text!r}: nothing to the right can be seen")
    return int(left)


ModelType = Literal["GPT", "BERT", "T5"]
Activation = Literal["gelu_tanh", "gelu", "relu", "squared_relu", "swiglu", "geglu", "reglu", "liglu"]
TOKEN_TYPES = 2
"""Segments of a BERT sample."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Model: shape, variants, dropout, initial weights."""

    model_type: ModelType = "GPT"
    """Said by the recipe, not by a flag."""
    num_layers: int | None = arg(None, "Transformer layers; of T5 those of each stack.")
    encoder_num_layers: int | None = arg(None, "T5: layers of the encoder, instead of --num-layers.")
    decoder_num_layers: int | None = arg(None, "T5: layers of the decoder. Default: as many as the encoder has.")
    hidden_size: int | None = arg(None, "Width of the residual stream (h).")
    ffn_hidden_size: int | None = arg(None, "Width of the MLP (f). Default: 4h; gated 8h/3 in whole 64s.")
    num_attention_heads: int | None = arg(None, "Query heads (a).")
    kv_channels: int | None = arg(None, "Size of a head (d). Default: h/a.")
    group_query_attention: bool = arg(False, "Share key/value heads between query heads; see --num-query-groups.")
    num_query_groups: int = arg(1, "Key/value heads with --group-query-attention.")
    num_key_value_heads: int | None = arg(None, "Key/value heads, Megatron-DeepSpeed's spelling. Default: a.")
    max_position_embeddings: int | None = arg(None, "Rows of the learned position table. Default: --seq-length.")
    position_embedding_type: str = arg(
        "learned_absolute",
        "learned_absolute, rope, alibi, relative (T5), none (also: absolute, rotary).",
        parse=_position_type,
    )
    use_rotary_position_embeddings: bool = arg(False, "The same as --position-embedding-type rope.")
    rotary_percent: float = arg(1.0, "Share of each head's features that rope turns.")
    rotary_base: float = arg(
        10000.0, "Base of rope's wavelengths.", "--rotary-base", "--rotary-position-embeddings-theta"
    )
    rotary_seq_len_interpolation_factor: float | None = arg(None, "Rope counts positions in steps of 1 over this.")
    use_rope_scaling: bool = arg(False, "Llama 3.1's stretching of rope's long wavelengths.")
    rope_scaling_factor: float = arg(8.0, "By how much --use-rope-scaling stretches.")
    rope_scaling_low_freq_factor: float = arg(1.0, "Wavelengths above context / this are stretched in full.")
    rope_scaling_high_freq_factor: float = arg(4.0, "Wavelengths below context / this are not stretched.")
    rope_scaling_original_max_position_embeddings: int = arg(8192, "That context.")
    relative_attention_num_buckets: int = arg(32, "Rows of the table of relative positions (T5).")
    relative_attention_max_distance: int = arg(128, "Distance from which on all share the last of them.")
    window_size: int | None = arg(
        None, "Tokens to the left that a token sees besides itself (sliding window); W or W,0.", parse=_window
    )
    softmax_scale: float | None = arg(None, "Factor of attention scores. Default: 1/sqrt(d); T5 has 1.")
    normalization: str = arg("LayerNorm", "LayerNorm or RMSNorm.", parse=_norm_type)
    norm_epsilon: float = arg(1e-5, "Epsilon of the norms.", "--norm-epsilon", "--layernorm-epsilon")
    apply_layernorm_1p: bool = arg(False, "Norms multiply by 1 + weight, and their weights start at 0.")
    apply_residual_connection_post_layernorm: bool = arg(
        False, "Residuals leave after the norm, as in the original (post-LN) BERT."
    )
    use_parallel_residual: bool = arg(
        False,
        "Attention and MLP side by side, each after a norm of its own: x + attention(x) + mlp(x) (GPT-NeoX).",
        "--use-parallel-residual",
        "--gpt-j-residual",
    )
    embed_layernorm: bool = arg(False, "A norm behind the embeddings (BLOOM).")
    qk_layernorm: bool = arg(False, "A norm on every head's queries and keys.")
    swiglu: bool = arg(False, "Gated MLP silu(gate) * up instead of GELU.")
    glu_activation: Literal["geglu", "liglu", "reglu", "swiglu"] | None = arg(
        None, "Gated MLP by GELU, nothing, ReLU or SiLU of the gate."
    )
    relu: bool = arg(False, "ReLU in the MLP (T5 1.0).")
    squared_relu: bool = arg(False, "Squared ReLU in the MLP.")
    bias_gelu_fusion: bool = arg(
        True, "GELU by erf instead of its tanh form, as without Megatron's fused kernel.", "--no-bias-gelu-fusion"
    )
    openai_gelu: bool = arg(False, "GELU in its tanh form even with --no-bias-gelu-fusion, and in BERT's head.")
    add_bias_linear: bool = arg(True, "No biases in linear layers.", "--disable-bias-linear")
    add_qkv_bias: bool = arg(False, "A bias on queries, keys and values even with --disable-bias-linear.")
    untie_embeddings_and_output_weights: bool = arg(False, "Give the output layer a matrix of its own.")
    lm_head_bias: bool = arg(True, "BERT, T5: no bias on the logits.", "--no-lm-head-bias")
    scale_decoder_outputs: bool = arg(False, "T5: multiply by h^-0.5 before a tied head (T5 1.0).")
    bert_binary_head: bool = arg(
        True, "BERT: masked words only; no sentence order, pooler, token types.", "--bert-no-binary-head"
    )
    attention_dropout: float = arg(0.1, "Dropout of attention probabilities.")
    hidden_dropout: float = arg(0.1, "Dropout of embeddings and of every residual branch.")
    init_method_std: float = arg(0.02, "Standard deviation of initial weights; output projections get it / sqrt(2L).")

    @property
    def encoder_layers(self) -> int:
        """Layers of T5's encoder."""
        layers = self.encoder_num_layers or self.num_layers
        assert layers
        return layers

    @property
    def decoder_layers(self) -> int:
        """Layers of T5's decoder."""
        return self.decoder_num_layers or self.encoder_layers

    @property
    def total_layers(self) -> int:
        """Layers of all stacks."""
        if self.model_type == "T5":
            return self.encoder_layers + self.decoder_layers
        assert self.num_layers
        return self.num_layers

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
    def activation(self) -> Activation:
        """What the MLP computes between its matrices."""
        if self.swiglu or self.glu_activation:
            return self.glu_activation or "swiglu"
        if self.relu or self.squared_relu:
            return "relu" if self.relu else "squared_relu"
        return "gelu" if self.exact_gelu else "gelu_tanh"

    @property
    def gated(self) -> bool:
        """True where the MLP's first matrix has a gate and an up half."""
        return self.swiglu or self.glu_activation is not None

    @property
    def exact_gelu(self) -> bool:
        """True for GELU by erf; Megatron's kernel of the tanh form needs a bias to fuse."""
        fused = self.bias_gelu_fusion and (self.add_bias_linear or self.gated)
        return not (fused or self.openai_gelu)

    @property
    def kernel(self) -> str:
        """The activation's name in the table of kernels: there GELU by erf is plain, its tanh form is said."""
        return "geglu_tanh" if self.activation == "geglu" and not self.exact_gelu else self.activation

    @property
    def ffn_size(self) -> int:
        """f"""
        assert self.hidden_size is not None
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return int(4 * self.hidden_size * 2 / 3 / 64) * 64 if self.gated else 4 * self.hidden_size

    @property
    def positions(self) -> str:
        """How positions come in: learned_absolute, rope, alibi, relative or none."""
        return "rope" if self.use_rotary_position_embeddings else self.position_embedding_type

    @property
    def uses_rope(self) -> bool:
        """True for rotary positions."""
        return self.positions == "rope"

    @property
    def rotated(self) -> int:
        """Features of a head that rope turns."""
        return int(self.head_size * self.rotary_percent)

    @property
    def has_sentence_order(self) -> bool:
        """True for a BERT that also learns which of two segments comes first."""
        return self.model_type == "BERT" and self.bert_binary_head

    @property
    def loss_names(self) -> tuple[str, ...]:
        """What is minimised: the sum of these, each a mean of its own."""
        return ("lm loss", "sop loss") if self.has_sentence_order else ("lm loss",)

    def architecture(self) -> dict[str, object]:
        """What weights mean, flag by flag with all defaults resolved; a checkpoint fits only where these are equal."""
        rope = (self.rotary_percent, self.rotary_base, self.rotary_seq_len_interpolation_factor)
        stretched = (
            self.rope_scaling_factor,
            self.rope_scaling_low_freq_factor,
            self.rope_scaling_high_freq_factor,
            self.rope_scaling_original_max_position_embeddings,
        )
        relative = (self.relative_attention_num_buckets, self.relative_attention_max_distance)
        is_t5 = self.model_type == "T5"
        return {
            "the recipe": self.model_type,
            "--num-layers": (self.encoder_layers, self.decoder_layers) if is_t5 else self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.ffn_size,
            "--num-attention-heads": self.num_attention_heads,
            "--num-query-groups": self.kv_heads,
            "--kv-channels": self.head_size,
            "--position-embedding-type": self.positions,
            "--rotary-percent, --rotary-base, --rotary-seq-len-interpolation-factor": rope if self.uses_rope else None,
            "--use-rope-scaling": stretched if self.uses_rope and self.use_rope_scaling else None,
            "--relative-attention-num-buckets, -max-distance": relative if self.positions == "relative" else None,
            "--window-size": self.window_size,
            "--softmax-scale": self.softmax_scale or self.head_size**-0.5,
            "--normalization": self.normalization,
            "--norm-epsilon": self.norm_epsilon,
            "--apply-layernorm-1p": self.apply_layernorm_1p,
            "--apply-residual-connection-post-layernorm": self.apply_residual_connection_post_layernorm,
            "--use-parallel-residual": self.use_parallel_residual,
            "--embed-layernorm": self.embed_layernorm,
            "--qk-layernorm": self.qk_layernorm,
            "activation (--swiglu, --no-bias-gelu-fusion, --relu ...)": self.kernel,
            "--openai-gelu": self.openai_gelu if self.model_type == "BERT" else None,
            "--disable-bias-linear": not self.add_bias_linear,
            "--add-qkv-bias": self.add_bias_linear or self.add_qkv_bias,
            "--untie-embeddings-and-output-weights": self.untie_embeddings_and_output_weights,
            "--no-lm-head-bias": None if self.model_type == "GPT" else not self.lm_head_bias,
            "--scale-decoder-outputs": self.scale_decoder_outputs,
            "--bert-no-binary-head": not self.bert_binary_head,
        }

    @classmethod
    def from_state(cls, stored: Mapping[str, Any]) -> TransformerConfig:
        """Read back from a checkpoint's state.

        Raises: ValueError for a model that this version does not know, or that nobody could have trained
        """
        unknown = sorted(set(stored) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown model options {', '.join(unknown)}")
        if "bias_gelu_fusion" not in stored and not (stored["add_bias_linear"] or stored["swiglu"]):
            stored = {**stored, "openai_gelu": True}  # from before GELU had forms: it was the tanh form
        config = cls(**stored)
        layers = ("encoder_layers",) if config.model_type == "T5" else ("num_layers",)
        for name in (*layers, "hidden_size", "num_attention_heads"):
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

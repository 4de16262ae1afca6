"""The options of the run that wrote a checkpoint, as Megatron keeps them in it, in our terms."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ds.convert.unpickle import Inert
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.errors import CheckpointError
from megatron_ds.model.config import ModelType, TransformerConfig

_POSITIONS = {1: "rope", 2: "learned_absolute", 3: "alibi", "rotary": "rope", "absolute": "learned_absolute"}
"""BigScience's PositionEmbeddingType by value, others by name."""
_TOKENIZERS = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "HFTokenizer": ("tokenizer_model", "tokenizer_name_or_path"),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "PretrainedFromHF": ("tokenizer_name_or_path",),
}
_SAME = (
    ("kv_channels", int),
    ("ffn_hidden_size", int),
    ("group_query_attention", bool),
    ("num_query_groups", int),
    ("num_key_value_heads", int),
    ("rotary_percent", float),
    ("rotary_seq_len_interpolation_factor", float),
    ("use_rope_scaling", bool),
    ("rope_scaling_factor", float),
    ("apply_layernorm_1p", bool),
    ("apply_residual_connection_post_layernorm", bool),
    ("embed_layernorm", bool),
    ("qk_layernorm", bool),
    ("swiglu", bool),
    ("glu_activation", str),
    ("squared_relu", bool),
    ("bias_gelu_fusion", bool),
    ("openai_gelu", bool),
    ("add_bias_linear", bool),
    ("add_qkv_bias", bool),
    ("untie_embeddings_and_output_weights", bool),
    ("bert_binary_head", bool),
    ("attention_dropout", float),
    ("hidden_dropout", float),
    ("init_method_std", float),
)
"""What has one name and one meaning on both sides; None or absent means our default, which is Megatron's."""
_REFUSED = (
    "rotary_interleaved",
    "multi_latent_attention",
    "quick_geglu",
    "num_experts_switch",
    "retro_add_retriever",
    "heterogeneous_layers_config_path",
)


class SavedArgs:
    """Megatron's options in a file, each looked up with the type that it must have."""

    def __init__(self, namespace: object, path: Path):
        if not isinstance(namespace, Namespace):
            raise CheckpointError(
                str(path),
                "no options of the run that wrote it (key args)",
                "a checkpoint of Megatron-LM or Megatron-DeepSpeed",
                "load one that Megatron's own save wrote",
            )
        self.path = path
        self._values: dict[str, Any] = vars(namespace)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def raw(self, *names: str) -> Any:
        """The first of these that is there and not None."""
        return next((self._values[name] for name in names if self._values.get(name) is not None), None)

    def get(self, kind: type, *names: str) -> Any:
        """The first of these options, of that type, or None.

        Raises: CheckpointError for a value of another type
        """
        value = self.raw(*names)
        if value is None or type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise self.wrong(names[0], f"{value!r}"[:100], f"a value of type {kind.__name__}")

    def size(self, *names: str) -> int:
        """The first of these options, a positive number.

        Raises: CheckpointError for anything else
        """
        value = self.get(int, *names)
        if value is None or value < 1:
            raise self.wrong(names[0], f"{value}", "a positive number")
        return int(value)

    def wrong(
        self, name: str, found: str, expected: str, fix: str = "load a checkpoint of another model"
    ) -> CheckpointError:
        """An error about one option."""
        return CheckpointError(f"{self.path}, args.{name}", found, expected, fix)


def transformer_config(args: SavedArgs, model_type: ModelType) -> TransformerConfig:
    """The model that these options describe.

    Raises: CheckpointError for one that is not among ours
    """
    _refuse(args)
    values = {name: args.get(kind, name) for name, kind in _SAME}
    window = args.raw("window_size")
    layers, decoder_layers = _layers(args, model_type)
    known: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    config = TransformerConfig(
        model_type=model_type,
        num_layers=layers,
        decoder_num_layers=decoder_layers,
        hidden_size=args.size("hidden_size"),
        num_attention_heads=args.size("num_attention_heads"),
        max_position_embeddings=args.size("max_position_embeddings", "seq_length", "encoder_seq_length"),
        position_embedding_type=_positions(args),
        rotary_base=args.get(float, "rotary_base", "rope_theta") or 10000.0,
        normalization=_normalization(args),
        norm_epsilon=args.get(float, "norm_epsilon", "layernorm_epsilon") or 1e-5,
        window_size=_window(args, window),
        **known,
    )
    heads, groups = args.size("num_attention_heads"), config.kv_heads
    if groups < 1 or heads % groups:
        raise args.wrong("num_query_groups", f"{groups} for {heads} heads", "a divisor of the heads")
    return config


def _refuse(args: SavedArgs) -> None:
    for name in _REFUSED:
        if args.raw(name):
            raise args.wrong(name, f"{args.raw(name)!r}"[:100], "a model without it")
    experts = args.raw("num_experts", "num_moe_experts") or 1
    if any(number != 1 for number in (experts if isinstance(experts, (list, tuple)) else [experts])):
        raise args.wrong("num_experts", f"{experts}", "a model without experts")


def _layers(args: SavedArgs, model_type: ModelType) -> tuple[int, int | None]:
    if model_type != "T5":
        return args.size("num_layers", "encoder_num_layers"), None
    encoder = args.size("encoder_num_layers", "num_layers")
    return encoder, args.get(int, "decoder_num_layers") or encoder


def _positions(args: SavedArgs) -> str:
    if args.raw("use_rotary_position_embeddings"):
        return "rope"
    if args.raw("add_position_embedding") is False and args.raw("position_embedding_type") is None:
        return "none"
    kind = args.raw("position_embedding_type")
    if kind is None:
        return "learned_absolute"
    if isinstance(kind, Inert):
        kind = kind.arguments[-1]
    found = _POSITIONS.get(kind, kind) if isinstance(kind, (int, str)) else kind
    if found not in ("learned_absolute", "rope", "alibi", "none"):
        raise args.wrong("position_embedding_type", f"{found}"[:100], "learned_absolute, rope, alibi or none")
    return str(found)


def _normalization(args: SavedArgs) -> str:
    name = args.get(str, "normalization") or "LayerNorm"
    known = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
    if name.lower() not in known:
        raise args.wrong("normalization", name, "LayerNorm or RMSNorm")
    return known[name.lower()]


def _window(args: SavedArgs, window: Any) -> int | None:
    left = window[0] if isinstance(window, (list, tuple)) and window else window
    if left is None or left == -1:
        return None
    if type(left) is not int or left < 0:
        raise args.wrong("window_size", f"{window!r}"[:100], "tokens seen to the left")
    return left


def tokenizer_config(args: SavedArgs) -> TokenizerConfig | None:
    """The tokenizer of that run, None unless its files are where they were."""
    name = args.get(str, "tokenizer_type")
    extra_ids = args.get(int, "vocab_extra_ids") or 0
    if name == "NullTokenizer" and args.raw("vocab_size"):
        return TokenizerConfig(tokenizer_type=name, vocab_size=args.size("vocab_size"), vocab_extra_ids=extra_ids)
    if name not in _TOKENIZERS:
        return None
    files = {kind: args.get(str, kind) for kind in _TOKENIZERS[name]}
    model = files.get("tokenizer_model") or files.get("tokenizer_name_or_path")
    vocab, merges = files.get("vocab_file"), files.get("merge_file")
    if not _all_there(file for file in (model, vocab, merges) if file):
        return None
    return TokenizerConfig(
        tokenizer_type=name, vocab_file=vocab, merge_file=merges, tokenizer_model=model, vocab_extra_ids=extra_ids
    )


def _all_there(files: Iterable[str]) -> bool:
    named = [Path(file) for file in files]
    return bool(named) and all(file.exists() for file in named)

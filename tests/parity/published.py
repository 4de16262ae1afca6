"""Models of transformers that compute what an oracle does, with the oracle's weights copied in by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.reference.bert import BertConfig
from tests.reference.gpt import OracleConfig
from tests.reference.t5 import T5Config
from tests.reference.transformer import TransformerConfig

ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "swiglu": "silu"}
Renamed = Iterator[tuple[str, Tensor]]
Rename = Callable[[str, Tensor], Renamed]


def filled(model: nn.Module, params: Mapping[str, Tensor], rename: Rename) -> nn.Module:
    """The model in fp64 without dropout, every one of its parameters set."""
    model = model.double().eval()
    todo = dict(model.named_parameters())
    with torch.no_grad():
        for ours, value in params.items():
            for theirs, part in rename(ours, value.double()):
                weight = todo.pop(theirs)
                assert weight.shape == part.shape, (ours, theirs)
                weight.copy_(part)
    assert not todo, f"not set: {list(todo)}"
    return model


def replaced(name: str, words: Mapping[str, str]) -> str:
    """Every one of the words that occurs, replaced by its counterpart; in the order of the table."""
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    return name


def split_qkv(c: TransformerConfig, value: Tensor) -> tuple[Tensor, ...]:
    """Rows of the queries, the keys and the values."""
    return value.split([c.heads * c.d, c.kv_heads * c.d, c.kv_heads * c.d])


def interleaved(c: TransformerConfig, value: Tensor) -> Tensor:
    """Head by head its query, key and value, as NeoX and BLOOM have them."""
    parts = [part.unflatten(0, (c.heads, c.d)) for part in split_qkv(c, value)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def gpt2(c: OracleConfig, params: Mapping[str, Tensor]) -> nn.Module:
    """GPT2LMHeadModel, whose matrices are transposed."""
    config = transformers.GPT2Config(
        vocab_size=c.vocab, n_positions=c.max_positions, n_embd=c.hidden, n_layer=c.num_layers, n_head=c.heads,
        n_inner=c.ffn, activation_function=ACTIVATIONS[c.activation], layer_norm_epsilon=c.norm_eps,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    words = {
        "embedding.word_embeddings": "wte",
        "embedding.position_embeddings": "wpe",
        "layers.": "h.",
        "input_layernorm": "ln_1",
        "self_attention.linear_qkv": "attn.c_attn",
        "self_attention.linear_proj": "attn.c_proj",
        "pre_mlp_layernorm": "ln_2",
        "linear_fc1": "c_fc",
        "linear_fc2": "c_proj",
        "final_layernorm": "ln_f",
    }

    def rename(name: str, value: Tensor) -> Renamed:
        yield f"transformer.{replaced(name, words)}", value.t() if "linear" in name and value.dim() == 2 else value

    return filled(transformers.GPT2LMHeadModel(config), params, rename)


def gpt_neox(c: OracleConfig, params: Mapping[str, Tensor]) -> nn.Module:
    """GPTNeoXForCausalLM."""
    config = transformers.GPTNeoXConfig(
        vocab_size=c.vocab, max_position_embeddings=c.max_positions, hidden_size=c.hidden,
        num_hidden_layers=c.num_layers, num_attention_heads=c.heads, intermediate_size=c.ffn,
        hidden_act=ACTIVATIONS[c.activation], layer_norm_eps=c.norm_eps, use_parallel_residual=c.parallel_residual,
        rope_parameters={
            "rope_type": "default", "rope_theta": c.rotary_base, "partial_rotary_factor": c.rotary_percent
        },
    )  # fmt: skip
    words = {
        "embedding.word_embeddings": "gpt_neox.embed_in",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_qkv": "attention.query_key_value",
        "self_attention.linear_proj": "attention.dense",
        "linear_fc1": "dense_h_to_4h",
        "linear_fc2": "dense_4h_to_h",
        "final_layernorm": "gpt_neox.final_layer_norm",
        "output_layer": "lm_head",
    }

    def rename(name: str, value: Tensor) -> Renamed:
        at = "gpt_neox." if name.startswith("layers.") else ""
        yield at + replaced(name, words), interleaved(c, value) if "linear_qkv" in name else value

    return filled(transformers.GPTNeoXForCausalLM(config), params, rename)


def bloom(c: OracleConfig, params: Mapping[str, Tensor]) -> nn.Module:
    """BloomForCausalLM."""
    config = transformers.BloomConfig(
        vocab_size=c.vocab, hidden_size=c.hidden, n_layer=c.num_layers, n_head=c.heads,
        layer_norm_epsilon=c.norm_eps, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    words = {
        "embedding.word_embeddings": "word_embeddings",
        "embedding.norm": "word_embeddings_layernorm",
        "layers.": "h.",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_qkv": "self_attention.query_key_value",
        "self_attention.linear_proj": "self_attention.dense",
        "linear_fc1": "dense_h_to_4h",
        "linear_fc2": "dense_4h_to_h",
        "final_layernorm": "ln_f",
    }

    def rename(name: str, value: Tensor) -> Renamed:
        yield f"transformer.{replaced(name, words)}", interleaved(c, value) if "linear_qkv" in name else value

    return filled(transformers.BloomForCausalLM(config), params, rename)


def llama(c: OracleConfig, params: Mapping[str, Tensor], kind: str = "Llama", **more: Any) -> nn.Module:
    """LlamaForCausalLM and those that differ by a window, a bias or norms of queries and keys."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rotary_base}
    if c.rope_interpolation != 1.0:
        rope |= {"rope_type": "linear", "factor": c.rope_interpolation}
    if c.llama3:
        rope |= {
            "rope_type": "llama3", "factor": c.llama3.factor, "low_freq_factor": c.llama3.low,
            "high_freq_factor": c.llama3.high, "original_max_position_embeddings": c.llama3.original,
        }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocab, hidden_size=c.hidden, num_hidden_layers=c.num_layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, intermediate_size=c.ffn, head_dim=c.d, rms_norm_eps=c.norm_eps,
        hidden_act=ACTIVATIONS[c.activation], max_position_embeddings=c.max_positions, rope_parameters=rope,
        tie_word_embeddings=c.tied, attn_implementation="eager", **more,
    )  # fmt: skip
    words = {
        "embedding.word_embeddings": "embed_tokens",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "linear_fc2": "down_proj",
        "final_layernorm": "norm",
    }

    def rename(name: str, value: Tensor) -> Renamed:
        at = "" if name.startswith("output_layer") else "model."
        name = at + replaced(name, words).replace("output_layer", "lm_head")
        if "linear_qkv" in name:
            for part, rows in zip("qkv", split_qkv(c, value), strict=True):
                yield name.replace("self_attention.linear_qkv", f"self_attn.{part}_proj"), rows
        elif "linear_fc1" in name:
            for half, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                yield name.replace("linear_fc1", f"{half}_proj"), rows
        else:
            yield name, value

    return filled(getattr(transformers, f"{kind}ForCausalLM")(config), params, rename)


def bert(c: BertConfig, params: Mapping[str, Tensor]) -> nn.Module:
    """BertForPreTraining, the norms moved by one place, or for pre-LN layers MegatronBertForPreTraining."""
    kind = "Bert" if c.post_ln else "MegatronBert"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocab, hidden_size=c.hidden, num_hidden_layers=c.num_layers, num_attention_heads=c.heads,
        intermediate_size=c.ffn, hidden_act=ACTIVATIONS[c.activation], max_position_embeddings=c.max_positions,
        layer_norm_eps=c.norm_eps, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    words = {
        "embedding.": "bert.embeddings.",
        "tokentype": "token_type",
        "layers.": "bert.encoder.layer.",
        "self_attention.linear_proj": "attention.output.dense",
        "mlp.linear_fc1": "intermediate.dense",
        "mlp.linear_fc2": "output.dense",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.norm": "cls.predictions.transform.LayerNorm",
        "lm_head.bias": "cls.predictions.bias",
        "pooler": "bert.pooler.dense",
        "binary_head": "cls.seq_relationship",
    }
    norms = {"input_layernorm": "attention.ln", "pre_mlp_layernorm": "ln", "final_layernorm": "bert.encoder.ln"}
    if c.post_ln:
        norms = {
            "layers.0.input_layernorm": "bert.embeddings.LayerNorm",
            **{f"layers.{i}.input_layernorm": f"layers.{i - 1}.output.LayerNorm" for i in range(1, c.num_layers)},
            "pre_mlp_layernorm": "attention.output.LayerNorm",
            "final_layernorm": f"layers.{c.num_layers - 1}.output.LayerNorm",
        }

    def rename(name: str, value: Tensor) -> Renamed:
        name = replaced(name, {**norms, **words})
        if "linear_qkv" in name:
            for part, rows in zip(("query", "key", "value"), split_qkv(c, value), strict=True):
                yield name.replace("self_attention.linear_qkv", f"attention.self.{part}"), rows
        else:
            yield name, value

    return filled(getattr(transformers, f"{kind}ForPreTraining")(config), params, rename)


def t5(c: T5Config, params: Mapping[str, Tensor]) -> nn.Module:
    """T5ForConditionalGeneration; an untied head is put in by hand, for its config always ties."""
    act = "gated-gelu" if c.activation == "geglu" else "relu"
    config = transformers.T5Config(
        vocab_size=c.vocab, d_model=c.hidden, d_kv=c.d, d_ff=c.ffn, num_layers=c.encoder_layers,
        num_decoder_layers=c.decoder_layers, num_heads=c.heads, relative_attention_num_buckets=c.buckets,
        relative_attention_max_distance=c.max_distance, layer_norm_epsilon=c.norm_eps, dropout_rate=0.0,
        feed_forward_proj=act, tie_word_embeddings=c.scaled_output,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    if not c.tied:
        model.lm_head.weight = nn.Parameter(torch.empty(c.vocab, c.hidden))
    words = {
        "embedding.word_embeddings": "shared",
        "embedding.encoder_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "embedding.decoder_bias": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "layers.": "block.",
        "input_layernorm": "layer.0.layer_norm",
        "pre_cross_attn_layernorm": "layer.1.layer_norm",
        "self_attention.linear_": "layer.0.SelfAttention.",
        "cross_attention.linear_": "layer.1.EncDecAttention.",
        "final_layernorm": "final_layer_norm",
        "output_layer": "lm_head",
    }

    def rename(name: str, value: Tensor) -> Renamed:
        last = "layer.1" if name.startswith("encoder") else "layer.2"
        mlp = {"pre_mlp_layernorm": f"{last}.layer_norm", "mlp.": f"{last}.DenseReluDense."}
        name = replaced(name, {**words, **mlp, "proj": "o", "linear_fc2": "wo"})
        if name.endswith("kv.weight"):
            sizes = split_qkv(c, value) if "qkv" in name else value.chunk(2)
            head = name.removesuffix("kv.weight").removesuffix("q")
            for part, rows in zip("qkv" if "qkv" in name else "kv", sizes, strict=True):
                yield f"{head}{part}.weight", rows
        elif "linear_fc1" in name and c.gated:
            for i, rows in enumerate(value.chunk(2)):
                yield name.replace("linear_fc1", f"wi_{i}"), rows
        else:
            yield name.replace("linear_fc1", "wi"), value

    return filled(model, params, rename)


def blenderbot(c: T5Config, params: Mapping[str, Tensor]) -> nn.Module:
    """BlenderbotForConditionalGeneration, the home of Megatron's T5: two equal position tables, a buffer for a bias."""
    layers = {"encoder_layers": c.encoder_layers, "decoder_layers": c.decoder_layers}
    sizes = {f"{stack}_{of}": n for stack in ("encoder", "decoder") for of, n in
             (("attention_heads", c.heads), ("ffn_dim", c.ffn))}  # fmt: skip
    config = transformers.BlenderbotConfig(
        vocab_size=c.vocab, d_model=c.hidden, max_position_embeddings=c.max_positions, scale_embedding=False,
        activation_function=ACTIVATIONS[c.activation], dropout=0.0, attention_dropout=0.0, **layers, **sizes,
    )  # fmt: skip
    words = {
        "embedding.word_embeddings": "shared",
        "input_layernorm": "self_attn_layer_norm",
        "pre_cross_attn_layernorm": "encoder_attn_layer_norm",
        "pre_mlp_layernorm": "final_layer_norm",
        "coder.final_layernorm": "coder.layer_norm",
        "self_attention.": "self_attn.",
        "cross_attention.": "encoder_attn.",
        "linear_proj": "out_proj",
        "linear_q.": "q_proj.",
        "mlp.linear_": "",
    }

    def rename(name: str, value: Tensor) -> Renamed:
        name = f"model.{replaced(name, words)}"
        if "position_embeddings" in name:
            yield from ((f"model.{stack}.embed_positions.weight", value) for stack in ("encoder", "decoder"))
        elif "kv." in name:
            parts = split_qkv(c, value) if "qkv" in name else value.chunk(2)
            for part, rows in zip("qkv" if "qkv" in name else "kv", parts, strict=True):
                yield name.replace("linear_qkv", f"{part}_proj").replace("linear_kv", f"{part}_proj"), rows
        else:
            yield name, value

    weights = {name: value for name, value in params.items() if name != "lm_head.bias"}
    model = filled(transformers.BlenderbotForConditionalGeneration(config), weights, rename)
    model.final_logits_bias.copy_(params["lm_head.bias"])  # type: ignore[operator,union-attr]
    return model

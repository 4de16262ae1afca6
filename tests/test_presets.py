"""Named models: their sizes as published, and who wins over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from megatron_ds.config import Config, parse
from megatron_ds.errors import ConfigError
from megatron_ds.model.config import TransformerConfig
from megatron_ds.presets import PRESETS
from megatron_ds.rules import check_config

# Vocabulary as published, padding included, and parameters counted in the published weights.
SIZES: Mapping[str, tuple[int, int]] = {
    "gpt2-124m": (50257, 124_439_808),
    "gpt2-355m": (50257, 354_823_168),
    "gpt2-774m": (50257, 774_030_080),
    "gpt2-1.5b": (50257, 1_557_611_200),
    "pythia-70m": (50304, 70_426_624),
    "pythia-160m": (50304, 162_322_944),
    "pythia-410m": (50304, 405_334_016),
    "pythia-1b": (50304, 1_011_781_632),
    "pythia-1.4b": (50304, 1_414_647_808),
    "pythia-2.8b": (50304, 2_775_208_960),
    "pythia-6.9b": (50432, 6_857_302_016),
    "pythia-12b": (50688, 11_846_072_320),
    "gpt-neox-20b": (50432, 20_554_567_680),
    "llama2-7b": (32000, 6_738_415_616),
    "llama2-13b": (32000, 13_015_864_320),
    "llama2-70b": (32000, 68_976_648_192),
    "llama3-8b": (128256, 8_030_261_248),
    "llama3-70b": (128256, 70_553_706_496),
    "llama3.1-8b": (128256, 8_030_261_248),
    "llama3.2-1b": (128256, 1_235_814_400),
    "mistral-7b": (32000, 7_241_732_096),
    "qwen2-0.5b": (151936, 494_032_768),
    "qwen2-1.5b": (151936, 1_543_714_304),
    "qwen2-7b": (152064, 7_615_616_512),
    "qwen3-0.6b": (151936, 596_049_920),
    "qwen3-1.7b": (151936, 1_720_574_976),
    "qwen3-8b": (151936, 8_190_735_360),
    "bloom-560m": (250880, 559_214_592),
    "bloom-1b1": (250880, 1_065_314_304),
    "bloom-7b1": (250880, 7_069_016_064),
    "bloom-176b": (250880, 176_247_271_424),
    # the body with its pooler; the heads were not published with all of them
    "bert-base": (30522, 109_482_240),
    "bert-large": (30522, 335_141_888),
    "t5-small": (32128, 60_506_624),
    "t5-base": (32128, 222_903_552),
    "t5-large": (32128, 737_668_096),
    "t5-3b": (32128, 2_851_598_336),
    "t5-v1_1-small": (32128, 76_961_152),
    "t5-v1_1-base": (32128, 247_577_856),
    "t5-v1_1-large": (32128, 783_150_080),
    "t5-v1_1-xl": (32128, 2_849_757_184),
}
# Published as rounded figures only, in millions, and how far the sum may be from them.
ROUNDED: Mapping[str, tuple[int, float, float]] = {
    "gpt3-125m": (50257, 125, 0.01),
    "gpt3-350m": (50257, 350, 0.02),
    "gpt3-760m": (50257, 760, 0.01),
    "gpt3-1.3b": (50257, 1300, 0.02),
    "gpt3-2.7b": (50257, 2700, 0.02),
    "gpt3-6.7b": (50257, 6700, 0.01),
    "gpt3-13b": (50257, 13000, 0.02),
    "gpt3-175b": (50257, 175000, 0.01),
    "megatron-bert-345m": (30592, 345, 0.04),
    "megatron-t5-220m": (30592, 220, 0.02),
}


def chosen(name: str, *argv: str) -> Config:
    return parse(["--model-preset", name, *argv], {"model_type": PRESETS[name].model_type})


def parameters(model: TransformerConfig, vocab: int) -> int:
    """Weights by hand: tables, then layers of attention, MLP and norms, then what follows."""
    h, a, d, f = model.hidden_size or 0, model.num_attention_heads or 0, model.head_size, model.ffn_size
    k, bias, norm = model.kv_heads, int(model.add_bias_linear), h * (2 if model.normalization == "LayerNorm" else 1)
    queries, keys_and_values = (
        (h + (bias or model.add_qkv_bias)) * a * d,
        (h + (bias or model.add_qkv_bias)) * 2 * k * d,
    )
    attention = queries + keys_and_values + (a * d + bias) * h + 2 * d * model.qk_layernorm
    mlp = (h + bias) * f * (2 if model.gated else 1) + (f + bias) * h
    layer, cross = attention + mlp + 2 * norm, attention + norm
    total = vocab * h * (2 if model.untie_embeddings_and_output_weights else 1) + norm
    if model.position_embedding_type == "learned_absolute":
        total += (model.max_position_embeddings or 0) * h
    if model.position_embedding_type == "relative":
        total += 2 * 32 * a
    if model.embed_layernorm:
        total += norm
    if model.model_type == "BERT":
        total += 2 * h + h * h + h
    if model.model_type != "T5":
        return total + (model.num_layers or 0) * layer
    return total + norm + (model.num_layers or 0) * (2 * layer + cross)


@pytest.mark.parametrize("name", SIZES)
def test_size_as_published(name: str) -> None:
    vocab, published = SIZES[name]
    assert parameters(chosen(name).model, vocab) == published


@pytest.mark.parametrize("name", ROUNDED)
def test_size_about_as_published(name: str) -> None:
    vocab, millions, share = ROUNDED[name]
    assert parameters(chosen(name).model, vocab) / 1e6 == pytest.approx(millions, rel=share)


def test_every_preset_has_a_published_size() -> None:
    assert SIZES.keys() | ROUNDED.keys() == PRESETS.keys()


# What no count of parameters can see.
FACTS: Mapping[str, dict[str, object]] = {
    "gpt2-124m": {"activation": "gelu_tanh", "norm_epsilon": 1e-5, "positions": "learned_absolute"},
    "gpt3-175b": {"head_size": 128, "max_position_embeddings": 2048},
    "pythia-1b": {"activation": "gelu", "rotated": 64, "use_parallel_residual": True, "rotary_base": 10000.0},
    "gpt-neox-20b": {"activation": "gelu_tanh", "rotated": 24, "use_parallel_residual": True},
    "llama2-70b": {"kv_heads": 8, "norm_epsilon": 1e-5, "rotary_base": 10000.0, "max_position_embeddings": 4096},
    "llama3-8b": {"rotary_base": 500000.0, "use_rope_scaling": False, "max_position_embeddings": 8192},
    "llama3.1-8b": {"use_rope_scaling": True, "rope_scaling_factor": 8.0, "max_position_embeddings": 131072},
    "llama3.2-1b": {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "head_size": 64, "kv_heads": 8},
    "mistral-7b": {"window_size": 4095, "rotary_base": 10000.0, "activation": "swiglu"},
    "qwen2-7b": {"add_bias_linear": False, "add_qkv_bias": True, "norm_epsilon": 1e-6, "rotary_base": 1e6},
    "qwen3-0.6b": {"add_qkv_bias": False, "qk_layernorm": True, "head_size": 128, "rotary_base": 1e6},
    "bloom-7b1": {"positions": "alibi", "embed_layernorm": True, "activation": "gelu_tanh"},
    "bert-base": {"apply_residual_connection_post_layernorm": True, "activation": "gelu", "norm_epsilon": 1e-12},
    "megatron-bert-345m": {"apply_residual_connection_post_layernorm": False, "activation": "gelu_tanh"},
    "t5-3b": {"head_size": 128, "softmax_scale": 1.0, "activation": "relu", "scale_decoder_outputs": True},
    "t5-v1_1-xl": {"activation": "geglu", "exact_gelu": False, "scale_decoder_outputs": False, "lm_head_bias": False},
    "megatron-t5-220m": {"positions": "learned_absolute", "lm_head_bias": True, "softmax_scale": None},
}


@pytest.mark.parametrize("name", FACTS)
def test_what_a_model_is_known_for(name: str) -> None:
    model = chosen(name).model
    assert {fact: getattr(model, fact) for fact in FACTS[name]} == FACTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_all_that_a_model_needs(name: str) -> None:
    flags = ["--seq-length=512", "--micro-batch-size=1", "--lr=1e-4", "--train-iters=1", "--mock-data"]
    check_config(chosen(name, *flags, *(["--decoder-seq-length=128"] if PRESETS[name].model_type == "T5" else [])), 1)


def test_typed_flags_win_in_any_spelling() -> None:
    model = chosen("llama3-8b", "--num-layers=2", "--relu", "--group-query-attention", "--num-query-groups=4").model
    assert (model.num_layers, model.hidden_size, model.activation, model.kv_heads) == (2, 4096, "relu", 4)
    assert chosen("gpt2-124m", "--use-rotary-position-embeddings").model.positions == "rope"
    stacks = chosen("t5-small", "--encoder-num-layers=3").model
    assert (stacks.num_layers, stacks.encoder_layers, stacks.decoder_layers) == (None, 3, 3)
    stacks = chosen("t5-small", "--decoder-num-layers=3").model
    assert (stacks.encoder_layers, stacks.decoder_layers) == (6, 3)


def test_a_preset_leaves_all_else_alone() -> None:
    given, plain = chosen("llama3-8b"), parse([])
    for name in ("data", "training", "tokenizer", "optimizer", "parallel", "precision"):
        assert vars(given)[name] == vars(plain)[name]
    left = {"attention_dropout", "hidden_dropout", "init_method_std", "model_type"}
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert left < fields
    assert not any(left & preset.values.keys() for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("name", "recipe", "fix"),
    [
        ("bert-base", "GPT", "pretrain_bert.py --model-preset bert-base"),
        ("T5-Small", "BERT", "pretrain_t5.py --model-preset t5-small"),
        ("gpt2-124m", "T5", "pretrain_gpt.py --model-preset gpt2-124m"),
        ("llama3-7b", "GPT", "--model-preset llama3-70b"),
        ("bert", "BERT", "--model-preset bert-base"),
    ],
)
def test_a_name_of_another_recipe_or_of_nothing(name: str, recipe: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--model-preset", name], {"model_type": recipe})
    assert caught.value.subject.startswith("--model-preset")
    assert caught.value.fix == fix
    assert all(
        PRESETS[other].model_type == recipe for other in caught.value.expected.removeprefix("one of ").split(", ")
    )

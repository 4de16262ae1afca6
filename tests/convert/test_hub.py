"""Directories as others have published them, and those that hold no model of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ds.convert.hub import load_hf
from megatron_ds.convert.weights import Weights
from megatron_ds.errors import CheckpointError
from tests.convert import published

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    out = tmp_path_factory.mktemp("published")
    return {
        name: published.save(name, out)
        for name in ("gpt2", "neox", "llama", "qwen2", "bert", "bert-masked", "t5", "blenderbot")
    }


def altered(
    source: Path,
    target: Path,
    fields: Mapping[str, Any] | None = None,
    tensors: Callable[[Tensors], Tensors] = lambda found: found,
) -> Path:
    """A copy whose config or tensors are others; a field of None is left out."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text()) | dict(fields or {})
    (target / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v is not None}))
    save_file(tensors(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.config == expected.config
    assert found.names == expected.names
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.names)


def test_gpt2_without_its_prefix_and_with_old_buffers(sources: Mapping[str, Path], tmp_path: Path) -> None:
    def old(found: Tensors) -> Tensors:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
        buffers = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        return bare | buffers | {"lm_head.weight": bare["wte.weight"].clone()}

    assert_equal(load_hf(altered(sources["gpt2"], tmp_path / "old", tensors=old)), load_hf(sources["gpt2"]))


def test_bert_with_gamma_and_beta(sources: Mapping[str, Path], tmp_path: Path) -> None:
    def old(found: Tensors) -> Tensors:
        greek = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in found.items()}
        greek = {n.replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in greek.items()}
        words, bias = found["bert.embeddings.word_embeddings.weight"], found["cls.predictions.bias"]
        copies = {"cls.predictions.decoder.weight": words.clone(), "cls.predictions.decoder.bias": bias.clone()}
        return greek | copies | {"bert.embeddings.position_ids": torch.arange(45)[None]}

    assert_equal(load_hf(altered(sources["bert"], tmp_path / "old", tensors=old)), load_hf(sources["bert"]))


def test_neox_as_published(sources: Mapping[str, Path], tmp_path: Path) -> None:
    def old(found: Tensors) -> Tensors:
        layer = "gpt_neox.layers.0.attention."
        return found | {
            f"{layer}bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            f"{layer}masked_bias": torch.tensor(-1e9),
            f"{layer}rotary_emb.inv_freq": torch.ones(1),
        }

    fields = {"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 1234, "dtype": None}
    found = load_hf(altered(sources["neox"], tmp_path / "old", fields, old)).config
    assert (found.rotary_percent, found.rotary_base, found.use_parallel_residual) == (0.5, 1234.0, True)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5}, (5e5, None, False)),
        ({}, (1e4, None, False)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.5}}, (5e5, 2.5, False)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
                | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            },
            (5e5, None, True),
        ),
    ],
)
def test_rope_as_transformers_4_writes_it(
    fields: dict[str, Any], expected: tuple[object, ...], sources: Mapping[str, Path], tmp_path: Path
) -> None:
    found = load_hf(altered(sources["llama"], tmp_path / "old", {"rope_parameters": None, **fields})).config
    assert (found.rotary_base, found.rotary_seq_len_interpolation_factor, found.use_rope_scaling) == expected


def test_a_pickle_of_tensors_is_read_and_any_other_refused(sources: Mapping[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_bytes((sources["t5"] / "config.json").read_bytes())
    found = load_file(sources["t5"] / "model.safetensors")
    torch.save(found, source / "pytorch_model.bin")
    assert_equal(load_hf(source), load_hf(sources["t5"]))
    torch.save({"harmless": Path("/")}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_hf(source)


@pytest.mark.parametrize(
    ("name", "fields", "word"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"activation_function": "quick_gelu"}, "quick_gelu"),
        ("gpt2", {"model_type": "opt"}, "opt"),
        ("gpt2", {"n_layer": "three"}, "n_layer"),
        ("gpt2", {"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon"),
        ("llama", {"rope_parameters": "none"}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_theta": "big"}}, "big"),
        ("bert-masked", {"type_vocab_size": 2}, "type_vocab_size"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("neox", {"attention_bias": False}, "attention_bias"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": None, "max_window_layers": 1},
         "max_window_layers"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("bert", {"hidden_act": "relu"}, "hidden_act"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"type_vocab_size": 3}, "type_vocab_size"),
        ("t5", {"feed_forward_proj": "gated-mish"}, "gated-mish"),
        ("blenderbot", {"scale_embedding": True}, "scale_embedding"),
        ("blenderbot", {"decoder_ffn_dim": 31}, "decoder_ffn_dim"),
    ],
)  # fmt: skip
def test_what_we_do_not_have_is_refused_by_name(
    name: str, fields: dict[str, Any], word: str, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_hf(altered(sources[name], tmp_path / "other", fields))
    assert word in caught.value.subject + caught.value.found


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda found: {name: tensor for name, tensor in found.items() if name not in names}


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("bert-masked", without("cls.predictions.bias"), "cls.predictions.bias"),
        ("bert", without("cls.seq_relationship.weight", "cls.seq_relationship.bias"), "cls.seq_relationship.bias"),
        ("llama", without("lm_head.weight"), "lm_head.weight"),
        ("gpt2", lambda found: found | {"score.weight": torch.ones(2)}, "score.weight"),
    ],
)
def test_tensors_too_few_or_too_many(
    name: str, change: Callable[[Tensors], Tensors], word: str, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_hf(altered(sources[name], tmp_path / "other", tensors=change))
    assert word in caught.value.found


def test_a_token_type_that_is_always_added_must_be_nothing(sources: Mapping[str, Path], tmp_path: Path) -> None:
    def typed(found: Tensors) -> Tensors:
        return found | {"bert.embeddings.token_type_embeddings.weight": torch.ones(1, 24)}

    weights = load_hf(altered(sources["bert-masked"], tmp_path / "typed", tensors=typed))
    with pytest.raises(CheckpointError, match="token_type_embeddings"):
        weights.read("embedding.position_embeddings.weight")


def test_shapes_that_the_config_does_not_mean(sources: Mapping[str, Path], tmp_path: Path) -> None:
    weights = load_hf(altered(sources["neox"], tmp_path / "other", {"num_attention_heads": 5}))
    with pytest.raises(CheckpointError, match=r"query_key_value\.weight \[72, 24\]"):
        weights.read("layers.0.self_attention.linear_qkv.weight")


def test_two_tables_of_positions_are_one_too_many(sources: Mapping[str, Path], tmp_path: Path) -> None:
    def apart(found: Tensors) -> Tensors:
        table = "model.decoder.embed_positions.weight"
        return found | {table: found[table] + 1}

    weights = load_hf(altered(sources["blenderbot"], tmp_path / "apart", tensors=apart))
    with pytest.raises(CheckpointError, match="embed_positions"):
        weights.read("embedding.position_embeddings.weight")


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("config.json", None, "config.json"),
        ("config.json", b"[1]", "config.json"),
        ("config.json", b"{", "config.json"),
        ("model.safetensors", None, "no weights"),
        ("model.safetensors", b"\xff" * 100, "model.safetensors"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../../etc/passwd"}}', "passwd"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
    ],
)
def test_damaged_directories(
    file: str, content: bytes | None, word: str, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    source = altered(sources["gpt2"], tmp_path / "damaged")
    (source / file).write_bytes(content) if content is not None else (source / file).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_hf(source)
    assert word in caught.value.subject + caught.value.found

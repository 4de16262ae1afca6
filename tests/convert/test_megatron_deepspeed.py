from __future__ import annotations

import argparse
import enum
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.convert.megatron import load_megatron
from megatron_ds.errors import CheckpointError
from tests.convert.megatron_files import (
    INSIDE,
    PADDED,
    VOCAB,
    H,
    Whole,
    embedding,
    gpt,
    gpt_chunk,
    is_whole,
    options,
    t5,
    t5_chunk,
)


def _deepspeed(directory: Path, args: argparse.Namespace, modules: list[Any], **more: Any) -> Path:
    path = directory / "global_step100"
    path.mkdir(parents=True)
    (directory / "latest").write_text("global_step100")
    (directory / "latest_checkpointed_iteration.txt").write_text("100")
    for rank, module in enumerate(modules):
        state = {"module": module, "args": args, "iteration": 100, "checkpoint_version": 3.0} | more
        torch.save(state, path / f"mp_rank_{rank:02d}_model_states.pt")
    return path


def _layer_files(path: Path, whole: Whole, first: int, norm_at: int) -> None:
    """One file per layer, numbered as the version at hand numbers them."""
    for t in range(2):
        embeddings = {f"{name}.weight": value["weight"] for name, value in embedding(whole, t, 2).items()}
        layers = {1: embeddings | whole.pair("embedding.norm", "word_embeddings.norm.")}
        layers |= {first + i: whole.inside(f"layers.{i}", INSIDE, t, 2) for i in range(4)}
        layers[norm_at] = whole.pair("final_layernorm")
        if "output_layer.weight" in whole.tensors:
            layers[norm_at + 1] = {"lm_head.weight": whole.piece("output_layer.weight", t, 2)}
        else:
            layers[norm_at + 1] = dict(embeddings)
        for number, state in layers.items():
            torch.save(state, path / f"layer_{number:02d}-model_{t:02d}-model_states.pt")


@pytest.mark.parametrize("untied", [True, False])
def test_a_pipeline_of_megatron_deepspeed(tmp_path: Path, untied: bool) -> None:
    whole = gpt(groups=2, gated=True, untied=untied)
    args = options(
        pipeline_model_parallel_size=2,
        num_key_value_heads=2,
        swiglu=True,
        untie_embeddings_and_output_weights=untied,
        normalization="layernorm",
        ds_sequence_parallel_fpdt=False,
    )
    path = _deepspeed(tmp_path, args, [None] * 4)
    _layer_files(path, whole, first=2, norm_at=6)
    is_whole(load_megatron(str(tmp_path), "GPT", VOCAB), whole)


def test_bloom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers from 3 on, a norm behind the embedding, ALiBi as a member of an enum that nobody here can import."""

    class PositionEmbeddingType(enum.Enum):
        rotary = 1
        absolute = 2
        alibi = 3

    whole = gpt(learned=False)
    whole.norm("embedding.norm")
    args = options(position_embedding_type=PositionEmbeddingType.alibi, embed_layernorm=True, bias_gelu_fusion=True)
    with monkeypatch.context() as patch:
        for name in ("megatron", "megatron.enums"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        PositionEmbeddingType.__module__, PositionEmbeddingType.__qualname__ = "megatron.enums", "PositionEmbeddingType"
        patch.setattr(sys.modules["megatron.enums"], "PositionEmbeddingType", PositionEmbeddingType, raising=False)
        path = _deepspeed(tmp_path, args, [None] * 2)
    _layer_files(path, whole, first=3, norm_at=8)
    weights = load_megatron(str(tmp_path), "GPT", VOCAB)
    is_whole(weights, whole)
    assert weights.config.positions == "alibi"
    assert weights.config.embed_layernorm
    assert weights.config.activation == "gelu_tanh"


@pytest.mark.parametrize(("more", "order"), [({}, "group"), ({"ds_sequence_parallel_fpdt": False}, "part")])
def test_deepspeed_without_a_pipeline(tmp_path: Path, more: dict[str, Any], order: str) -> None:
    """Since it has that option, each rank's rows are all its queries, then all its keys, then all its values."""
    whole = gpt(order=order)
    modules = [gpt_chunk(whole, range(4), t, 2) for t in range(2)]
    _deepspeed(tmp_path, options(**more), modules)
    is_whole(load_megatron(str(tmp_path), "GPT", VOCAB), whole)


@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize(("more", "order"), [({}, "group"), ({"ds_sequence_parallel_fpdt": False}, "part")])
def test_universal(tmp_path: Path, pipeline: bool, more: dict[str, Any], order: str) -> None:
    """Ranks' rows one after the other, gates and ups already joined, vocabulary already cut."""
    whole = gpt(gated=True, order=order)
    info = {"original_vocab_size": VOCAB, "padded_vocab_size": PADDED}
    args = options(swiglu=True, **more)
    path = _deepspeed(tmp_path, args, [None] * 2, universal_checkpoint_info=info)
    names = {}
    for i in range(4):
        prefix = f"{i + 2}." if pipeline else f"language_model.encoder.layers.{i}."
        names |= {f"layers.{i}.{ours}.": f"{prefix}{theirs}." for ours, theirs in INSIDE.items()}
    names["embedding."] = "tied_modules.embed." if pipeline else "language_model.embedding."
    names["final_layernorm."] = "6." if pipeline else "language_model.encoder.final_layernorm."
    for ours, tensor in whole.tensors.items():
        start = next(start for start in names if ours.startswith(start))
        folder = path / "zero" / (names[start] + ours.removeprefix(start))
        folder.mkdir(parents=True)
        ranks = torch.cat([whole.piece(ours, t, 2) for t in range(2)]) if "linear_qkv" in ours else tensor
        torch.save({"param": ranks, "cat_dim": 0}, folder / "fp32.pt")
        torch.save({"param": ranks + 1}, folder / "exp_avg.pt")
    weights = load_megatron(str(tmp_path), "GPT", None)
    is_whole(weights, whole)
    assert weights.vocab_size == VOCAB


def test_positions_cut_by_sequence_parallelism(tmp_path: Path) -> None:
    whole = gpt()
    whole.tensors["embedding.position_embeddings.weight"] = torch.randn(8, H)
    modules = [gpt_chunk(whole, range(4), t, 2) for t in range(2)]
    for t, module in enumerate(modules):
        tables = module["language_model"]["embedding"]
        cut = whole.tensors["embedding.position_embeddings.weight"][4 * t : 4 * t + 4].clone()
        tables["position_embeddings"] = {"local_embeddings.weight": cut}
    _deepspeed(tmp_path, options(max_position_embeddings=8), modules)
    is_whole(load_megatron(str(tmp_path), "GPT", VOCAB), whole)


def test_missing_layer_files(tmp_path: Path) -> None:
    path = _deepspeed(tmp_path, options(), [None] * 2)
    _layer_files(path, gpt(), first=2, norm_at=6)
    (path / "layer_04-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="layer_04-model_01"):
        load_megatron(str(tmp_path), "GPT", VOCAB)
    (path / "layer_04-model_00-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks layers\.2\.input_layernorm"):
        load_megatron(str(tmp_path), "GPT", VOCAB)


def test_t5_without_a_pipeline(tmp_path: Path) -> None:
    """Cross attention interleaves keys and values head by head, also where self-attention is in flat thirds."""
    whole = t5(order="part", kv_order="group")
    modules = [t5_chunk(whole, t, encoder=True, decoder=range(3)) for t in range(2)]
    args = options(encoder_num_layers=2, decoder_num_layers=3, ds_sequence_parallel_fpdt=False)
    _deepspeed(tmp_path, args, modules)
    is_whole(load_megatron(str(tmp_path), "T5", VOCAB), whole)

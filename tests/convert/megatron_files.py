"""Whole tensors under our names, and a slicer that writes them down as Megatron's ranks would, one row at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ds.convert.weights import Weights

H, HEADS, D, F, VOCAB, PADDED, POSITIONS = 12, 4, 3, 10, 13, 16, 7

INSIDE = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
INSIDE_T5_DECODER = INSIDE | {
    "pre_cross_attn_layernorm": "post_attention_layernorm",
    "cross_attention.linear_q": "inter_attention.query",
    "cross_attention.linear_kv": "inter_attention.key_value",
    "cross_attention.linear_proj": "inter_attention.dense",
    "pre_mlp_layernorm": "post_inter_attention_layernorm",
}


@dataclass
class Whole:
    """A model's tensors under our names, and how its rows lie in Megatron's files."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: int = HEADS
    gated: bool = False
    bias: bool = True
    norm_bias: bool = True
    order: str = "group"
    kv_order: str = "group"

    def add(self, name: str, *shape: int) -> None:
        generator = torch.Generator().manual_seed(len(self.tensors))
        self.tensors[name] = torch.randn(shape, generator=generator)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.add(f"{name}.weight", rows, columns)
        if self.bias:
            self.add(f"{name}.bias", rows)

    def norm(self, name: str) -> None:
        self.add(f"{name}.weight", H)
        if self.norm_bias:
            self.add(f"{name}.bias", H)

    def layer(self, prefix: str, cross: bool = False) -> None:
        self.norm(f"{prefix}.input_layernorm")
        self.linear(f"{prefix}.self_attention.linear_qkv", (HEADS + 2 * self.groups) * D, H)
        self.linear(f"{prefix}.self_attention.linear_proj", H, HEADS * D)
        if cross:
            self.norm(f"{prefix}.pre_cross_attn_layernorm")
            self.linear(f"{prefix}.cross_attention.linear_q", HEADS * D, H)
            self.linear(f"{prefix}.cross_attention.linear_kv", 2 * HEADS * D, H)
            self.linear(f"{prefix}.cross_attention.linear_proj", H, HEADS * D)
        self.norm(f"{prefix}.pre_mlp_layernorm")
        self.linear(f"{prefix}.mlp.linear_fc1", 2 * F if self.gated else F, H)
        self.linear(f"{prefix}.mlp.linear_fc2", H, F)

    def piece(self, name: str, t: int, tp: int) -> torch.Tensor:
        """What tensor-parallel rank t holds of one of ours."""
        whole = self.tensors[name]
        if "linear_qkv" in name:
            starts = [0, HEADS, HEADS + self.groups]
            return whole[_rows(self.order, starts, [HEADS // self.groups, 1, 1], self.groups, t, tp)]
        if "linear_kv" in name:
            return whole[_rows(self.kv_order, [0, HEADS], [1, 1], HEADS, t, tp)]
        if "linear_fc1" in name and self.gated:
            gate, up = whole[:F], whole[F:]
            return torch.cat([_part(gate, 0, t, tp), _part(up, 0, t, tp)])
        if name in ("embedding.word_embeddings.weight", "output_layer.weight", "lm_head.bias"):
            padding = torch.full((PADDED - VOCAB, *whole.shape[1:]), 99.0)
            return _part(torch.cat([whole, padding]), 0, t, tp)
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            return _part(whole, 1, t, tp)
        if "linear_fc1" in name or "linear_q." in name:
            return _part(whole, 0, t, tp)
        return whole.clone()

    def inside(self, prefix: str, names: dict[str, str], t: int, tp: int) -> dict[str, torch.Tensor]:
        """One layer as rank t holds it, under Megatron's names within a layer."""
        return {
            f"{theirs}.{kind}": self.piece(f"{prefix}.{ours}.{kind}", t, tp)
            for ours, theirs in names.items()
            for kind in ("weight", "bias")
            if f"{prefix}.{ours}.{kind}" in self.tensors
        }

    def stack(self, prefix: str, layers: range, names: dict[str, str], t: int, tp: int) -> dict[str, torch.Tensor]:
        """Some layers of a stack, numbered from 0 as a stage numbers them."""
        return {
            f"layers.{local}.{name}": tensor
            for local, i in enumerate(layers)
            for name, tensor in self.inside(f"{prefix}layers.{i}", names, t, tp).items()
        }

    def pair(self, ours: str, theirs: str = "") -> dict[str, torch.Tensor]:
        """Weight and bias of something that is not split."""
        return {
            f"{theirs}{kind}": self.tensors[f"{ours}.{kind}"].clone()
            for kind in ("weight", "bias")
            if f"{ours}.{kind}" in self.tensors
        }


def _part(tensor: torch.Tensor, dim: int, t: int, tp: int) -> torch.Tensor:
    size = tensor.shape[dim] // tp
    return tensor.narrow(dim, t * size, size).clone()


def _rows(order: str, starts: list[int], sizes: list[int], groups: int, t: int, tp: int) -> list[int]:
    """Which of our rows (all of the first part, then of the next; in heads of D rows) rank t holds, in its order."""
    mine = range(t * groups // tp, (t + 1) * groups // tp)

    def heads(part: int, group: int) -> list[int]:
        return [starts[part] + group * sizes[part] + i for i in range(sizes[part])]

    rows = []
    if order == "group":
        for group in mine:
            for part in range(len(starts)):
                rows += [head * D + i for head in heads(part, group) for i in range(D)]
    elif order == "part":
        for part in range(len(starts)):
            for group in mine:
                rows += [head * D + i for head in heads(part, group) for i in range(D)]
    else:
        for group in mine:
            for i in range(D):
                rows += [heads(part, group)[0] * D + i for part in range(len(starts))]
    return rows


def options(**changes: Any) -> argparse.Namespace:
    """Options of a small GPT with everything at Megatron's default."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "encoder_num_layers": 4,
        "hidden_size": H,
        "num_attention_heads": HEADS,
        "kv_channels": D,
        "ffn_hidden_size": F,
        "max_position_embeddings": POSITIONS,
        "seq_length": POSITIONS,
        "encoder_seq_length": POSITIONS,
        "decoder_seq_length": None,
        "padded_vocab_size": PADDED,
        "layernorm_epsilon": 1e-5,
        "params_dtype": torch.float32,
        "num_experts": [1],
        "tokenizer_type": "GPT2BPETokenizer",
        "vocab_file": "/nowhere/vocab.json",
        "merge_file": "/nowhere/merges.txt",
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "bias_gelu_fusion": False,
    }
    return argparse.Namespace(**(values | changes))


def gpt(layers: int = 4, *, learned: bool = True, untied: bool = False, **changes: Any) -> Whole:
    """Whole tensors of a GPT."""
    whole = Whole(**changes)
    whole.add("embedding.word_embeddings.weight", VOCAB, H)
    if learned:
        whole.add("embedding.position_embeddings.weight", POSITIONS, H)
    for i in range(layers):
        whole.layer(f"layers.{i}")
    whole.norm("final_layernorm")
    if untied:
        whole.add("output_layer.weight", VOCAB, H)
    return whole


def embedding(whole: Whole, t: int, tp: int) -> dict[str, Any]:
    """Megatron's nested state of the embeddings."""
    return {
        table: {"weight": whole.piece(f"embedding.{table}.weight", t, tp)}
        for table in ("word_embeddings", "position_embeddings", "tokentype_embeddings")
        if f"embedding.{table}.weight" in whole.tensors
    }


def gpt_chunk(
    whole: Whole, layers: range, t: int, tp: int, *, stack: str = "encoder", attention: str = "self_attention"
) -> dict[str, Any]:
    """Megatron's nested state of some layers of a GPT, with the ends of the model where they belong."""
    total = sum(name.endswith("input_layernorm.weight") for name in whole.tensors)
    inside = {ours: theirs.replace("self_attention", attention) for ours, theirs in INSIDE.items()}
    language: dict[str, Any] = {stack: whole.stack("", layers, inside, t, tp), "moe_state_dict": {}}
    state: dict[str, Any] = {"language_model": language}
    words = "embedding.word_embeddings.weight"
    if layers.start == 0:
        language["embedding"] = embedding(whole, t, tp)
    if layers.stop == total:
        language[stack] |= whole.pair("final_layernorm", "final_layernorm.")
        if "output_layer.weight" in whole.tensors:
            language["output_layer"] = {"weight": whole.piece("output_layer.weight", t, tp)}
        elif layers.start > 0:
            state["word_embeddings_for_head"] = {"weight": whole.piece(words, t, tp)}
    return state


def t5(**changes: Any) -> Whole:
    """Whole tensors of a T5 with 2 and 3 layers."""
    whole = Whole(**changes)
    whole.add("embedding.word_embeddings.weight", VOCAB, H)
    whole.add("embedding.position_embeddings.weight", POSITIONS, H)
    for i in range(2):
        whole.layer(f"encoder.layers.{i}")
    whole.norm("encoder.final_layernorm")
    for i in range(3):
        whole.layer(f"decoder.layers.{i}", cross=True)
    whole.norm("decoder.final_layernorm")
    whole.add("lm_head.bias", VOCAB)
    return whole


def t5_chunk(whole: Whole, t: int, *, encoder: bool, decoder: range) -> dict[str, Any]:
    """Megatron's nested state of the encoder or of some layers of the decoder, on rank t of 2."""
    language: dict[str, Any] = {}
    state: dict[str, Any] = {"language_model": language}
    if encoder:
        language["encoder"] = whole.stack("encoder.", range(2), INSIDE, t, 2)
        language["encoder"] |= whole.pair("encoder.final_layernorm", "final_layernorm.")
    if decoder:
        language["decoder"] = whole.stack("decoder.", decoder, INSIDE_T5_DECODER, t, 2)
    if encoder or decoder.start == 0:
        language["embedding"] = embedding(whole, t, 2)
    if decoder.stop == 3:
        language["decoder"] |= whole.pair("decoder.final_layernorm", "final_layernorm.")
        state["lm_head"] = {"bias": whole.piece("lm_head.bias", t, 2)}
        if not encoder:
            state["word_embeddings_for_head"] = {"weight": whole.piece("embedding.word_embeddings.weight", t, 2)}
    return state


def write_classic(
    directory: Path,
    args: argparse.Namespace,
    state: Callable[[int, int], dict[str, Any]],
    tp: int,
    pp: int,
    version: float | None = 3.0,
) -> Path:
    """iter_0000100 with a file of every rank; state(tensor rank, pipeline rank) holds model, or model0, model1 ..."""
    for t in range(tp):
        for p in range(pp):
            name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")
            file = directory / "iter_0000100" / name / "model_optim_rng.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"args": args, "iteration": 100, "optimizer": {"step": torch.ones(3)}} | state(t, p)
            torch.save(content if version is None else content | {"checkpoint_version": version}, file)
    (directory / "latest_checkpointed_iteration.txt").write_text("100")
    return directory / "iter_0000100"


def is_whole(weights: Weights, whole: Whole) -> None:
    """Every tensor and no other, bit by bit."""
    assert sorted(weights.names) == sorted(whole.tensors)
    for name, tensor in whole.tensors.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype, name
        assert torch.equal(read, tensor), name

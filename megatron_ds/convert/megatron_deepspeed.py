"""Megatron-DeepSpeed's files: of a pipeline, of a model in one piece, and universal ones.

    global_stepN/layer_LL-model_TT-model_states.pt      one per layer of a pipeline and tensor rank
    global_stepN/mp_rank_RR_model_states.pt             options; without a pipeline the weights, RR the tensor rank
    global_stepN/zero/NAME/fp32.pt                      universal: whole tensors in fp32, options as above

Weights are taken as the model holds them, in its precision; fp32 masters in *_optim_states.pt are left alone
(DeepSpeed's ds_to_universal.py makes a universal checkpoint of them). Layers are told by what they hold, not by their
numbers, which differ between versions: Megatron-DeepSpeed has them at 2..L+1, BigScience (BLOOM) at 3..L+2.

Rows of self-attention are taken for [groups, heads/groups + 2, d] like Megatron-LM's: so all versions computed before
December 2024, and so write the converters from Hugging Face. Since then Megatron-DeepSpeed cuts each rank's rows into
three flat thirds, which works only without groups. A run of that kind is known by its option
ds_sequence_parallel_fpdt, and is read that way unless keys and values are grouped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ds.convert.megatron_args import SavedArgs
from megatron_ds.convert.megatron_join import Order
from megatron_ds.convert.megatron_names import flatten, in_layer
from megatron_ds.convert.megatron_source import Collector, Pieces, Source, broken
from megatron_ds.convert.unpickle import load_pickled
from megatron_ds.errors import CheckpointError
from megatron_ds.model.config import ModelType

_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_OUTSIDE = {
    "word_embeddings.norm.weight": "embedding.norm.weight",
    "word_embeddings.norm.bias": "embedding.norm.bias",
    "position_embeddings.local_embeddings.weight": "embedding.position_embeddings.weight",
    "word_embeddings.weight": "embedding.word_embeddings.weight",
    "position_embeddings.weight": "embedding.position_embeddings.weight",
    "tokentype_embeddings.weight": "embedding.tokentype_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "weight": "final_layernorm.weight",
    "bias": "final_layernorm.bias",
}
"""A pipeline's layers other than transformer layers."""


def is_deepspeed(path: Path) -> bool:
    """Whether these are files of DeepSpeed."""
    return any(path.glob("*_model_states.pt")) or (path / "zero").is_dir()


def read_deepspeed(path: Path, model_type: ModelType) -> Source:
    """Open all files of one step.

    Raises: CheckpointError
    """
    ranks = {int(m[1]): file for file in sorted(path.iterdir()) if (m := _RANK.fullmatch(file.name))}
    if not ranks:
        raise _without_options(path)
    first = ranks[min(ranks)]
    options = load_pickled(first)
    args = SavedArgs(options.get("args"), first)
    tp = args.get(int, "tensor_model_parallel_size", "model_parallel_size") or 1
    order = _qkv_order(args)
    if (path / "zero").is_dir():
        pieces = _universal(path / "zero", model_type, tp, order)
    elif any(_LAYER.fullmatch(file.name) for file in path.iterdir()):
        pieces = _pipeline(path, args, tp)
    else:
        pieces = _in_one_piece(path, ranks, options, model_type, tp)
    info, iteration = options.get("universal_checkpoint_info"), options.get("iteration")
    true_size = info.get("original_vocab_size") if isinstance(info, Mapping) else None
    return Source(
        path=path,
        args=args,
        iteration=iteration if type(iteration) is int else 0,
        pieces=pieces,
        qkv=order,
        kv="group",
        vocab_size=true_size if type(true_size) is int else None,
    )


def _without_options(path: Path) -> CheckpointError:
    if any(path.glob("*zero_pp_rank_*_model_states.pt")):
        fix = "make it universal first, with DeepSpeed's ds_to_universal.py, and load that"
        return CheckpointError(str(path), "weights cut up by ZeRO-3", "ZeRO-0, 1 or 2, or a universal checkpoint", fix)
    return broken(path / "mp_rank_00_model_states.pt", "no such file")


def _qkv_order(args: SavedArgs) -> Order:
    heads = args.size("num_attention_heads")
    grouped = (args.get(int, "num_key_value_heads") or heads) != heads
    return "part" if "ds_sequence_parallel_fpdt" in args and not grouped else "group"


def _in_one_piece(
    path: Path, ranks: Mapping[int, Path], first: Mapping[str, Any], model_type: ModelType, tp: int
) -> Pieces:
    collector, chunk = Collector(model_type), []
    for rank in range(max(tp, 1 + max(ranks))):
        file = path / f"mp_rank_{rank:02d}_model_states.pt"
        state = first if ranks.get(rank) == ranks[min(ranks)] else load_pickled(file)
        module = state.get("module")
        if not isinstance(module, Mapping):
            raise broken(file, "no key module with weights, and no layer_*-model_*-model_states.pt beside it")
        chunk.append((file, module))
    collector.add(chunk)
    return collector.pieces


def _pipeline(path: Path, args: SavedArgs, tp: int) -> Pieces:
    """Files in the order of their numbers; the first layer with an attention is layer 0."""
    found = {(int(m[1]), int(m[2])) for file in path.iterdir() if (m := _LAYER.fullmatch(file.name))}
    pieces: Pieces = {}
    first_layer: int | None = None
    for number in sorted({number for number, _ in found}):
        files = [path / f"layer_{number:02d}-model_{rank:02d}-model_states.pt" for rank in range(tp)]
        states = [dict(flatten(load_pickled(file))) for file in files]
        for file, state in zip(files, states, strict=True):
            if state.keys() != states[0].keys():
                raise broken(file, "not the parameters that the other ranks of its group have")
        for name in states[0]:
            if not name.endswith("inv_freq"):
                if first_layer is None and name not in _OUTSIDE:
                    first_layer = number
                ours = _pipeline_name(files[0], number - (first_layer or 0), name)
                pieces.setdefault(ours, [state[name] for state in states])
    return pieces


def _pipeline_name(subject: Path, layer: int, name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    try:
        return f"layers.{layer}.{in_layer(name)}"
    except LookupError:
        fix = "load another model; this one is not supported"
        raise CheckpointError(str(subject), f"parameter {name}", "those of Megatron's GPT", fix) from None


def _universal(path: Path, model_type: ModelType, tp: int, order: Order) -> Pieces:
    """Whole tensors; rows in parts are still those of rank after rank, so they are cut into ranks again."""
    state = {str(file.parent.relative_to(path)): _fp32(file) for file in sorted(path.glob("*/fp32.pt"))}
    numbered = {int(name.split(".")[0]) for name in state if re.match(r"\d+\.\w+\.\w", name)}
    layers = {int(name.split(".")[0]) for name in state if re.match(r"\d+\.(self_)?attention\.", name)}
    if numbered and layers:
        pieces = {_universal_name(path, name, min(layers)): [tensor] for name, tensor in state.items()}
    else:
        collector = Collector(model_type)
        collector.add([(path, state)])
        pieces = collector.pieces
    if order == "part":
        for name, (whole, *_) in pieces.items():
            if "linear_qkv." in name:
                pieces[name] = list(whole.chunk(tp))
    return pieces


def _universal_name(path: Path, name: str, first_layer: int) -> str:
    outside = re.sub(r"^(tied_modules\.embed\.|\d+\.)", "", name)
    if outside in _OUTSIDE:
        return _OUTSIDE[outside]
    number, _, rest = name.partition(".")
    return _pipeline_name(path / name, int(number) - first_layer if number.isdigit() else 0, rest)


def _fp32(file: Path) -> torch.Tensor:
    value = load_pickled(file).get("param")
    if not isinstance(value, torch.Tensor):
        raise broken(file, "no tensor under the key param")
    return value

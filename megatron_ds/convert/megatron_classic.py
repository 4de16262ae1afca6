"""Megatron-LM's own files: iter_XXXXXXX/mp_rank_TT[_PPP]/model_optim_rng.pt, one per tensor and pipeline rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ds.convert.megatron_args import SavedArgs
from megatron_ds.convert.megatron_join import Order
from megatron_ds.convert.megatron_source import Collector, Source, broken
from megatron_ds.convert.unpickle import load_pickled
from megatron_ds.errors import CheckpointError
from megatron_ds.model.config import ModelType

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")


def read_classic(path: Path, model_type: ModelType) -> Source:
    """Open all files of one iteration.

    Raises: CheckpointError
    """
    named = _directories(path)
    first = load_pickled(named[min(named)])
    args = SavedArgs(first.get("args"), named[min(named)])
    tp = max(1 + max(t for _, t in named), args.get(int, "tensor_model_parallel_size", "model_parallel_size") or 1)
    pp = max(1 + max(p for p, _ in named), args.get(int, "pipeline_model_parallel_size") or 1)
    missing = [(p, t) for p in range(pp) for t in range(tp) if (p, t) not in named]
    if missing:
        name = f"mp_rank_{missing[0][1]:02d}" + (f"_{missing[0][0]:03d}" if pp > 1 else "")
        raise broken(
            path / name / FILE, f"no such file, nor {len(missing) - 1} more", f"files of tp {tp} x pp {pp} ranks"
        )
    states = {key: first if key == min(named) else load_pickled(file) for key, file in named.items()}
    collector = Collector(model_type)
    chunks = _chunk_names(named[min(named)], first)
    for chunk in chunks:
        for p in range(pp):
            collector.add([(named[p, t], _chunk(named[p, t], states[p, t], chunk)) for t in range(tp)])
    order = _order(named[min(named)], first)
    iteration = first.get("iteration")
    return Source(
        path=path,
        args=args,
        iteration=iteration if type(iteration) is int else 0,
        pieces=collector.pieces,
        qkv=order,
        kv=order,
        vocab_size=None,
    )


def _directories(path: Path) -> dict[tuple[int, int], Path]:
    """(pipeline rank, tensor rank) -> file."""
    found: dict[tuple[int, int], Path] = {}
    for directory in sorted(path.iterdir()):
        match = _RANK.fullmatch(directory.name)
        if match is None or not (directory / FILE).is_file():
            continue
        if match[3]:
            raise CheckpointError(
                str(directory), "experts in parallel", "a model without experts", "load another model"
            )
        found[int(match[2] or 0), int(match[1])] = directory / FILE
    if not found:
        raise broken(path, f"no mp_rank_00/{FILE}")
    return found


def _chunk_names(path: Path, state: Mapping[str, Any]) -> list[str]:
    """Keys of the virtual stages' states, in order."""
    if "model" in state:
        return ["model"]
    numbers = sorted(int(key[5:]) for key in state if isinstance(key, str) and re.fullmatch(r"model\d+", key))
    if not numbers or numbers != list(range(len(numbers))):
        raise broken(path, "no key model, nor model0, model1 ...")
    return [f"model{number}" for number in numbers]


def _chunk(path: Path, state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    chunk = state.get(name)
    if not isinstance(chunk, Mapping):
        raise broken(path, f"no key {name}", "the virtual stages of the other ranks")
    return chunk


def _order(path: Path, state: Mapping[str, Any]) -> Order:
    version = state.get("checkpoint_version", 0)
    orders: dict[float, Order] = {0: "part", 1.0: "last", 2.0: "group", 3.0: "group", 4.0: "group"}
    if type(version) not in (int, float) or version not in orders:
        raise CheckpointError(
            f"{path}, checkpoint_version", f"{version!r}"[:100], "0, 1.0, 2.0, 3.0 or 4.0", "load another"
        )
    return orders[version]

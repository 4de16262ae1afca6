"""Save: all ranks write their pieces to a staging directory, which rank 0 completes and renames; before, nothing shows.

    prepare   rank 0   sweep what a dead save left, make iter_0000100.tmp
    write     all      rank_00003.safetensors, down to the disk
    publish   rank 0   check that the boxes cover every tensor exactly once; index.json; rename; tracker

After each phase the ranks tell each other how it went, so that a full disk under one of them is the same fault on all.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint import layout
from megatron_ds.checkpoint.layout import Stored, StoredTensor
from megatron_ds.checkpoint.shard import DTYPE_NAMES, write_shard
from megatron_ds.errors import RunFault, UserError
from megatron_ds.parallel.collectives import gather_bytes
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Box, Piece


def save(directory: str | Path, iteration: int, pieces: Iterable[Piece], state: Mapping[str, Any], world: Axis) -> Path:
    """Write one checkpoint and make it visible at once; returns its directory.

    Over all ranks the pieces must hold every element of every tensor once; `state` is JSON and rank 0's is kept.
    Comm:   three all-gathers of bytes over world; the second carries the ranks' lists of boxes
    Raises: RunFault on all ranks if one of them could not write; what was saved before is untouched
    """
    parent, first = Path(directory), world.rank == 0
    _together(parent, world, lambda: _prepare(parent, iteration) if first else b"")
    lists = _together(parent, world, lambda: _write(layout.staging_path(parent, iteration), pieces, world.rank))
    _together(parent, world, lambda: _publish(parent, iteration, lists, state) if first else b"")
    return layout.final_path(parent, iteration)


def _together(parent: Path, world: Axis, work: Callable[[], bytes]) -> list[bytes]:
    """Do this rank's work; then every rank has every rank's answer, or every rank raises."""
    fault: Exception | None = None
    try:
        answer = b"+" + work()
    except Exception as error:
        fault, answer = error, b"-" + _one_line(error).encode()
    answers = gather_bytes(answer, world)
    failed = [rank for rank, text in enumerate(answers) if text[:1] == b"-"]
    if not failed:
        return [text[1:] for text in answers]
    if world.rank == 0:
        with suppress(OSError):
            layout.sweep(parent)
    if fault is not None and not isinstance(fault, (OSError, UserError)):
        raise fault
    raise RunFault(
        f"checkpoint in {parent}",
        found=f"rank {failed[0]}: {answers[failed[0]][1:].decode()}",
        expected="a directory with room in it, that all ranks see and may write to",
        fix="make room or choose another --save; earlier checkpoints are intact",
    ) from fault


def _one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return f"{error.subject}: {error.found}, not {error.expected}"
    return f"{type(error).__name__}: {error}"


def _prepare(parent: Path, iteration: int) -> bytes:
    parent.mkdir(parents=True, exist_ok=True)
    layout.sweep(parent)
    os.mkdir(layout.staging_path(parent, iteration))
    return b""


def _write(staging: Path, pieces: Iterable[Piece], rank: int) -> bytes:
    """Write one rank's file; returns its list of boxes as JSON."""
    counts: Counter[str] = Counter()
    tensors, boxes = [], []
    for piece in pieces:
        assert tuple(piece.tensor.shape) == piece.box.shape, f"{piece.name}: {piece.tensor.shape} in {piece.box}"
        assert piece.tensor.numel(), f"{piece.name}: an empty piece"
        key = f"{piece.name}#{counts[piece.name]}"
        counts[piece.name] += 1
        assert layout.TEXT.fullmatch(key), f"{key!r} is no name that can be loaded"
        tensors.append((key, piece.tensor))
        boxes.append((piece.name, piece.global_shape, DTYPE_NAMES[piece.tensor.dtype], key, *piece.box))
    name = layout.shard_name(rank)
    files = {name: write_shard(staging / name, tensors)} if tensors else {}
    return json.dumps({"files": files, "boxes": boxes}).encode()


def _merge(lists: Sequence[bytes]) -> tuple[dict[str, int], dict[str, StoredTensor]]:
    """All ranks' lists as one: sizes of the files and, by name, the tensors."""
    file_bytes: dict[str, int] = {}
    facts: dict[str, tuple[tuple[int, ...], str]] = {}
    boxes: dict[str, list[Stored]] = {}
    for rank, text in enumerate(lists):
        record = json.loads(text)
        file_bytes |= record["files"]
        for name, shape, dtype, key, start, extent in record["boxes"]:
            fact = (tuple(shape), dtype)
            assert facts.setdefault(name, fact) == fact, f"{name}: {fact} on rank {rank}, {facts[name]} before"
            box = Box(tuple(start), tuple(extent))
            boxes.setdefault(name, []).append(Stored(box, layout.shard_name(rank), key))
    tensors = {name: StoredTensor(*facts[name], tuple(boxes[name])) for name in sorted(boxes)}
    for name, tensor in tensors.items():
        covered = layout.covers_exactly(tensor.shape, (stored.box for stored in tensor.boxes))
        assert covered, f"{name} {tensor.shape}: a hole or an overlap in {[stored.box for stored in tensor.boxes]}"
    return file_bytes, tensors


def _publish(parent: Path, iteration: int, lists: Sequence[bytes], state: Mapping[str, Any]) -> bytes:
    file_bytes, tensors = _merge(lists)
    staging, final = layout.staging_path(parent, iteration), layout.final_path(parent, iteration)
    _write_durably(staging / layout.INDEX, layout.dump_index(iteration, state, file_bytes, tensors))
    _sync_directory(staging)
    layout.read_index(staging)  # what we publish can be read; files are missing when nodes do not share the directory
    aside = layout.aside_path(parent, iteration)
    if final.exists():
        os.rename(final, aside)
    os.rename(staging, final)
    _sync_directory(parent)
    _write_durably(parent / f"{layout.TRACKER}.tmp", str(iteration).encode())
    os.replace(parent / f"{layout.TRACKER}.tmp", parent / layout.TRACKER)
    _sync_directory(parent)
    with suppress(OSError):  # it is published; the next save sweeps again
        layout.sweep(parent)
    return b""


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

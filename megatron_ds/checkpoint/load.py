"""Load: fill pieces of any layout from the boxes of any other, reading only what overlaps.

All that can be wrong is found before the first value is written: names, shapes, dtypes, sizes and headers of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ds import log
from megatron_ds.checkpoint import layout
from megatron_ds.checkpoint.layout import FromTheFuture, Index, read_index
from megatron_ds.checkpoint.shard import DTYPES, damaged, locate, open_shard, read_box
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.spec import Box, Piece

__all__ = ["Found", "find", "holds_checkpoints", "load", "names", "read_index"]


@dataclass(frozen=True)
class Found:
    """A complete checkpoint in a directory."""

    path: Path
    iteration: int
    index: Index


class _Read(NamedTuple):
    """A box of a stored tensor and the view that it goes to."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box
    target: torch.Tensor


def holds_checkpoints(directory: str | Path) -> bool:
    """Whether anything was ever published there, damaged or not: a first run finds nothing."""
    parent = Path(directory)
    return (parent / layout.TRACKER).exists() or bool(layout.iterations(parent))


def find(directory: str | Path, step: int | None = None) -> Found:
    """The checkpoint of iteration `step`, or the one the tracker names, or (with a warning) the newest complete one.

    Raises: CheckpointError if there is none
    """
    parent = Path(directory)
    paths = layout.iterations(parent)
    if not paths:
        found = "no checkpoint" if parent.is_dir() else "not a directory" if parent.exists() else "no such directory"
        raise CheckpointError(f"{parent}", found, "a directory with iter_0000100 or the like", "correct --load")
    if step is not None:
        if step not in paths:
            listed = ", ".join(map(str, paths))
            raise CheckpointError(
                f"--ckpt-step {step}", f"no such iteration in {parent}", f"one of {listed}", "choose one"
            )
        return _open(paths[step], step)
    named = layout.read_tracker(parent)
    troubles = [] if named in paths else [f"{parent / layout.TRACKER} names no iteration that is there"]
    for iteration in sorted(paths, key=lambda i: (i == named, i), reverse=True):
        try:
            found_one = _open(paths[iteration], iteration)
        except FromTheFuture:
            raise
        except CheckpointError as error:
            troubles.append(f"{error.subject}: {error.found}, expected {error.expected}")
            continue
        if troubles:
            log.warn(f"loading iteration {iteration} instead of the latest: {'; '.join(troubles)}")
        return found_one
    fix = "restore one of them, or start anew in another directory"
    raise CheckpointError(f"{parent}", "; ".join(troubles), "at least one complete checkpoint", fix)


def _open(path: Path, iteration: int) -> Found:
    index = read_index(path)
    if index.iteration != iteration:
        raise damaged(
            path, f"an index of iteration {index.iteration}", f"iteration {iteration}, as the directory's name says"
        )
    return Found(path, iteration, index)


def names(index: Index) -> list[str]:
    """Names of all tensors, sorted."""
    return sorted(index.tensors)


def load(index: Index, wanted: Iterable[Piece]) -> None:
    """Fill the tensor of every wanted piece; floating-point values are converted to its dtype.

    Raises: CheckpointError, before anything is written unless the disk itself fails
    """
    pieces = list(wanted)
    _reject_misfits(index, pieces)
    reads = _plan(index, pieces)
    offsets = _locate_all(index, reads)
    with torch.no_grad():
        for name, of_file in reads.items():
            where = offsets[name]
            try:
                with open_shard(index.path / name) as file:
                    for read in sorted(of_file, key=lambda read: where[read.key]):
                        read_box(file, where[read.key], read.shape, read.dtype, read.box, read.target)
            except (OSError, EOFError) as error:
                raise damaged(
                    index.path / name, f"{error} (weights are now partly loaded)", "a readable file"
                ) from error


def _reject_misfits(index: Index, pieces: Sequence[Piece]) -> None:
    """One table of everything that the checkpoint lacks or holds differently."""
    lines: dict[str, str] = {}
    for piece in pieces:
        assert tuple(piece.tensor.shape) == piece.box.shape, f"{piece.name}: {piece.tensor.shape} in {piece.box}"
        stored = index.tensors.get(piece.name)
        shape, dtype = tuple(piece.global_shape), piece.tensor.dtype
        if stored is None:
            lines[piece.name] = f"{_dims(shape):>20} {'missing':>20}"
        elif stored.shape != shape:
            lines[piece.name] = f"{_dims(shape):>20} {_dims(stored.shape):>20}"
        elif DTYPES[stored.dtype] != dtype and not (DTYPES[stored.dtype].is_floating_point and dtype.is_floating_point):
            lines[piece.name] = f"{str(dtype).removeprefix('torch.'):>20} {stored.dtype:>20}"
    if not lines:
        return
    width = max(map(len, lines))
    table = [f"{'name':{width}} {'expected':>20} {'found':>20}"] + [f"{n:{width}} {lines[n]}" for n in sorted(lines)]
    others = sorted(index.tensors.keys() - {piece.name for piece in pieces})
    note = [f"not asked for here: {len(others)} tensors, such as {', '.join(others[:5])}"] if others else []
    raise CheckpointError(
        f"{index.path}",
        found=f"{len(lines)} tensors that do not fit\n" + "\n".join(f"      {line}" for line in table + note),
        expected="the tensors of the model that the flags describe",
        fix="give the model the flags it was saved with; if only optimizer state is missing, --no-load-optim",
    )


def _dims(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _plan(index: Index, pieces: Sequence[Piece]) -> dict[str, list[_Read]]:
    """What to read, file by file: the intersections of wanted and stored boxes."""
    reads: dict[str, list[_Read]] = {}
    for piece in pieces:
        tensor = index.tensors[piece.name]
        for stored in tensor.boxes:
            common = stored.box.intersect(piece.box)
            if common:
                start = tuple(a - b for a, b in zip(common.start, stored.box.start, strict=True))
                target = piece.tensor[common.slices(piece.box.start)]
                read = _Read(stored.key, stored.box.shape, DTYPES[tensor.dtype], Box(start, common.shape), target)
                reads.setdefault(stored.file, []).append(read)
    return reads


def _locate_all(index: Index, files: Iterable[str]) -> dict[str, dict[str, int]]:
    """Open each file once, check its header against the index, and learn where its keys lie."""
    expected: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {file: {} for file in files}
    for tensor in index.tensors.values():
        for stored in tensor.boxes:
            if stored.file in expected:
                expected[stored.file][stored.key] = (tensor.dtype, stored.box.shape)
    return {file: locate(index.path / file, index.file_bytes[file], keys) for file, keys in expected.items()}

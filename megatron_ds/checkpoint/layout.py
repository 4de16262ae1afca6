"""Names in a checkpoint directory, and the index: what is stored where.

    DIR/latest_checkpointed_iteration.txt     "100"
    DIR/iter_0000100/index.json               run state; shape and dtype of every tensor, and the boxes it is stored in
    DIR/iter_0000100/rank_00003.safetensors   the boxes that rank 3 of the saving run wrote
    DIR/iter_0000150.tmp/                     a save under way, or one that died
    DIR/iter_0000100.old/                     set aside while iteration 100 is replaced; stands in if that dies half-way

An index from disk is checked to the last field before anything follows from it. In full: docs/checkpoint_format.md.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ds.checkpoint.shard import DTYPES, damaged, strict_json
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.spec import Box

FORMAT = "megatron_ds.checkpoint"
VERSION = 1
INDEX = "index.json"
TRACKER = "latest_checkpointed_iteration.txt"
TEXT = re.compile(r"[!-~]{1,512}")
"""Names of tensors and keys."""

_INDEX_LIMIT_BYTES = 1 << 30
_MOST_DIMS = 8
_ITERATION = re.compile(r"iter_([0-9]{7,12})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class Stored(NamedTuple):
    """One box of a tensor and where its values lie."""

    box: Box
    file: str
    key: str


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor; its boxes cover it exactly once."""

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[Stored, ...]


@dataclass(frozen=True)
class Index:
    """All of a checkpoint except the values: run state (JSON), size of every file, where every tensor lies."""

    path: Path
    iteration: int
    state: Mapping[str, Any]
    file_bytes: Mapping[str, int]
    tensors: Mapping[str, StoredTensor]


class FromTheFuture(CheckpointError):
    """Written by a newer version of this package: intact, but not for us to read."""


def final_path(parent: Path, iteration: int) -> Path:
    """Directory of a complete checkpoint."""
    return parent / f"iter_{iteration:07d}"


def staging_path(parent: Path, iteration: int) -> Path:
    """Directory of a save under way."""
    return parent / f"iter_{iteration:07d}.tmp"


def aside_path(parent: Path, iteration: int) -> Path:
    """Directory of a checkpoint that is being replaced."""
    return parent / f"iter_{iteration:07d}.old"


def shard_name(rank: int) -> str:
    """File of one rank's boxes."""
    return f"rank_{rank:05d}.safetensors"


def iterations(parent: Path) -> dict[int, Path]:
    """Every published iteration and its directory, in order; one set aside counts where its successor never came."""
    found: dict[int, Path] = {}
    for path in sorted(parent.iterdir() if parent.is_dir() else (), reverse=True):  # X.old before X, which overrides it
        match = _ITERATION.fullmatch(path.name.removesuffix(".old"))
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def sweep(parent: Path) -> None:
    """Undo what a save that died has left: drop its staging, put back what it had set aside."""
    for path in list(parent.iterdir()):
        if not _ITERATION.fullmatch(path.stem):
            continue
        if path.suffix == ".tmp" or (path.suffix == ".old" and path.with_suffix("").exists()):
            shutil.rmtree(path)
        elif path.suffix == ".old":
            os.rename(path, path.with_suffix(""))


def read_tracker(parent: Path) -> int | None:
    """The iteration named by the tracker file; None if there is no such file or it holds something else."""
    try:
        with open(parent / TRACKER, "rb") as file:
            text = file.read(64).strip()
    except OSError:
        return None
    return int(text) if re.fullmatch(rb"[0-9]{1,12}", text) else None


def covers_exactly(shape: tuple[int, ...], boxes: Iterable[Box]) -> bool:
    """Whether every element of the shape lies in just one box, and nothing outside it lies in any.

    The mixed difference of a box's indicator function is +1 or -1 at its corners, 0 elsewhere, and determines the
    function: so the boxes sum to the whole if and only if the corners cancel. Linear in the number of boxes.
    """
    signs = [(-1) ** sum(ends) for ends in itertools.product((0, 1), repeat=len(shape))]
    left: dict[tuple[int, ...], int] = dict(zip(itertools.product(*((0, n) for n in shape)), signs, strict=True))
    for box in boxes:
        stop = map(operator.add, box.start, box.shape)
        for corner, sign in zip(itertools.product(*zip(box.start, stop, strict=True)), signs, strict=True):
            left[corner] = left.get(corner, 0) - sign
    return not any(left.values())


def dump_index(
    iteration: int, state: Mapping[str, Any], file_bytes: Mapping[str, int], tensors: Mapping[str, StoredTensor]
) -> bytes:
    """The text of index.json."""
    record = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": iteration,
        "state": state,
        "files": {name: {"bytes": size} for name, size in file_bytes.items()},
        "tensors": {
            name: {
                "shape": tensor.shape,
                "dtype": tensor.dtype,
                "boxes": [
                    {"file": stored.file, "key": stored.key, "start": stored.box.start, "shape": stored.box.shape}
                    for stored in tensor.boxes
                ],
            }
            for name, tensor in tensors.items()
        },
    }
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()


def read_index(path: str | Path) -> Index:
    """The index of one checkpoint directory, checked, with the sizes of the files beside it.

    Raises: CheckpointError
    """
    path = Path(path)
    record = _read_json(path / INDEX)
    where = f"{path / INDEX}"
    kind, version = _field(record, "format", str, where), _field(record, "version", int, where)
    if kind != FORMAT or version < 1:
        raise damaged(where, f"format {kind!a:.80}, version {version}", f"format {FORMAT!r}, version {VERSION}")
    if version > VERSION:
        fix = "update megatron_ds, or load an older iteration with --ckpt-step"
        raise FromTheFuture(where, f"format version {version}", f"at most version {VERSION}", fix)
    iteration = _field(record, "iteration", int, where)
    state = _field(record, "state", dict, where)
    files = _field(record, "files", dict, where)
    sizes = {name: _field(entry, "bytes", int, f"{where}: files: {name!a:.80}") for name, entry in files.items()}
    check_files(path, sizes)
    tensors, keys = {}, set[tuple[str, str]]()
    for name, entry in _field(record, "tensors", dict, where).items():
        tensor = tensors[name] = _tensor(entry, sizes, f"{where}: tensor {name!a:.80}")
        if not TEXT.fullmatch(name):
            raise damaged(where, f"tensor name {name!a:.80}", "1 to 512 printable ASCII characters")
        for stored in tensor.boxes:
            if (stored.file, stored.key) in keys:
                raise damaged(where, f"key {stored.key} of {stored.file} used twice", "every key used once")
            keys.add((stored.file, stored.key))
    return Index(path, iteration, state, sizes, tensors)


def _read_json(path: Path) -> Any:
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _INDEX_LIMIT_BYTES:
            raise damaged(
                path, f"no plain file, or {found.st_size} bytes", f"a file of at most {_INDEX_LIMIT_BYTES} bytes"
            )
        with open(path, "rb") as file:
            return strict_json(file.read(_INDEX_LIMIT_BYTES))
    except OSError as error:
        raise damaged(path, error.strerror or str(error), "the index of a complete checkpoint of megatron_ds") from None
    except ValueError as error:
        raise damaged(path, f"{error}"[:200], "JSON") from None


def _field(record: Any, key: str, kind: type, where: str) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not kind:  # a bool is no int here
        raise damaged(where, f"{key}: {value!a:.80}", f"{key} of JSON's kind for {kind.__name__}")
    return value


def check_files(path: Path, sizes: Mapping[str, int]) -> None:
    """Compare the files of a directory with the sizes they should have.

    Raises: CheckpointError for a name that is not plain, a file that is missing, linked or of another size
    """
    for name, size in sizes.items():
        if not _FILE_NAME.fullmatch(name):
            raise damaged(path / INDEX, f"file name {name!a:.80}", "a plain file name")
        try:
            found = os.lstat(path / name)
        except OSError as error:
            raise damaged(path / name, error.strerror or str(error), f"a file of {size} bytes") from None
        if not stat.S_ISREG(found.st_mode):
            raise damaged(path / name, "a link or another special file", f"a plain file of {size} bytes")
        if found.st_size != size or size < 8:
            raise damaged(path / name, f"{found.st_size} bytes", f"{size} bytes, and no fewer than 8")


def _tensor(entry: Any, sizes: Mapping[str, int], where: str) -> StoredTensor:
    shape, dtype = _ints(entry, "shape", where), _field(entry, "dtype", str, where)
    if min(shape, default=1) < 1 or len(shape) > _MOST_DIMS:
        raise damaged(where, f"shape {shape!a:.80}", f"at most {_MOST_DIMS} dims, none empty")
    if dtype not in DTYPES:
        raise damaged(where, f"dtype {dtype!a:.80}", f"one of {' '.join(DTYPES)}")
    boxes = tuple(_stored(box, shape, sizes, where) for box in _field(entry, "boxes", list, where))
    if not covers_exactly(shape, (stored.box for stored in boxes)):
        raise damaged(
            where, f"{len(boxes)} boxes with a hole or an overlap", f"boxes that cover {list(shape)} exactly once"
        )
    return StoredTensor(shape, dtype, boxes)


def _stored(entry: Any, shape: tuple[int, ...], sizes: Mapping[str, int], where: str) -> Stored:
    file, key = _field(entry, "file", str, where), _field(entry, "key", str, where)
    box = Box(_ints(entry, "start", where), _ints(entry, "shape", where))
    if not TEXT.fullmatch(key) or key == "__metadata__":
        raise damaged(where, f"key {key!a:.80}", "1 to 512 printable ASCII characters")
    if file not in sizes:
        raise damaged(where, f"file {file!a:.80}", "a name listed under files")
    fits = len(box.start) == len(box.shape) == len(shape) and all(
        start >= 0 and count >= 1 and start + count <= extent
        for start, count, extent in zip(box.start, box.shape, shape, strict=True)
    )
    if not fits:
        raise damaged(where, f"box {tuple(box)!a:.120}", f"a box inside {shape!a:.80}")
    return Stored(box, file, key)


def _ints(entry: Any, key: str, where: str) -> tuple[int, ...]:
    values = _field(entry, key, list, where)
    if not all(type(value) is int for value in values):
        raise damaged(where, f"{key}: {values!a:.80}", "a list of integers")
    return tuple(values)

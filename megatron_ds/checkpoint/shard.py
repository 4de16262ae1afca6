"""One safetensors file: written block by block, read box by box, never believed.

    8 bytes    length of the header, little-endian
    header     JSON: {key: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}, offsets count from its end
    data       the tensors' bytes, row-major, little-endian, without holes

Written by hand because pieces are often strided views or lie on another device: only one block is copied at a time.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.spec import Box

HEADER_LIMIT_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
_BLOCK_BYTES = 16 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def damaged(subject: Path | str, found: str, expected: str) -> CheckpointError:
    """The error for anything on disk that is not as we would have written it."""
    return CheckpointError(
        str(subject), found, expected, "load another iteration with --ckpt-step, or copy this one anew"
    )


def strict_json(raw: bytes) -> Any:
    """Parse JSON as the standard has it: UTF-8, no repeated key, no NaN.

    Raises: ValueError
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!a:.80} twice in one object")
    return record


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def write_shard(path: Path, tensors: Sequence[tuple[str, torch.Tensor]]) -> int:
    """Write tensors under unique keys, down to the disk; returns the size of the file in bytes."""
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())  # so that every tensor lies aligned
    header, end = {}, 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            for block in _blocks(tensor):
                file.write(_bytes_of(block))
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor in contiguous CPU blocks, in order; what already is contiguous and on the CPU is not copied."""
    rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    step = max(1, _BLOCK_BYTES // (math.prod(rows.shape[1:]) * rows.element_size()))
    for row in range(0, len(rows), step):
        yield rows[row : row + step].cpu().contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def open_shard(path: Path) -> io.FileIO:
    """Open for unbuffered reading; a symbolic link is not followed.

    Raises: OSError
    """
    return open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))


def locate(path: Path, size: int, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Where in the file each key's data begin, once the header says just what the index says: key -> (dtype, shape).

    Raises: CheckpointError for any difference
    """
    try:
        with open_shard(path) as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise damaged(path, f"{actual} bytes", f"{size} bytes")
            start = 8 + int.from_bytes(_read(file, 8), "little")
            if start > min(size, 8 + HEADER_LIMIT_BYTES):
                raise damaged(path, f"a header of {start - 8} bytes", f"at most {min(size - 8, HEADER_LIMIT_BYTES)}")
            header = strict_json(_read(file, start - 8))
    except (OSError, EOFError, ValueError) as error:
        raise damaged(path, f"a header that cannot be read: {error}", "a safetensors file") from None
    entries = {key: entry for key, entry in header.items() if key != "__metadata__"} if isinstance(header, dict) else {}
    if entries.keys() != expected.keys():
        key = min(entries.keys() ^ expected.keys())
        raise damaged(
            path, f"key {key!a:.80} only in {'the file' if key in entries else 'index.json'}", "the same keys"
        )
    for key, (dtype, shape) in expected.items():
        entry, nbytes = entries[key], math.prod(shape) * DTYPES[dtype].itemsize
        begin = _begin(entry)
        if begin is None or begin + nbytes > size - start:
            raise damaged(path, f"{key}: data_offsets outside the file", "offsets of two integers within it")
        if entry != {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}:
            raise damaged(
                path, f"{key}: {entry!a:.200}", f"{dtype} {list(shape)} in {nbytes} bytes, as index.json says"
            )
    return {key: start + int(entries[key]["data_offsets"][0]) for key in expected}


def _begin(entry: Any) -> int | None:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or not offsets or type(offsets[0]) is not int or offsets[0] < 0:
        return None
    return offsets[0]


def read_box(
    file: io.FileIO, offset: int, shape: tuple[int, ...], dtype: torch.dtype, box: Box, target: torch.Tensor
) -> None:
    """Copy one box of the tensor stored at `offset` into `target`, converting its dtype.

    What lies between the first and the last element of the box is read, in blocks: not a byte too many of rows and flat
    ranges, but whole rows of columns.
    Raises: OSError, EOFError
    """
    if not shape:
        shape, box, target = (1,), Box((0,), (1,)), target.view(1)
    strides = tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]
    step = max(1, _BLOCK_BYTES // (strides[0] * dtype.itemsize))
    for row in range(0, box.shape[0], step):
        block = target[row : row + step]
        first = sum(s * n for s, n in zip(box.start, strides, strict=True)) + row * strides[0]
        span = 1 + sum((n - 1) * stride for n, stride in zip(block.shape, strides, strict=True))
        file.seek(offset + first * dtype.itemsize)
        ready = block.is_cpu and block.dtype == dtype and block.is_contiguous() and span == block.numel()
        if ready:
            _fill(file, _bytes_of(block.detach()))
        else:
            buffer = torch.empty(span, dtype=dtype)
            _fill(file, _bytes_of(buffer))
            block.copy_(buffer.as_strided(block.shape, strides))


def _fill(file: io.FileIO, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            raise EOFError(f"the file ends {len(into) - done} bytes early")
        done += count


def _read(file: io.FileIO, count: int) -> bytes:
    buffer = bytearray(count)
    _fill(file, memoryview(buffer))
    return bytes(buffer)

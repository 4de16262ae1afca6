"""Datasets for tests, written byte by byte without the package's writer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CODES = {"uint16": 8, "int32": 4}


def write_pair(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> str:
    """One sequence per document; an empty document is a bound without a sequence."""
    return write_sentences(prefix, [[row] if len(row) else [] for row in documents], dtype)


def write_sentences(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16") -> str:
    """One sequence per sentence."""
    rows = [row for document in documents for row in document]
    size = np.dtype(dtype).itemsize
    bounds, offsets, offset = [0], [], 0
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    for row in rows:
        offsets.append(offset)
        offset += len(row) * size
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(rows), len(bounds))
    index += struct.pack(f"<{len(rows)}i", *map(len, rows))
    index += struct.pack(f"<{len(rows)}q", *offsets)
    index += struct.pack(f"<{len(bounds)}q", *bounds)
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(row, dtype).tobytes() for row in rows))
    return str(prefix)


def random_documents(rng: np.random.Generator, count: int, longest: int, vocab_size: int = 90) -> list[list[int]]:
    """Documents of 1 to `longest` tokens."""
    return [rng.integers(0, vocab_size, rng.integers(1, longest + 1)).tolist() for _ in range(count)]

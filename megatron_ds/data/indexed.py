"""Megatron's indexed dataset, read: token sequences in PREFIX.bin, where each one starts and ends in PREFIX.idx.

PREFIX.idx, little endian, nothing aligned; N sequences, D documents:

    bytes    0..8   4D 4D 49 44 49 44 58 00 00          "MMIDIDX", two zeros
    bytes   9..16   u64 version                         1
    byte       17   u8 code of the token type           1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
    bytes  18..25   u64 N
    bytes  26..33   u64 D + 1
    then            i32[N]      length of each sequence in tokens
    then            i64[N]      byte offset of each sequence in PREFIX.bin
    then            i64[D + 1]  first sequence of each document; the first is 0, the last is N

PREFIX.bin: the tokens, nothing else. A document without tokens has a bound and no sequence. For text a document is one
sequence, unless it was split into sentences.
Source: the layout that Megatron-LM, Megatron-DeepSpeed and GPT-NeoX share
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import mmap
import os
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
TOKEN_CODES = (1, 2, 3, 4, 5, 8)
_CHUNK = 1 << 22
_EDGE_BYTES = 1 << 20

Array = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that holds ids of a vocabulary: uint16 below 65500, else int32 (Megatron's rule)."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def idx_path(prefix: str) -> Path:
    """PREFIX.idx."""
    return Path(f"{prefix}.idx")


def bin_path(prefix: str) -> Path:
    """PREFIX.bin."""
    return Path(f"{prefix}.bin")


class IndexedDataset:
    """Reader of one .bin/.idx pair; everything the index says is checked against the files' sizes at birth.

    Raises: DataError for a missing file, or an index that is damaged or does not belong to its .bin
    """

    def __init__(self, prefix: str, mmap_bin: bool = True):
        self.prefix = prefix
        self._mmap_bin = mmap_bin
        _check_present(prefix)
        index = _map(idx_path(prefix))
        self.dtype, sequences, bounds = _read_header(idx_path(prefix), index)
        start = HEADER.size
        self.lengths: npt.NDArray[np.int32] = np.frombuffer(index, "<i4", sequences, start)
        self._offsets: npt.NDArray[np.int64] = np.frombuffer(index, "<i8", sequences, start + 4 * sequences)
        self.document_indices: npt.NDArray[np.int64] = np.frombuffer(index, "<i8", bounds, start + 12 * sequences)
        self.bin_bytes = bin_path(prefix).stat().st_size
        self.tokens = _check_lengths(self)
        self._index = index
        self._open_lock = threading.Lock()
        self._fd = -1
        self._bin: Array | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> Array:
        return self.read(sequence)

    def read(self, sequence: int, start: int = 0, count: int | None = None) -> Array:
        """`count` tokens of one sequence from token `start` on; all the rest without a count."""
        left = int(self.lengths[sequence]) - start
        count = left if count is None else count
        if start < 0 or not 0 <= count <= left:
            raise IndexError(f"tokens {start}..{start + count} of sequence {sequence} of {left + start} tokens")
        return self.read_at(int(self._offsets[sequence]) // self.dtype.itemsize + start, count)

    def read_at(self, first: int, count: int) -> Array:
        """`count` tokens of the whole .bin from token `first` on."""
        if self._bin is None and self._fd < 0:
            self._open_bin()
        if self._bin is not None:
            return self._bin[first : first + count]
        return _pread(self._fd, bin_path(self.prefix), first * self.dtype.itemsize, count, self.dtype)

    def _open_bin(self) -> None:
        """Opens late, so that a blend of thousands of files starts fast; once, whichever thread reads first."""
        with self._open_lock:
            if self._mmap_bin and self._bin is None:
                self._bin = np.frombuffer(_map(bin_path(self.prefix)), self.dtype)
            elif not self._mmap_bin and self._fd < 0:
                self._fd = os.open(bin_path(self.prefix), os.O_RDONLY)

    def document_of(self, sequence: int) -> int:
        """The document that a sequence belongs to."""
        return int(np.searchsorted(self.document_indices, sequence, side="right")) - 1

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest id, by reading the whole .bin; (0, -1) if it is empty."""
        low, high = 0, -1
        for _, ids in self._blocks():
            low, high = min(low, int(ids.min())), max(high, int(ids.max()))
        return low, high

    def first_id_outside(self, vocab_size: int) -> tuple[int, int] | None:
        """(sequence, id) of the first id that is not in [0, vocab_size)."""
        for first, ids in self._blocks():
            bad = (ids < 0) | (ids >= vocab_size)
            if bad.any():
                token = int(np.argmax(bad))
                offset = (first + token) * self.dtype.itemsize
                return int(np.searchsorted(self._offsets, offset, side="right")) - 1, int(ids[token])
        return None

    def _blocks(self) -> Iterator[tuple[int, Array]]:
        for first in range(0, self.tokens, _CHUNK):
            yield first, self.read_at(first, min(_CHUNK, self.tokens - first))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the whole index, the size of the .bin, and its first and last MiB: changes when the data do."""
        digest = hashlib.sha256(self._index)
        digest.update(struct.pack("<Q", self.bin_bytes))
        with open(bin_path(self.prefix), "rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, self.bin_bytes - _EDGE_BYTES))
            digest.update(file.read(_EDGE_BYTES))
        return digest.hexdigest()

    def __del__(self) -> None:
        if self.__dict__.get("_fd", -1) >= 0:
            os.close(self._fd)


def _check_present(prefix: str) -> None:
    index, data = idx_path(prefix), bin_path(prefix)
    found = [path.is_file() for path in (index, data)]
    if all(found):
        return
    if any(found):
        missing, other = (index, data) if found[1] else (data, index)
        raise DataError(
            str(missing),
            found=f"no such file, though {other.name} is there",
            expected="a .bin and an .idx of one name",
            fix="copy the missing half, or preprocess again",
        )
    hint = (
        "leave the ending off" if prefix.endswith((".bin", ".idx")) else "give the prefix that preprocess_data.py wrote"
    )
    raise DataError(
        f"data path {prefix!r}",
        found=f"neither {index.name} nor {data.name} in {index.parent.resolve()}",
        expected="the common prefix of a .bin and an .idx file",
        fix=f"{hint}, for example my-corpus_text_document",
    )


def _read_header(path: Path, index: mmap.mmap | bytes) -> tuple[np.dtype[Any], int, int]:
    """Token type, N and D + 1, refused before anything is sized by them."""
    head = bytes(index[: HEADER.size])
    if head[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        raise _damaged(
            path, f"magic {_hex(head[:8])}: the old TNTIDX format (--data-impl lazy or cached)", "the mmap format"
        )
    if head[: len(MAGIC)] != MAGIC:
        raise _damaged(
            path, f"magic {_hex(head[: len(MAGIC)]) or 'nothing: the file is empty'}", f"magic {_hex(MAGIC)} (MMIDIDX)"
        )
    if len(head) < HEADER.size:
        raise _damaged(path, f"{len(head)} bytes", f"a header of {HEADER.size} bytes")
    _, version, code, sequences, bounds = HEADER.unpack(head)
    if version != VERSION:
        raise _damaged(path, f"version {version}", f"version {VERSION}")
    if code not in DTYPES:
        raise _damaged(path, f"token type code {code}", f"one of {', '.join(map(str, DTYPES))}")
    if code not in TOKEN_CODES:
        raise _damaged(path, f"token type code {code} ({DTYPES[code].__name__})", "an integer type")
    least = HEADER.size + 12 * sequences + 8 * bounds
    # A tail of one byte per sequence holds the modes of a multimodal dataset, which text training does not need.
    if len(index) not in (least, least + sequences):
        raise _damaged(
            path,
            f"{len(index)} bytes, but {sequences} sequences and {bounds} document bounds",
            f"{least} bytes for these counts",
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, bounds


def _check_lengths(data: IndexedDataset) -> int:
    """Number of tokens, after the three tables are found to agree with each other and with the size of the .bin."""
    path, bounds, itemsize = idx_path(data.prefix), data.document_indices, data.dtype.itemsize
    first, last = (int(bounds[0]), int(bounds[-1])) if len(bounds) else (-1, -1)
    if (first, last) != (0, len(data)):
        found = f"document bounds from {first} to {last}" if len(bounds) else "no document bounds"
        raise _damaged(path, found, f"bounds from 0 to the number of sequences, {len(data)}")
    for low, chunk in chunks(bounds, overlap=1):
        if np.any(chunk[1:] < chunk[:-1]):
            raise _damaged(path, f"document bounds that fall, near document {low}", "bounds that never fall")
    tokens = 0
    for low, lengths in chunks(data.lengths):
        if lengths.min() < 0:
            bad = int(np.argmax(lengths < 0))
            raise _damaged(path, f"sequence {low + bad} with length {lengths[bad]}", "lengths >= 0")
        ends = tokens + np.cumsum(lengths, dtype=np.int64)
        if np.any(data._offsets[low : low + len(lengths)] != (ends - lengths) * itemsize):
            raise _damaged(
                path, f"byte offsets that do not follow from the lengths, near sequence {low}", "contiguous sequences"
            )
        tokens = int(ends[-1])
    if tokens * itemsize != data.bin_bytes:
        raise _wrong_size(data, tokens)
    return tokens


def _wrong_size(data: IndexedDataset, tokens: int) -> DataError:
    path, itemsize = bin_path(data.prefix), data.dtype.itemsize
    found = f"{data.bin_bytes} bytes"
    expected = f"{tokens * itemsize} bytes: {tokens} tokens of {itemsize} bytes, as {idx_path(data.prefix).name} says"
    with_tokens = int(np.count_nonzero(np.diff(data.document_indices)))
    if data.bin_bytes == (tokens + with_tokens) * itemsize:
        return DataError(
            str(path),
            found=f"{found}: one token more per document ({with_tokens} documents) than the index knows of",
            expected=expected,
            fix="Megatron-DeepSpeed's --append-eod fault, documents drift: preprocess again with our tool",
        )
    what = "truncated or not yet fully copied" if data.bin_bytes < tokens * itemsize else "too long"
    return DataError(
        str(path), found=f"{found} ({what})", expected=expected, fix="copy the pair again, or preprocess again"
    )


def _damaged(path: Path, found: str, expected: str) -> DataError:
    return DataError(str(path), found=found, expected=expected, fix="preprocess again with tools/preprocess_data.py")


def _hex(data: bytes) -> str:
    return data.hex(" ").upper()


def chunks(values: Array, overlap: int = 0) -> Iterator[tuple[int, Array]]:
    """Pieces of a table that fit in a cache, each with the row of its first element."""
    for low in range(0, len(values), _CHUNK):
        yield low, values[low : low + _CHUNK + overlap]


def _map(path: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as exc:
        fix = "raise the limit of open files, ulimit -n" if exc.errno == errno.EMFILE else ""
        raise DataError(str(path), found=str(exc), expected="a file that can be mapped", fix=fix) from exc


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files to the hard one: each mapped file holds one, and a blend has thousands."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _pread(fd: int, path: Path, offset: int, count: int, dtype: np.dtype[Any]) -> Array:
    parts, left = [], count * dtype.itemsize
    while left:
        part = os.pread(fd, left, offset)
        if not part:
            raise DataError(
                str(path), found=f"the end of the file at byte {offset}", expected="the size it had at start"
            )
        parts.append(part)
        left, offset = left - len(part), offset + len(part)
    return np.frombuffer(b"".join(parts), dtype)

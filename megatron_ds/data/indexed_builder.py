"""Megatron's indexed dataset, written: the layout is described in indexed.py."""

from __future__ import annotations

import array
import contextlib
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_ds.data.indexed import DTYPES, HEADER, MAGIC, VERSION, Array, IndexedDataset, bin_path, chunks, idx_path
from megatron_ds.data.sidecar import Sidecar, check_replaceable, sidecar_path
from megatron_ds.errors import DataError


class IndexedDatasetBuilder:
    """Writer of one pair, under temporary names until `finalize`; leaving its `with` removes what was not finalized.

    Raises: DataError for a token that the type cannot hold, or a file that cannot be written
    """

    def __init__(self, prefix: str, dtype: npt.DTypeLike):
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.max_token_id = -1
        self._code = next(code for code, kind in DTYPES.items() if np.dtype(kind) == self.dtype)
        self._lengths = array.array("i")
        self._bounds = array.array("q", [0])
        self._temporary = [Path(f"{path}.tmp-{os.getpid()}") for path in (bin_path(prefix), idx_path(prefix))]
        check_replaceable(prefix)

    @functools.cached_property
    def _file(self) -> BinaryIO:
        # Made on first use, which is within `with`: wherever SIGTERM strikes, what is there is removed.
        try:
            self._temporary[0].parent.mkdir(parents=True, exist_ok=True)
            return open(self._temporary[0], "wb")
        except OSError as exc:
            raise DataError("--output-prefix", found=str(exc), expected="a folder that can be written") from exc

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._bounds) - 1

    @property
    def sequences(self) -> int:
        """Sequences so far."""
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._file.tell() // self.dtype.itemsize

    def add_item(self, tokens: npt.ArrayLike) -> None:
        """One sequence of a document that `end_document` will close."""
        row = self._write(tokens)
        self._lengths.append(len(row))

    def end_document(self) -> None:
        """Close the document of the items added so far."""
        self._bounds.append(len(self._lengths))

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int]) -> None:
        """One document, its sequences end to end."""
        self.add_block(tokens, lengths, [len(lengths)])

    def add_block(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike, sequences_per_document: npt.ArrayLike) -> None:
        """Many documents, all their tokens end to end."""
        rows = np.asarray(lengths, np.int64)
        bounds = len(self._lengths) + np.cumsum(np.asarray(sequences_per_document, np.int64))
        values = self._write(tokens)
        if len(values) != rows.sum() or (len(rows) and rows.max() > np.iinfo(np.int32).max):
            raise ValueError(f"{len(values)} tokens for lengths that sum to {rows.sum()}")
        self._lengths.frombytes(rows.astype(np.int32).tobytes())
        self._bounds.frombytes(bounds.tobytes())

    def add_index(self, prefix: str) -> None:
        """All of another pair, which must be of the same token type."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(
                str(idx_path(prefix)),
                found=f"tokens of type {other.dtype.name}",
                expected=f"{self.dtype.name}, as in the pairs before it",
                fix="merge only what one tokenizer wrote",
            )
        self._bounds.frombytes((len(self._lengths) + other.document_indices[1:]).tobytes())
        self._lengths.frombytes(other.lengths.tobytes())
        with open(bin_path(prefix), "rb") as file:
            shutil.copyfileobj(file, self._file, 1 << 24)
        self.max_token_id = max(self.max_token_id, other.id_range()[1])

    def finalize(self, sidecar: Sidecar | None = None) -> None:
        """Write the index and give the files their names; the .idx last, for without it there is no dataset."""
        _sync_close(self._file)
        with open(self._temporary[1], "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, self._code, len(self._lengths), len(self._bounds)))
            lengths = np.frombuffer(self._lengths, np.int32)
            file.write(lengths.astype("<i4", copy=False).data)
            end = 0
            for _, chunk in chunks(lengths):
                ends = end + np.cumsum(chunk, dtype=np.int64)
                file.write(((ends - chunk) * self.dtype.itemsize).astype("<i8", copy=False).data)
                end = int(ends[-1])
            file.write(np.frombuffer(self._bounds, np.int64).astype("<i8", copy=False).data)
            _sync_close(file)
        idx_path(self.prefix).unlink(missing_ok=True)
        sidecar_path(self.prefix).unlink(missing_ok=True)
        self._temporary[0].rename(bin_path(self.prefix))
        if sidecar is not None:
            sidecar_path(self.prefix).write_text(sidecar.to_json())
        self._temporary[1].rename(idx_path(self.prefix))

    def discard(self) -> None:
        """Remove whatever is not finalized."""
        if "_file" in vars(self):
            self._file.close()
        for path in self._temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _write(self, tokens: npt.ArrayLike) -> Array:
        values = np.asarray(tokens, None if isinstance(tokens, np.ndarray) else np.int64)
        if len(values):
            low, high, kind = int(values.min()), int(values.max()), np.iinfo(self.dtype)
            if low < kind.min or high > kind.max:
                raise DataError(
                    f"token id {high if high > kind.max else low}", expected=f"an id that fits in {self.dtype.name}"
                )
            self.max_token_id = max(self.max_token_id, high)
        values = values.astype(self.dtype, copy=False)
        self._file.write(np.ascontiguousarray(values).data)
        return values


def _sync_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()

"""Do the ids in a dataset fit the tokenizer of this run? Found out before step 1, not by a device-side assert."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ds import log
from megatron_ds.data.indexed import IndexedDataset, bin_path
from megatron_ds.data.sidecar import Sidecar, read_sidecar, sidecar_path
from megatron_ds.errors import DataError

_MAX_SCAN_BYTES = 1 << 30
"""A larger .bin without a sidecar is not read through at start; its samples are checked as they are read."""


class TokenRows(Protocol):
    """Rows of tokens that belong to documents."""

    prefix: str

    def read(self, row: int, start: int = 0, count: int | None = None, /) -> npt.NDArray[Any]:
        """`count` tokens of a row from token `start` on; all the rest without a count."""
        ...

    def document_of(self, row: int, /) -> int:
        """The document that a row belongs to."""
        ...


def check_vocabulary(data: IndexedDataset, vocab_size: int, fingerprint: str | None) -> None:
    """Compare a dataset with the tokenizer, by its sidecar or else by its tokens.

    Raises: DataError for an id that is not in [0, vocab_size)
    """
    sidecar = read_sidecar(data.prefix)
    if sidecar is not None and (sidecar.sequences, sidecar.tokens) != (len(data), data.tokens):
        log.warn(f"{sidecar_path(data.prefix)} was written for another dataset: not believed")
        sidecar = None
    if sidecar is not None:
        _compare_fingerprint(sidecar, data, fingerprint)
        fits = sidecar.max_token_id < vocab_size
    elif _cannot_exceed(data, vocab_size) or data.bin_bytes > _MAX_SCAN_BYTES:
        fits = True
    else:
        low, high = data.id_range()
        fits = low >= 0 and high < vocab_size
    if not fits:
        found = data.first_id_outside(vocab_size)
        sequence, token = found if found is not None else (0, sidecar.max_token_id if sidecar else -1)
        raise token_error(data, sequence, token, vocab_size)


def check_tokens(tokens: npt.NDArray[Any], data: TokenRows, rows: Iterable[int], vocab_size: int) -> None:
    """Refuse a sample, read from these rows, with an id that the model has no embedding for.

    Raises: DataError for an id that is not in [0, vocab_size)
    """
    if not len(tokens) or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return
    for row in rows:
        ids = data.read(row)
        bad = (ids < 0) | (ids >= vocab_size)
        if bad.any():
            raise token_error(data, row, int(ids[np.argmax(bad)]), vocab_size)
    raise AssertionError("the sample has a wrong id but its rows have none")


def token_error(data: TokenRows, sequence: int, token: int, vocab_size: int) -> DataError:
    """What to say of an id that the model has no embedding for."""
    return DataError(
        str(bin_path(data.prefix)),
        found=f"token id {token} in document {data.document_of(sequence)}",
        expected=f"ids from 0 to {vocab_size - 1} (vocabulary of {vocab_size})",
        fix="give the tokenizer flags that the data were preprocessed with, or preprocess them again",
    )


def _compare_fingerprint(sidecar: Sidecar, data: IndexedDataset, fingerprint: str | None) -> None:
    if fingerprint is not None and fingerprint != sidecar.tokenizer_fingerprint:
        log.warn(
            f"{data.prefix} was written by another tokenizer ({sidecar.tokenizer_type}, vocabulary of "
            f"{sidecar.vocab_size}) than this run's: its ids mean other text"
        )


def _cannot_exceed(data: IndexedDataset, vocab_size: int) -> bool:
    kind = np.iinfo(data.dtype)
    return kind.min >= 0 and kind.max < vocab_size

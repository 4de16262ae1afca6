"""Index arrays against the definition written as slow loops."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from megatron_ds.data import index_map
from megatron_ds.data.index_map import build_index_map, plan_epochs


def slow_index(
    lengths: list[int], begin: int, end: int, seq: int, wanted: int | None, seed: int
) -> tuple[list[int], list[tuple[int, int]], list[int], bool]:
    """Documents, sample starts, shuffle, and whether the last epoch is apart, one document at a time."""
    tokens = sum(lengths[begin:end])
    epochs = 1
    while wanted is not None and (epochs * tokens - 1) // seq < wanted:
        epochs += 1
    separate, before_last = False, 0
    if epochs > 1:
        assert wanted is not None
        before_last = ((epochs - 1) * tokens - 1) // seq
        separate = wanted - before_last < int(0.80 * ((tokens - 1) // seq))
    rng = np.random.RandomState(seed)
    documents: list[int] = []
    for copies in (epochs - 1, 1) if separate else (epochs,):
        part = np.array([d for _ in range(copies) for d in range(begin, end)], np.int32)
        rng.shuffle(part)
        documents += part.tolist()
    total = (epochs * tokens - 1) // seq
    starts, row, offset = [(0, 0)], 0, 0
    for _ in range(total):
        missing = seq + 1
        while missing > 0:
            left = lengths[documents[row]] - offset
            if missing <= left:
                offset, missing = offset + missing - 1, 0
            else:
                missing, row, offset = missing - left, row + 1, 0
        starts.append((row, offset))
    shuffle: list[int] = []
    for low, high in ((0, before_last), (before_last, total)) if separate else ((0, total),):
        piece = np.arange(low, high, dtype=np.int64)
        rng.shuffle(piece)
        shuffle += piece.tolist()
    return documents, starts, shuffle, separate


def test_random_cases_equal_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 small cases, several epochs, empty sequences among them, chunks smaller than the data."""
    rng = np.random.default_rng(0)
    separate, epochs_seen = 0, set()
    for case in range(300):
        monkeypatch.setattr(index_map, "_CHUNK", int(rng.integers(1, 50)))
        count = int(rng.integers(1, 30))
        lengths = rng.integers(0, int(rng.integers(1, 20)), count, dtype=np.int32, endpoint=True)
        begin = int(rng.integers(0, count))
        end = int(rng.integers(begin + 1, count + 1))
        if lengths[begin:end].sum() == 0:
            continue
        seq = int(rng.integers(1, 40))
        wanted = None if case % 7 == 0 else int(rng.integers(1, 60))
        found = build_index_map(lengths, begin, end, seq, wanted, case)
        documents, starts, shuffle, apart = slow_index(lengths.tolist(), begin, end, seq, wanted, case)
        assert found.documents.tolist() == documents, case
        assert list(map(tuple, found.samples.tolist())) == starts, case
        assert found.shuffle.tolist() == shuffle and len(found) >= (wanted or 0), case
        separate += apart
        epochs_seen.add(len(documents) // (end - begin))
    assert separate > 10 and len(epochs_seen) > 5


def test_samples_hold_the_row_of_tokens() -> None:
    """Cutting at the starts gives the row's tokens [j s, j s + s], with one token shared."""
    lengths = np.array([3, 5, 1, 4], np.int32)
    found = build_index_map(lengths, 0, 4, 4, None, 7)
    row = np.concatenate([[(doc, token) for token in range(lengths[doc])] for doc in found.documents])
    starts: npt.NDArray[np.int64] = np.array([(found.documents[d], token) for d, token in found.samples])
    assert starts.tolist() == row[::4][: len(found) + 1].tolist() and len(found) == 3


def test_dtypes() -> None:
    small = build_index_map(np.array([4, 4], np.int32), 0, 2, 3, 5, 1)
    assert (small.documents.dtype, small.samples.dtype, small.shuffle.dtype) == (np.int32, np.int32, np.uint32)
    # A sequence longer than int32 can count, as an offset within a document must be able to say.
    wide = build_index_map(np.array([2**31 + 10], np.int64), 0, 1, 2**30, 2, 1)
    assert wide.samples.dtype == np.int64 and wide.samples.tolist() == [[0, 0], [0, 2**30], [0, 2**31]]


def test_last_epoch_apart_below_80_percent() -> None:
    """101 tokens, 10 samples an epoch: of 20 samples in two epochs, 17 leave 7 for the last one, 18 leave 8."""
    assert plan_epochs(101, 10, 17).first_samples == 10
    assert plan_epochs(101, 10, 18).first_samples == 20
    assert plan_epochs(101, 10, 10).epochs == 1 and plan_epochs(101, 10, 11).epochs == 2

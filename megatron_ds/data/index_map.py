"""Which tokens are sample i: the document, sample and shuffle index of a GPT dataset.

The documents of a split, repeated for e epochs and shuffled, are read as one long row of tokens. Sample j is its tokens
[j s, j s + s]: s + 1 of them, the last one shared with the next sample. Item i of the dataset is sample shuffle[i].

Whole epochs are shuffled together, but a last epoch of which less than 80 % is needed is shuffled apart and comes
last, so that no document is seen for the e-th time before all have been seen e - 1 times. Without shuffling, documents
and samples stay in the order of the files.
Source: Megatron-Core's GPT dataset; same seed, same arrays
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_LAST_EPOCH_SHARE = 0.80
_CHUNK = 1 << 20

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are repeated, and how the samples fall into epochs."""

    epochs: int
    samples: int
    """Whole samples in all epochs; at least as many as were asked for."""
    first_samples: int
    """Samples that are shuffled together; the rest, if any, belong to a last epoch that is shuffled apart."""

    @property
    def separate_last(self) -> bool:
        """Whether the last epoch is shuffled apart."""
        return self.first_samples < self.samples


@dataclass(frozen=True)
class IndexMap:
    """The three arrays; `samples[j]` is (row of `documents`, token in that document) where sample j starts."""

    documents: Array
    samples: Array
    shuffle: Array

    def __len__(self) -> int:
        return len(self.shuffle)


def plan_epochs(tokens: int, seq_length: int, samples: int | None) -> EpochPlan:
    """Least number of epochs of `tokens` tokens that give `samples` samples; one epoch where none are asked for."""
    epochs = 1 if samples is None else max(1, -(-(samples * seq_length + 1) // tokens))
    total = (epochs * tokens - 1) // seq_length
    if epochs == 1 or samples is None:
        return EpochPlan(epochs, total, total)
    before_last = ((epochs - 1) * tokens - 1) // seq_length
    per_epoch = (tokens - 1) // seq_length
    separate = samples - before_last < int(_LAST_EPOCH_SHARE * per_epoch)
    return EpochPlan(epochs, total, before_last if separate else total)


def build_index_map(
    lengths: Array, begin: int, end: int, seq_length: int, samples: int | None, seed: int, shuffle: bool = True
) -> IndexMap:
    """The index of sequences [begin, end) of a dataset with these sequence lengths.

    Shapes: documents [epochs (end - begin)], samples [S + 1, 2], shuffle [S]
    """
    tokens = int(np.sum(lengths[begin:end], dtype=np.int64))
    plan = plan_epochs(tokens, seq_length, samples)
    rng = np.random.RandomState(seed) if shuffle else None
    documents = _document_index(begin, end, plan, rng)
    starts = _sample_index(lengths, documents, seq_length, plan.samples)
    return IndexMap(documents, starts, _shuffle_index(plan, rng))


def _document_index(begin: int, end: int, plan: EpochPlan, rng: np.random.RandomState | None) -> Array:
    once = np.arange(begin, end, dtype=np.int32 if end <= np.iinfo(np.int32).max else np.int64)
    if rng is None:
        return np.tile(once, plan.epochs)
    if not plan.separate_last:
        documents = np.tile(once, plan.epochs)
        rng.shuffle(documents)
        return documents
    first = np.tile(once, plan.epochs - 1)
    rng.shuffle(first)
    rng.shuffle(once)
    return np.concatenate((first, once))


def _sample_index(lengths: Array, documents: Array, seq_length: int, samples: int) -> Array:
    """Where tokens 0, s, 2s ... S s of the row lie, found chunk by chunk among the documents' ends."""
    largest = max(len(documents), int(lengths.max(initial=0)))
    starts = np.zeros((samples + 1, 2), np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    filled, end = 0, 0
    for low in range(0, len(documents), _CHUNK):
        sizes = lengths[documents[low : low + _CHUNK]]
        ends = end + np.cumsum(sizes, dtype=np.int64)
        end = int(ends[-1])
        stop = min(samples + 1, -(-end // seq_length))
        tokens = np.arange(filled, stop, dtype=np.int64) * seq_length
        rows = np.searchsorted(ends, tokens, side="right")
        starts[filled:stop, 0] = low + rows
        starts[filled:stop, 1] = tokens - (ends - sizes)[rows]
        filled = stop
    # Token 0 lies in the first document with tokens; Megatron says the first document, which reads the same.
    starts[0] = 0
    return starts


def _shuffle_index(plan: EpochPlan, rng: np.random.RandomState | None) -> Array:
    kind = np.uint32 if plan.samples < np.iinfo(np.uint32).max - 1 else np.int64
    shuffle = np.arange(plan.samples, dtype=kind)
    if rng is None:
        return shuffle
    rng.shuffle(shuffle[: plan.first_samples])
    if plan.separate_last:
        rng.shuffle(shuffle[plan.first_samples :])
    return shuffle

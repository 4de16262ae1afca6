"""Which sentences are sample i of BERT and T5: (first sentence, one past the last, tokens to aim at).

Documents are walked in file order, epoch after epoch until there are enough samples. A sample takes sentences until it
has as many tokens as it aims at and at least `min_sentences`; what would leave a single sentence behind takes that too,
so the samples of a document tile it. Then all samples of all epochs are shuffled together.

Each target is one draw: 1 in round(1 / short_seq_prob) is short, the rest aim at `max_tokens`. A document costs one
draw more than it has samples, so where its draws lie in the stream is known only after the document before it.
Source: Megatron-Core's build_mapping; same seed, same array
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.mt19937_64 import mt19937_64

LONG_SENTENCE_TOKENS = 512
"""A document of several sentences, one of them longer than this, is left out."""
_CHUNK_SENTENCES = 1 << 20
_DRAWS = 1 << 16

Array = npt.NDArray[Any]


def usable_documents(lengths: Array, bounds: Array, min_sentences: int) -> npt.NDArray[np.bool_]:
    """Which documents give samples; sentence lengths, and the documents' bounds among them.

    Shapes: bounds [D + 1] -> [D]
    """
    sentences = np.diff(bounds)
    long = np.concatenate(([0], np.cumsum(lengths[bounds[0] : bounds[-1]] > LONG_SENTENCE_TOKENS)))
    has_long = np.diff(long[bounds - bounds[0]]) > 0
    usable: npt.NDArray[np.bool_] = (sentences >= max(1, min_sentences)) & ~(has_long & (sentences > 1))
    return usable


def build_sentence_map(
    lengths: Array,
    bounds: Array,
    *,
    max_tokens: int,
    short_seq_prob: float,
    min_sentences: int,
    samples: int | None,
    seed: int,
    shuffle: bool = True,
) -> Array:
    """Whole epochs with at least `samples` samples, one epoch where None; some document must be usable.

    Shapes: lengths [N], bounds [D + 1] -> [samples or more, 3]
    """
    usable = np.flatnonzero(usable_documents(lengths, bounds, min_sentences))
    assert len(usable), "no epoch would ever give a sample"
    documents = np.stack((bounds[usable], bounds[usable + 1]), axis=1)
    targets = _targets(seed, max_tokens, short_seq_prob)
    kind = np.uint32 if len(lengths) <= np.iinfo(np.uint32).max else np.uint64
    parts, found = list[Array](), 0
    while not parts or found < (samples or 0):
        for chunk in _chunks(documents):
            parts.append(np.array(_walk(lengths, chunk, targets, min_sentences), kind).reshape(-1, 3))
            found += len(parts[-1])
    rows = np.concatenate(parts)
    return rows[_order(len(rows), seed + 1)] if shuffle else rows


def _targets(seed: int, max_tokens: int, short_seq_prob: float) -> Iterator[int]:
    """How many tokens the samples aim at, draw by draw."""
    # C rounds halves up, Python to even.
    ratio = math.floor(1.0 / short_seq_prob + 0.5) if short_seq_prob > 0 else 0
    draws = np.random.MT19937()
    draws._legacy_seeding(seed & 0xFFFFFFFF)
    while True:
        if not ratio:
            yield from [max_tokens] * _DRAWS
        else:
            drawn = draws.random_raw(_DRAWS).astype(np.int64)
            yield from np.where(drawn % ratio == 0, 2 + drawn % (max_tokens - 1), max_tokens).tolist()


def _chunks(documents: Array) -> Iterator[Array]:
    """Consecutive documents that span few sentences, or one that spans many."""
    low = 0
    while low < len(documents):
        high = int(np.searchsorted(documents[:, 1], documents[low, 0] + _CHUNK_SENTENCES, side="right"))
        high = max(high, low + 1)
        yield documents[low:high]
        low = high


def _walk(lengths: Array, documents: Array, targets: Iterator[int], min_sentences: int) -> list[int]:
    """The samples of some documents, flat: first, stop, target, first, stop, target ..."""
    base = int(documents[0, 0])
    before = np.concatenate(([0], np.cumsum(lengths[base : documents[-1, 1]], dtype=np.int64))).tolist()
    rows = list[int]()
    for first, last in (documents - base).tolist():
        target = next(targets)
        while first < last:
            stop = bisect_left(before, before[first] + target, first + 1, last)
            if stop < first + min_sentences:
                stop = first + min_sentences
            if stop >= last - 1:
                stop = last
            rows += (base + first, base + stop, target)
            first, target = stop, next(targets)
    return rows


def _order(count: int, seed: int) -> Array:
    """0 .. count - 1 as a Fisher-Yates shuffle from the end leaves them."""
    order = array("I" if count <= np.iinfo(np.uint32).max else "Q", range(count))
    high = count - 1
    for words in mt19937_64(seed):
        places = np.arange(high, max(high - len(words), 0), -1, dtype=np.uint64)
        others = (words[: len(places)] % (places + np.uint64(1))).tolist()
        for place, other in zip(range(high, 0, -1), others, strict=False):
            order[place], order[other] = order[other], order[place]
        high -= len(places)
        if high <= 0:
            break
    return np.array(order)

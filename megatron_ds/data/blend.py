"""Several datasets as one: which source, and which of its samples, is sample k of the blend.

    blend:  0.7 A  0.3 B          A B A A B A A A B A ...
    source sample                 0 0 1 2 1 3 4 5 2 6 ...

Sample k comes from the source that is furthest behind its share: the largest weight_d max(k, 1) - taken_d, the first of
equals. Each step needs the counts of the step before, but the counts forget where they started: they keep within a
few samples of weight_d k, and two different starts soon run into each other. So many segments run side by side from
guessed counts, and a segment whose guess turns out wrong runs again from the counts that its left neighbour ended
with, until all of them join. The first segment needs no guess, so the result is exact.
Source: Megatron-Core's rule; same weights and size, same indices
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ds.errors import ConfigError

_SEGMENT_SAMPLES = 4096
_SURPLUS = 0.005
"""Sources are built a little longer than their share, for the greedy rule may overshoot it."""

Array = npt.NDArray[Any]
Weights = npt.NDArray[np.float64]
Row = Any
"""What a dataset gives for one sample: an array of tokens (GPT), or a dict of arrays and numbers (BERT, T5)."""


class TokenDataset(Protocol):
    """Rows, one per sample; the same row number gives the same row."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, row: int, /) -> Row:
        """Row `row`."""
        ...


@dataclass(frozen=True)
class Blend:
    """What --data-path says: prefixes, and their weights where it gives any."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(words: Sequence[str], flag: str) -> Blend:
    """`w1 P1 w2 P2 ...` is weighted; an odd number of words, or words without numbers, are prefixes only.

    A weight of 0 leaves its prefix out.

    Raises: ConfigError for half-given, negative or all-zero weights
    """
    if len(words) % 2:
        return Blend(tuple(words), None)
    weights = [_number(word) for word in words[::2]]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return Blend(tuple(words), None)
    if len(given) < len(weights) or not all(math.isfinite(w) and w >= 0 for w in given) or sum(given) == 0:
        raise ConfigError(
            flag,
            found=" ".join(words),
            expected="w1 PREFIX1 w2 PREFIX2 ... with weights >= 0 that are not all 0, or prefixes only",
        )
    kept = [(prefix, weight) for prefix, weight in zip(words[1::2], given, strict=True) if weight > 0]
    return Blend(tuple(prefix for prefix, _ in kept), tuple(weight for _, weight in kept))


def normalize(weights: Sequence[float] | Weights) -> Weights:
    """Weights that sum to 1."""
    values = np.asarray(weights, np.float64)
    return values / np.sum(values)


def shares(weights: Weights, samples: int, surplus: float = 0.0) -> list[int]:
    """Samples that each source gives to a blend of `samples`; their sum is the length of the blend."""
    return [math.ceil(math.ceil(samples * float(weight)) * (1 + surplus)) for weight in weights]


def source_sizes(weights: Weights, samples: int, taken: Sequence[int]) -> list[int]:
    """Samples to build each source with: Megatron-Core's share and surplus, and never less than the blend takes."""
    return [max(share, count) for share, count in zip(shares(weights, samples, _SURPLUS), taken, strict=True)]


def build_blend_index(weights: Weights, size: int) -> dict[str, Array]:
    """`source` [size] int16 and `sample` [size] int64 of a blend of `size` samples."""
    source = _greedy(weights, size)
    # Sorted stably by source, the samples of one source are numbered 0, 1, 2 ...
    order = np.argsort(source, kind="stable")
    counts = np.bincount(source, minlength=len(weights))
    sample = np.empty(size, np.int64)
    sample[order] = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
    return {"source": source, "sample": sample}


class BlendedDataset:
    """Several datasets read through a blend index."""

    def __init__(self, datasets: Sequence[TokenDataset], index: dict[str, Array]):
        self.datasets = datasets
        self.source, self.sample = index["source"], index["sample"]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Row:
        return self.datasets[int(self.source[row])][int(self.sample[row])]


def _greedy(weights: Weights, size: int) -> npt.NDArray[np.int16]:
    """The greedy choice at each of `size` steps."""
    firsts = np.arange(0, size, _SEGMENT_SAMPLES)
    chosen = np.empty((len(firsts), _SEGMENT_SAMPLES), np.int16)
    starts = _guess_counts(weights, firsts)
    ends = np.empty_like(starts)
    wrong = np.arange(len(firsts))
    while len(wrong):
        chosen[wrong], ends[wrong] = _run_segments(weights, firsts[wrong], starts[wrong])
        wrong = 1 + np.flatnonzero((starts[1:] != ends[:-1]).any(axis=1))
        starts[wrong] = ends[wrong - 1]
    return chosen.reshape(-1)[:size]


def _guess_counts(weights: Weights, steps: Array) -> Weights:
    """Whole numbers near weight * step that sum to the step: floors, and one more for the largest remainders."""
    exact = weights * steps[:, None]
    counts = np.floor(exact)
    missing = np.rint(steps - counts.sum(axis=1))
    rank = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    guess: Weights = counts + (rank < missing[:, None])
    return guess


def _run_segments(weights: Weights, firsts: Array, starts: Weights) -> tuple[Array, Weights]:
    """One segment from each row of counts: the choices [segments, _SEGMENT_SAMPLES] and the counts after them."""
    chosen = np.empty((_SEGMENT_SAMPLES, len(firsts)), np.int16)
    taken, steps = starts.copy(), firsts.astype(np.float64)[:, None]
    flat, rows = taken.reshape(-1), np.arange(len(firsts)) * len(weights)
    behind = np.empty_like(taken)
    for step in range(_SEGMENT_SAMPLES):
        np.multiply(weights, np.maximum(steps, 1.0), out=behind)
        np.subtract(behind, taken, out=behind)
        source = behind.argmax(axis=1)
        flat[rows + source] += 1
        chosen[step] = source
        steps += 1
    return chosen.T, taken


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None

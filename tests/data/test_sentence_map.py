"""The sentence map, against the C++ loop written out step by step, and arrays that megatron-core 0.16.1 made."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from megatron_ds.data.mt19937_64 import mt19937_64
from megatron_ds.data.sentence_map import build_sentence_map, usable_documents
from tests.data.words import sentence_documents

M64 = 2**64 - 1


class Twister64:
    """The generator word by word, as its authors' C program."""

    def __init__(self, seed: int):
        self.state, self.place = [seed & M64], 312
        for i in range(1, 312):
            last = self.state[-1]
            self.state.append((6364136223846793005 * (last ^ (last >> 62)) + i) & M64)

    def __call__(self) -> int:
        if self.place == 312:
            self.place = 0
            for i in range(312):
                y = (self.state[i] & 0xFFFFFFFF80000000) | (self.state[(i + 1) % 312] & 0x7FFFFFFF)
                self.state[i] = self.state[(i + 156) % 312] ^ (y >> 1) ^ (0xB5026F5AA96619E9 if y & 1 else 0)
        x = self.state[self.place]
        self.place += 1
        x ^= (x >> 29) & 0x5555555555555555
        x ^= (x << 17) & 0x71D67FFFEDA60000
        x ^= (x << 37) & 0xFFF7EEE000000000
        return x ^ (x >> 43)


def by_the_loop(
    lengths: list[int],
    bounds: list[int],
    max_tokens: int,
    short_seq_prob: float,
    min_sentences: int,
    samples: int,
    seed: int,
) -> list[list[int]]:
    rng = np.random.RandomState(seed)
    ratio = int(1 / short_seq_prob + 0.5) if short_seq_prob else 0

    def target() -> int:
        if not ratio:
            return max_tokens
        drawn = int(rng.randint(0, 2**32, dtype=np.uint32))
        return 2 + drawn % (max_tokens - 1) if drawn % ratio == 0 else max_tokens

    rows: list[list[int]] = []
    while len(rows) < samples:
        for first, last in itertools.pairwise(bounds):
            remaining = last - first
            too_long = remaining > 1 and any(lengths[s] > 512 for s in range(first, last))
            if remaining < min_sentences or remaining == 0 or too_long:
                continue
            start, tokens, count, aim = first, 0, 0, target()
            for sentence in range(first, last):
                tokens, count, remaining = tokens + lengths[sentence], count + 1, remaining - 1
                if (tokens >= aim and remaining > 1 and count >= min_sentences) or remaining == 0:
                    rows.append([start, sentence + 1, aim])
                    start, tokens, count, aim = sentence + 1, 0, 0, target()
    draw = Twister64(seed + 1)
    for i in range(len(rows) - 1, 0, -1):
        j = draw() % (i + 1)
        rows[i], rows[j] = rows[j], rows[i]
    return rows


def flat(documents: list[list[list[int]]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    lengths = np.array([len(sentence) for document in documents for sentence in document], np.int32)
    return lengths, np.cumsum([0] + [len(document) for document in documents])


def test_twister_against_the_standard_and_word_by_word() -> None:
    """The C++ standard: the 10000th number of seed 5489 is 9981545732273789042."""
    assert int(next(mt19937_64(5489))[9999]) == 9981545732273789042
    small, slow = mt19937_64(77, block=200), Twister64(77)
    numbers = np.concatenate([next(small) for _ in range(5)]).tolist()
    assert numbers == [slow() for _ in numbers]


@pytest.mark.parametrize("case", range(12))
def test_as_the_loop(case: int) -> None:
    rng = np.random.default_rng(case)
    sentences = rng.integers(0, 12, 50)
    lengths = rng.integers(case % 3 and 1, (6, 60, 530)[case % 3], int(sentences.sum())).astype(np.int32)
    bounds = np.concatenate(([0], np.cumsum(sentences)))[case:]
    max_tokens, prob, least, samples = (3, 61, 509)[case // 4], (0.1, 0.4, 0.0)[case % 3], 1 + case % 2, 40 * case
    got = build_sentence_map(
        lengths,
        bounds,
        max_tokens=max_tokens,
        short_seq_prob=prob,
        min_sentences=least,
        samples=samples,
        seed=case + 1,
    )
    expected = by_the_loop(lengths.tolist(), bounds.tolist(), max_tokens, prob, least, max(1, samples), case + 1)
    assert got.tolist() == expected and got.dtype == np.uint32


def test_as_megatron_core() -> None:
    """Made by megatron-core 0.16.1: helpers.build_mapping, 2 epochs and 1 epoch of the same sentences."""
    lengths, bounds = flat(sentence_documents())
    assert len(lengths) == 169
    two = build_sentence_map(lengths, bounds, max_tokens=29, short_seq_prob=0.1, min_sentences=2, samples=83, seed=1234)
    assert two.shape == (83, 3)
    assert two[:4].tolist() == [[18, 21, 29], [108, 111, 29], [11, 13, 29], [85, 89, 29]]
    assert (np.arange(1, 84) @ two.astype(np.int64)).tolist() == [297950, 311313, 100439]
    one = build_sentence_map(lengths, bounds, max_tokens=20, short_seq_prob=0.4, min_sentences=1, samples=None, seed=7)
    assert one[:4].tolist() == [[163, 166, 14], [13, 16, 20], [136, 139, 20], [156, 158, 20]]
    assert (np.arange(1, 60) @ one.astype(np.int64)).tolist() == [147276, 152183, 30373]


def test_without_shuffling_the_samples_tile_the_documents() -> None:
    lengths, bounds = np.array([5, 5, 5, 5, 9, 9], np.int32), np.array([0, 4, 4, 6])
    rows = build_sentence_map(
        lengths, bounds, max_tokens=8, short_seq_prob=0, min_sentences=1, samples=4, seed=1, shuffle=False
    )
    # Two sentences reach 8; of the last document's two, the first would leave one behind.
    assert rows.tolist() == [[0, 2, 8], [2, 4, 8], [4, 6, 8]] * 2


def test_which_documents_are_usable() -> None:
    """A long sentence spoils a document of several, not one of a single sentence."""
    lengths, bounds = np.array([512, 1, 513, 1, 600, 3], np.int32), np.array([0, 2, 4, 5, 5, 6])
    assert usable_documents(lengths, bounds, 1).tolist() == [True, False, True, False, True]
    assert usable_documents(lengths, bounds, 2).tolist() == [True, False, False, False, False]
    assert usable_documents(lengths, bounds[1:3], 1).tolist() == [False]

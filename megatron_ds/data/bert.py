"""BERT's samples: two segments in the right or the wrong order, some of their words hidden.

    [CLS] the cat [MASK] [SEP] it purr ##ed [SEP] [PAD] ...      is_random 1 if the segments were swapped

Source: Devlin et al. 2019, arXiv:1810.04805; Lan et al. 2020, arXiv:1909.11942 (sentence order); draws as in Megatron
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.masking import Rng, choose_spans, draw_ngram, find_words, mask_budget
from megatron_ds.data.sentences import SentenceSamples
from megatron_ds.data.tokenizer import Tokenizer

Array = npt.NDArray[Any]
Row = dict[str, Any]

SPECIAL_TOKENS = 3
"""[CLS] and two [SEP]: a sample has so many tokens less for text, with one segment too."""


@dataclass(frozen=True)
class BertVocabulary:
    """What BERT's samples need of a tokenizer."""

    cls: int
    sep: int
    mask: int
    pad: int
    continuations: npt.NDArray[np.bool_]
    random_ids: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> BertVocabulary:
        """Raises: DataError for a vocabulary without one of the special tokens"""
        t = tokenizer
        return cls(t.cls, t.sep, t.mask, t.pad, t.continuations, t.random_ids)


class BertDataset:
    """Rows text, types, labels (-1: not asked), loss_mask, padding_mask (1: real), is_random and truncated.

    Shapes: arrays [s]
    """

    def __init__(
        self,
        samples: SentenceSamples,
        vocabulary: BertVocabulary,
        *,
        seq_length: int,
        seed: int,
        mask_prob: float,
        binary_head: bool,
    ):
        self.samples, self.vocabulary = samples, vocabulary
        self.seq_length, self.seed = seq_length, seed
        self.mask_prob, self.binary_head = mask_prob, binary_head

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Row:
        sentences, target = self.samples.read(row)
        rng = np.random.RandomState((self.seed + row) % 2**32)
        first, second, swapped = self._segments(sentences, rng)
        excess = len(first) + len(second) - target
        if excess > 0:
            first, second = trim(first, second, excess, rng)
        cls, sep = [self.vocabulary.cls], [self.vocabulary.sep]
        tokens = np.concatenate((cls, first, sep, *((second, sep) if len(second) else ()))).astype(np.int64)
        text, labels = self._mask(tokens, target, rng)
        return _row(text, labels, len(first) + 2, self.seq_length, self.vocabulary.pad) | {
            "is_random": int(swapped),
            "truncated": int(excess > 0),
        }

    def _segments(self, sentences: list[Array], rng: Rng) -> tuple[Array, Array, bool]:
        """Both segments and whether they were swapped; all in the first without a binary head."""
        nothing = sentences[0][:0]
        if not self.binary_head:
            return np.concatenate(sentences), nothing, False
        pivot = rng.randint(1, len(sentences)) if len(sentences) > 2 else 1
        before, after = np.concatenate(sentences[:pivot]), np.concatenate(sentences[pivot:])
        swapped = rng.random_sample() < 0.5
        return (after, before, True) if swapped else (before, after, False)

    def _mask(self, tokens: Array, target: int, rng: Rng) -> tuple[Array, Array]:
        """The tokens with some hidden, and as labels the hidden ones."""
        v, text, labels = self.vocabulary, tokens.copy(), np.full_like(tokens, -1)

        def hide(position: int) -> None:
            labels[position] = tokens[position]
            if rng.random_sample() < 0.8:
                text[position] = v.mask
            elif rng.random_sample() >= 0.5:
                text[position] = v.random_ids[rng.randint(0, len(v.random_ids))]

        words = find_words(tokens, v.continuations, (v.cls, v.sep))
        choose_spans(words, mask_budget(self.mask_prob, len(tokens), target), rng, draw_ngram, hide)
        return text, labels


def trim(first: Array, second: Array, excess: int, rng: Rng) -> tuple[Array, Array]:
    """Both segments with `excess` tokens less together.

    Token by token the longer one loses one, the second of equals, at its front or its back by one draw each: so first
    the difference goes, then both take turns.
    """
    front = rng.random_sample(excess) < 0.5
    difference = min(excess, abs(len(first) - len(second)))
    of_first = np.arange(excess) - difference & 1 == 1
    of_first[:difference] = len(first) > len(second)

    def cut(segment: Array, losses: Array) -> Array:
        return segment[np.count_nonzero(losses & front) : len(segment) - np.count_nonzero(losses & ~front)]

    return cut(first, of_first), cut(second, ~of_first)


def _row(text: Array, labels: Array, first_segment: int, seq_length: int, pad: int) -> Row:
    size, real = (0, seq_length - len(text)), len(text)
    places = np.arange(seq_length)
    labels = np.pad(labels, size, constant_values=-1)
    return {
        "text": np.pad(text, size, constant_values=pad),
        "types": ((places >= first_segment) & (places < real)).astype(np.int64),
        "labels": labels,
        "loss_mask": (labels >= 0).astype(np.int64),
        "padding_mask": (places < real).astype(np.int64),
    }


class MockBertDataset:
    """Random rows, the same for the same seed and row; no files."""

    def __init__(self, samples: int, seq_length: int, vocab_size: int, seed: int, mask_prob: float, binary_head: bool):
        self.samples, self.seq_length, self.vocab_size, self.seed = samples, seq_length, vocab_size, seed
        self.mask_prob, self.binary_head = mask_prob, binary_head

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, row: int) -> Row:
        rng = np.random.default_rng((self.seed, row))
        real = int(rng.integers(max(1, self.seq_length // 2), self.seq_length + 1))
        text, labels = rng.integers(0, self.vocab_size, (2, real))
        asked = rng.permutation(real) < max(1, round(self.mask_prob * real))
        first_segment = int(rng.integers(1, real + 1)) if self.binary_head else real
        return _row(text, np.where(asked, labels, -1), first_segment, self.seq_length, 0) | {
            "is_random": int(rng.integers(0, 2)) if self.binary_head else 0,
            "truncated": 0,
        }

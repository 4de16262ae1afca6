"""A vocabulary and documents of sentences for the tests of masked data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_ds.errors import DataError

VOCAB = 200


class FakeTokenizer:
    """Ids 0..5 are special, 100..149 continue a word, the last ones are sentinels; everything else begins a word."""

    name = "Fake"
    vocab_size = VOCAB
    pad, cls, sep, mask, bos, eos, eod = 0, 1, 2, 3, 4, 5, 5

    def __init__(self, sentinels: int = 40):
        self.sentinels = tuple(range(VOCAB - sentinels, VOCAB))
        self.continuations: npt.NDArray[np.bool_] = (np.arange(VOCAB) >= 100) & (np.arange(VOCAB) < 150)
        self.random_ids = np.arange(VOCAB)

    def fingerprint(self) -> str:
        return "fake"

    def tokenize(self, text: str) -> list[int]:
        raise NotImplementedError

    def tokenize_batch(self, texts: Sequence[str], bare: bool = False) -> list[list[int]]:
        raise NotImplementedError

    def detokenize(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


class TokenizerWithoutMask(FakeTokenizer):
    """As Tokenizer says of a special token that is not there."""

    @property
    def mask(self) -> int:  # type: ignore[override]
        raise DataError("vocab.txt", found="no [MASK]")


def sentence_documents(count: int = 40) -> list[list[list[int]]]:
    """Documents of 0 to 9 sentences of 1 to 12 tokens, the same on every machine without a random generator."""
    state, documents = 1, []

    def draw(values: int) -> int:
        nonlocal state
        state = state * 48271 % 2147483647
        return state % values

    for _ in range(count):
        documents.append([[6 + draw(144) for _ in range(1 + draw(12))] for _ in range(draw(10))])
    return documents

"""Two ways to look at a dataset whose documents are split into sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.vocabulary import check_tokens

Array = npt.NDArray[Any]


class SentenceSamples:
    """The sentences of each row of a sentence map, and how many tokens the row aims at.

    Raises: DataError when a row holds an id that is not in [0, vocab_size)
    """

    def __init__(self, data: IndexedDataset, rows: Array, vocab_size: int):
        self.data, self.rows, self.vocab_size = data, rows, vocab_size

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> tuple[list[Array], int]:
        """Sentences, and the target."""
        first, stop, target = self.rows[row].tolist()
        sentences = [self.data.read(sequence) for sequence in range(first, stop)]
        check_tokens(np.concatenate(sentences), self.data, range(first, stop), self.vocab_size)
        return sentences, target


class FlatDocuments:
    """The documents of a dataset, each as one row of tokens whatever its sentences are."""

    def __init__(self, data: IndexedDataset):
        self.data, self.prefix = data, data.prefix
        ends = np.concatenate(([0], np.cumsum(data.lengths, dtype=np.int64)))
        self._begins = ends[data.document_indices]
        self.lengths: npt.NDArray[np.int64] = np.diff(self._begins)

    def read(self, document: int, start: int = 0, count: int | None = None) -> Array:
        """`count` tokens of one document from token `start` on; all the rest without a count."""
        left = int(self.lengths[document]) - start
        return self.data.read_at(int(self._begins[document]) + start, left if count is None else count)

    def document_of(self, row: int) -> int:
        """The document that a row is."""
        return row

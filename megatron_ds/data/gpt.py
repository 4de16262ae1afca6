"""GPT's samples: seq_length + 1 tokens cut from the row of documents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_ds.data.index_map import IndexMap
from megatron_ds.data.vocabulary import TokenRows, check_tokens


class GPTDataset:
    """Rows of seq_length + 1 tokens, int64, read through an index map.

    Raises: DataError when a row holds an id that is not in [0, vocab_size)
    """

    def __init__(self, data: TokenRows, index: IndexMap, seq_length: int, vocab_size: int):
        self.data, self.index = data, index
        self.seq_length, self.vocab_size = seq_length, vocab_size

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        sample = int(self.index.shuffle[row])
        (first, start), (last, end) = self.index.samples[sample : sample + 2].tolist()
        sequences = self.index.documents[first : last + 1].tolist()
        tokens = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        for place, sequence in enumerate(sequences, first):
            begin = start if place == first else 0
            part = self.data.read(sequence, begin, end + 1 - begin if place == last else None)
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        check_tokens(tokens, self.data, sequences, self.vocab_size)
        return tokens


class MockGPTDataset:
    """Random tokens, the same for the same seed and row; no files."""

    def __init__(self, samples: int, seq_length: int, vocab_size: int, seed: int):
        self.samples, self.seq_length, self.vocab_size, self.seed = samples, seq_length, vocab_size, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, row))
        return rng.integers(0, self.vocab_size, self.seq_length + 1)

"""How documents are cut into samples: for GPT and the T5 paper's spans as a row of tokens, else by sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ds import log
from megatron_ds.data.blend import Array, TokenDataset
from megatron_ds.data.gpt import GPTDataset
from megatron_ds.data.index_cache import Arrays
from megatron_ds.data.index_map import IndexMap, build_index_map
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.sentence_map import LONG_SENTENCE_TOKENS, build_sentence_map, usable_documents
from megatron_ds.data.sentences import FlatDocuments, SentenceSamples
from megatron_ds.data.splits import Range
from megatron_ds.errors import DataError


@dataclass(frozen=True, kw_only=True)
class GPTCut:
    """Rows of seq_length + 1 tokens; each sequence of the .idx counts as a document, as in Megatron."""

    name: str = "gpt"
    seq_length: int
    vocab_size: int
    fingerprint: str | None
    seed: int
    shuffle: bool

    @property
    def least_tokens(self) -> int:
        """A row."""
        return self.seq_length + 1

    def documents(self, data: IndexedDataset) -> int:
        """Sequences."""
        return len(data)

    def tokens(self, data: IndexedDataset, found: Range) -> int:
        """Tokens of a range."""
        return int(data.lengths[slice(*found)].sum(dtype=np.int64))

    def check(self, data: IndexedDataset, found: Range, part: str) -> None:
        """Any token will do, repeated often enough."""

    def key(self) -> dict[str, Any]:
        """What the index depends on."""
        return {"seq_length": self.seq_length, "seed": self.seed, "shuffle": self.shuffle}

    def index(self, data: IndexedDataset, found: Range, samples: int | None) -> Arrays:
        """The index map's arrays."""
        return self.index_of(data.lengths, found, samples)

    def index_of(self, lengths: Array, found: Range, samples: int | None) -> Arrays:
        """The index map's arrays, by the documents' lengths."""
        return vars(build_index_map(lengths, *found, self.seq_length, samples, self.seed, self.shuffle))

    def dataset(self, data: IndexedDataset, index: Arrays) -> TokenDataset:
        """Rows of tokens."""
        return GPTDataset(data, IndexMap(**index), self.seq_length, self.vocab_size)

    def epochs(self, samples: int, tokens: int, index: Arrays) -> float:
        """By tokens."""
        return samples * self.seq_length / tokens


@dataclass(frozen=True, kw_only=True)
class TextCut(GPTCut):
    """As GPT's, but of documents whatever their sentences, and handed to `samples_of`."""

    name: str = "text"
    samples_of: Callable[[GPTDataset], TokenDataset]

    def documents(self, data: IndexedDataset) -> int:
        """Documents."""
        return len(data.document_indices) - 1

    def tokens(self, data: IndexedDataset, found: Range) -> int:
        """Tokens of a range."""
        return document_tokens(data, found)

    def index(self, data: IndexedDataset, found: Range, samples: int | None) -> Arrays:
        """The index map's arrays."""
        return self.index_of(FlatDocuments(data).lengths, found, samples)

    def dataset(self, data: IndexedDataset, index: Arrays) -> TokenDataset:
        """What the model makes of rows of tokens."""
        return self.samples_of(GPTDataset(FlatDocuments(data), IndexMap(**index), self.seq_length, self.vocab_size))


@dataclass(frozen=True, kw_only=True)
class SentenceCut:
    """Consecutive sentences of one document, up to about `max_tokens` tokens."""

    name: str = "sentences"
    seq_length: int
    vocab_size: int
    fingerprint: str | None
    seed: int
    shuffle: bool
    max_tokens: int
    min_sentences: int
    short_seq_prob: float
    samples_of: Callable[[SentenceSamples], TokenDataset]

    @property
    def least_tokens(self) -> int:
        """A usable document, which check() asks for, gives a sample."""
        return 1

    def documents(self, data: IndexedDataset) -> int:
        """Documents."""
        return len(data.document_indices) - 1

    def tokens(self, data: IndexedDataset, found: Range) -> int:
        """Tokens of a range."""
        return document_tokens(data, found)

    def check(self, data: IndexedDataset, found: Range, part: str) -> None:
        """Refuse a range that would give no sample in any number of epochs; say what is left out of the others.

        Raises: DataError
        """
        bounds = _bounds(data, found)
        usable = usable_documents(data.lengths, bounds, self.min_sentences)
        sentences = np.diff(bounds)
        single = int(np.count_nonzero(sentences == 1)) if self.min_sentences > 1 else 0
        long = int(np.count_nonzero(~usable & (sentences > 1)))
        reasons = {"of one sentence": single, f"with a sentence of more than {LONG_SENTENCE_TOKENS} tokens": long}
        left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        if not usable.any():
            raise self._unusable(data, part, left_out, bool(single))
        if left_out:
            log.info(f"{data.prefix}, {part}: of {len(usable)} documents these are left out: {left_out}")
        if int(sentences.max()) == 1 and self.tokens(data, found) > 2 * self.max_tokens * len(usable):
            log.warn(
                f"{data.prefix} is not split into sentences: of each document at most {self.max_tokens} tokens are "
                f"read, though it has {self.tokens(data, found) / len(usable):.0f} (see --split-sentences)"
            )

    def _unusable(self, data: IndexedDataset, part: str, left_out: str, single: bool) -> DataError:
        split = "preprocess again with tools/preprocess_data.py --split-sentences"
        return DataError(
            f"{data.prefix}, {part}",
            found=f"no usable document: {left_out}",
            expected=f"at least {self.min_sentences} sentence(s), none of more than {LONG_SENTENCE_TOKENS} tokens",
            fix=f"{split}, or give --bert-no-binary-head" if single else split,
        )

    def key(self) -> dict[str, Any]:
        """What the index depends on."""
        names = ("seed", "shuffle", "max_tokens", "min_sentences", "short_seq_prob")
        return {name: value for name, value in vars(self).items() if name in names}

    def index(self, data: IndexedDataset, found: Range, samples: int | None) -> Arrays:
        """The sentence map."""
        rows = build_sentence_map(
            data.lengths,
            _bounds(data, found),
            max_tokens=self.max_tokens,
            short_seq_prob=self.short_seq_prob,
            min_sentences=self.min_sentences,
            samples=samples,
            seed=self.seed,
            shuffle=self.shuffle,
        )
        return {"rows": rows}

    def dataset(self, data: IndexedDataset, index: Arrays) -> TokenDataset:
        """What the model makes of sentences."""
        return self.samples_of(SentenceSamples(data, index["rows"], self.vocab_size))

    def epochs(self, samples: int, tokens: int, index: Arrays) -> float:
        """By the first sentence, which begins one sample of each epoch."""
        first = index["rows"][:, 0]
        return samples / len(first) * int(np.count_nonzero(first == first.min()))


def document_tokens(data: IndexedDataset, found: Range) -> int:
    """Tokens of a range of documents."""
    bounds = data.document_indices[list(found)]
    return int(data.lengths[slice(*bounds.tolist())].sum(dtype=np.int64))


def _bounds(data: IndexedDataset, found: Range) -> Array:
    return data.document_indices[found[0] : found[1] + 1]

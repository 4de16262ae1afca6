"""T5's samples: spans of a text are cut out of the encoder's tokens, and the decoder writes them.

    encoder   thank you <0> me to your party <1> week
    decoder   [BOS] <0> for inviting <1> last               labels: the same one to the left, then [EOS]

Megatron's spans are runs of whole words of the sentences of one document. The paper's are runs of tokens that make up a
fixed share of as many tokens as fill the encoder, taken from a row of shuffled documents.
Source: Raffel et al. 2020, arXiv:1910.10683; Megatron's spans, and their draws, as in Megatron
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds.data.config import DataConfig
from megatron_ds.data.gpt import GPTDataset
from megatron_ds.data.masking import Span, choose_spans, draw_span, find_words, mask_budget, random_parts
from megatron_ds.data.sentences import SentenceSamples
from megatron_ds.data.tokenizer import Tokenizer

Array = npt.NDArray[Any]
Row = dict[str, Any]

SPARE_TOKENS = 2
"""Megatron leaves so many places of the encoder free."""
USUAL_SPAN_TOKENS = 3
"""Fewer than a span of Megatron's has on average (4.5 words), so a sample has not more spans than this makes of it."""


def first_token(config: DataConfig, tokenizer: Tokenizer) -> int:
    """What the decoder begins with: the paper's padding with the paper's spans, else Megatron's [BOS].

    Raises: DataError for a vocabulary without it
    """
    return tokenizer.pad if has_paper_spans(config) else tokenizer.bos


def has_paper_spans(config: DataConfig) -> bool:
    """Whether spans are the paper's: asked for by either of its numbers."""
    return config.noise_density is not None or config.mean_noise_span_length is not None


@dataclass(frozen=True)
class T5Format:
    """Lengths and special tokens; `start` begins the decoder's tokens, `end` its labels."""

    encoder_length: int
    decoder_length: int
    start: int
    end: int
    pad: int
    sentinels: tuple[int, ...]

    def row(self, tokens: list[int], spans: list[Span], encoder_end: tuple[int, ...] = ()) -> Row:
        """Rows text_enc, text_dec, labels (-1: padding), loss_mask, enc_mask and dec_mask (1: real).

        Shapes: text_enc and enc_mask [encoder_length], the others [decoder_length]
        """
        encoder, decoder, done = list[int](), list[int](), 0
        for sentinel, span in zip(self.sentinels, spans, strict=False):
            encoder += [*tokens[done : span[0]], sentinel]
            decoder += [sentinel, *(tokens[position] for position in span)]
            done = span[-1] + 1
        encoder += [*tokens[done:], *encoder_end]
        return self.padded(np.array(encoder), np.array([self.start, *decoder]), np.array([*decoder, self.end]))

    def padded(self, encoder: Array, decoder: Array, labels: Array) -> Row:
        """The row of these tokens."""
        loss_mask = _fill(np.ones_like(labels), self.decoder_length, 0)
        return {
            "text_enc": _fill(encoder, self.encoder_length, self.pad),
            "text_dec": _fill(decoder, self.decoder_length, self.pad),
            "labels": _fill(labels, self.decoder_length, -1),
            "loss_mask": loss_mask,
            "enc_mask": _fill(np.ones_like(encoder), self.encoder_length, 0),
            "dec_mask": loss_mask,
        }


def _fill(values: Array, length: int, filler: int) -> Array:
    return np.pad(values.astype(np.int64), (0, length - len(values)), constant_values=filler)


class T5Dataset:
    """Rows with Megatron's spans; no more of them than there are sentinels and places in the decoder."""

    def __init__(
        self,
        samples: SentenceSamples,
        form: T5Format,
        *,
        continuations: npt.NDArray[np.bool_],
        separators: tuple[int, ...],
        seed: int,
        mask_prob: float,
        max_spans: int,
    ):
        self.samples, self.form, self.seed = samples, form, seed
        self.continuations, self.separators = continuations, separators
        self.mask_prob, self.max_spans = mask_prob, max_spans

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Row:
        sentences, target = self.samples.read(row)
        rng = np.random.RandomState((self.seed + row) % 2**32)
        tokens = np.concatenate(sentences)[:target]
        words = find_words(tokens, self.continuations, self.separators)
        budget = mask_budget(self.mask_prob, len(tokens), target)
        spans = choose_spans(words, budget, rng, draw_span, max_spans=self.max_spans)
        return self.form.row(tokens.tolist(), spans)


@dataclass(frozen=True)
class SpanCounts:
    """How many of `tokens` tokens the paper's rule cuts out, in how many spans."""

    tokens: int
    noise: int
    spans: int

    @property
    def encoder_tokens(self) -> int:
        """What is left, a sentinel for each span, and the end."""
        return self.tokens - self.noise + self.spans + 1

    @property
    def decoder_tokens(self) -> int:
        """What is cut out, a sentinel for each span, and the end."""
        return self.noise + self.spans + 1


def span_counts(tokens: int, density: float, mean_length: float) -> SpanCounts:
    """The paper's counts for at least 2 tokens: something is cut out and something left."""
    noise = min(max(round(tokens * density), 1), tokens - 1)
    return SpanCounts(tokens, noise, min(max(round(noise / mean_length), 1), noise, tokens - noise))


def largest_counts(encoder_length: int, decoder_length: int, density: float, mean_length: float) -> SpanCounts | None:
    """The counts for the most tokens that fit both stacks; None where not even two do."""
    for tokens in range(encoder_length + decoder_length, 1, -1):
        counts = span_counts(tokens, density, mean_length)
        if counts.encoder_tokens <= encoder_length and counts.decoder_tokens <= decoder_length:
            return counts
    return None


class T5SpanDataset:
    """Rows with the paper's spans, drawn by (seed + row); `texts` has rows of at least `counts.tokens` tokens."""

    def __init__(self, texts: GPTDataset, form: T5Format, counts: SpanCounts, seed: int):
        self.texts, self.form, self.counts, self.seed = texts, form, counts, seed

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> Row:
        rng = np.random.RandomState((self.seed + row) % 2**32)
        counts = self.counts
        noise = random_parts(counts.noise, counts.spans, rng)
        kept = random_parts(counts.tokens - counts.noise, counts.spans, rng)
        stops = np.cumsum(noise + kept)
        spans = [list(range(stop - size, stop)) for stop, size in zip(stops.tolist(), noise.tolist(), strict=True)]
        return self.form.row(self.texts[row][: counts.tokens].tolist(), spans, (self.form.end,))


def spans_needed(encoder_length: int, mask_prob: float) -> int:
    """As many spans as a full sample of Megatron's may be expected to have."""
    return math.ceil(most_masked(encoder_length, mask_prob) / USUAL_SPAN_TOKENS)


def most_masked(encoder_length: int, mask_prob: float) -> int:
    """Tokens that a full sample of Megatron's hides."""
    most = encoder_length - SPARE_TOKENS
    return mask_budget(mask_prob, most, most)


class MockT5Dataset:
    """Random rows, the same for the same seed and row; no files."""

    def __init__(self, samples: int, encoder_length: int, decoder_length: int, vocab_size: int, seed: int):
        self.samples, self.vocab_size, self.seed = samples, vocab_size, seed
        self.form = T5Format(encoder_length, decoder_length, start=0, end=0, pad=0, sentinels=())

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, row: int) -> Row:
        rng = np.random.default_rng((self.seed, row))

        def draw(longest: int) -> Array:
            return rng.integers(0, self.vocab_size, rng.integers(max(1, longest // 2), longest + 1))

        encoder, labels = draw(self.form.encoder_length), draw(self.form.decoder_length)
        return self.form.padded(encoder, np.append(self.form.start, labels[:-1]), labels)

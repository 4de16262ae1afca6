"""From the data flags to the training, validation and test set of each kind of model."""

from __future__ import annotations

import math

from megatron_ds.data import bert, t5
from megatron_ds.data.blend import TokenDataset
from megatron_ds.data.config import DataConfig
from megatron_ds.data.cuts import GPTCut, SentenceCut, TextCut
from megatron_ds.data.gpt import GPTDataset, MockGPTDataset
from megatron_ds.data.sentences import SentenceSamples
from megatron_ds.data.sources import Datasets, build_datasets, mock_datasets
from megatron_ds.data.tokenizer import Tokenizer
from megatron_ds.errors import ConfigError, DataError

__all__ = ["Datasets", "build_bert_datasets", "build_gpt_datasets", "build_t5_datasets"]

_PAPER_DENSITY = 0.15
_PAPER_SPAN_LENGTH = 3.0


def build_gpt_datasets(
    config: DataConfig,
    *,
    num_samples: tuple[int, int, int],
    seq_length: int,
    seed: int,
    vocab_size: int,
    tokenizer_fingerprint: str | None = None,
) -> Datasets:
    """GPT's sets: rows of seq_length + 1 tokens. Every process may call it.

    Comm:   none; processes share built indices through the cache folder
    Raises: ConfigError, DataError
    """
    if config.mock_data:
        return mock_datasets(num_samples, lambda n, part: MockGPTDataset(n, seq_length, vocab_size, seed + part))
    cut = GPTCut(
        seq_length=seq_length,
        vocab_size=vocab_size,
        fingerprint=tokenizer_fingerprint,
        seed=seed,
        shuffle=config.shuffle,
    )
    return build_datasets(config, num_samples, cut)


def build_bert_datasets(
    config: DataConfig,
    *,
    num_samples: tuple[int, int, int],
    seq_length: int,
    seed: int,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    binary_head: bool,
) -> Datasets:
    """BERT's sets, as build_gpt_datasets; only --mock-data needs no tokenizer."""
    _check_masking(config, seq_length, bert.SPECIAL_TOKENS)
    if config.mock_data:
        return mock_datasets(
            num_samples,
            lambda n, part: bert.MockBertDataset(n, seq_length, vocab_size, seed + part, config.mask_prob, binary_head),
        )
    assert tokenizer is not None
    vocabulary = bert.BertVocabulary.of(tokenizer)

    def samples_of(samples: SentenceSamples) -> TokenDataset:
        return bert.BertDataset(
            samples,
            vocabulary,
            seq_length=seq_length,
            seed=seed,
            mask_prob=config.mask_prob,
            binary_head=binary_head,
        )

    cut = SentenceCut(
        seq_length=seq_length,
        vocab_size=vocab_size,
        fingerprint=tokenizer.fingerprint(),
        seed=seed,
        shuffle=config.shuffle,
        max_tokens=seq_length - bert.SPECIAL_TOKENS,
        min_sentences=2 if binary_head else 1,
        short_seq_prob=config.short_seq_prob,
        samples_of=samples_of,
    )
    return build_datasets(config, num_samples, cut)


def build_t5_datasets(
    config: DataConfig,
    *,
    num_samples: tuple[int, int, int],
    seq_length: int,
    decoder_seq_length: int,
    seed: int,
    vocab_size: int,
    tokenizer: Tokenizer | None,
) -> Datasets:
    """T5's sets, as build_gpt_datasets; only --mock-data needs no tokenizer."""
    _check_masking(config, seq_length, t5.SPARE_TOKENS)
    if config.mock_data:
        return mock_datasets(
            num_samples,
            lambda n, part: t5.MockT5Dataset(n, seq_length, decoder_seq_length, vocab_size, seed + part),
        )
    assert tokenizer is not None
    if not tokenizer.sentinels:
        raise _too_few_sentinels(0, 1)
    make = _paper_spans if t5.has_paper_spans(config) else _word_spans
    cut: SentenceCut | TextCut = make(config, tokenizer, seq_length, decoder_seq_length, seed, vocab_size)
    return build_datasets(config, num_samples, cut)


def _word_spans(
    config: DataConfig, tokenizer: Tokenizer, encoder_length: int, decoder_length: int, seed: int, vocab_size: int
) -> SentenceCut:
    """Megatron's spans."""
    start = t5.first_token(config, tokenizer)
    form = t5.T5Format(encoder_length, decoder_length, start, tokenizer.eos, tokenizer.pad, tokenizer.sentinels)
    masked, spans = t5.most_masked(encoder_length, config.mask_prob), t5.spans_needed(encoder_length, config.mask_prob)
    if len(form.sentinels) < spans:
        raise _too_few_sentinels(len(form.sentinels), spans)
    if decoder_length < masked + spans + 1:
        raise ConfigError(
            "--decoder-seq-length",
            found=str(decoder_length),
            expected=f"{masked} masked tokens of --encoder-seq-length {encoder_length}, {spans} sentinels and one more",
            fix=f"--decoder-seq-length {masked + spans + 1}, or a lower --mask-prob",
        )
    max_spans = min(len(form.sentinels), decoder_length - masked - 1)

    def samples_of(samples: SentenceSamples) -> TokenDataset:
        return t5.T5Dataset(
            samples,
            form,
            continuations=tokenizer.continuations,
            separators=_separators(tokenizer),
            seed=seed,
            mask_prob=config.mask_prob,
            max_spans=max_spans,
        )

    return SentenceCut(
        seq_length=encoder_length,
        vocab_size=vocab_size,
        fingerprint=tokenizer.fingerprint(),
        seed=seed,
        shuffle=config.shuffle,
        max_tokens=encoder_length - t5.SPARE_TOKENS,
        min_sentences=1,
        short_seq_prob=config.short_seq_prob,
        samples_of=samples_of,
    )


def _separators(tokenizer: Tokenizer) -> tuple[int, ...]:
    """[CLS] and [SEP], which Megatron never masks, where the vocabulary has them."""
    try:
        return tokenizer.cls, tokenizer.sep
    except DataError:
        return ()


def _paper_spans(
    config: DataConfig, tokenizer: Tokenizer, encoder_length: int, decoder_length: int, seed: int, vocab_size: int
) -> TextCut:
    """The T5 paper's spans."""
    density = _PAPER_DENSITY if config.noise_density is None else config.noise_density
    mean = _PAPER_SPAN_LENGTH if config.mean_noise_span_length is None else config.mean_noise_span_length
    if not 0 < density < 1:
        raise ConfigError("--noise-density", found=str(density), expected="a share between 0 and 1", fix="0.15, say")
    if not mean >= 1:
        raise ConfigError("--mean-noise-span-length", found=str(mean), expected="at least 1 token", fix="3, say")
    counts = t5.largest_counts(encoder_length, decoder_length, density, mean)
    if counts is None:
        raise ConfigError(
            "--encoder-seq-length, --decoder-seq-length",
            found=f"{encoder_length}, {decoder_length}",
            expected="room for a token, a sentinel and an end in both",
            fix="longer sequences",
        )
    if len(tokenizer.sentinels) < counts.spans:
        raise _too_few_sentinels(len(tokenizer.sentinels), counts.spans)
    start = t5.first_token(config, tokenizer)
    form = t5.T5Format(encoder_length, decoder_length, start, tokenizer.eos, tokenizer.pad, tokenizer.sentinels)

    def samples_of(texts: GPTDataset) -> TokenDataset:
        return t5.T5SpanDataset(texts, form, counts, seed)

    return TextCut(
        seq_length=counts.tokens,
        vocab_size=vocab_size,
        fingerprint=tokenizer.fingerprint(),
        seed=seed,
        shuffle=config.shuffle,
        samples_of=samples_of,
    )


def _too_few_sentinels(found: int, needed: int) -> DataError:
    return DataError(
        "--vocab-extra-ids",
        found=f"{found} of the tokens <extra_id_0>, <extra_id_1> ..., which stand for T5's masked spans",
        expected=f"at least {needed}",
        fix=f"--vocab-extra-ids {max(100, needed)}",
    )


def _check_masking(config: DataConfig, seq_length: int, special_tokens: int) -> None:
    """Raises: ConfigError for shares that are none, or a sequence without room for two tokens of text or for a mask"""
    for flag, share in (("--mask-prob", config.mask_prob), ("--short-seq-prob", config.short_seq_prob)):
        if not 0 <= share <= 1 or (flag == "--mask-prob" and share in (0, 1)):
            raise ConfigError(flag, found=str(share), expected="a share between 0 and 1")
    if seq_length < special_tokens + 2:
        raise ConfigError(
            "--seq-length",
            found=str(seq_length),
            expected=f"at least {special_tokens + 2}: {special_tokens} special tokens and 2 of text",
        )
    if config.mask_prob * (seq_length - special_tokens) < 1:
        enough = special_tokens + math.ceil(1 / config.mask_prob)
        raise ConfigError(
            "--seq-length, --mask-prob",
            found=f"{config.mask_prob} of {seq_length - special_tokens} tokens of text, which masks none",
            expected="at least one masked token",
            fix=f"--seq-length {enough}, or a higher --mask-prob",
        )

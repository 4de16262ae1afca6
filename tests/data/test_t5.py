"""T5's rows: made by megatron-core, put together again, and counted; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.data.config import DataConfig
from megatron_ds.data.datasets import Datasets, build_t5_datasets
from megatron_ds.data.t5 import T5SpanDataset, largest_counts, span_counts
from megatron_ds.errors import ConfigError, DataError
from tests.data.pairs import write_pair, write_sentences
from tests.data.words import VOCAB, FakeTokenizer, sentence_documents


def build(
    prefix: str,
    samples: tuple[int, int, int] = (100, 0, 0),
    encoder: int = 32,
    decoder: int = 16,
    sentinels: int = 40,
    **flags: Any,
) -> Datasets:
    return build_t5_datasets(
        DataConfig(**({"data_path": (prefix,), "split": "1"} | flags)),
        num_samples=samples,
        seq_length=encoder,
        decoder_seq_length=decoder,
        seed=1234,
        vocab_size=VOCAB,
        tokenizer=FakeTokenizer(sentinels),
    )


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_sentences(tmp_path / "corpus", sentence_documents())


def put_together(row: dict[str, Any], first_sentinel: int, end: int | None = None) -> list[int]:
    """The text: spans back in the places of their sentinels."""
    labels = row["labels"][row["loss_mask"] == 1].tolist()
    assert labels.pop() == 5
    spans: dict[int, list[int]] = {}
    for token in labels:
        if token >= first_sentinel:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    assert list(spans) == list(range(first_sentinel, first_sentinel + len(spans))) and all(spans.values())
    encoder = row["text_enc"][row["enc_mask"] == 1].tolist()
    if end is not None:
        assert encoder.pop() == end
    assert [t for t in encoder if t >= first_sentinel] == list(spans)
    return [t for token in encoder for t in spans.get(token, [token])]


def test_rows_of_megatron_core(prefix: str) -> None:
    """Rows 0 and 17 of megatron-core 0.16.1's T5MaskedWordPieceDataset on the same files and seed."""
    dataset = build(prefix).train
    assert dataset is not None and len(dataset) == 145
    row = dataset[0]
    encoder = [62, 95, 117, 63, 99, 138, 16, 110, 7, 35, 160, 89, 112, 69, 148, 161]
    assert row["text_enc"].tolist() == encoder + [0] * 16 and row["enc_mask"].tolist() == [1] * 16 + [0] * 16
    assert row["text_dec"].tolist() == [4, 160, 35, 55, 161, 48] + [0] * 10
    assert row["labels"].tolist() == [160, 35, 55, 161, 48, 5] + [-1] * 10
    assert row["loss_mask"].tolist() == row["dec_mask"].tolist() == [1] * 6 + [0] * 10
    row = dataset[17]
    encoder = [119, 17, 77, 141, 60, 16, 117, 129, 95, 90, 146, 79, 35, 79, 6, 88, 122, 90, 45, 160, 47, 35, 60, 51]
    assert row["text_enc"].tolist() == encoder + [56, 19, 51, 161] + [0] * 4
    assert row["labels"].tolist() == [160, 47, 48, 161, 28, 21, 5] + [-1] * 9
    assert {value.dtype for value in row.values()} == {np.dtype(np.int64)}


def test_rows_are_one_documents_text(prefix: str) -> None:
    texts = [",".join(str(t) for s in document for t in s) + "," for document in sentence_documents()]
    dataset = build(prefix).train
    assert dataset is not None
    for i in range(len(dataset)):
        text = ",".join(map(str, put_together(dataset[i], 160))) + ","
        assert any(whole.startswith(text) or "," + text in whole for whole in texts)


def test_few_sentinels_and_a_short_decoder_end_the_masking(tmp_path: Path) -> None:
    """Words of one token, 100 to a sample: some 15 tokens in three or four spans, up to 8 would be allowed."""
    prefix = write_sentences(tmp_path / "a", [[[7] * 50] * 2] * 50)
    spans = []
    for sentinels, decoder in ((40, 60), (5, 60), (40, 15 + 1 + 5)):
        dataset = build(prefix, encoder=102, decoder=decoder, sentinels=sentinels).train
        assert dataset is not None
        rows = [dataset[i] for i in range(len(dataset))]
        spans.append(max(int((row["text_dec"] >= VOCAB - sentinels).sum()) for row in rows))
    assert spans[0] > 5 and spans[1:] == [5, 5]


def test_sentinels_are_needed(prefix: str) -> None:
    with pytest.raises(DataError, match="--vocab-extra-ids 100"):
        build(prefix, sentinels=0)
    with pytest.raises(DataError, match=r"at least 13(.|\n)*--vocab-extra-ids 100"):
        build(prefix, encoder=262, decoder=128, sentinels=12)
    assert build(prefix, encoder=262, decoder=128, sentinels=13).train is not None


def test_decoder_must_hold_the_spans(prefix: str) -> None:
    """30 tokens: 4 are masked, in 2 spans, and one more token."""
    assert build(prefix, decoder=7).train is not None
    with pytest.raises(ConfigError, match="--decoder-seq-length 7"):
        build(prefix, decoder=6)
    # Megatron's own example.
    assert build(prefix, encoder=512, decoder=128).train is not None


@pytest.mark.parametrize(
    ("encoder", "decoder", "tokens", "noise", "spans"),
    [(512, 114, 568, 85, 28), (512, 128, 568, 85, 28), (32, 16, 34, 5, 2), (512, 30, 150, 22, 7)],
)
def test_largest_counts(encoder: int, decoder: int, tokens: int, noise: int, spans: int) -> None:
    """The first is T5's own: 568 raw tokens give inputs of 512 and targets of 114."""
    counts = largest_counts(encoder, decoder, 0.15, 3.0)
    assert counts is not None and (counts.tokens, counts.noise, counts.spans) == (tokens, noise, spans)
    bigger = span_counts(tokens + 1, 0.15, 3.0)
    assert bigger.encoder_tokens > encoder or bigger.decoder_tokens > decoder
    assert largest_counts(2, 9, 0.15, 3.0) is None


def test_rows_of_the_paper(prefix: str) -> None:
    """34 tokens of the row of shuffled documents: 29 and 2 sentinels and [EOS], and 5 and 2 sentinels and [EOS]."""
    documents = sentence_documents()
    dataset = build(prefix, mean_noise_span_length=3.0).train
    assert isinstance(dataset, T5SpanDataset) and len(dataset) >= 100
    order, seen = dataset.texts.index.documents.tolist(), set()
    text = [t for d in order for sentence in documents[d] for t in sentence]
    for i in range(100):
        row = dataset[i]
        assert row["enc_mask"].sum() == 32 and row["dec_mask"].sum() == 8
        assert row["text_dec"].tolist() == [0, *row["labels"][:7]] + [0] * 8
        start = 34 * int(dataset.texts.index.shuffle[i])
        assert put_together(row, 160, end=5) == text[start : start + 34]
        seen.add(tuple(np.flatnonzero(row["text_enc"] >= 160)))
        assert all(np.array_equal(row[key], dataset[i][key]) for key in row)
    assert len(seen) > 20


def test_the_papers_shares(tmp_path: Path) -> None:
    """165 tokens, 82 of them in 16 spans: 83 + 16 + 1 and 82 + 16 + 1."""
    prefix = write_pair(tmp_path / "a", [[7] * 5000])
    dataset = build(prefix, encoder=100, decoder=100, noise_density=0.5, mean_noise_span_length=5.0).train
    assert dataset is not None
    row = dataset[0]
    assert (int(row["enc_mask"].sum()), int(row["dec_mask"].sum())) == (100, 99)
    sentinels = int((row["text_enc"] >= 160).sum())
    assert sentinels == int((row["labels"] >= 160).sum()) == 16 and int((row["labels"] == 7).sum()) == 82


def test_the_papers_faults(prefix: str) -> None:
    with pytest.raises(ConfigError, match="--noise-density"):
        build(prefix, noise_density=1.5)
    with pytest.raises(ConfigError, match="--mean-noise-span-length"):
        build(prefix, mean_noise_span_length=0.0)
    with pytest.raises(DataError, match="at least 28"):
        build(prefix, encoder=512, decoder=128, sentinels=27, noise_density=0.15)


def test_mock_rows() -> None:
    sets = build("", (20, 0, 3), mock_data=True, data_path=())
    again = build("", (20, 0, 3), mock_data=True, data_path=()).train
    assert sets.train is not None and again is not None and sets.valid is None
    for i in range(20):
        row = sets.train[i]
        encoder, decoder = int(row["enc_mask"].sum()), int(row["dec_mask"].sum())
        assert 16 <= encoder <= 32 and 8 <= decoder <= 16 and row["loss_mask"].sum() == decoder
        assert row["text_dec"][1:decoder].tolist() == row["labels"][: decoder - 1].tolist()
        assert set(row["labels"][decoder:]) <= {-1} and row["labels"][:decoder].min() >= 0
        assert all(np.array_equal(row[key], again[i][key]) for key in row)

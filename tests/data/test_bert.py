"""BERT's rows: made by megatron-core, written out slowly, and by hand; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.data.bert import trim
from megatron_ds.data.config import DataConfig
from megatron_ds.data.datasets import Datasets, build_bert_datasets
from megatron_ds.errors import ConfigError, DataError
from tests.data.pairs import write_pair, write_sentences
from tests.data.words import VOCAB, FakeTokenizer, TokenizerWithoutMask, sentence_documents


def build(
    prefix: str, samples: tuple[int, int, int] = (100, 0, 0), seq: int = 32, head: bool = True, **flags: Any
) -> Datasets:
    return build_bert_datasets(
        DataConfig(**({"data_path": (prefix,), "split": "1"} | flags)),
        num_samples=samples,
        seq_length=seq,
        seed=1234,
        vocab_size=VOCAB,
        tokenizer=FakeTokenizer(),
        binary_head=head,
    )


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_sentences(tmp_path / "corpus", sentence_documents())


def test_rows_of_megatron_core(prefix: str) -> None:
    """Rows 0 and 5 of megatron-core 0.16.1's BERTMaskedWordPieceDataset on the same files and seed."""
    dataset = build(prefix).train
    assert dataset is not None and len(dataset) == 125
    text = [1, 147, 91, 77, 138, 90, 84, 38, 3, 3, 3, 97, 119, 126, 94, 44, 2, 61, 2]
    row = dataset[0]
    assert row["text"].tolist() == text + [0] * 13 and row["padding_mask"].tolist() == [1] * 19 + [0] * 13
    assert row["types"].tolist() == [0] * 17 + [1] * 2 + [0] * 13
    assert {i: t for i, t in enumerate(row["labels"].tolist()) if t != -1} == {8: 93, 9: 89, 10: 121}
    assert np.flatnonzero(row["loss_mask"]).tolist() == [8, 9, 10]
    assert (row["is_random"], row["truncated"]) == (0, 0)
    text = [1, 105, 7, 25, 18, 47, 46, 2, 189, 92, 116, 15, 138, 119, 106, 140, 68, 81, 134, 124, 3, 26, 15, 40, 11]
    row = dataset[5]
    assert row["text"].tolist() == text + [122, 3, 95, 127, 104, 59, 2]
    assert row["types"].tolist() == [0] * 8 + [1] * 24 and (row["is_random"], row["truncated"]) == (1, 1)
    # One token kept as it is, one replaced at random, two hidden.
    assert {i: t for i, t in enumerate(row["labels"].tolist()) if t != -1} == {5: 47, 8: 96, 20: 92, 26: 20}
    assert {value.dtype for value in row.values() if isinstance(value, np.ndarray)} == {np.dtype(np.int64)}


@pytest.mark.parametrize("head", [True, False])
def test_every_row_holds_sentences_of_one_document(prefix: str, head: bool) -> None:
    """Unhidden, a row's segments are consecutive text of one document, in the other order where is_random says so."""
    texts = [",".join(str(t) for s in document for t in s) + "," for document in sentence_documents()]
    dataset = build(prefix, head=head).train
    assert dataset is not None
    swaps = 0
    for i in range(len(dataset)):
        row = dataset[i]
        real = int(row["padding_mask"].sum())
        tokens = np.where(row["labels"] >= 0, row["labels"], row["text"])[:real]
        ends = np.flatnonzero(tokens == 2).tolist()
        assert tokens[0] == 1 and ends[-1] == real - 1 and len(ends) == (1 + head) and not row["text"][real:].any()
        parts = [tokens[1 : ends[0]], tokens[ends[0] + 1 : -1]] if head else [tokens[1:-1]]
        parts = parts[::-1] if row["is_random"] else parts
        found = [{d for d, text in enumerate(texts) if ",".join(map(str, p)) + "," in text} for p in parts]
        assert set.intersection(*found)
        swaps += row["is_random"]
    assert 0.3 < swaps / len(dataset) < 0.7 if head else swaps == 0


def test_trim_as_token_by_token() -> None:
    for seed in range(200):
        sizes = np.random.default_rng(seed).integers(0, 12, 3)
        first, second = list(range(sizes[0])), list(range(100, 100 + sizes[1]))
        excess = int(min(sizes[2], sizes[0] + sizes[1]))
        got = trim(np.array(first), np.array(second), excess, np.random.RandomState(seed))
        rng = np.random.RandomState(seed)
        for _ in range(excess):
            longer = first if len(first) > len(second) else second
            del longer[0 if rng.random() < 0.5 else -1]
        assert [part.tolist() for part in got] == [first, second]


def test_masking_is_80_10_10(tmp_path: Path) -> None:
    """15 % of the tokens; of these 80 % hidden, 10 % replaced by any id, 10 % as they are."""
    rng = np.random.default_rng(0)
    documents = [[rng.integers(6, 100, 60).tolist() for _ in range(4)] for _ in range(40)]
    dataset = build(write_sentences(tmp_path / "a", documents), seq=128).train
    assert dataset is not None
    rows = [dataset[i] for i in range(len(dataset))]
    text, labels = np.concatenate([r["text"] for r in rows]), np.concatenate([r["labels"] for r in rows])
    asked = labels >= 0
    assert abs(asked.sum() / sum(r["padding_mask"].sum() for r in rows) - 0.15) < 0.01
    hidden, kept = (text[asked] == 3).mean(), (text[asked] == labels[asked]).mean()
    assert abs(hidden - 0.8) < 0.04 and abs(kept - 0.1) < 0.03 and text[asked].max() > 150


@pytest.mark.parametrize("kind", ["one sequence per document", "one of two"])
def test_documents_of_one_sentence(tmp_path: Path, kind: str) -> None:
    """One error at start that names both ways out, not a loop; with other documents beside them they are left out."""
    if kind == "one of two":
        prefix = write_sentences(tmp_path / "a", [[[7] * 9], [[8] * 9, [9] * 9]])
        dataset = build(prefix, (3, 0, 0)).train
        assert dataset is not None and all(7 not in dataset[i]["text"] for i in range(len(dataset)))
        return
    prefix = write_pair(tmp_path / "a", [[7] * 20] * 10)
    with pytest.raises(DataError) as caught:
        build(prefix)
    message = str(caught.value)
    assert "10 of one sentence" in message and "--bert-no-binary-head" in message and "--split-sentences" in message
    dataset = build(prefix, head=False).train
    assert dataset is not None and len(dataset) == 100


def test_only_long_sentences(tmp_path: Path) -> None:
    prefix = write_sentences(tmp_path / "a", [[[7] * 600, [8] * 3]] * 10)
    with pytest.raises(DataError, match="10 with a sentence of more than 512 tokens"):
        build(prefix)
    with pytest.raises(DataError, match="more than 512"):
        build(prefix, head=False)


def test_a_part_without_usable_documents(tmp_path: Path) -> None:
    """--split counts documents, not sentences: 5 for training, 5 of one sentence for validation."""
    prefix = write_sentences(tmp_path / "a", [[[7] * 9] * 3] * 5 + [[[8] * 9]] * 5)
    with pytest.raises(DataError, match=r"validation(.|\n)*5 of one sentence"):
        build(prefix, (1, 1, 0), split="50,50,0")
    dataset = build(prefix, (40, 0, 0), split="50,50,0").train
    assert dataset is not None and all(8 not in dataset[i]["text"] for i in range(40))


def test_documents_that_are_not_split_are_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(write_pair(tmp_path / "a", [[7] * 100] * 10), head=False)
    captured = capsys.readouterr()
    assert "at most 29 tokens" in captured.out + captured.err


def test_what_else_is_refused(prefix: str) -> None:
    config = DataConfig(data_path=(prefix,), split="1")
    with pytest.raises(DataError, match=r"\[MASK\]"):
        build_bert_datasets(
            config,
            num_samples=(1, 0, 0),
            seq_length=32,
            seed=1,
            vocab_size=VOCAB,
            tokenizer=TokenizerWithoutMask(),
            binary_head=True,
        )
    with pytest.raises(ConfigError, match="--seq-length"):
        build(prefix, seq=4)
    # 15 % of 5 tokens is less than one: nothing would ever be masked.
    with pytest.raises(ConfigError, match="--seq-length 10, or a higher --mask-prob"):
        build(prefix, seq=8)
    with pytest.raises(ConfigError, match="--mask-prob"):
        build(prefix, mask_prob=1.0)
    with pytest.raises(ConfigError, match="--short-seq-prob"):
        build(prefix, short_seq_prob=-0.1)


def test_wrong_id(tmp_path: Path) -> None:
    prefix = write_sentences(tmp_path / "a", [[[7] * 9, [8] * 9], [[7, VOCAB, 7], [8] * 9]])
    with pytest.raises(DataError, match=f"token id {VOCAB} in document 1"):
        build(prefix)


@pytest.mark.parametrize("head", [True, False])
def test_mock_rows(head: bool) -> None:
    sets = build("", (20, 20, 0), head=head, mock_data=True, data_path=())
    again = build("", (20, 20, 0), head=head, mock_data=True, data_path=())
    assert sets.train is not None and sets.valid is not None and again.train is not None
    rows = [sets.train[i] for i in range(20)]
    for i, row in enumerate(rows):
        real = int(row["padding_mask"].sum())
        asked = np.flatnonzero(row["labels"] >= 0)
        assert 1 <= len(asked) == round(0.15 * real) and asked.max() < real
        assert np.array_equal(row["loss_mask"], row["labels"] >= 0) and row["text"].max() < VOCAB
        assert all(np.array_equal(row[key], again.train[i][key]) for key in row)
    assert len({int(row["padding_mask"].sum()) for row in rows}) > 3
    assert {row["is_random"] for row in rows} == ({0, 1} if head else {0})
    assert any(row["types"].any() for row in rows) == head
    assert sets.valid[0]["text"].tolist() != rows[0]["text"].tolist()

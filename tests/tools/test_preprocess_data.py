"""The tools from the command line: bytes, order, refusals, and what they leave behind."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data import preprocess
from megatron_ds.data.bpe_ranks import byte_alphabet
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.sidecar import read_sidecar
from tests.data.pairs import write_pair
from tools import merge_datasets, preprocess_data

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


def write_lines(path: Path, texts: Sequence[object], key: str = "text") -> str:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def run(*argv: str) -> int:
    return preprocess_data.main([*argv, *NULL])


def sequences(prefix: Path | str) -> list[list[int]]:
    data = IndexedDataset(str(prefix))
    return [data[i].tolist() for i in range(len(data))]


def test_bytes_by_hand(tmp_path: Path) -> None:
    """Three documents, the middle one empty, the last one split into sentences; ends of documents are counted."""
    source = write_lines(tmp_path / "a.jsonl", ["5 6 7", "", ["1 2", "", "3"]])
    assert run("--input", source, "--output-prefix", str(tmp_path / "out"), "--append-eod") == 0
    tokens = [5, 6, 7, 100, 1, 2, 3, 100]
    assert (tmp_path / "out_text_document.bin").read_bytes() == struct.pack("<8H", *tokens)
    assert (tmp_path / "out_text_document.idx").read_bytes() == (
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i3q4q", 4, 2, 2, 0, 8, 12, 0, 1, 1, 3)
    )
    sidecar = read_sidecar(str(tmp_path / "out_text_document"))
    assert sidecar is not None
    facts = (sidecar.tokenizer_type, sidecar.vocab_size, sidecar.eod, sidecar.append_eod, sidecar.max_token_id)
    assert facts == ("NullTokenizer", 101, 100, True, 100)
    assert (sidecar.documents, sidecar.sequences, sidecar.tokens) == (3, 3, 8)


def test_without_append_eod(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["5 6 7", "8"])
    assert run("--input", source, "--output-prefix", str(tmp_path / "out")) == 0
    assert sequences(tmp_path / "out_text_document") == [[5, 6, 7], [8]]


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . ! the dog ##s cat"


def run_words(folder: Path, name: str, *argv: str) -> Path:
    """Preprocess folder/a.jsonl with a WordPiece in which [SEP] is 3."""
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n")
    tokenizer = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", str(folder / "vocab.txt")]
    flags = ["--input", str(folder / "a.jsonl"), "--output-prefix", str(folder / name), *argv, *tokenizer]
    assert preprocess_data.main(flags) == 0
    return folder / f"{name}_text_sentence"


def test_sentences_by_hand(tmp_path: Path) -> None:
    """One text, one that is split already, one of nothing, one whose middle and last sentences tokenize to nothing."""
    split_already = ["The dogs. The cat", "\u200b", "cat!"]
    empty_ones = "The dog!\n\n\u200b\n\nCat.\n\n\u200b"
    write_lines(tmp_path / "a.jsonl", ["The dog. The\ncats! The", split_already, " \n ", empty_ones])
    prefix = run_words(tmp_path, "out", "--split-sentences", "--append-eod", "--lang", "english")
    index = prefix.with_suffix(".idx").read_bytes()
    # 7 sentences, bounds of 4 documents; lengths count the [SEP] that ends a document
    assert struct.unpack("<QBQQ", index[9:34]) == (1, 8, 7, 5)
    lengths = np.frombuffer(index, "<i4", 7, 34)
    offsets = np.frombuffer(index, "<i8", 7, 34 + 28)
    documents = np.frombuffer(index, "<i8", 5, 34 + 28 + 56)
    assert lengths.tolist() == [3, 4, 2, 6, 3, 3, 3] and documents.tolist() == [0, 3, 5, 5, 7]
    assert offsets.tolist() == [0, 6, 14, 18, 30, 36, 42] and len(index) == 34 + 28 + 56 + 40
    tokens = np.fromfile(prefix.with_suffix(".bin"), "<u2").tolist()
    the, dog, cat, plural, end, bang, stop = 7, 8, 10, 9, 5, 6, 3
    assert tokens == [
        *(the, dog, end), *(the, cat, plural, bang), *(the, stop),
        *(the, dog, plural, end, the, cat), *(cat, bang, stop),
        *(the, dog, bang), *(cat, end, stop),
    ]  # fmt: skip
    assert (sidecar := read_sidecar(str(prefix))) is not None and (sidecar.eod, sidecar.sequences) == (3, 7)


def test_sentences_with_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "_BLOCK_BYTES", 200)
    write_lines(tmp_path / "a.jsonl", ["The dog. " * (i % 5) + "A cat! " * (i % 3) for i in range(100)])
    one = run_words(tmp_path, "one", "--split-sentences", "--append-eod")
    two = run_words(tmp_path, "two", "--split-sentences", "--append-eod", "--workers", "2")
    assert len(sequences(one)) == sum(i % 5 + i % 3 for i in range(100))
    for ending in (".bin", ".idx", ".json"):
        assert one.with_suffix(ending).read_bytes() == two.with_suffix(ending).read_bytes()


def test_line_breaks_are_kept_for_tokenizers_that_see_them(tmp_path: Path, bpe_files: list[str]) -> None:
    write_lines(tmp_path / "a.jsonl", ["a\nb.\nC"])
    for flags, wanted in (([], ["a b.", "C"]), (["--keep-newlines"], ["a\nb.\n", "C"])):
        argv = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "out"), "--split-sentences"]
        assert preprocess_data.main([*argv, *flags, *bpe_files]) == 0
        assert [bytes(ids).decode() for ids in sequences(tmp_path / "out_text_sentence")] == wanted


@pytest.fixture
def bpe_files(tmp_path: Path) -> list[str]:
    """A BPE of bytes alone, each with its own value as id."""
    vocab = byte_alphabet() | {"<|endoftext|>": 256}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return ["--vocab-file", str(tmp_path / "vocab.json"), "--merge-file", str(tmp_path / "merges.txt")]


def test_several_keys_files_and_gz(tmp_path: Path) -> None:
    (tmp_path / "b2.jsonl").write_text('{"x": "3", "y": "30"}')  # no newline at the end
    with gzip.open(tmp_path / "b1.jsonl.gz", "wt") as file:
        file.write('{"x": "1", "y": "10"}\n{"x": "2", "y": "20", "z": 0}\n')
    pattern, out = str(tmp_path / "b*"), str(tmp_path / "out")
    assert run("--input", pattern, "--output_prefix", out, "--json-keys", "x", "y") == 0
    assert sequences(f"{out}_x_document") == [[1], [2], [3]] and sequences(f"{out}_y_document") == [[10], [20], [30]]


def test_order_is_kept_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "_BLOCK_BYTES", 100)
    texts = [" ".join([str(i % 100)] * (i % 7 + 1)) for i in range(300)]
    source = write_lines(tmp_path / "a.jsonl", texts)
    assert run("--input", source, "--output-prefix", str(tmp_path / "two"), "--workers", "2") == 0
    assert run("--input", source, "--output-prefix", str(tmp_path / "one"), "--partitions", "2") == 0
    assert sequences(tmp_path / "two_text_document") == [[int(word) for word in text.split()] for text in texts]
    for ending in ("bin", "idx", "json"):
        one, two = (tmp_path / f"{name}_text_document.{ending}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


BAD = [
    (b"not json\n", "not JSON"),
    (b"\n", "blank line"),
    (b'{"text": "1\xff"}\n', "not UTF-8"),
    (b'{"other": "1"}\n', "no key 'text'"),
    (b'{"text": 5}\n', "neither a text nor"),
    (b'["text"]\n', "a JSON list"),
    (b'{"text": "\\ud800"}\n', "surrogate"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_line_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, said: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1"}\n' + line + b'{"text": "2"}\n')
    assert run("--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "o" / "out")) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{tmp_path}/a.jsonl:2" in error and said in error
    assert not (tmp_path / "o").exists()


def test_bad_lines_can_be_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "%d"}\n' % i + line for i, (line, _) in enumerate(BAD)))
    out = str(tmp_path / "out")
    assert run("--input", str(tmp_path / "a.jsonl"), "--output-prefix", out, "--skip-bad-lines") == 0
    assert sequences(f"{out}_text_document") == [[i] for i in range(len(BAD))]
    error = capsys.readouterr().err
    assert "7 bad lines left out" in error and "a.jsonl:14" in error


def test_id_beyond_the_vocabulary_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["1", "2 101", "3"])
    assert run("--input", source, "--output-prefix", str(tmp_path / "out")) == 3
    assert "a.jsonl:2" in (error := capsys.readouterr().err) and "101" in error


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--input", "/no/such"], 3, "--input /no/such"),
        (["--output-prefix", "x"], 2, "--input"),
        (["--input", __file__], 2, "--output-prefix"),
        (["--split-sentences", "--lang", "german"], 2, "--lang"),
        (["--append-oed"], 2, "--append-eod"),
    ],
)
def test_wrong_flags(capsys: pytest.CaptureFixture[str], flags: list[str], code: int, said: str) -> None:
    if flags[1:] == ["/no/such"] or "--lang" in flags:
        flags = ["--input", __file__, *flags, "--output-prefix", "/tmp/never"]
    assert run(*flags) == code and said in capsys.readouterr().err


def test_missing_tokenizer_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a"])
    flags = [
        "--input",
        source,
        "--output-prefix",
        str(tmp_path / "out"),
        "--vocab-file",
        "/no/v",
        "--merge-file",
        "/no/m",
    ]
    assert preprocess_data.main(flags) == 3
    assert "--vocab-file /no/v" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_empty_input_and_torn_gz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert run("--input", str(tmp_path / "empty.jsonl"), "--output-prefix", str(tmp_path / "out")) == 3
    assert "no text" in capsys.readouterr().err
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b'{"text": "1"}\n' * 1000)[:-10])
    assert run("--input", str(tmp_path / "torn.gz"), "--output-prefix", str(tmp_path / "out")) == 3
    assert "gzip" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "torn.gz"]


def test_a_users_json_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "out_text_document.json", ["1", "2"])
    assert run("--input", source, "--output-prefix", str(tmp_path / "out")) == 3
    assert "out_text_document.json" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_script_runs_anywhere_and_logs_plain_lines(tmp_path: Path) -> None:
    """As a user calls it: from another folder, not installed; every line of the log is whole."""
    source = write_lines(tmp_path / "a.jsonl", [str(i % 100) for i in range(2500)])
    script = Path(preprocess_data.__file__).resolve()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script), "--input", source, "--output-prefix", "out", "--workers", "2", *NULL],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\r" not in done.stdout and "Processed 2500 documents" in done.stdout and done.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.jsonl", "out_text_document.bin", "out_text_document.idx", "out_text_document.json"
    ]  # fmt: skip


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    script = str(Path(preprocess_data.__file__).resolve())
    (tmp_path / "o").mkdir()
    source = write_lines(tmp_path / "big.jsonl", ["1 2 3 " * 20000] * 200)
    process = subprocess.Popen(
        [sys.executable, script, "--input", source, "--output-prefix", f"{tmp_path}/o/out", *NULL]
    )
    for _ in range(1500):
        if any((tmp_path / "o").iterdir()):
            break
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 143 and not list((tmp_path / "o").iterdir())


def test_merge(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for name, texts in (("b", ["3"]), ("a", ["1 1", ""]), ("c", ["99 4"])):
        assert run("--input", write_lines(tmp_path / name, texts), "--output-prefix", str(shards / name)) == 0
    for _ in range(2):  # the second time the first one's output is no input
        argv = ["--input", str(shards), "--output-prefix", str(shards / "all")]
        assert merge_datasets.main(argv) == 0
        assert sequences(shards / "all") == [[1, 1], [3], [99, 4]]
    sidecar = read_sidecar(str(shards / "all"))
    assert sidecar is not None and (sidecar.documents, sidecar.tokens, sidecar.max_token_id) == (4, 5, 99)


def test_merge_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "out" / "all")]
    assert merge_datasets.main(argv) == 3 and "no .bin/.idx pair" in capsys.readouterr().err
    write_pair(tmp_path / "a", [[1]], "uint16")
    write_pair(tmp_path / "b", [[1]], "int32")
    assert merge_datasets.main(argv) == 3 and "uint16" in capsys.readouterr().err
    (tmp_path / "b.bin").unlink()
    assert merge_datasets.main(argv) == 3 and "b.bin" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert merge_datasets.main(["--input", str(tmp_path)]) == 2 and "--output-prefix" in capsys.readouterr().err

"""The corpus of a small made-up library, checked against its files read one by one; and the tokenizer trained on it."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from tools import build_corpus, train_tokenizer

LONG = "x = 'enough text to be worth a document'\n" * 4


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    files = {
        "a.py": "A" + LONG,
        "package/b.py": "B" + LONG,
        "package/copy_of_b.py": "B" + LONG,
        "package/notes.txt": "N" + LONG,
        "package/tests/test_b.py": "T" + LONG,
        "test/support.py": "S" + LONG,
        "site-packages/other.py": "O" + LONG,
        "package/__pycache__/b.py": "P" + LONG,
        "short.py": "pass\n",
        "package/data.bin": "D" + LONG,
        "pydoc_data/topics.py": f"# generated\ntopics = {{'assert': {'assert' + LONG!r}, 'if': {'if' + LONG!r}}}\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "latin.py").write_bytes(b"# caf\xe9\n" + LONG.encode())
    return root


def rows(path: Path) -> dict[str, str]:
    parsed = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(row) == {"text", "path"} for row in parsed)
    return {row["path"]: row["text"] for row in parsed}


def test_one_document_per_file_without_copies(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out/corpus.jsonl"
    assert build_corpus.main(["--source", str(library), "--output", str(out)]) == 0
    assert rows(out) == {
        "a.py": "A" + LONG,
        "package/b.py": "B" + LONG,
        "package/notes.txt": "N" + LONG,
        "pydoc_data/topics.py#assert": "assert" + LONG,
        "pydoc_data/topics.py#if": "if" + LONG,
    }
    assert [path.name for path in out.parent.iterdir()] == ["corpus.jsonl"]


def test_include_tests(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus.jsonl"
    assert build_corpus.main(["--source", str(library), "--output", str(out), "--include-tests"]) == 0
    assert {"package/tests/test_b.py", "test/support.py"} <= rows(out).keys()
    assert "site-packages/other.py" not in rows(out)


def test_order_is_the_seeds(tmp_path: Path) -> None:
    names = [f"m{i:03d}.py" for i in range(200)]
    for name in random.Random(0).sample(names, len(names)):
        (tmp_path / name).write_text(name + LONG)
    orders = []
    for seed in ("1", "1", "2"):
        out = tmp_path / "corpus.jsonl"
        assert build_corpus.main(["--source", str(tmp_path), "--output", str(out), "--seed", seed]) == 0
        orders.append(list(rows(out)))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == names
    # a contiguous tenth is drawn from the whole alphabet, not from one end of it
    tenth = [int(name[1:4]) for name in orders[0][:20]]
    assert min(tenth) < 60
    assert max(tenth) > 140


def test_a_library_without_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "corpus.jsonl"
    assert build_corpus.main(["--source", str(tmp_path / "python311.zip"), "--output", str(out)]) == 3
    assert "CORPUS=file.jsonl" in capsys.readouterr().err
    assert not out.exists()


def test_the_real_library_is_megabytes_of_text() -> None:
    documents = list(build_corpus.documents(Path(sysconfig.get_path("stdlib")), False))
    paths = {path for path, _ in documents}
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics.py#assert"} <= paths
    assert sum(len(text) for _, text in documents) > 5_000_000


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "tokenizer"
    rows = [{"text": f"{word} is {word[::-1]} worth a document {word} {word}"} for word in dir(str)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train_tokenizer.main(["--input", str(corpus), "--vocab-size", "300", "--output-dir", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["merges.txt", "vocab.json"]
    vocab = json.loads((out / "vocab.json").read_text())
    merges = (out / "merges.txt").read_text().splitlines()[1:]
    assert sorted(vocab.values()) == list(range(300))
    assert len(merges) == 300 - 256 - 1
    assert "<|endoftext|>" in vocab
    bpe = ByteLevelBPETokenizer(str(out / "vocab.json"), str(out / "merges.txt"))
    text = "worth a document, caf\u00e9 \u4e2d\n\t "
    ids = bpe.encode(text).ids
    assert bpe.decode(ids) == text
    assert len(ids) < len(text.encode())


def test_tokenizer_learns_from_an_even_sample(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:04d}"}) + "\n" for i in range(1000)))
    texts = list(train_tokenizer.sample_texts(path, "text", path.stat().st_size / 10))
    assert texts == [f"{i:04d}" for i in range(9, 1000, 10)]
    assert len(list(train_tokenizer.sample_texts(path, "text", 1e9))) == 1000


@pytest.mark.parametrize(
    ("line", "flags", "code", "named"),
    [
        ("not json", [], 3, "line 2"),
        ('{"txt": "x"}', [], 3, "line 2"),
        ('{"text": "x"}', ["--vocab-size", "200"], 2, "--vocab-size"),
        ('{"text": "x"}', ["--input", "missing.jsonl"], 3, "missing.jsonl"),
    ],
)
def test_tokenizer_refuses(
    line: str, flags: list[str], code: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "corpus.jsonl", tmp_path / "tokenizer"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    assert train_tokenizer.main(["--input", str(path), "--output-dir", str(out), *flags]) == code
    assert named in capsys.readouterr().err
    assert not out.exists()

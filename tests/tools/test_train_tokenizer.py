"""The WordPiece that a quickstart trains; the BPE is tested with the corpus that it is made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.tokenizer import build_tokenizer
from tools import train_tokenizer


def train(folder: Path, name: str, *argv: str) -> list[str]:
    """The lines of the vocab.txt that is trained on names of Python's."""
    names = sorted({name for kind in (str, dict, int, OSError) for name in dir(kind)})
    texts = [f"The {name.upper()} of {name[::-1]}, caf\u00e9 {name} \u65e5\u672c!" for name in names * 3]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = folder / name
    flags = ["--kind", "wordpiece", "--input", str(corpus), "--output-dir", str(out), *argv]
    assert train_tokenizer.main(flags) == 0
    assert [path.name for path in out.iterdir()] == ["vocab.txt"]
    return (out / "vocab.txt").read_text(encoding="utf-8").splitlines()


def test_word_piece(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = train(tmp_path, "out", "--vocab-size", "300")
    assert "vocab.txt, 300 tokens" in capsys.readouterr().out
    assert len(pieces) == len(set(pieces)) == 300
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert pieces == [piece.lower() if place >= 5 else piece for place, piece in enumerate(pieces)]
    assert {"the", "of", "cafe", "\u65e5", "!", "##e"} <= set(pieces) and "##\u65e5" not in pieces
    found = build_tokenizer(
        TokenizerConfig(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(tmp_path / "out" / "vocab.txt"))
    )
    ids = found.tokenize("The caf\u00e9 of THE \u65e5!")
    assert [pieces[i] for i in ids] == ["the", "cafe", "of", "the", "\u65e5", "!"]


def test_word_piece_is_the_same_every_time(tmp_path: Path) -> None:
    """The library alone numbers letters within words by a hash that differs from run to run, and merges by number."""
    first = train(tmp_path, "first", "--vocab-size", "400")
    assert all(train(tmp_path, f"again{i}", "--vocab-size", "400") == first for i in range(3))


def test_rare_letters_do_not_crowd_out_pieces(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rare = "".join(chr(0x400 + i) for i in range(250))
    corpus.write_text(json.dumps({"text": f"{rare} " + "these are the words that those others wrote " * 9}) + "\n")
    flags = ["--kind", "wordpiece", "--input", str(corpus), "--vocab-size", "257", "--output-dir", str(tmp_path)]
    assert train_tokenizer.main(flags) == 0
    pieces = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert len(pieces) <= 257 and {"these", "words", "others"} <= set(pieces)
    assert sum(len(piece.removeprefix("##")) == 1 for piece in pieces) <= (257 - 5) // 2

"""Train a tokenizer on JSON lines: a byte-level BPE for GPT2BPETokenizer, or a WordPiece for BertWordPieceLowerCase.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output-dir tokenizer
        ->  tokenizer/vocab.json, tokenizer/merges.txt
    python tools/train_tokenizer.py --kind wordpiece --input corpus.jsonl --vocab-size 8192 --output-dir tokenizer
        ->  tokenizer/vocab.txt

A large corpus is sampled evenly from its first line to its last: merges are settled after some megabytes of text.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer

from megatron_ds.cli import Parser, arg
from megatron_ds.errors import EXIT_OK, ConfigError, DataError, UserError

END_OF_TEXT = "<|endoftext|>"
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST_VOCAB = 256 + 1
"""Every byte, and the end of a document; a WordPiece of fewer could hardly spell either."""
FILES = MappingProxyType({"bpe": ("vocab.json", "merges.txt"), "wordpiece": ("vocab.txt",)})


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig:
    """Tokenizer training."""

    input: str | None = arg(None, "JSON lines to learn from.", metavar="FILE")
    output_dir: str | None = arg(None, "Where vocab.json and merges.txt, or vocab.txt, go.", metavar="DIR")
    kind: Literal["bpe", "wordpiece"] = arg("bpe", "bpe: GPT-2's, of bytes; wordpiece: BERT's, in lower case.")
    vocab_size: int = arg(8192, "Tokens in all: letters or bytes, special ones, and one per merge.")
    json_key: str = arg("text", "Key of the text in each line.")
    sample_mb: float = arg(16.0, "Learn from about this many MB of the input.", metavar="MB")


def sample_texts(path: Path, key: str, limit_bytes: float) -> Iterator[str]:
    """Texts of every n-th line, n such that they add up to about `limit_bytes`.

    Raises: DataError for a line that is not a JSON object with a string under `key`
    """
    stride = max(1, round(path.stat().st_size / limit_bytes))
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if number % stride == 0 and line.strip():
                yield _text_of(line, key, f"{path}, line {number}")


def _text_of(line: str, key: str, where: str) -> str:
    fix = "one JSON object per line; --json-key names the text"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as exc:
        raise DataError(where, found=f"no JSON: {exc}", expected=f'{{"{key}": "..."}}', fix=fix) from exc
    text = row.get(key) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise DataError(where, found=f"{type(text).__name__} under {key!r}", expected="a string", fix=fix)
    return text


def train(config: TokenizerTrainingConfig, path: Path, output_dir: Path) -> int:
    """Write the files whole or not at all; return the number of tokens."""
    texts = functools.partial(sample_texts, path, config.json_key, config.sample_mb * 1e6)
    learn = _learn_bpe if config.kind == "bpe" else _learn_word_piece
    tokenizer = learn(texts, config.vocab_size)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as staging:
        tokenizer.save_model(staging)
        for name in FILES[config.kind]:
            os.replace(Path(staging, name), output_dir / name)
    return int(tokenizer.get_vocab_size())


def _learn_bpe(texts: Callable[[], Iterator[str]], vocab_size: int) -> Any:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts(), vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=sys.stdout.isatty()
    )
    return tokenizer


def _learn_word_piece(texts: Callable[[], Iterator[str]], vocab_size: int) -> Any:
    tokenizer: Any = BertWordPieceTokenizer(lowercase=True)
    # Merged pieces are to get at least half of the ids; a letter may take two, at the start of a word and within one.
    letters, within = _letters(tokenizer, texts(), (vocab_size - len(BERT_SPECIAL)) // 4)
    tokenizer.train_from_iterator(
        texts(),
        vocab_size=vocab_size,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        # Letters within words are named here because the library would number them in an order that differs by run.
        special_tokens=[*BERT_SPECIAL, *(f"##{letter}" for letter in within)],
        show_progress=sys.stdout.isatty(),
    )
    return tokenizer


def _letters(tokenizer: Any, texts: Iterator[str], limit: int) -> tuple[list[str], list[str]]:
    """The most frequent letters of the words of all texts, and those of them that continue a word."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(tokenizer.normalizer.normalize_str(text).split())
    counts: Counter[str] = Counter()
    within: set[str] = set()
    for word, count in words.items():
        for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word):
            within.update(part[1:])
            for letter in part:
                counts[letter] += count
    letters = sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:limit])
    return letters, [letter for letter in letters if letter in within]


def main(argv: Sequence[str]) -> int:
    """Run the tool; return its exit code."""
    parser = Parser("train_tokenizer.py", (__doc__ or "").splitlines()[0])
    parser.add_config(TokenizerTrainingConfig)
    try:
        (config,) = parser.parse_configs([TokenizerTrainingConfig], argv, {})
        path, output_dir = _check(config)
        tokens = train(config, path, output_dir)
    except UserError as exc:
        print(f"ERROR: {exc}", file=sys.stderr)
        return exc.exit_code
    print(f"{output_dir}: {' and '.join(FILES[config.kind])}, {tokens} tokens")
    return EXIT_OK


def _check(config: TokenizerTrainingConfig) -> tuple[Path, Path]:
    if config.input is None or config.output_dir is None:
        flag = "--input" if config.input is None else "--output-dir"
        raise ConfigError(flag, found="nothing", expected="a path", fix="see --help")
    if config.vocab_size < SMALLEST_VOCAB:
        raise ConfigError("--vocab-size", str(config.vocab_size), f"at least {SMALLEST_VOCAB}", "--vocab-size 8192")
    if config.sample_mb <= 0:
        raise ConfigError("--sample-mb", str(config.sample_mb), "more than 0", "--sample-mb 16")
    if not Path(config.input).is_file():
        raise DataError("--input", f"{config.input}: no such file", "a file of JSON lines", "see tools/build_corpus.py")
    return Path(config.input), Path(config.output_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

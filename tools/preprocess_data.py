#!/usr/bin/env python3
"""Tokenize JSON lines into the .bin/.idx pair that training reads.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix my-corpus --append-eod \\
        --vocab-file vocab.json --merge-file merges.txt --workers 8      ->  my-corpus_text_document.bin, .idx, .json

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix my-corpus --split-sentences \\
        --tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt   ->  my-corpus_text_sentence.bin, .idx, .json
"""

from __future__ import annotations

import glob
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# A clone that was never installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ds import log
from megatron_ds.cli import Parser, arg
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.preprocess import Job, preprocess
from megatron_ds.errors import ConfigError, DataError, UserError


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Input and output."""

    input: tuple[str, ...] = arg((), "JSON lines, .gz too; names or patterns.", metavar="FILE")
    json_keys: tuple[str, ...] = arg(
        ("text",), "Keys to take texts from; each makes a dataset of its own.", metavar="KEY"
    )
    output_prefix: str | None = arg(
        None, "Writes PREFIX_KEY_document.bin and .idx, of split text PREFIX_KEY_sentence.", metavar="PREFIX"
    )
    split_sentences: bool = arg(
        False, "One sequence per sentence, as BERT and T5 want it; a list of texts is taken as split already."
    )
    keep_newlines: bool = arg(False, "Keep line breaks within and after sentences, instead of taking them for blanks.")
    lang: str = arg("english", "Language whose sentences are split; there is one.", metavar="NAME")
    append_eod: bool = arg(False, "End each document with the end-of-document token.")
    workers: int = arg(1, "Processes that tokenize.")
    partitions: int = arg(1, "Accepted for Megatron's sake: one pass keeps the order and needs no parts.")
    log_interval: int = arg(1000, "Documents between two lines of progress in a log file.")
    dataset_impl: Literal["mmap"] = arg("mmap", "Accepted for Megatron's sake: there is one format.")
    skip_bad_lines: bool = arg(False, "Leave lines out that are no JSON object with all keys, instead of stopping.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code."""
    try:
        parser = Parser("tools/preprocess_data.py", "Tokenize JSON lines into a .bin/.idx pair.")
        groups: tuple[type[Any], ...] = (PreprocessConfig, TokenizerConfig)
        for group in groups:
            parser.add_config(group)
        config, tokenizer = parser.parse_configs(groups, sys.argv[1:] if argv is None else argv, {})
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        run(config, tokenizer)
    except UserError as exc:
        log.clear_progress()
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def run(config: PreprocessConfig, tokenizer: TokenizerConfig) -> None:
    """Check the flags, preprocess, say what was written."""
    if not config.input or config.output_prefix is None:
        missing = "--input" if not config.input else "--output-prefix"
        raise ConfigError(missing, found="nothing", expected="--input FILE and --output-prefix PREFIX")
    if not config.json_keys or config.workers < 1 or config.log_interval < 1:
        raise ConfigError("--json-keys, --workers, --log-interval", expected="at least one key, numbers >= 1")
    if config.lang != "english":
        raise ConfigError(
            "--lang", found=config.lang, expected="english", fix='split it yourself: {"text": ["A sentence.", ...]}'
        )
    job = Job(tokenizer, config.json_keys, config.append_eod, config.split_sentences, config.keep_newlines)
    summary = preprocess(
        _inputs(config.input),
        config.output_prefix,
        job,
        workers=config.workers,
        log_interval=config.log_interval,
        skip_bad_lines=config.skip_bad_lines,
    )
    if summary.bad_lines:
        log.warn(f"{summary.bad_lines} bad lines left out")
    for prefix, tokens in zip(summary.prefixes, summary.tokens.values(), strict=True):
        log.info(f"{prefix}: {summary.documents} documents, {tokens} tokens")


def _inputs(patterns: Sequence[str]) -> list[str]:
    """The files that names or patterns stand for, each pattern's in order of their names.

    Raises: DataError for a name or pattern that nothing matches
    """
    files: list[str] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(f for f in glob.glob(pattern) if Path(f).is_file())
        if not found:
            raise DataError(f"--input {pattern}", found="no such file", expected="JSON lines")
        files += found
    return files


if __name__ == "__main__":
    sys.exit(main())

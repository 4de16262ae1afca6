#!/usr/bin/env python3
"""Measure how well a GPT predicts texts; one JSON object on stdout.

    python tools/evaluate.py --load runs/gpt/checkpoints --data valid.jsonl                  perplexity
    python tools/evaluate.py --load runs/gpt/checkpoints --data-path corpus_text_document    the same, of a .bin/.idx
    python tools/evaluate.py --load runs/gpt/checkpoints --data lambada.jsonl --task lambada last words

Reads a checkpoint of any layout on any layout; ranks beyond tp x pp share the texts. Definitions: docs/evaluation.md
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

# A clone that was never installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megatron_ds import log
from megatron_ds.cli import Parser, arg
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.tokenizer import Tokenizer
from megatron_ds.data.vocabulary import check_vocabulary
from megatron_ds.errors import EXIT_OK, ConfigError, DataError
from megatron_ds.training.inference import InferenceConfig, Trained, guarded, open_checkpoint
from megatron_ds.training.scoring import Window, score, windows


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Texts and task."""

    data: str | None = arg(None, "JSON lines, a text each.", metavar="FILE")
    data_path: str | None = arg(None, "Prefix of a .bin/.idx pair, instead of --data.", metavar="PREFIX")
    task: Literal["perplexity", "lambada"] = arg("perplexity", "perplexity of all tokens, or lambada: last words.")
    json_key: str = arg("text", "Key of the text in each line.")
    seq_length: int | None = arg(None, "Tokens that the model sees at once. Default: as in training.")
    stride: int | None = arg(
        None, "Tokens scored per window; fewer give each more context and take longer. Default: --seq-length."
    )
    micro_batch_size: int = arg(4, "Windows at a time; the result does not depend on it.")
    max_documents: int | None = arg(None, "Only so many texts, from the first.", metavar="N")


class Document(NamedTuple):
    """Tokens, of which the first `given` are not scored; words and bytes of the text, 0 where it is not known."""

    tokens: list[int]
    given: int
    words: int = 0
    size_bytes: int = 0


def texts(path: str, key: str) -> Iterator[tuple[str, str]]:
    """(where, text) of every line.

    Raises: DataError for a missing file, or a line without a text
    """
    try:
        file = open(path, encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"--data {path}", error.strerror or str(error), "a file of JSON lines") from error
    with file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", _text(line, key, f"{path}, line {number}")


def _text(line: str, key: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(where, f"no JSON: {error}", f'{{"{key}": "..."}}', "an object per line") from error
    found = row.get(key) if isinstance(row, dict) else None
    if not isinstance(found, str):
        raise DataError(where, f"no string under {key!r}", f'{{"{key}": "..."}}', "--json-key names the text")
    return found


def text_documents(path: str, key: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """Every line as a document that follows another one's end, or what the tokenizer begins texts with."""
    begins = tokenizer.tokenize("")
    for _, text in texts(path, key):
        ids = tokenizer.tokenize(text)
        own = bool(begins) and ids[: len(begins)] == begins
        tokens = ids if own else [tokenizer.eod, *ids]
        yield Document(tokens, len(begins) if own else 1, len(re.split(r"\s+", text)), len(text.encode()))


def indexed_documents(prefix: str, trained: Trained, tokenizer: Tokenizer) -> Iterator[Document]:
    """Every document of a pair after an end of document; its own end, if it was stored, is scored too."""
    data = IndexedDataset(prefix)
    check_vocabulary(data, trained.vocab.size, tokenizer.fingerprint())
    bounds = data.document_indices
    for begin, end in pairwise(bounds.tolist()):
        ids = np.concatenate([np.zeros(0, np.int64), *(data[i] for i in range(begin, end))]).tolist()
        yield Document([tokenizer.eod, *map(int, ids)], 1)


def perplexity(trained: Trained, config: EvaluationConfig, length: int, stride: int) -> dict[str, Any]:
    """Mean loss per token, and what follows from it."""
    tokenizer = trained.tokenizer()
    if config.data_path is not None:
        source = indexed_documents(config.data_path, trained, tokenizer)
    else:
        source = text_documents(str(config.data), config.json_key, tokenizer)
    documents = words = size_bytes = 0

    def pieces() -> Iterator[Window]:
        nonlocal documents, words, size_bytes
        for document in islice(source, config.max_documents):
            documents, words, size_bytes = documents + 1, words + document.words, size_bytes + document.size_bytes
            yield from windows(document.tokens, length, stride, document.given)

    totals = score(trained, _checked(trained, pieces()), config.micro_batch_size)
    if not totals.targets:
        raise DataError(_source(config), "no token to predict", "texts", "another file")
    result = {
        "documents": documents,
        "tokens": totals.targets,
        "loss": totals.loss / totals.targets,
        "perplexity": _exp(totals.loss / totals.targets),
    }
    if size_bytes:
        result |= {
            "words": words,
            "word_perplexity": _exp(totals.loss / words),
            "bytes": size_bytes,
            "bits_per_byte": totals.loss / math.log(2) / size_bytes,
        }
    return result


def last_words(trained: Trained, config: EvaluationConfig, length: int) -> dict[str, Any]:
    """Is the last word of each text, all of its tokens, what the model would say; and how likely does it find it?"""
    tokenizer = trained.tokenizer()

    def pieces() -> Iterator[Window]:
        for where, text in islice(texts(str(config.data), config.json_key), config.max_documents):
            before, _, last = text.rstrip().rpartition(" ")
            if not before.strip() or not last:
                raise DataError(where, "one word", "a word to predict and words before it", "leave the line out")
            ids, given = tokenizer.tokenize(f"{before} {last}"), len(tokenizer.tokenize(before))
            if given >= len(ids):
                raise DataError(where, "a last word without tokens of its own", "another last word")
            (window,) = windows(ids[-length - 1 :], length, length, given - max(0, len(ids) - length - 1))
            yield window

    totals = score(trained, _checked(trained, pieces()), config.micro_batch_size)
    if not totals.windows:
        raise DataError(_source(config), "no text", "texts", "another file")
    return {
        "documents": totals.windows,
        "accuracy": totals.guessed / totals.windows,
        "perplexity": _exp(totals.loss / totals.windows),
    }


def _checked(trained: Trained, pieces: Iterator[Window]) -> Iterator[Window]:
    """The same windows; ids that the model does not have are told before they reach it."""
    for window in pieces:
        outside = [token for token in (*window.inputs, *window.targets) if token >= trained.vocab.size]
        if outside:
            expected = f"0 to {trained.vocab.size - 1}"
            raise DataError("--data", f"token id {outside[0]}", expected, "texts for this model's tokenizer")
        yield window


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _source(config: EvaluationConfig) -> str:
    return f"--data-path {config.data_path}" if config.data is None else f"--data {config.data}"


def check(config: EvaluationConfig) -> None:
    """Whether the flags fit together.

    Raises: ConfigError
    """
    if (config.data is None) == (config.data_path is None):
        found = "neither" if config.data is None else "both"
        raise ConfigError("--data, --data-path", found, "one of them", "--data valid.jsonl")
    if config.task == "lambada" and config.data is None:
        raise ConfigError("--task lambada", "--data-path", "texts, to find their last words", "--data FILE.jsonl")
    for flag, value in (
        ("--seq-length", config.seq_length),
        ("--stride", config.stride),
        ("--micro-batch-size", config.micro_batch_size),
        ("--max-documents", config.max_documents),
    ):
        if value is not None and value < 1:
            raise ConfigError(flag, str(value), "1 or more", "leave it out")


def _window(trained: Trained, config: EvaluationConfig) -> tuple[int, int]:
    """Length and stride."""
    length = config.seq_length or trained.seq_length
    stride = config.stride or length
    if trained.config.positions == "learned_absolute" and length > trained.max_positions:
        found, expected = str(length), f"at most {trained.max_positions}, the rows of the position table"
        raise ConfigError("--seq-length", found, expected, f"--seq-length {trained.max_positions}")
    if stride > length:
        raise ConfigError("--stride", str(stride), f"at most --seq-length {length}", "leave it out")
    return length, stride


def work(argv: Sequence[str]) -> int:
    """Load, measure, print; the exit code."""
    parser = Parser("evaluate.py", (__doc__ or "").splitlines()[0])
    for group in (EvaluationConfig, InferenceConfig):
        parser.add_config(group)
    typed = parser.read(argv)
    (config,), (options,) = parser.build([EvaluationConfig], typed, {}), parser.build([InferenceConfig], typed, {})
    check(config)
    trained = open_checkpoint(options, data_parallel=True)
    if trained.config.model_type != "GPT":
        found, expected = f"a {trained.config.model_type}, which has no next token", "a GPT"
        fix = "tools/forward.py gives the loss of given labels; training prints the validation loss"
        raise ConfigError(f"--load {options.load}", found, expected, fix)
    length, stride = _window(trained, config)
    result: dict[str, Any] = {
        "task": config.task,
        "data": config.data or config.data_path,
        "iteration": trained.iteration,
    }
    if config.task == "lambada":
        result |= last_words(trained, config, length)
    else:
        result |= {"seq_length": length, "stride": stride} | perplexity(trained, config, length, stride)
    log.info(json.dumps(result))
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; its exit code."""
    return guarded(lambda: work(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())

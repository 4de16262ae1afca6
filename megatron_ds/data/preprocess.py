"""JSON lines to .bin/.idx: one pass, memory that does not grow with the corpus, order kept by any number of workers.

    file -> blocks of whole lines -> workers: parse, split, tokenize -> builders, one per key -> rename at the end

Nothing appears under its final name before all of it is written.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds import log
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.indexed import token_dtype
from megatron_ds.data.indexed_builder import IndexedDatasetBuilder
from megatron_ds.data.sentence_splitter import split_sentences
from megatron_ds.data.sidecar import Sidecar
from megatron_ds.data.tokenizer import Tokenizer, build_tokenizer
from megatron_ds.errors import DataError, RunFault

_BLOCK_BYTES = 1 << 20
_SHOWN_BAD_LINES = 10


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...]
    append_eod: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False


@dataclass(frozen=True)
class Block:
    """Whole lines of one file."""

    path: str
    first_line: int
    lines: bytes


@dataclass
class Encoded:
    """The documents of one block for one key: all their tokens, sequence by sequence."""

    tokens: npt.NDArray[Any]
    lengths: list[int]
    sequences_per_document: list[int]


@dataclass
class BlockResult:
    """What a worker hands back."""

    lines: int
    bytes: int
    by_key: dict[str, Encoded] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(FILE:LINE, what is wrong with it)"""


@dataclass(frozen=True)
class Summary:
    """What was written."""

    prefixes: tuple[str, ...]
    documents: int
    tokens: dict[str, int]
    bad_lines: int


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    job: Job,
    *,
    workers: int = 1,
    log_interval: int = 1000,
    skip_bad_lines: bool = False,
) -> Summary:
    """Write `{output_prefix}_{key}_document.bin` and `.idx` for each key; `_sentence` where sentences are split.

    Raises: ConfigError, DataError; RunFault if a worker dies
    """
    tokenizer = build_tokenizer(job.tokenizer)
    level = "sentence" if job.split_sentences else "document"
    prefixes = {key: f"{output_prefix}_{key}_{level}" for key in job.keys}
    with contextlib.ExitStack() as stack, _disk_faults(output_prefix):
        builders = {
            key: stack.enter_context(IndexedDatasetBuilder(prefix, token_dtype(tokenizer.vocab_size)))
            for key, prefix in prefixes.items()
        }
        meter = _Meter(sum(os.path.getsize(path) for path in inputs), log_interval)
        bad_lines = 0
        for result, position in _encode_in_order(inputs, job, tokenizer, workers):
            _report_bad_lines(result.bad, bad_lines, skip_bad_lines)
            bad_lines += len(result.bad)
            for key, encoded in result.by_key.items():
                builders[key].add_block(encoded.tokens, encoded.lengths, encoded.sequences_per_document)
            meter.add(result, position)
        tokens = {key: builder.tokens for key, builder in builders.items()}
        for key, count in tokens.items():
            if not count:
                raise DataError(", ".join(inputs), found=f"no text under {key!r}", expected="one JSON object per line")
        documents = next(iter(builders.values())).documents
        for builder in builders.values():
            builder.finalize(_sidecar(builder, tokenizer, job.append_eod))
    meter.finish()
    return Summary(tuple(prefixes.values()), documents, tokens, bad_lines)


@contextlib.contextmanager
def _disk_faults(output_prefix: str) -> Iterator[None]:
    """Raises: RunFault where the system refuses to read or write."""
    try:
        yield
    except OSError as exc:
        raise RunFault(str(exc.filename or output_prefix), found=str(exc.strerror or exc)) from exc


def _sidecar(builder: IndexedDatasetBuilder, tokenizer: Tokenizer, append_eod: bool) -> Sidecar:
    return Sidecar(
        tokenizer_type=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=append_eod,
        max_token_id=builder.max_token_id,
        documents=builder.documents,
        sequences=builder.sequences,
        tokens=builder.tokens,
    )


def _encode_in_order(
    inputs: Sequence[str], job: Job, tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[BlockResult, int]]:
    """Each block's result with the number of input bytes read so far, in the order of the input."""
    if workers <= 1:
        for block, position in _blocks(inputs):
            yield encode_block(block, job, tokenizer), position
        return
    # spawn: forking a process in which a tokenizer library has started threads may deadlock.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    waiting: deque[tuple[Future[BlockResult], int]] = deque()
    try:
        for block, position in _blocks(inputs):
            waiting.append((pool.submit(_encode_in_worker, block, job), position))
            if len(waiting) > 2 * workers:
                future, reached = waiting.popleft()
                yield future.result(), reached
        while waiting:
            future, reached = waiting.popleft()
            yield future.result(), reached
    except BrokenProcessPool as exc:
        raise RunFault(
            "--workers", found="a worker process died, perhaps for want of memory", fix="fewer workers"
        ) from exc
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # A worker is one of many: threads of its own would only get in the others' way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


_tokenizer_of_worker = functools.cache(build_tokenizer)


def _encode_in_worker(block: Block, job: Job) -> BlockResult:
    return encode_block(block, job, _tokenizer_of_worker(job.tokenizer))


def _blocks(inputs: Sequence[str]) -> Iterator[tuple[Block, int]]:
    """Blocks of whole lines, each with the bytes of all inputs that are read by then (of a .gz: packed bytes)."""
    before = 0
    for path in inputs:
        line = 1
        with open(path, "rb") as raw:
            stream: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            try:
                while lines := stream.read(_BLOCK_BYTES):
                    lines += stream.readline()
                    yield Block(path, line, lines), before + raw.tell()
                    line += lines.count(b"\n")
            except (EOFError, gzip.BadGzipFile) as exc:
                raise DataError(path, found=str(exc), expected="a whole gzip file") from exc
        before += os.path.getsize(path)


def encode_block(block: Block, job: Job, tokenizer: Tokenizer) -> BlockResult:
    """Parse and tokenize the lines of one block; a line that is wrong for any key is left out for all."""
    lines = block.lines.removesuffix(b"\n").split(b"\n")
    result = BlockResult(len(lines), len(block.lines))
    documents: list[list[list[str]]] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, block.first_line):
        try:
            documents.append(_parse(line, job))
            numbers.append(number)
        except ValueError as exc:
            result.bad.append((f"{block.path}:{number}", str(exc)))
    for place, key in enumerate(job.keys):
        texts = [document[place] for document in documents]
        try:
            result.by_key[key] = _encode(texts, tokenizer, job)
        except DataError as exc:
            line_number = numbers[_first_failing(texts, tokenizer, job)]
            raise DataError(f"{block.path}:{line_number}: {exc.subject}", exc.found, exc.expected, exc.fix) from exc
    return result


def _parse(line: bytes, job: Job) -> list[list[str]]:
    """The sentences of each key; a list is a text that is split already, and a text that is not split is one sentence.

    Raises: ValueError
    """
    if not line.strip():
        raise ValueError("blank line")
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise ValueError(f"not UTF-8: {exc.reason} at byte {exc.start}") from exc
    except RecursionError as exc:
        raise ValueError("not JSON: nested too deep") from exc
    except json.JSONDecodeError as exc:
        raise ValueError(f"not JSON: {exc.msg} at column {exc.colno}") from exc
    if not isinstance(data, dict):
        raise ValueError(f"a JSON {type(data).__name__}, not an object")
    return [_sentences(data, key, job) for key in job.keys]


def _sentences(data: dict[str, Any], key: str, job: Job) -> list[str]:
    if key not in data:
        raise ValueError(f"no key {key!r}")
    value = data[key]
    sentences = value if isinstance(value, list) else [value]
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise ValueError(f"{key!r} is neither a text nor a list of texts")
    for sentence in sentences:
        if not sentence.isascii():
            try:
                sentence.encode("utf-8")
            except UnicodeEncodeError as exc:
                raise ValueError(f"{key!r} holds half a surrogate pair") from exc
    if job.split_sentences and isinstance(value, str):
        return split_sentences(value, job.keep_newlines)
    return sentences


def _encode(documents: list[list[str]], tokenizer: Tokenizer, job: Job) -> Encoded:
    """Tokens of documents. One without tokens keeps its bound, gets no sequence and no end-of-document token."""
    sentences = [sentence for document in documents for sentence in document]
    ids = iter(tokenizer.tokenize_batch(sentences, bare=job.split_sentences))
    tokens: list[npt.NDArray[Any]] = []
    lengths: list[int] = []
    counts: list[int] = []
    for document in documents:
        before = len(lengths)
        for _ in document:
            sequence = np.array(next(ids), np.int64)
            if len(sequence):
                tokens.append(sequence)
                lengths.append(len(sequence))
        counts.append(len(lengths) - before)
        if job.append_eod and counts[-1]:
            tokens.append(np.array([tokenizer.eod]))
            lengths[-1] += 1
    joined = np.concatenate(tokens) if tokens else np.empty(0, np.int64)
    if len(joined) and (joined.min() < 0 or joined.max() >= tokenizer.vocab_size):
        bad = int(joined.max() if joined.min() >= 0 else joined.min())
        raise DataError("token ids", found=str(bad), expected=f"0 to {tokenizer.vocab_size - 1}, the vocabulary")
    return Encoded(joined.astype(token_dtype(tokenizer.vocab_size)), lengths, counts)


def _first_failing(texts: list[list[str]], tokenizer: Tokenizer, job: Job) -> int:
    for place, document in enumerate(texts):
        try:
            _encode([document], tokenizer, job)
        except DataError:
            return place
    raise AssertionError("a block failed but none of its documents does")


def _report_bad_lines(bad: list[tuple[str, str]], already: int, skip: bool) -> None:
    """Say which lines are left out, the first few one by one.

    Raises: DataError unless they may be skipped
    """
    if bad and not skip:
        where, what = bad[0]
        raise DataError(
            where, found=what, expected="one JSON object per line", fix="mend the line, or --skip-bad-lines"
        )
    for where, what in bad[: max(0, _SHOWN_BAD_LINES - already)]:
        log.warn(f"left out {where}: {what}")


class _Meter:
    """Progress: a live line on a terminal, a plain line every `interval` documents elsewhere."""

    def __init__(self, total_bytes: int, interval: int):
        self.total_bytes, self.interval = total_bytes, interval
        self.started = time.monotonic()
        self.documents, self.text_bytes = 0, 0

    def add(self, result: BlockResult, position: int) -> None:
        """Count one block."""
        before = self.documents
        self.documents += result.lines - len(result.bad)
        self.text_bytes += result.bytes
        share = position / max(1, self.total_bytes)
        filled = int(30 * share)
        log.progress(f"[{'#' * filled}{'.' * (30 - filled)}] {share:4.0%}  {self._rates()}")
        if not sys.stdout.isatty() and self.documents // self.interval > before // self.interval:
            log.info(f"Processed {self._rates()}")

    def finish(self) -> None:
        """Leave one line behind."""
        log.info(f"Processed {self._rates()}")

    def _rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self.started)
        return (
            f"{self.documents} documents ({self.documents / seconds:.0f} docs/s, "
            f"{self.text_bytes / 1e6 / seconds:.2f} MB/s)"
        )

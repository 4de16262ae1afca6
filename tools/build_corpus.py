"""Write a corpus of real text without a download: the Python standard library of this machine as JSON lines.

    python tools/build_corpus.py --output corpus.jsonl

One object per file, {"text": ..., "path": ...}: the sources with their docstrings, and each topic of the reference that
`help()` prints. Copies are dropped and the order is shuffled, so that any contiguous split resembles the whole.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.cli import Parser, arg
from megatron_ds.errors import EXIT_OK, ConfigError, DataError, UserError

SUFFIXES = (".py", ".txt", ".rst")
NOT_OURS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
TABLES = frozenset({"encodings"})
"""Generated tables of characters: a tenth of the text, and nothing to learn from."""
TESTS = frozenset({"test", "tests", "idle_test"})
TOPICS = "pydoc_data/topics.py"
SHORTEST_TEXT_CHARS = 64


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Corpus."""

    output: str | None = arg(None, "File of JSON lines to write.", metavar="FILE")
    source: str | None = arg(None, "Directory to read; by default the standard library of this Python.", metavar="DIR")
    include_tests: bool = arg(False, "Also take the library's own tests: three times the text.")
    seed: int = arg(1234, "Seed of the order of documents.")


def source_files(root: Path, include_tests: bool) -> Iterator[Path]:
    """Every text file below `root`, in an order that does not depend on the file system."""
    skipped = NOT_OURS | TABLES if include_tests else NOT_OURS | TABLES | TESTS
    for directory, children, names in os.walk(root):
        children[:] = sorted(set(children) - skipped)
        yield from (Path(directory, name) for name in sorted(names) if name.endswith(SUFFIXES))


def documents(root: Path, include_tests: bool) -> Iterator[tuple[str, str]]:
    """(path, text) of every document: a file that is valid UTF-8, or one topic of the reference."""
    for file in source_files(root, include_tests):
        path = file.relative_to(root).as_posix()
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if path == TOPICS:
            yield from ((f"{path}#{name}", topic) for name, topic in topics(text))
        else:
            yield path, text


def topics(source: str) -> Iterator[tuple[str, str]]:
    """The entries of `topics = {name: text}`, read without running the file."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).items()


def build(root: Path, output: Path, include_tests: bool, seed: int) -> tuple[int, int]:
    """Write the corpus whole or not at all; return its documents and bytes of text.

    Raises: DataError if `root` holds no Python sources
    """
    by_hash: dict[bytes, tuple[str, str]] = {}
    for path, text in documents(root, include_tests):
        if len(text.strip()) >= SHORTEST_TEXT_CHARS:
            by_hash.setdefault(hashlib.sha256(text.encode()).digest(), (path, text))
    if not by_hash:
        raise DataError(
            str(root),
            found="no text: a missing directory, or a standard library that is zipped or compiled only",
            expected=f"files ending in {', '.join(SUFFIXES)}",
            fix='bring your own text, one {"text": ...} per line: CORPUS=file.jsonl scripts/quickstart.sh',
        )
    rows = list(by_hash.values())
    random.Random(seed).shuffle(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(output.name + ".tmp")
    with staged.open("w", encoding="ascii") as file:
        file.writelines(json.dumps({"text": text, "path": path}) + "\n" for path, text in rows)
    staged.replace(output)
    return len(rows), sum(len(text.encode()) for _, text in rows)


def main(argv: Sequence[str]) -> int:
    """Run the tool; return its exit code."""
    parser = Parser("build_corpus.py", (__doc__ or "").splitlines()[0])
    parser.add_config(CorpusConfig)
    try:
        (config,) = parser.parse_configs([CorpusConfig], argv, {})
        if config.output is None:
            raise ConfigError("--output", found="nothing", expected="the file to write", fix="--output corpus.jsonl")
        root = Path(config.source or sysconfig.get_path("stdlib"))
        count, size_bytes = build(root, Path(config.output), config.include_tests, config.seed)
    except UserError as exc:
        print(f"ERROR: {exc}", file=sys.stderr)
        return exc.exit_code
    print(f"{config.output}: {count} documents, {size_bytes / 1e6:.1f} MB of text from {root}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

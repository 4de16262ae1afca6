#!/usr/bin/env python3
"""Join all .bin/.idx pairs of a folder, in order of their names, into one pair of the same token type.

python tools/merge_datasets.py --input shards/ --output-prefix my-corpus_text_document
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A clone that was never installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ds import log
from megatron_ds.cli import Parser, arg
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.indexed_builder import IndexedDatasetBuilder
from megatron_ds.data.sidecar import merged, read_sidecar
from megatron_ds.errors import ConfigError, DataError, UserError


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Input and output."""

    input: str | None = arg(None, "Folder with the pairs to join.", metavar="DIR")
    output_prefix: str | None = arg(None, "Writes PREFIX.bin and PREFIX.idx.", metavar="PREFIX")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code."""
    try:
        parser = Parser("tools/merge_datasets.py", "Join all .bin/.idx pairs of a folder into one.")
        parser.add_config(MergeConfig)
        (config,) = parser.parse_configs([MergeConfig], sys.argv[1:] if argv is None else argv, {})
        merge(config)
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


def merge(config: MergeConfig) -> None:
    """Join the pairs; their sidecars too, where one tokenizer wrote them all."""
    if config.input is None or config.output_prefix is None:
        missing = "--input" if config.input is None else "--output-prefix"
        raise ConfigError(missing, found="nothing", expected="--input DIR and --output-prefix PREFIX")
    prefixes = _prefixes(Path(config.input), Path(config.output_prefix))
    sidecars = [sidecar for sidecar in map(read_sidecar, prefixes) if sidecar is not None]
    joined = merged(sidecars) if len(sidecars) == len(prefixes) else None
    if joined is None:
        log.warn(f"{config.output_prefix}.json is not written: the parts do not all say that one tokenizer wrote them")
    with IndexedDatasetBuilder(config.output_prefix, IndexedDataset(prefixes[0]).dtype) as builder:
        for prefix in prefixes:
            builder.add_index(prefix)
            log.info(f"{prefix}: {builder.documents} documents, {builder.tokens} tokens so far")
        builder.finalize(joined)


def _prefixes(folder: Path, output: Path) -> list[str]:
    """The pairs of a folder in order of their names, but for an earlier run's output.

    Raises: DataError if there is no folder or no pair; half a pair is refused when it is opened
    """
    if not folder.is_dir():
        raise DataError(f"--input {folder}", found="no such folder", expected="a folder with .bin/.idx pairs")
    names = {path.with_suffix("") for path in folder.iterdir() if path.suffix in (".bin", ".idx")}
    prefixes = sorted(str(name) for name in names if name.resolve() != output.resolve())
    if not prefixes:
        raise DataError(f"--input {folder}", found="no .bin/.idx pair", expected="at least one")
    return prefixes


if __name__ == "__main__":
    sys.exit(main())

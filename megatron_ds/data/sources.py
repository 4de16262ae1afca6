"""The datasets of one run: which files, which part of them, how many samples of each; the same for every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ds import log
from megatron_ds.data.blend import (
    Array,
    Blend,
    BlendedDataset,
    TokenDataset,
    Weights,
    build_blend_index,
    normalize,
    parse_blend,
    shares,
    source_sizes,
)
from megatron_ds.data.config import DataConfig
from megatron_ds.data.index_cache import Arrays, IndexCache
from megatron_ds.data.indexed import IndexedDataset, raise_open_file_limit
from megatron_ds.data.splits import Range, split_ranges
from megatron_ds.data.vocabulary import check_vocabulary
from megatron_ds.errors import ConfigError, DataError

PARTS = ("training", "validation", "test")


@dataclass(frozen=True)
class Datasets:
    """The three sets; None where no sample was asked for, or where --split gives the part a share of 0."""

    train: TokenDataset | None
    valid: TokenDataset | None
    test: TokenDataset | None


class Cut(Protocol):
    """How one model cuts a range of a dataset's documents into samples."""

    @property
    def name(self) -> str:
        """Of its index in the cache."""
        ...

    @property
    def seq_length(self) -> int:
        """Most tokens of one sample."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that a dataset may hold."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """The tokenizer's."""
        ...

    @property
    def least_tokens(self) -> int:
        """Tokens that one epoch must have for one sample."""
        ...

    def documents(self, data: IndexedDataset) -> int:
        """How many documents --split shares out."""
        ...

    def tokens(self, data: IndexedDataset, found: Range) -> int:
        """Tokens of a range."""
        ...

    def check(self, data: IndexedDataset, found: Range, part: str) -> None:
        """Raises: DataError for a range with tokens but without a sample in any number of epochs"""
        ...

    def key(self) -> dict[str, Any]:
        """What the index depends on, besides data, range and number of samples."""
        ...

    def index(self, data: IndexedDataset, found: Range, samples: int | None) -> Arrays:
        """The index with at least `samples` samples, one epoch where None."""
        ...

    def dataset(self, data: IndexedDataset, index: Arrays) -> TokenDataset:
        """The samples of an index."""
        ...

    def epochs(self, samples: int, tokens: int, index: Arrays) -> float:
        """How often `samples` samples read the range's tokens."""
        ...


@dataclass(frozen=True)
class _Source:
    """One part of one dataset, cut into samples."""

    prefix: str
    tokens: int
    index: Arrays
    dataset: TokenDataset


def mock_datasets(num_samples: tuple[int, int, int], mock: Callable[[int, int], TokenDataset]) -> Datasets:
    """Sets that need no files, of `mock`, which takes the number of samples and of the part."""
    return Datasets(*(mock(samples, part) if samples else None for part, samples in enumerate(num_samples)))


def build_datasets(config: DataConfig, num_samples: tuple[int, int, int], cut: Cut) -> Datasets:
    """The sets that the data flags describe, each with at least the samples asked for. Every process may call it.

    Comm:   none; processes share built indices through the cache folder
    Raises: ConfigError, DataError
    """
    raise_open_file_limit()
    sources = _Sources(config, cut)
    blends = _blends(config)
    # All faults are found before the first index is built and stored.
    for part, blend in enumerate(blends):
        if blend is not None and num_samples[part]:
            sources.check(part, blend, num_samples[part])
    built = [
        sources.part(part, blends[part], num_samples[part]) if num_samples[part] else None for part in range(len(PARTS))
    ]
    return Datasets(*built)


def _blends(config: DataConfig) -> list[Blend | None]:
    """What training, validation and test read; None where nothing is given.

    Raises: ConfigError unless the data come from --data-path or from the three flags
    """
    separate = {
        "--train-data-path": config.train_data_path,
        "--valid-data-path": config.valid_data_path,
        "--test-data-path": config.test_data_path,
    }
    if config.data_path and any(separate.values()):
        given = [flag for flag, words in separate.items() if words]
        raise ConfigError(
            "--data-path", found=f"also {', '.join(given)}", expected="one or the other", fix="drop --data-path"
        )
    if config.data_path:
        return [parse_blend(config.data_path, "--data-path")] * len(PARTS)
    if not any(separate.values()):
        raise ConfigError(
            "--data-path", found="nothing", expected="a dataset", fix="give --data-path PREFIX, or --mock-data"
        )
    return [parse_blend(words, flag) if words else None for flag, words in separate.items()]


class _Sources:
    """The opened datasets of one run, and what it takes to cut samples from them."""

    def __init__(self, config: DataConfig, cut: Cut):
        self.config, self.cut = config, cut
        self.opened: dict[str, IndexedDataset] = {}
        self.caches: dict[Path, IndexCache] = {}

    def check(self, part: int, blend: Blend, samples: int) -> None:
        """Open what a part reads.

        Raises: DataError for a damaged or unfitting file, or for a source without a sample for this part
        """
        ranges = [self.range(prefix, part) for prefix in blend.prefixes]
        if part and all(found is None for found in ranges):
            return
        for prefix, found in zip(blend.prefixes, ranges, strict=True):
            data = self.open(prefix)
            if not self.cut.tokens(data, found or (0, 0)):
                raise self.empty(part, data, samples)
            self.cut.check(data, found or (0, 0), PARTS[part])

    def part(self, part: int, blend: Blend | None, samples: int) -> TokenDataset | None:
        """One of the three sets."""
        if blend is None:
            log.info(f"no data for {PARTS[part]}: it is left out")
            return None
        ranges = [self.range(prefix, part) for prefix in blend.prefixes]
        if part and all(found is None for found in ranges):
            log.info(f"--split {self.config.split!r} has no share for {PARTS[part]}: it is left out")
            return None
        single = len(blend.prefixes) == 1 and (blend.weights is None or not self.config.data_path)
        if single:
            source = self.source(part, blend.prefixes[0], ranges[0], samples)
            self.report(part, [source], [1.0], [samples])
            return source.dataset
        if blend.weights is None:
            return self.by_length(part, blend, ranges, samples)
        return self.weighted(part, blend, ranges, samples)

    def weighted(self, part: int, blend: Blend, ranges: list[Range | None], samples: int) -> TokenDataset:
        """A blend by given weights; sources repeat as often as that takes."""
        assert blend.weights is not None
        weights = normalize(blend.weights)
        # Megatron-Core normalises a second time, which may change the last bit and with it a tie.
        index = self.blend_index(blend, normalize(weights), sum(shares(weights, samples)))
        taken = np.bincount(index["source"], minlength=len(weights)).tolist()
        sizes = source_sizes(weights, samples, taken)
        parts = zip(blend.prefixes, ranges, sizes, strict=True)
        sources = [self.source(part, prefix, found, size) for prefix, found, size in parts]
        self.report(part, sources, weights.tolist(), taken)
        return BlendedDataset([source.dataset for source in sources], index)

    def by_length(self, part: int, blend: Blend, ranges: list[Range | None], samples: int) -> TokenDataset:
        """A blend of one epoch of each source, each by its length."""
        parts = list(zip(blend.prefixes, ranges, strict=True))
        sources = [self.source(part, prefix, found, None) for prefix, found in parts]
        lengths = [len(source.dataset) for source in sources]
        if sum(lengths) < samples and self.config.dataloader_type == "single":
            raise DataError(
                f"{PARTS[part]} data",
                found=f"{sum(lengths)} samples in one epoch of {len(lengths)} datasets",
                expected=f"{samples} samples",
                fix="give weights (w1 PREFIX1 w2 PREFIX2 ...), then datasets repeat, or --dataloader-type cyclic",
            )
        weights = normalize(lengths)
        index = self.blend_index(blend, weights, min(samples, sum(lengths)))
        taken = np.bincount(index["source"], minlength=len(weights)).tolist()
        for place, (length, count) in enumerate(zip(lengths, taken, strict=True)):
            # The greedy rule may overshoot a length by one; Megatron-Core then gives up.
            if count > length:
                sources[place] = self.source(part, *parts[place], count)
        self.report(part, sources, weights.tolist(), taken)
        return BlendedDataset([source.dataset for source in sources], index)

    def blend_index(self, blend: Blend, weights: Weights, size: int) -> dict[str, Array]:
        """The blend's index, kept beside its first source."""
        key = {"weights": weights.tolist(), "size": size}
        return self.cache(blend.prefixes[0]).get("blend", key, lambda: build_blend_index(weights, size))

    def open(self, prefix: str) -> IndexedDataset:
        """The dataset of a prefix, opened and checked once."""
        if prefix not in self.opened:
            data = IndexedDataset(prefix, mmap_bin=self.config.mmap_bin_files)
            check_vocabulary(data, self.cut.vocab_size, self.cut.fingerprint)
            self.opened[prefix] = data
        return self.opened[prefix]

    def cache(self, prefix: str) -> IndexCache:
        """The cache folder for what is built from a dataset."""
        given = self.config.data_cache_path
        folder = Path(given) if given else Path(prefix).resolve().parent / "cache" / "GPTDataset_indices"
        return self.caches.setdefault(folder, IndexCache(folder))

    def range(self, prefix: str, part: int) -> Range | None:
        """The documents of a dataset that belong to this part."""
        documents = self.cut.documents(self.open(prefix))
        return split_ranges(self.config.split, documents)[part] if self.config.data_path else (0, documents)

    def source(self, part: int, prefix: str, found: Range | None, samples: int | None) -> _Source:
        """Samples of one part of one dataset, one epoch where their number is not given.

        Raises: DataError if one epoch holds not even one sample
        """
        data, cut, bounds = self.open(prefix), self.cut, found or (0, 0)
        key = {"data": data.fingerprint, "range": list(bounds), "samples": samples} | cut.key()
        try:
            index = self.cache(prefix).get(cut.name, key, lambda: cut.index(data, bounds, samples))
        except (MemoryError, ValueError) as error:  # numpy raises either, by how far it is too much
            raise DataError(
                f"{prefix}, {PARTS[part]}",
                found=f"{samples} samples asked for; their index does not fit into memory ({error})",
                expected="an index of some 20 bytes a sample that does",
                fix="lower --train-iters or --train-samples: a later run resumes with more",
            ) from error
        dataset = cut.dataset(data, index)
        if not len(dataset):
            raise DataError(
                f"{prefix}, {PARTS[part]}",
                found="less than one sample in one epoch",
                expected=f"at least {cut.least_tokens} tokens",
                fix="give the datasets weights (w1 PREFIX1 w2 PREFIX2 ...): they then repeat",
            )
        return _Source(prefix, cut.tokens(data, bounds), index, dataset)

    def empty(self, part: int, data: IndexedDataset, samples: int) -> DataError:
        """What to say of a part that no number of epochs would fill."""
        documents, name = self.cut.documents(data), PARTS[part]
        if self.config.data_path:
            ends = [found[1] - found[0] if found else 0 for found in split_ranges(self.config.split, documents)]
            subject = f"--split {self.config.split!r} of {data.prefix}"
            sizes = ", ".join(f"{PARTS[i]} {n}" for i, n in enumerate(ends)) + f" of {documents} documents"
        else:
            subject, sizes = data.prefix, f"{documents} documents, {data.tokens} tokens"
        way_out = (
            "use more documents" if part == 0 else "use more documents, a share of 0 to leave it out, or --eval-iters 0"
        )
        return DataError(
            subject,
            found=f"no tokens for {name} ({sizes})",
            expected=f"some, for {samples} samples of {name}",
            fix=f"give {name} a larger share, {way_out}",
        )

    def report(self, part: int, sources: list[_Source], weights: list[float], taken: list[int]) -> None:
        """One line per source: what it gives to this part."""
        log.info(f" > {PARTS[part]}: {sum(taken)} samples of {self.cut.seq_length} tokens")
        for source, weight, samples in zip(sources, weights, taken, strict=True):
            epochs = self.cut.epochs(samples, source.tokens, source.index)
            log.info(f"     {weight:6.1%}  {epochs:8.3f} epochs of {source.tokens} tokens  {source.prefix}")

"""Text to ids and back, under Megatron's names, from local files only."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_ds.data import tokenizer_kinds as kinds
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.errors import ConfigError


class Tokenizer(Protocol):
    """What data, training and sampling need to know of a tokenizer.

    Raises: DataError where a special token is asked for that the vocabulary lacks
    """

    @property
    def name(self) -> str:
        """Megatron's name of its type."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eod(self) -> int:
        """Id that ends a document."""
        ...

    @property
    def cls(self) -> int:
        """Id that begins a sample."""
        ...

    @property
    def sep(self) -> int:
        """Id that ends a segment."""
        ...

    @property
    def mask(self) -> int:
        """Id that hides a token."""
        ...

    @property
    def pad(self) -> int:
        """Id that fills a sample up."""
        ...

    @property
    def bos(self) -> int:
        """Id that begins a decoder's input."""
        ...

    @property
    def eos(self) -> int:
        """Id that ends a decoder's labels."""
        ...

    @property
    def sentinels(self) -> tuple[int, ...]:
        """Ids of <extra_id_0>, <extra_id_1> ...; none is no fault here."""
        ...

    @property
    def continuations(self) -> npt.NDArray[np.bool_]:
        """Of every id: does it continue a word?"""
        ...

    @property
    def random_ids(self) -> npt.NDArray[np.int64]:
        """Ids that a token may be replaced with at random, rising."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; the name of a special token within it is ordinary text."""
        ...

    def tokenize_batch(self, texts: Sequence[str], bare: bool = False) -> list[list[int]]:
        """Ids of each text; bare: as a sentence within a text, so with no special token around it."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of these ids."""
        ...

    def fingerprint(self) -> str:
        """Hash of its kind and of its files' bytes: equal only where the same text gets the same ids."""
        ...


def build_tokenizer(config: TokenizerConfig, default_type: str = "GPT2BPETokenizer") -> Tokenizer:
    """The tokenizer that the flags describe.

    Raises: ConfigError for an unknown type or a flag that is not given, DataError for a missing or damaged file
    """
    name = config.tokenizer_type or default_type
    if name not in _KINDS:
        near = difflib.get_close_matches(name, _KINDS, n=1, cutoff=0) or [default_type]
        raise ConfigError(
            "--tokenizer-type", found=name, expected=f"one of {', '.join(_KINDS)}", fix=f"--tokenizer-type {near[0]}"
        )
    return _KINDS[name].build(config, name)


def planned_vocab_size(config: TokenizerConfig, default_type: str = "GPT2BPETokenizer") -> tuple[int, str]:
    """The vocabulary's size, and where the number comes from; files that are not here are no fault.

    Raises: ConfigError where nothing tells the size
    """
    name = config.tokenizer_type or default_type
    kind = _KINDS.get(name)
    if kind is None or not kind.flags or all(_given(config, flag) for flag in kind.flags):
        return build_tokenizer(config, default_type).vocab_size, f"counted by {name}"
    absent = f"the files of {name} are not here"
    added = kind.adds + config.vocab_extra_ids
    if config.vocab_size is not None:
        return config.vocab_size + added, f"--vocab-size, for {absent}"
    if kind.usual_size is None:
        raise ConfigError(
            f"--{kind.flags[0]}", found=absent, expected="the file, or --vocab-size", fix="--vocab-size 32000, say"
        )
    return kind.usual_size + added, f"the usual {kind.usual_size}, for {absent}"


def _given(config: TokenizerConfig, flag: str) -> bool:
    path = vars(config)[flag.replace("-", "_")]
    return path is not None and Path(path).exists()


@dataclass(frozen=True)
class _Kind:
    build: Callable[[TokenizerConfig, str], Tokenizer]
    flags: tuple[str, ...]
    usual_size: int | None
    adds: int = 0
    """Tokens that it always adds to its files'."""


_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "GPT2BPETokenizer": _Kind(kinds.gpt2_bpe, ("vocab-file", "merge-file"), 50257),
        "BertWordPieceLowerCase": _Kind(kinds.word_piece, ("vocab-file",), 30522, len(kinds.BERT_ADDED)),
        "BertWordPieceCase": _Kind(kinds.word_piece, ("vocab-file",), 28996, len(kinds.BERT_ADDED)),
        "SentencePieceTokenizer": _Kind(kinds.sentence_piece, ("tokenizer-model",), 32000),
        "GPTSentencePieceTokenizer": _Kind(kinds.sentence_piece, ("tokenizer-model",), 32000),
        "Llama2Tokenizer": _Kind(kinds.sentence_piece, ("tokenizer-model",), 32000),
        "HFTokenizer": _Kind(kinds.hugging_face, ("tokenizer-model",), None),
        "HuggingFaceTokenizer": _Kind(kinds.hugging_face, ("tokenizer-model",), None),
        "PretrainedFromHF": _Kind(kinds.hugging_face, ("tokenizer-model",), None),
        "NullTokenizer": _Kind(kinds.null, (), None),
    }
)

"""A tokenizer library behind the protocol of tokenizer.py: its vocabulary, the names we add to it, special tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, groupby, takewhile
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from megatron_ds.errors import DataError

ROLES = MappingProxyType(
    {
        "cls": "to begin a sample with",
        "sep": "to end a segment with",
        "mask": "to hide tokens with",
        "pad": "to fill a sample up with",
        "bos": "to begin the decoder's input with",
        "eos": "to end the decoder's labels with",
    }
)
"""Special tokens and what they are wanted for."""


@dataclass(frozen=True)
class Vocabulary:
    """The library's pieces with their ids, then names that we add."""

    own: Mapping[str, int]
    added: tuple[str, ...]

    @classmethod
    def extended(cls, own: Mapping[str, int], wanted: Iterable[str]) -> Vocabulary:
        """The library's pieces and, after them, those wanted names that are not among them."""
        return cls(own, tuple(name for name in wanted if name not in own))

    @cached_property
    def own_size(self) -> int:
        """One more than the library's largest id."""
        return max(self.own.values()) + 1

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Every name's id."""
        return {**self.own, **{name: self.own_size + place for place, name in enumerate(self.added)}}


@dataclass(frozen=True, kw_only=True)
class LocalTokenizer:
    """One tokenizer from local files."""

    name: str
    vocabulary: Vocabulary
    eod: int
    roles: Mapping[str, str]
    """Role, one of ROLES -> the token that plays it."""
    source: str
    """The flag and file that an error names."""
    remedy: str
    """What helps where no token plays a role; may name {role} and {token}."""
    continues: Callable[[str], bool]
    """Does one of the library's pieces continue a word?"""
    encode_batch: Callable[[Sequence[str], bool], list[list[int]]]
    """Texts, bare or not -> ids."""
    decode: Callable[[list[int]], str]
    digest: str

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.vocabulary.own_size + len(self.vocabulary.added)

    @property
    def cls(self) -> int:
        """Id that begins a sample."""
        return self._special("cls")

    @property
    def sep(self) -> int:
        """Id that ends a segment."""
        return self._special("sep")

    @property
    def mask(self) -> int:
        """Id that hides a token."""
        return self._special("mask")

    @property
    def pad(self) -> int:
        """Id that fills a sample up."""
        return self._special("pad")

    @property
    def bos(self) -> int:
        """Id that begins a decoder's input."""
        return self._special("bos")

    @property
    def eos(self) -> int:
        """Id that ends a decoder's labels."""
        return self._special("eos")

    @cached_property
    def sentinels(self) -> tuple[int, ...]:
        """Ids of <extra_id_0>, <extra_id_1> ... as far as there are any."""
        ids = self.vocabulary.ids
        return tuple(ids[name] for name in takewhile(ids.__contains__, map(extra_id, count())))

    @cached_property
    def continuations(self) -> npt.NDArray[np.bool_]:
        """Of every id: does it continue a word?"""
        found = np.zeros(self.vocab_size, np.bool_)
        found[[token for piece, token in self.vocabulary.own.items() if self.continues(piece)]] = True
        return found

    @cached_property
    def random_ids(self) -> npt.NDArray[np.int64]:
        """Ids that a token may be replaced with at random: all that have a name, rising."""
        return np.unique(np.fromiter(self.vocabulary.ids.values(), np.int64))

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encode_batch([text], False)[0]

    def tokenize_batch(self, texts: Sequence[str], bare: bool = False) -> list[list[int]]:
        """Ids of each text."""
        return self.encode_batch(texts, bare)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of these ids; ids that we added read as their names."""
        own_size, added = self.vocabulary.own_size, self.vocabulary.added
        parts = []
        for is_own, group in groupby(map(int, ids), lambda token: token < own_size):
            run = list(group)
            parts.append(self.decode(run) if is_own else "".join(added[token - own_size] for token in run))
        return "".join(parts)

    def fingerprint(self) -> str:
        """Hash of kind and files."""
        return self.digest

    def _special(self, role: str) -> int:
        token = self.roles.get(role, "")
        if token not in self.vocabulary.ids:
            raise DataError(
                self.source,
                found=f"no token {token}" if token else f"no {role} token",
                expected=f"one, {ROLES[role]}",
                fix=self.remedy.format(role=role, token=token),
            )
        return self.vocabulary.ids[token]


def extra_id(number: int) -> str:
    """Name of a sentinel."""
    return f"<extra_id_{number}>"

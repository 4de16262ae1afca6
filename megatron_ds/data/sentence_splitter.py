"""English text to sentences, by rules that need no trained model, so that one text is split in one way everywhere.

A sentence ends at `.`, `!`, `?` or an ellipsis, with quotes and brackets that close there, if a blank follows and what
comes next can begin a sentence; and at an empty line. A full stop may instead belong to its word:

    title    Mr. Dr. e.g. vs.     what follows belongs to it: never an end
    counted  No. p. Fig. Jan.     no end before a number
    other    Inc. etc. U.S. J.    an end only before a word that often begins a sentence: The, It, But ...
    item     1. a. (at the start) a list's number: no end
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

_CLOSING = "\"')]}*_`\u201d\u2019\u00bb"
_OPENING = "\"'([{*_`\u201c\u2018\u00ab\u2013\u2014-"
_STOPS = ".!?\u2026"
_STOP = re.compile(f"[{_STOPS}][{re.escape(_STOPS + _CLOSING)}]*")
_EMPTY_LINE = re.compile(r"\n[^\S\n]*\n\s*")
_LETTERS = re.compile(r"[^\W\d_]+")
_ITEM = re.compile(r"\(?(?:[0-9]{1,3}|[A-Za-z]|[ivxIVX]{1,4})\.\)?")
_LONGEST_ITEM = 8
_LONGEST_WORD = 40


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TITLES = _words(
    """
    adm brig capt cmdr col cpl dr drs fr gen gov hon lt maj messrs mlle mme mr mrs ms mt mx pres prof rep rev sen sgt
    supt cf e.g eg i.e ie viz vs v
    """
)
_COUNTED = _words(
    """
    app art c ch chap eq eqs fig figs l ll no nos nr p par pp pt sec sect vol vols
    jan feb mar apr jun jul aug sep sept oct nov dec
    """
)
_OTHER = _words(
    """
    al approx assn ave bldg blvd bros ca co corp dept dist ed eds esp est etc ext inc incl jr ltd mfg orig ph.d phd pl
    plc rd resp sq sr st tel univ
    """
)
_STARTERS = _words(
    """
    A After All Also Although An And Another Any As At Because Before Both But By Each Even Every Finally First For From
    He Her Here His How However I If In It Its Many Most My No Not Now Of On Once One Only Or Our Perhaps She Since So
    Some Such That The Their Then There These They This Those Though Thus To Today Under Until We What When Where Which
    While Who Why With Yes Yet You Your
    """
)


def split_sentences(text: str, keep_newlines: bool = False) -> list[str]:
    """The sentences of a text in order, without the blanks around them; line breaks are blanks unless they are kept."""
    edges = [0, *_ends(text), len(text)]
    pieces = [text[start:stop] for start, stop in pairwise(edges) if text[start:stop].strip()]
    if keep_newlines:
        return [piece.strip(" \t") for piece in pieces]
    return [" ".join(line.strip() for line in piece.split("\n") if line.strip()) for piece in pieces]


def _ends(text: str) -> Iterator[int]:
    """Where each sentence but the last one gives way to the next."""
    start = 0
    for paragraph_end in (*(line.end() for line in _EMPTY_LINE.finditer(text)), len(text)):
        for stop in _STOP.finditer(text, start, paragraph_end):
            following = _skip(text, stop.end(), paragraph_end)
            if stop.end() < following < paragraph_end and _is_end(text, start, stop, following):
                yield following
                start = following
        if paragraph_end < len(text):
            yield paragraph_end
        start = paragraph_end


def _skip(text: str, place: int, limit: int) -> int:
    """The first place from here that holds no blank."""
    while place < limit and text[place].isspace():
        place += 1
    return place


def _is_end(text: str, start: int, stop: re.Match[str], following: int) -> bool:
    """Does this stop, before blanks and then `following`, end the sentence that began at `start`?"""
    while following < len(text) and text[following] in _OPENING:
        following += 1
    first = text[following : following + 1]
    if not first or first.islower() or first in _STOPS:
        return False
    if stop.group().rstrip(_CLOSING) != "." or stop.start() == start or text[stop.start() - 1].isspace():
        return True
    sentence = text[start : stop.end()].strip() if stop.end() - start <= _LONGEST_ITEM else ""
    word = text[max(start, stop.start() - _LONGEST_WORD) : stop.start()].split()[-1].lstrip(_OPENING)
    return not (_ITEM.fullmatch(sentence) or _keeps_stop(word, text, following))


def _keeps_stop(word: str, text: str, following: int) -> bool:
    """Is the full stop after `word` a part of it, and no end?"""
    lower = word.lower()
    if lower in _TITLES or (lower in _COUNTED and text[following].isdigit()):
        return True
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    is_acronym = "." in word and all(len(part) == 1 and part.isalpha() for part in word.split("."))
    return (is_initial or is_acronym or lower in _OTHER) and not _often_begins(text, following)


def _often_begins(text: str, place: int) -> bool:
    """Is the word at `place` one that sentences often begin with, and no initial?"""
    word = _LETTERS.match(text, place)
    if word is None or word.group() not in _STARTERS:
        return False
    return len(word.group()) > 1 or text[word.end() : word.end() + 1] != "."

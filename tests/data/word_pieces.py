"""BERT's tokenizer by its definition, letter by letter."""

from __future__ import annotations

import unicodedata


def bert_words(text: str, lower: bool) -> list[str]:
    """Clean, set Chinese letters apart, fold, cut at blanks and punctuation."""
    spaced = ""
    for letter in text:
        if letter in "\t\n\r" or unicodedata.category(letter) == "Zs":
            spaced += " "
        elif letter != "\ufffd" and not unicodedata.category(letter).startswith("C"):
            spaced += f" {letter} " if 0x4E00 <= ord(letter) <= 0x9FFF else letter
    if lower:
        apart = unicodedata.normalize("NFD", spaced.lower())
        spaced = "".join(letter for letter in apart if unicodedata.category(letter) != "Mn")
    words = [""]
    for letter in spaced:
        is_ascii_sign = letter.isascii() and letter.isprintable() and not letter.isalnum() and letter != " "
        if is_ascii_sign or unicodedata.category(letter).startswith("P"):
            words += [letter, ""]
        elif letter == " ":
            words.append("")
        else:
            words[-1] += letter
    return [word for word in words if word]


def longest_first(word: str, vocab: dict[str, int]) -> list[int]:
    """The longest piece that fits, again and again; one [UNK] where none fits."""
    ids, start = [], 0
    while start < len(word):
        stop = next((e for e in range(len(word), start, -1) if "##" * (start > 0) + word[start:e] in vocab), None)
        if stop is None:
            return [vocab["[UNK]"]]
        ids.append(vocab["##" * (start > 0) + word[start:stop]])
        start = stop
    return ids if len(word) <= 100 else [vocab["[UNK]"]]

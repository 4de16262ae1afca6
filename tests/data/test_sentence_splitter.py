"""Sentences as a reader would cut them; `|` stands between two sentences."""

from __future__ import annotations

import time

import pytest

from megatron_ds.data.sentence_splitter import split_sentences

CUT = [
    "It rains.|It pours!|Does it?|Yes.",
    "One sentence without an end",
    "Mr. and Mrs. Smith met Dr. J. R. Jones.|He left at 5 p.m.|The shop closed.",
    "It costs $3.50, or 4.20 with tax.|Version 1.2.3 of foo.bar() is out.|In 1990.|5 men came.",
    "See Fig. 3, Sec. 4.2 and p. 12, e.g. this one, i.e. that.|Doe et al. Science 5.|Cf. Vol. 2.",
    "The U.S. Army came to the U.S.|It left.|Apple Inc. Bar met Foo Inc.|The end.",
    "So did I.|Then vitamin C.|But on Jan. 5 he said no.|Yes?",
    '"Why?" he asked.|"Because."|She went.|(See above.)|Next.',
    "\u201cQuoted.\u201d|\u2018Next\u2019 one.|He said \u201cgo.\u201d|They went.",
    "It was... strange.|He paused...|Then he left\u2026|Well . . . no. . .|Yes?!|No!!",
    "Wait . . . for it.|Yahoo! is a firm.|What? is a word.",
    "1. First item.|2. Second item.|(3.) Third.|IV. Fourth.",
    "Am I?|I am.|Send me: a) or b).|*Bold.*|_Thin._|End.",
    "J. Smith came.|A. The B. Cornell Univ.|It's there.|He was here (in the U.K.).|Who?",
    "\u00c9t\u00e9 came.|\u00c9t\u00e9 went.|\u00d6l.|\u65e5\u672c is Japan.|\u65e5\u672c.",
]


@pytest.mark.parametrize("text", CUT)
def test_sentences(text: str) -> None:
    sentences = text.split("|")
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("  " + "\n \t".join(sentences) + "\n") == sentences


def test_empty_lines_end_sentences_and_line_breaks_do_not() -> None:
    text = "\n Heading\n\nA line\n  goes on. Next\r\none.\n \n\nLast\n"
    assert split_sentences(text) == ["Heading", "A line goes on.", "Next one.", "Last"]
    assert split_sentences(text, keep_newlines=True) == [
        "\n Heading\n\n", "A line\n  goes on.", "Next\r\none.\n \n\n", "Last\n"
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "   ", "\n\n", "\t\n \n"])
def test_nothing_is_no_sentence(text: str) -> None:
    assert split_sentences(text) == [] == split_sentences(text, keep_newlines=True)


def test_no_letter_is_lost() -> None:
    text = " ".join(CUT).replace("|", "\n\n") + ". ... ! x ?\n. "
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    assert "".join("".join(split_sentences(text, True)).split()) == "".join(text.split())


@pytest.mark.parametrize(
    "unit", [".", "a.", ". ", " ", "\n", "\n x", "(", ".' ", '" ? ', "A. ", "x", "The. (", ") ", "...\n\n"]
)
def test_time_grows_with_the_text_and_no_faster(unit: str) -> None:
    """300 KB of what makes careless patterns quadratic, which would take minutes."""
    started = time.process_time()
    split_sentences("Start. " + unit * (300_000 // len(unit)) + "x")
    assert time.process_time() - started < 5

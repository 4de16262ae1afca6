"""Which whole words of a sample are hidden, and what stands there instead.

Words are tried in random order: a run of `draw_words` words from there on, shortened until it fits what is left of the
budget, is hidden unless part of it is already. The draws are taken one by one in this order, so a seed gives Megatron's
choice.
Source: Devlin et al. 2019, arXiv:1810.04805; Joshi et al. 2020, arXiv:1907.10529 (geometric runs); order as in Megatron
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NGRAM_WORDS = 3
"""BERT hides up to so many words at a time, n of them with a chance proportional to 1 / n."""
SPAN_WORDS = 10
"""T5 hides up to so many words at a time, n of them by a geometric distribution."""
_SPAN_ENDS = 0.2

Array = npt.NDArray[Any]
Rng = np.random.RandomState
Span = list[int]


@dataclass(frozen=True)
class Words:
    """The words among some tokens: word w is positions[starts[w]:starts[w + 1]]."""

    positions: list[int]
    starts: list[int]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def run(self, word: int, words: int) -> Span:
        """Positions of `words` words from `word` on, fewer at the end."""
        return self.positions[self.starts[word] : self.starts[min(word + words, len(self))]]


def find_words(tokens: Array, is_continuation: Array, separators: tuple[int, ...] = ()) -> Words:
    """Words of a sample: a token that continues a word joins the word before, even across a separator, as in Megatron.

    Shapes: tokens [n], is_continuation [v]
    """
    inside = np.ones(len(tokens), bool)
    for separator in separators:
        inside &= tokens != separator
    positions = np.flatnonzero(inside)
    begins = ~is_continuation[tokens[positions]]
    begins[:1] = True
    return Words(positions.tolist(), np.append(np.flatnonzero(begins), len(positions)).tolist())


def mask_budget(mask_prob: float, tokens: int, target: int) -> int:
    """Most tokens to hide in a sample of `tokens` tokens that aimed at `target`."""
    return int(min(mask_prob * target, max(1, round(tokens * mask_prob))))


def draw_ngram(rng: Rng) -> int:
    """1 to NGRAM_WORDS words."""
    # One double and a search is what rng.choice(p=...) does, without its checks.
    return 1 + int(_NGRAM_CDF.searchsorted(rng.random_sample(), side="right"))


def draw_span(rng: Rng) -> int:
    """1 to SPAN_WORDS words."""
    return min(int(rng.geometric(_SPAN_ENDS)), SPAN_WORDS)


def choose_spans(
    words: Words,
    budget: int,
    rng: Rng,
    draw_words: Callable[[Rng], int],
    hide: Callable[[int], None] | None = None,
    max_spans: int | None = None,
) -> list[Span]:
    """Positions to hide, run by run in text order; `hide` is called with each when it is chosen, for its own draws."""
    order = np.arange(len(words))
    rng.shuffle(order)
    hidden, spans = set[int](), list[Span]()
    for word in order.tolist():
        if len(hidden) >= budget or len(spans) == max_spans:
            break
        count = draw_words(rng)
        while count and len(hidden) + len(words.run(word, count)) > budget:
            count -= 1
        span = words.run(word, count)
        if not span or not hidden.isdisjoint(span):
            continue
        hidden.update(span)
        spans.append(span)
        if hide is not None:
            for position in span:
                hide(position)
    return sorted(spans)


def random_parts(total: int, parts: int, rng: Rng) -> Array:
    """`total` cut into `parts` lengths of at least 1, every way with the same chance.

    Source: T5's random_segmentation, Raffel et al. 2020, arXiv:1910.10683
    """
    cuts = np.arange(total - 1) < parts - 1
    rng.shuffle(cuts)
    return np.bincount(np.concatenate(([0], np.cumsum(cuts))), minlength=parts)


def _ngram_cdf() -> npt.NDArray[np.float64]:
    chances = 1.0 / np.arange(1, NGRAM_WORDS + 1)
    # Megatron normalises twice, and numpy's choice once more: the last bit may decide.
    for _ in range(2):
        chances = chances / chances.sum()
    ends = chances.cumsum()
    ends /= ends[-1]
    return ends


_NGRAM_CDF = _ngram_cdf()

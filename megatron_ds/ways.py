"""Ways out of a broken rule: the words that messages share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Ways(NamedTuple):
    """What a rule about the layout may propose, each checked against all rules.

    layouts: the nearest legal layouts, as flags. world: the nearest number of ranks that is legal.
    """

    layouts: str = ""
    world: str = ""


NO_WAYS = Ways()
"""While ways are sought, rules only have to say whether they hold."""


def either(*options: str) -> str:
    """Alternatives in one sentence, empty ones left out."""
    return ", or ".join(option for option in options if option)


def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def nearest(numbers: Iterable[int], wanted: int) -> int:
    """The one closest to what was asked for, the smaller of two."""
    return min(numbers, key=lambda number: (abs(number - wanted), number))


def nearest_multiple(unit: int, wanted: int) -> int:
    """The positive multiple of `unit` closest to `wanted`."""
    return nearest({max(1, wanted // unit) * unit, (wanted // unit + 1) * unit}, wanted)


def plural(count: int, word: str) -> str:
    """`1 rank`, `2 ranks`"""
    return f"{count} {word}{'s' * (count != 1)}"

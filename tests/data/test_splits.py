"""Document ranges against bounds worked out by hand."""

from __future__ import annotations

import pytest

from megatron_ds.data.splits import parse_split, split_ranges
from megatron_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("split", "documents", "ranges"),
    [
        ("969, 30, 1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 149, [(0, 144), (144, 149), (149, 149)]),  # 144.381, 148.851
        ("969/30/1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("1 1 1", 5, [(0, 2), (2, 3), (3, 5)]),  # 1.67, 3.33
        ("0.5,0.5", 5, [(0, 2), (2, 5), None]),  # 2.5 goes to the even 2
        ("100,0,0", 7, [(0, 7), None, None]),
        ("0,50,50", 3, [None, (0, 2), (2, 3)]),
        ("3", 4, [(0, 4), None, None]),
    ],
)
def test_ranges(split: str, documents: int, ranges: list[tuple[int, int] | None]) -> None:
    assert list(split_ranges(split, documents)) == ranges


@pytest.mark.parametrize("split", ["", "a,b,c", "1,2,3,4", "0,0,0", "-1,2", "nan,1", "1,,x"])
def test_nonsense_is_refused(split: str) -> None:
    with pytest.raises(ConfigError, match="--split"):
        parse_split(split)

"""Which documents train, which validate, which test: `--split 969,30,1` -> three ranges."""

from __future__ import annotations

import math
import re

import numpy as np

from megatron_ds.errors import ConfigError

Range = tuple[int, int]


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of training, validation and test that sum to 1; missing ones are 0.

    Raises: ConfigError unless split is one to three numbers >= 0 that are not all 0
    """
    words = [word for word in re.split(r"[,/\s]+", split.strip()) if word]
    try:
        shares = [float(word) for word in words]
    except ValueError:
        shares = []
    valid = 1 <= len(shares) <= 3 and all(math.isfinite(s) and s >= 0 for s in shares) and sum(shares) > 0
    if not valid:
        raise ConfigError(
            "--split",
            found=repr(split),
            expected="one to three numbers >= 0 (training, validation, test), not all 0",
            fix="for example --split 969,30,1",
        )
    train, valid_share, test = np.array(shares + [0.0] * (3 - len(shares))) / np.sum(shares)
    return float(train), float(valid_share), float(test)


def split_ranges(split: str, documents: int) -> tuple[Range | None, Range | None, Range | None]:
    """Half-open document ranges of training, validation and test; None where the share is 0.

    The bounds are the rounded cumulative shares, so the ranges tile all documents.
    Source: Megatron-Core's rule
    """
    low, ranges = 0.0, list[Range | None]()
    for share in parse_split(split):
        high = low + share
        ranges.append((round(low * documents), round(high * documents)) if high > low else None)
        low = high
    return ranges[0], ranges[1], ranges[2]

"""The 64-bit Mersenne Twister as std::mt19937_64, which numpy does not have, in blocks of numbers.

Source: Matsumoto & Nishimura 1998 (the generator), Nishimura 2000 (its 64-bit constants)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_STATE = 312
_AHEAD = 156
"""Word k + 312 follows from words k, k + 1 and k + 156: so many are known at once."""
_UPPER = np.uint64(0xFFFFFFFF80000000)
_LOWER = np.uint64(0x7FFFFFFF)
_MATRIX = np.uint64(0xB5026F5AA96619E9)
_BLOCK = _AHEAD << 12

Words = npt.NDArray[np.uint64]


def mt19937_64(seed: int, block: int = _BLOCK) -> Iterator[Words]:
    """The numbers that follow from `seed`, for ever, in blocks of at least `block`."""
    size = -(-block // _AHEAD) * _AHEAD
    words = np.empty(_STATE + size, np.uint64)
    words[:_STATE] = _first_state(seed)
    one, zero = np.uint64(1), np.uint64(0)
    while True:
        for k in range(0, size, _AHEAD):
            mixed = (words[k : k + _AHEAD] & _UPPER) | (words[k + 1 : k + 1 + _AHEAD] & _LOWER)
            twisted = (mixed >> one) ^ np.where(mixed & one, _MATRIX, zero)
            words[k + _STATE : k + _STATE + _AHEAD] = words[k + _AHEAD : k + 2 * _AHEAD] ^ twisted
        yield _temper(words[_STATE:])
        words[:_STATE] = words[size:].copy()


def _first_state(seed: int) -> Words:
    state = [seed & 0xFFFFFFFFFFFFFFFF]
    for place in range(1, _STATE):
        last = state[-1]
        state.append((6364136223846793005 * (last ^ (last >> 62)) + place) & 0xFFFFFFFFFFFFFFFF)
    return np.array(state, np.uint64)


def _temper(words: Words) -> Words:
    out = words ^ ((words >> np.uint64(29)) & np.uint64(0x5555555555555555))
    out ^= (out << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000)
    out ^= (out << np.uint64(37)) & np.uint64(0xFFF7EEE000000000)
    out ^= out >> np.uint64(43)
    return out

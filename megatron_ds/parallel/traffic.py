"""Bytes that this rank sends along one axis, counted where they are sent."""

from __future__ import annotations

from collections import Counter


class Traffic:
    """Bytes and calls by collective.

    Bytes are those that leave this rank when the collective is done in the way that moves least: of a buffer of n
    bytes over p ranks, an all-reduce sends 2 (p-1)/p n, the others (p-1)/p n, a message n. What a library adds to
    that is not seen.
    """

    def __init__(self) -> None:
        self.sent_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def add(self, collective: str, sent_bytes: int) -> None:
        """One call more."""
        self.sent_bytes[collective] += sent_bytes
        self.calls[collective] += 1

    def clear(self) -> None:
        """Begin again."""
        self.sent_bytes.clear()
        self.calls.clear()

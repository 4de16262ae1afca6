"""SIGTERM means: save, leave with code 75. A later one means: leave now.

A launcher and a scheduler often send the same order twice within moments (srun signals the ranks, and torchrun passes
on what it got itself), so repeats within a few seconds count once.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

REPEAT_S = 5.0


class StopRequest:
    """Remembers that this process was told to stop; the ranks agree on it within the next step."""

    def __init__(self) -> None:
        self.received = False

    def listen(self) -> None:
        """From now on a signal is a request; before, it ends the process."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """True once a signal has come."""
        return self.received

    def within(self, seconds: float) -> bool:
        """Wait this long for a signal; True as soon as one has come."""
        deadline = time.monotonic() + seconds
        while not self.received and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = True, now
        elif number == signal.SIGTERM and now - self._since > REPEAT_S:
            os._exit(128 + number)

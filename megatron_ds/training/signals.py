"""SIGTERM means: save, leave with code 75. A second one means: leave now."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """Remembers that this process was told to stop; the ranks agree on it within the next step."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """True once a signal has come."""
        return self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGTERM:
            os._exit(128 + number)
        self.received = True

"""Named timers with Megatron's levels and Megatron's printed block.

timers = Timers(level=1, synchronise=torch.cuda.synchronize)
with timers("forward-backward", level=1):
    ...
log.last(timer_block(gather(timers.elapsed()), "minmax", log_interval))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

TimingOption = Literal["max", "minmax", "all"]

_OFF: AbstractContextManager[None] = nullcontext()


class Timers:
    """Seconds spent under each name.

    level: timers of a higher level cost one comparison and measure nothing.
    synchronise: called at both ends of a stretch so that a device's queued work is counted where it was asked for.
    """

    def __init__(self, level: int = 0, synchronise: Callable[[], None] | None = None):
        self.level = level
        self._synchronise = synchronise
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, level: int = 0) -> AbstractContextManager[None]:
        """Time what runs inside `with timers(name):`."""
        if level > self.level:
            return _OFF
        if name not in self._timers:
            self._timers[name] = _Timer(self._synchronise)
        return self._timers[name]

    def elapsed(self, reset: bool = True) -> dict[str, float]:
        """Seconds under every name that was used since the last reset."""
        seconds = {name: timer.seconds for name, timer in self._timers.items()}
        if reset:
            self._timers.clear()
        return seconds


class _Timer(AbstractContextManager[None]):
    def __init__(self, synchronise: Callable[[], None] | None):
        self.seconds = 0.0
        self._synchronise = synchronise
        self._start: float | None = None

    def __enter__(self) -> None:
        assert self._start is None, "a timer inside itself"
        self._start = self._now()

    def __exit__(self, *error: object) -> None:
        assert self._start is not None
        self.seconds += self._now() - self._start
        self._start = None

    def _now(self) -> float:
        if self._synchronise:
            self._synchronise()
        return time.perf_counter()


def longest(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The slowest rank's seconds under every name that any rank used."""
    return {name: max(rank.get(name, 0.0) for rank in ranks) for name in _names(ranks)}


def timer_block(ranks: Sequence[Mapping[str, float]], option: TimingOption = "minmax", iterations: int = 1) -> str:
    """Megatron's block of timers, in ms per iteration; `ranks` holds each rank's `elapsed()`. Empty if nothing ran."""
    names = _names(ranks)
    if not names:
        return ""
    header = {"max": "max time", "minmax": "(min, max) time", "all": "times"}[option]
    lines = [f"{header} across ranks (ms):"]
    for name in names:
        values = [rank.get(name, 0.0) * 1000 / iterations for rank in ranks]
        dotted = f"    {name + ' ':.<48}: "
        if option == "all":
            lines += [f"  {name}:", *(f"     rank {rank:2d}: {value:.2f}" for rank, value in enumerate(values))]
        elif option == "max":
            lines.append(f"{dotted}{max(values):.2f}")
        else:
            lines.append(f"{dotted}({min(values):.2f}, {max(values):.2f})")
    return "\n".join(lines)


def _names(ranks: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for rank in ranks for name in rank))

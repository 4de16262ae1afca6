"""One place to print from: which rank may speak, and a live line that never reaches a log file.

Ordinary messages come from rank 0, the training log from the last rank (Megatron's habit: it owns the loss).
"""

from __future__ import annotations

import os
import sys


def rank() -> int:
    """This process's global rank, known from the launcher's environment before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, known from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def info(message: str) -> None:
    """Print once, from rank 0."""
    if rank() == 0:
        _print(message)


def last(message: str) -> None:
    """Print once, from the last rank."""
    if rank() == world_size() - 1:
        _print(message)


def warn(message: str) -> None:
    """Print a warning once, from rank 0, to stderr."""
    if rank() == 0:
        clear_progress()
        print(f"WARNING: {message}", file=sys.stderr, flush=True)


def progress(message: str) -> None:
    """Redraw the live line of a terminal; nothing at all when stdout is a file or a pipe."""
    if sys.stdout.isatty():
        print(f"\r\033[K{message}", end="", flush=True)


def clear_progress() -> None:
    """Wipe the live line before something permanent is printed."""
    if sys.stdout.isatty():
        print("\r\033[K", end="")


def _print(message: str) -> None:
    clear_progress()
    print(message, flush=True)

"""What a process sets before it trains on a CPU: how many threads it computes with, how malloc hands out memory."""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def prepare(threads: int | None) -> str:
    """Set both, and say in a line what was set; `threads`: as many, if given.

    OMP_NUM_THREADS rules, unless it may be torchrun's: that sets 1 if it starts several ranks and finds nothing.
    """
    said, ranks = os.environ.get("OMP_NUM_THREADS"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torchruns = said == "1" and ranks > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    if threads is not None or said is None or torchruns:
        torch.set_num_threads(threads or fair_share())
    kept = "; malloc keeps what is freed" if keep_freed_memory() else ""
    return f" > threads per rank: {torch.get_num_threads()}{kept}"


def fair_share() -> int:
    """The cores that this process may use, shared with the ranks that torchrun started beside it."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for a training step asks for the same again and again; True if it will.

    By default glibc maps every large tensor anew and gives it back, and the kernel clears its pages each time: 2 to 7 %
    of a step (docs/performance.md). MALLOC_ variables in the environment are left to rule.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))

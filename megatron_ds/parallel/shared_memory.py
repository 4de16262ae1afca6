"""Memory that the ranks of one machine share, for collectives on CPUs.

gloo sends even to a neighbour through sockets and threads of its own, which wait for a core while the ranks compute:
half a megabyte takes 0.5 ms between idle processes and 2.5 ms between busy ones (docs/performance.md). Here a rank
copies its tensor to where all others can read it, raises a counter, and reads theirs when their counters say so.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_ds import log

Tensor = torch.Tensor

HERE = Path("/dev/shm")
SLOTS = 4
"""Tensors of a rank that may be on their way at once."""
LARGEST = 8 * 2**20
"""Bytes of a tensor: larger ones are worth a thread that sends them while this one computes."""
SMALLEST_SLOT = 64 * 2**10
POSTED, CLOSED = 0, 1
LINE = 8
"""Counters, of 8 bytes, per cache line: each one has a line to itself."""
PATIENCE_SECONDS = 0.002
"""How long a rank waits with its core at hand before it sleeps between looks."""
NAP_SECONDS = 0.0002
CHECK_SECONDS = 1.0
"""How often a waiting rank asks whether those it waits for are alive."""


class SharedMemory:
    """The memory of one axis's ranks, opened when it is first asked for.

    Only on x86, where a processor's writes are seen by the others in the order in which they were made.
    """

    def __init__(self, timeout_seconds: float = 600.0):
        self.timeout_seconds = timeout_seconds
        self.region: _Region | None = None
        self.largest = LARGEST

    def post(self, tensor: Tensor, rank: int, size: int, tell: Callable[[bytes], list[bytes]]) -> Posted | None:
        """Show a tensor to the other ranks; None if it has to go another way, which then holds for all of them.

        tell: gives every rank's bytes to every rank
        """
        if tensor.device.type != "cpu" or tensor.nbytes > self.largest:
            return None
        if self.region is None or tensor.nbytes > self.region.slot_bytes:
            if self.region is not None and self.region.taken:
                return None
            slot_bytes = max(SMALLEST_SLOT, 1 << (tensor.nbytes - 1).bit_length())
            opened = _open(rank, size, slot_bytes, self.timeout_seconds, tell)
            if opened is None:
                self.largest = 0 if self.region is None else self.region.slot_bytes
                log.info(f" > {size} ranks share no memory for tensors of {slot_bytes >> 10} KiB: gloo moves them")
                return None
            self.region = opened
        return self.region.post(tensor)


class Posted:
    """A tensor that was shown to the other ranks, who show theirs of the same size in the same slot."""

    def __init__(self, region: _Region, slot: int, number: int, tensor: Tensor):
        self.region, self.slot, self.number = region, slot, number
        self.numel, self.dtype = tensor.numel(), tensor.dtype

    def parts(self) -> list[Tensor]:
        """Every rank's, in rank order, flat; to be read before `close`. Waits for those that have not come.

        Raises: RuntimeError if a rank is gone or does not come in time
        """
        self.region.wait_for(POSTED, self.slot, self.number)
        ranks = range(self.region.size)
        return [self.region.place(self.slot, rank, self.numel, self.dtype) for rank in ranks]

    def close(self) -> None:
        """The others may write there again."""
        self.region.close(self.slot, self.number)


class _Region:
    """Two counters for each slot and rank, the numbers of its last post and of the last one that it has closed; then
    the slots, with a place for each rank.

    A slot takes a new post when every rank has closed the last one there. All ranks post and close in the same order,
    so they choose the same slots. A rank holds a lock on the byte of its number for as long as it lives.
    """

    def __init__(self, file: int, rank: int, size: int, slot_bytes: int, timeout_seconds: float):
        self.file, self.rank, self.size, self.slot_bytes = file, rank, size, slot_bytes
        self.timeout_seconds = timeout_seconds
        weakref.finalize(self, os.close, file)
        memory = mmap.mmap(file, _length(size, slot_bytes))
        self.counters = memoryview(memory)[: _header(size)].cast("q")
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8, offset=_header(size)).view(SLOTS, size, slot_bytes)
        self.last = 0
        self.last_slot = 0
        self.newest = [0] * SLOTS
        self.taken: set[int] = set()

    def post(self, tensor: Tensor) -> Posted | None:
        free = [slot for slot in range(SLOTS) if slot not in self.taken]
        if not free:
            return None
        # Not the last one, which others may still read; else the first, for memory that is never touched costs nothing.
        slot = next((slot for slot in free if slot != self.last_slot), free[0])
        self.wait_for(CLOSED, slot, self.newest[slot])
        self.place(slot, self.rank, tensor.numel(), tensor.dtype).copy_(tensor.flatten())
        self.last += 1
        self.last_slot, self.newest[slot] = slot, self.last
        self.counters[self._counter(POSTED, slot, self.rank)] = self.last
        self.taken.add(slot)
        return Posted(self, slot, self.last, tensor)

    def place(self, slot: int, rank: int, numel: int, dtype: torch.dtype) -> Tensor:
        return self.bytes[slot, rank, : numel * dtype.itemsize].view(dtype)

    def close(self, slot: int, number: int) -> None:
        self.counters[self._counter(CLOSED, slot, self.rank)] = number
        self.taken.remove(slot)

    def _counter(self, kind: int, slot: int, rank: int) -> int:
        return ((kind * SLOTS + slot) * self.size + rank) * LINE

    def wait_for(self, kind: int, slot: int, number: int) -> None:
        """Return when every rank's counter has come to `number`."""
        for rank in range(self.size):
            place = self._counter(kind, slot, rank)
            if self.counters[place] < number:
                self._wait(rank, place, number)

    def _wait(self, rank: int, place: int, number: int) -> None:
        begun = checked = time.monotonic()
        while self.counters[place] < number:
            os.sched_yield()
            now = time.monotonic()
            if now - begun > PATIENCE_SECONDS:
                time.sleep(NAP_SECONDS)
            if now - checked > CHECK_SECONDS:
                self._check(rank, place, number)
                checked = now
            if now - begun > self.timeout_seconds:
                raise RuntimeError(f"Timed out waiting {self.timeout_seconds:.0f} s for rank {rank} of {self.size}")

    def _check(self, rank: int, place: int, number: int) -> None:
        if _lock(self.file, rank):
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, rank)
            if self.counters[place] < number:  # else it came in the meantime, and went
                raise RuntimeError(f"Connection closed by peer, rank {rank} of {self.size}")


def _header(size: int) -> int:
    return -(-2 * SLOTS * size * LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


def _length(size: int, slot_bytes: int) -> int:
    return _header(size) + SLOTS * size * slot_bytes


def _lock(file: int, rank: int) -> bool:
    """Take the lock on a rank's byte; False if that rank lives and holds it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
    except OSError:
        return False
    return True


def _open(
    rank: int, size: int, slot_bytes: int, timeout_seconds: float, tell: Callable[[bytes], list[bytes]]
) -> _Region | None:
    """Map a new file on every rank; None if one of them cannot, as on another machine."""
    able = platform.machine() == "x86_64"  # a matter for all of them, who may differ
    file, path = _create(_length(size, slot_bytes)) if able and rank == 0 else (None, b"")
    path = tell(path)[0]
    if able and rank and path:
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:
            file = None
    took = tell(b"1" if file is not None and _lock(file, rank) else b"")
    if rank == 0 and path:
        os.unlink(path)
    if all(took):
        assert file is not None
        return _Region(file, rank, size, slot_bytes, timeout_seconds)
    if file is not None:
        os.close(file)
    return None


def _create(length: int) -> tuple[int | None, bytes]:
    """A file with room for so many bytes, if there is any."""
    try:
        file, path = tempfile.mkstemp(prefix="megatron_ds-", dir=HERE)
    except OSError:
        return None, b""
    try:
        os.posix_fallocate(file, 0, length)
    except OSError:
        os.close(file)
        os.unlink(path)
        return None, b""
    return file, path.encode()

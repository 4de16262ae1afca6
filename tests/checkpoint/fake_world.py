"""Ranks as threads of this process: what save() needs of a world, without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.checkpoint import save as save_module
from megatron_ds.parallel.spec import Box, Piece


@dataclass(frozen=True)
class Rank:
    """Quacks like an Axis."""

    rank: int
    size: int
    barrier: threading.Barrier
    slots: list[bytes]

    def gather(self, payload: bytes) -> list[bytes]:
        self.slots[self.rank] = payload
        self.barrier.wait(timeout=20)
        everyone = list(self.slots)
        self.barrier.wait(timeout=20)
        return everyone


def save_all(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    iteration: int,
    by_rank: Sequence[Sequence[Piece]],
    state: dict[str, Any] | None = None,
    on_rank: Callable[[int], None] = lambda rank: None,
) -> list[BaseException | None]:
    """Save from as many ranks as there are lists of pieces; returns what each rank raised."""
    monkeypatch.setattr(save_module, "gather_bytes", lambda payload, world: world.gather(payload))
    size = len(by_rank)
    barrier, slots = threading.Barrier(size), [b""] * size
    raised: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            on_rank(rank)
            world: Any = Rank(rank, size, barrier, slots)
            save_module.save(directory, iteration, by_rank[rank], state or {}, world)
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def whole_piece(name: str, tensor: torch.Tensor) -> Piece:
    """The piece that is the entire tensor."""
    shape = tuple(tensor.shape)
    return Piece(name, shape, Box((0,) * len(shape), shape), tensor)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits of any dtype, NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.empty(tuple(shape), dtype=dtype).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(tuple(shape))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaNs included."""
    a, b = a.contiguous().view(-1), b.contiguous().view(-1)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))

"""The same over a real process group: a save that works, and one that fails on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ds.checkpoint.load import find, load
from megatron_ds.checkpoint.save import save
from megatron_ds.errors import RunFault
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Box, Piece
from tests.helpers.ranks import run_ranks


def pieces_of_a_sick_rank(piece: Piece, rank: int) -> Iterator[Piece]:
    yield piece
    if rank == 1:
        raise OSError(28, "No space left on device")


def save_twice(directory: str) -> str:
    dist.init_process_group("gloo")
    world = Axis("world", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    mine = torch.arange(3.0) + 3 * world.rank
    piece = Piece("w", (6,), Box((3 * world.rank,), (3,)), mine)
    save(directory, 1, [piece], {"rank": world.rank}, world)
    if world.rank == 1:
        (Path(directory) / "iter_0000002.tmp").mkdir()  # swept by rank 0 before anyone writes
    dist.barrier()
    try:
        save(directory, 2, pieces_of_a_sick_rank(piece, world.rank), {}, world)
    except RunFault as fault:
        return str(fault)
    return ""


def test_two_processes(tmp_path: Path) -> None:
    faults = run_ranks(save_twice, 2, str(tmp_path))
    assert faults[0] == faults[1]
    assert "rank 1: OSError: [Errno 28] No space left on device" in faults[0]
    found, w = find(tmp_path), torch.zeros(6)
    load(found.index, [Piece("w", (6,), Box((0,), (6,)), w)])
    assert (found.iteration, found.index.state) == (1, {"rank": 0})
    assert w.tolist() == [0, 1, 2, 3, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]

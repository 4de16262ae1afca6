"""What gloo's collectives cost between processes of one machine, beside the same sums made of sends and receives.

    python benchmarks/collectives.py --ranks 2 4 --mib 1 4 16 64 --dtype fp32

Each rank starts with a buffer of the given size. Ways of a reduce-scatter leave every rank the sum of its own part,
ways of an all-gather fill the buffer from everyone's part, and an all-reduce of the whole buffer stands beside both.
"ours" is what training uses: shared memory up to 8 MiB (decision 016), for larger buffers gloo or messages. The ways
take turns, one call each per repetition, and every result is checked. Prints one JSON row per size: median milliseconds
of the slowest rank, and the same as a share of gloo's all-reduce.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from megatron_ds.parallel import collectives
from megatron_ds.parallel.context import Axis

Way = Callable[[torch.Tensor], None]
"""Works on the whole buffer of this rank; the result lies where `check` looks for it."""

PIECE_BYTES = 2 * 2**20
"""Of a chunked transfer: small enough that what arrived is still in the cache when it is added."""


def _send(tensor: torch.Tensor, rank: int) -> Any:
    return dist.isend(tensor, rank)


def _receive(tensor: torch.Tensor, rank: int) -> Any:
    return dist.irecv(tensor, rank)


class Ways:
    """Every way, on one rank. Scratch memory is taken once, as a training run would."""

    def __init__(self, numel: int, dtype: torch.dtype):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.share = numel // self.size
        self.scratch = torch.empty(numel, dtype=dtype)
        self.axis = Axis("world", self.size, self.rank, dist.group.WORLD, on_gloo=True)
        self.all_reduces: dict[str, Way] = {"all_reduce": dist.all_reduce, "ours": self.our_all_reduce}
        self.reduce_scatters: dict[str, Way] = {
            "ours": self.our_reduce_scatter,
            "reduce_scatter_single": self.reduce_scatter_single,
            "all_to_all_single + sum": self.all_to_all_and_sum,
            "isend/irecv + add": self.pairwise_reduce_scatter,
            "isend/irecv + add, in pieces": self.pairwise_reduce_scatter_in_pieces,
        }
        self.all_gathers: dict[str, Way] = {
            "ours": self.our_all_gather,
            "all_gather_single": self.all_gather_single,
            "isend/irecv": self.pairwise_all_gather,
        }

    def part(self, buffer: torch.Tensor, rank: int) -> torch.Tensor:
        """The share of the buffer that belongs to a rank."""
        return buffer[rank * self.share : (rank + 1) * self.share]

    @property
    def others(self) -> list[int]:
        """All other ranks, starting with the next one, so that no rank is everybody's first."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]

    def our_all_reduce(self, buffer: torch.Tensor) -> None:
        """The package's."""
        collectives.all_reduce(buffer, self.axis)

    def our_reduce_scatter(self, buffer: torch.Tensor) -> None:
        """The package's."""
        collectives.reduce_scatter_async(self.part(buffer, self.rank), buffer, self.axis).wait()

    def our_all_gather(self, buffer: torch.Tensor) -> None:
        """The package's."""
        collectives.all_gather_async(buffer, self.part(buffer, self.rank), self.axis).wait()

    def reduce_scatter_single(self, buffer: torch.Tensor) -> None:
        """The backend's own."""
        dist.reduce_scatter_single(self.part(buffer, self.rank), buffer)

    def all_to_all_and_sum(self, buffer: torch.Tensor) -> None:
        """Everybody's version of my part, side by side; then one sum over the rows."""
        dist.all_to_all_single(self.scratch, buffer)
        torch.sum(self.scratch.view(self.size, -1), 0, out=self.part(buffer, self.rank))

    def pairwise_reduce_scatter(self, buffer: torch.Tensor) -> None:
        """One message to and from every other rank, added in the order of the ranks."""
        sends = [_send(self.part(buffer, other), other) for other in self.others]
        receives = {other: _receive(self.part(self.scratch, other), other) for other in self.others}
        mine = self.part(buffer, self.rank)
        for other, handle in receives.items():
            handle.wait()
            mine.add_(self.part(self.scratch, other))
        for handle in sends:
            handle.wait()

    def pairwise_reduce_scatter_in_pieces(self, buffer: torch.Tensor) -> None:
        """The same in pieces, all posted at once: one is added while the next ones arrive."""
        numel = max(1, PIECE_BYTES // buffer.element_size())
        mine = self.part(buffer, self.rank).split(numel)
        sends, receives = [], []
        for pieces in zip(*(self.part(buffer, other).split(numel) for other in self.others), strict=True):
            sends += [_send(piece, other) for piece, other in zip(pieces, self.others, strict=True)]
        for number, pieces in enumerate(
            zip(*(self.part(self.scratch, other).split(numel) for other in self.others), strict=True)
        ):
            for piece, other in zip(pieces, self.others, strict=True):
                receives.append((_receive(piece, other), number, piece))
        for handle, number, piece in receives:
            handle.wait()
            mine[number].add_(piece)
        for handle in sends:
            handle.wait()

    def all_gather_single(self, buffer: torch.Tensor) -> None:
        """The backend's own."""
        dist.all_gather_single(buffer, self.part(buffer, self.rank))

    def pairwise_all_gather(self, buffer: torch.Tensor) -> None:
        """My part to every other rank, theirs straight to where they belong."""
        sends = [_send(self.part(buffer, self.rank), other) for other in self.others]
        receives = [_receive(self.part(buffer, other), other) for other in self.others]
        for handle in receives + sends:
            handle.wait()


def measure(mib: float, dtype: torch.dtype, repetitions: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of every way on a buffer of this size."""
    rank, size = dist.get_rank(), dist.get_world_size()
    numel = int(mib * 2**20 / dtype.itemsize) // size * size
    ways = Ways(numel, dtype)
    kinds: dict[str, dict[str, Way]] = {"all_reduce": ways.all_reduces}
    kinds |= {"reduce_scatter": ways.reduce_scatters, "all_gather": ways.all_gathers}
    names = [(kind, name) for kind, members in kinds.items() for name in members]
    times = torch.zeros(repetitions + 1, len(names), dtype=torch.float64)
    buffer = torch.empty(numel, dtype=dtype)
    for repetition in range(repetitions + 1):
        for column, (kind, name) in enumerate(names):
            buffer.fill_(rank + 1)
            dist.barrier()
            begun = time.perf_counter()
            kinds[kind][name](buffer)
            times[repetition, column] = time.perf_counter() - begun
            _check(kind, name, buffer, ways)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    medians = (times[1:].median(0).values * 1e3).tolist()
    out: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for (kind, name), value in zip(names, medians, strict=True):
        out[kind][name] = round(value, 3)
    return out


def _check(kind: str, name: str, buffer: torch.Tensor, ways: Ways) -> None:
    size, total = ways.size, ways.size * (ways.size + 1) // 2
    if kind == "all_gather":
        right = all(bool((ways.part(buffer, rank) == rank + 1).all()) for rank in range(size))
    else:
        right = bool(((buffer if kind == "all_reduce" else ways.part(buffer, ways.rank)) == total).all())
    if not right:
        raise RuntimeError(f"{name} is wrong on rank {ways.rank}")


def work(rank: int, size: int, port: int, options: argparse.Namespace, rows: Any) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    dtype = machine.DTYPES[options.dtype]
    for mib in options.mib:
        milliseconds = measure(mib, dtype, options.repetitions)
        if rank == 0:
            whole = milliseconds["all_reduce"]["all_reduce"]
            share = {
                kind: {name: round(value / whole, 2) for name, value in members.items()}
                for kind, members in milliseconds.items()
            }
            rows.put({"ranks": size, "mib": mib, "milliseconds": milliseconds, "share_of_all_reduce": share})
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print one JSON row per number of ranks and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mib", type=float, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--dtype", choices=machine.DTYPES, default="fp32")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    about = {"benchmark": "collectives", "backend": "gloo", "dtype": options.dtype, "repetitions": options.repetitions}
    for size in options.ranks:
        rows = context.SimpleQueue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn(work, args=(size, port, options, rows), nprocs=size)
        for _ in options.mib:
            text = json.dumps(
                {**about, **rows.get(), "repetitions": options.repetitions, "machine": machine.describe()}
            )
            print(text, flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()

"""Collectives through memory that the ranks of one machine share, against what the ranks' values add up to."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_ds import log
from megatron_ds.parallel import collectives, context, shared_memory
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.parallel.context import Axis
from tests.helpers.ranks import RankFailed, run_ranks

KIB = 1024


def meet(tp: int) -> Axis:
    """This rank's axis of so many."""
    return context.start(ParallelConfig(), {"pp": 1, "dp": 1, "cp": 1, "tp": tp}, torch.device("cpu")).tp


def values(rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(tuple(shape), generator=torch.Generator().manual_seed(rank)) * 8).to(dtype)


def every_collective(size: int, dtype: torch.dtype, n: int) -> None:
    axis = meet(size)
    shape = (size, n)
    everyone = torch.stack([values(rank, shape, dtype) for rank in range(size)])
    total = everyone.double().sum(0).to(dtype)

    def mine() -> torch.Tensor:
        return values(axis.rank, shape, dtype)

    close = torch.testing.assert_close
    close(collectives.all_reduce(mine(), axis), total)
    assert torch.equal(collectives.all_reduce(mine(), axis, "max"), everyone.amax(0))
    assert torch.equal(collectives.all_reduce(mine(), axis, "min"), everyone.amin(0))
    close(collectives.reduce_scatter(mine(), axis), total[axis.rank, None])
    assert torch.equal(collectives.all_gather(mine(), axis), everyone.flatten(0, 1))
    assert torch.equal(collectives.all_to_all(mine(), axis), everyone[:, axis.rank])
    across = values(axis.rank, (n, size), dtype).t()  # rows of it do not lie in one piece
    sent = torch.stack([values(rank, (n, size), dtype).t()[axis.rank] for rank in range(size)])
    assert torch.equal(collectives.all_to_all(across, axis), sent)
    same = collectives.all_gather(collectives.all_reduce(mine(), axis), axis).view(size, size, n)
    assert torch.equal(same, same[:1].expand_as(same)), "all ranks must have the same bits"
    assert axis.memory.region is not None
    context.stop()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("n", [1, 1001, 300_000])
def test_every_collective_does_what_its_name_says(size: int, dtype: torch.dtype, n: int) -> None:
    run_ranks(every_collective, size, size, dtype, n)


def a_sum_in_bf16() -> list[float]:
    axis = meet(3)
    mine = torch.tensor([1.0, 3.0] if axis.rank == 0 else [2**-8, -(2**-7)], dtype=torch.bfloat16)
    total: list[float] = collectives.all_reduce(mine, axis).tolist()
    context.stop()
    return total


def test_a_sum_of_three_is_rounded_once() -> None:
    """1 + 2^-8 is 1 in bf16: who rounds after every addend loses both."""
    assert run_ranks(a_sum_in_bf16, 3) == [[1 + 2**-7, 3 - 2**-6]] * 3


def many_at_once(count: int) -> None:
    """As many as there are slots and more, waited for last first, while small ones come and go."""
    axis = meet(2)
    tensors = [torch.full((1000,), 10.0 * number + axis.rank) for number in range(count)]
    handles = [collectives.all_reduce_async(tensor, axis) for tensor in tensors]
    for _ in range(2 * shared_memory.SLOTS):
        assert collectives.all_reduce(torch.ones(3), axis).tolist() == [2.0] * 3
    for handle in reversed(handles):
        handle.wait()
        handle.wait()  # does nothing
    for number, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.full((1000,), 20.0 * number + 1))
    for _ in range(2 * shared_memory.SLOTS):
        assert collectives.all_reduce(torch.ones(3), axis).tolist() == [2.0] * 3
    context.stop()


@pytest.mark.parametrize("count", [1, shared_memory.SLOTS, shared_memory.SLOTS + 3])
def test_several_on_their_way(count: int) -> None:
    run_ranks(many_at_once, 2, count)


def a_slow_reader() -> None:
    """While one rank has still to read a tensor, the other is ready to write the next one into its slot."""
    axis = meet(2)
    for turn in range(4):
        tensor = torch.full((5000,), float(turn))
        handle = collectives.all_reduce_async(tensor, axis)
        for _ in range(shared_memory.SLOTS - 1):
            collectives.all_reduce(torch.ones(1), axis)
        if turn % 2 == axis.rank:
            time.sleep(0.05)
        handle.wait()
        assert collectives.all_reduce(torch.full((5000,), 100.0), axis).unique().tolist() == [200.0]
        assert tensor.unique().tolist() == [2.0 * turn]
    context.stop()


def test_a_slow_rank_reads_what_was_meant_for_it() -> None:
    run_ranks(a_slow_reader, 2)


def growing() -> list[int]:
    axis = meet(2)
    slots = []
    for size in (10, 100 * KIB, 20, 300 * KIB, shared_memory.LARGEST // 4 + 1):
        assert collectives.all_reduce(torch.ones(size), axis).sum().item() == 2.0 * size
        assert axis.memory.region is not None
        slots.append(axis.memory.region.slot_bytes)
    for _ in range(10):
        collectives.all_reduce(torch.ones(5), axis)
    assert axis.memory.region is not None
    assert sum(number > 0 for number in axis.memory.region.newest) == 2, "one by one they need no more memory"
    context.stop()
    return slots


def test_it_grows_with_what_is_sent_and_leaves_no_file() -> None:
    before = set(shared_memory.HERE.glob("megatron_ds-*"))
    first, larger, largest = 64 * KIB, 512 * KIB, 2048 * KIB  # 1.2 MB of fp32 lie in 2 MiB
    assert run_ranks(growing, 2) == [[first, larger, larger, largest, largest]] * 2
    assert set(shared_memory.HERE.glob("megatron_ds-*")) <= before


def on_two_machines(cannot: int, processor: str) -> tuple[bool, list[str]]:
    """Rank `cannot` finds no such file, as on another machine, or has another processor."""
    axis, said = meet(2), list[str]()
    log.info = said.append
    if axis.rank == cannot and processor != platform.machine():
        platform.machine = lambda: processor
    elif axis.rank == cannot:
        shared_memory.HERE = Path("/proc")
        os.open = refuse  # type: ignore[assignment]
    assert collectives.all_reduce(torch.ones(5), axis).tolist() == [2.0] * 5
    assert collectives.reduce_scatter(torch.ones(2, 5), axis).tolist() == [[2.0] * 5]
    context.stop()
    return axis.memory.region is None, said


def refuse(path: str, flags: int, mode: int = 0o777) -> int:
    raise FileNotFoundError(path)


@pytest.mark.parametrize("cannot", [0, 1])
@pytest.mark.parametrize("processor", [platform.machine(), "aarch64"], ids=["machine", "processor"])
def test_ranks_that_share_no_memory_go_through_gloo(cannot: int, processor: str) -> None:
    said = [" > 2 ranks share no memory for tensors of 64 KiB: gloo moves them"]
    assert run_ranks(on_two_machines, 2, cannot, processor) == [(True, said)] * 2


def lonely(notes: Path, how: str) -> None:
    axis = meet(2)
    collectives.all_reduce(torch.ones(1), axis)
    shared_memory.CHECK_SECONDS = 0.05
    if axis.rank == 1:
        os._exit(3) if how == "gone" else time.sleep(2)
        return
    assert axis.memory.region is not None
    axis.memory.region.timeout_seconds = 30.0 if how == "gone" else 0.3
    try:
        collectives.all_reduce(torch.ones(1), axis)
    except RuntimeError as error:
        notes.write_text(str(error))
    os._exit(0)


@pytest.mark.parametrize(
    ("how", "said"),
    [("gone", "Connection closed by peer, rank 1 of 2"), ("late", "Timed out waiting 0 s for rank 1 of 2")],
)
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(RankFailed):
        run_ranks(lonely, 2, tmp_path / "notes", how)
    assert (tmp_path / "notes").read_text() == said

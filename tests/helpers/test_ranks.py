"""The harness that all multi-rank tests stand on."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankFailed, RanksTimedOut, run_ranks


def summed(scale: int) -> tuple[int, int, float]:
    dist.init_process_group("gloo")
    x = torch.full((3,), float(scale * (dist.get_rank() + 1)))
    dist.all_reduce(x)
    return dist.get_rank(), torch.get_num_threads(), x[0].item()


def environment(name: str) -> list[str]:
    return [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", name)] + [os.getcwd()]


def one_raises() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 2:
        raise ValueError("rank two says no")
    dist.all_reduce(torch.ones(1))


def one_dies() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def leaves(code: object) -> None:
    sys.exit(code)  # type: ignore[arg-type]


def one_sleeps(marker: str) -> int:
    if os.environ["RANK"] == "1":
        time.sleep(600)
    with open(marker, "w") as file:
        file.write("done")
    return 1


def one_fails_one_sleeps() -> None:
    if os.environ["RANK"] == "0":
        raise KeyError("early")
    time.sleep(600)


def late_reader() -> int:
    """Rank 0, which hosts the store, is done long before the others ask it for something."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        dist.distributed_c10d._get_default_store().set("word", "7")
        return 7
    time.sleep(0.3)
    return int(dist.distributed_c10d._get_default_store().get("word"))


def returns(value: object) -> object:
    return value


def test_all_reduce_on_four_ranks() -> None:
    assert run_ranks(summed, 4, 10) == [(rank, 1, 100.0) for rank in range(4)]


def test_a_call_costs_under_a_second_after_the_first() -> None:
    run_ranks(returns, 1, None)
    costs = []
    for _ in range(3):
        start = time.perf_counter()
        run_ranks(summed, 4, 1)
        costs.append(time.perf_counter() - start)
    assert min(costs) < 1.0


def test_environment_is_what_torchrun_gives_plus_the_callers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    monkeypatch.setenv("SOMETHING_NEW", "here")
    monkeypatch.chdir(tmp_path)
    expected = [[str(rank), str(rank), "2", "2", "here", str(tmp_path)] for rank in range(2)]
    assert run_ranks(environment, 2, "SOMETHING_NEW") == expected


def test_tensors_travel_both_ways() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    (y,) = run_ranks(returns, 1, x)
    assert torch.equal(x, y)


def test_the_rank_that_raised_is_named_not_its_victims() -> None:
    with pytest.raises(RankFailed, match="rank two says no") as caught:
        run_ranks(one_raises, 4)
    assert (caught.value.rank, caught.value.exit_code) == (2, 1)
    assert "in one_raises" in caught.value.traceback


def test_a_killed_rank_is_named_not_its_victims() -> None:
    with pytest.raises(RankFailed, match="SIGKILL") as caught:
        run_ranks(one_dies, 3)
    assert (caught.value.rank, caught.value.exit_code) == (1, -signal.SIGKILL)


@pytest.mark.parametrize(("code", "expected"), [(75, 75), (0, 0), (None, 0), ("message", 1)])
def test_system_exit_gives_its_code(code: object, expected: int) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(leaves, 2, code)
    assert caught.value.exit_codes == (expected, expected)


def test_a_hang_ends_with_the_stack_of_the_hung_rank(tmp_path: os.PathLike[str]) -> None:
    start = time.perf_counter()
    with pytest.raises(RanksTimedOut, match="one_sleeps") as caught:
        run_ranks(one_sleeps, 2, os.path.join(tmp_path, "marker"), timeout_s=3.0)
    assert caught.value.rank == 1
    assert "rank 0" not in caught.value.traceback
    assert time.perf_counter() - start < 15


def test_a_failure_does_not_wait_for_ranks_that_never_notice() -> None:
    start = time.perf_counter()
    with pytest.raises(RankFailed, match="early") as caught:
        run_ranks(one_fails_one_sleeps, 2)
    assert caught.value.exit_codes == (1, None)
    assert time.perf_counter() - start < 10


def test_early_ranks_stay_until_the_last_is_done() -> None:
    assert run_ranks(late_reader, 3) == [7, 7, 7]


def test_a_result_that_cannot_travel_is_an_error_not_a_hang() -> None:
    with pytest.raises(RankFailed, match=r"(?i)pickle"):
        run_ranks(returns_a_lambda, 1)


def returns_a_lambda() -> object:
    return lambda: None

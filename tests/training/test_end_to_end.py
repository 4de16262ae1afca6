"""The whole recipe on a tiny model: it trains, reports, saves, resumes and stops when told to."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint.load import find
from megatron_ds.training import loop
from tests.helpers.ranks import RankFailed, run_ranks
from tests.helpers.recipe import TINY, Outcome, Value, as_rank, environment, free_port, run, tree, words, write_tokens
from tests.house.source import ROOT

TIMINGS = {"elapsed_ms", "tokens_per_s", "tflops"}
FLAGS: dict[str, Value] = TINY | {
    "split": "8,1,1",
    "train_iters": 10,
    "eval_interval": 5,
    "eval_iters": 2,
    "save_interval": 5,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 20 documents of 50 tokens."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    write_tokens(prefix)
    return str(prefix)


def flags(data: str, out: Path, **changes: Value) -> list[str]:
    """A run that keeps everything below `out`, and goes on from there."""
    places: dict[str, Value] = {
        "data_path": data,
        "save": f"{out}/saved",
        "load": f"{out}/saved",
        "metrics_file": f"{out}/metrics.jsonl",
        "tensorboard_dir": f"{out}/tensorboard",
    }
    return words(FLAGS | places | changes)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def weights(out: Path, iteration: int) -> bytes:
    return (out / f"saved/iter_{iteration:07d}/rank_00000.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Ten iterations without a pause."""
    out = tmp_path_factory.mktemp("straight")
    outcome = run(flags(data, out))
    assert outcome.code == 0, outcome.err
    return out, outcome


def test_what_a_run_reports(straight: tuple[Path, Outcome]) -> None:
    out, outcome = straight
    rows = metrics(out)
    steps = [row for row in rows if "lm loss" in row]
    assert [row["iteration"] for row in steps] == list(range(1, 11))
    for row in steps:
        assert row["consumed_samples"] == 4 * row["iteration"]
        assert row["consumed_tokens"] == 4 * 8 * row["iteration"]
        # linear from 1e-3 to 0 over 10 iterations; the first step uses the peak
        assert row["learning_rate"] == pytest.approx(1e-3 * (11 - row["iteration"]) / 10, rel=1e-12)
        assert (row["loss_scale"], row["global_batch_size"], row["skipped"]) == (1.0, 4, False)
        assert row["grad_norm"] > 0
        assert row["tokens_per_s"] == pytest.approx(32 / row["elapsed_ms"] * 1000)
    # An untrained model knows nothing of 101 ids, and ten steps do not teach it random text.
    assert all(abs(row["lm loss"] - math.log(101)) < 0.3 for row in steps)
    passes = [
        (row["iteration"], *(row.keys() & {"validation lm loss", "test lm loss"})) for row in rows if row not in steps
    ]
    assert passes == [
        (5, "validation lm loss"),
        (10, "validation lm loss"),
        (10, "validation lm loss"),
        (10, "test lm loss"),
    ]
    assert outcome.err == ""
    assert re.search(
        r"^ iteration +10/ +10 \| consumed samples: +40 \|.*\| lm loss: 4\.\d{6}E\+00 \|", outcome.out, re.M
    )
    assert outcome.out.count(" validation loss at iteration ") == 4
    assert "data-parallel-size: 1" in outcome.out
    assert "padded vocab (size: 101) with 27 dummy tokens (new size: 128)" in outcome.out


def test_tensorboard_shows_the_same_numbers(straight: tuple[Path, Outcome]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight[0] / "tensorboard"))
    events.Reload()
    rows = [row for row in metrics(straight[0]) if "lm loss" in row]
    for tag, key in (
        ("lm-loss-training/lm loss", "lm loss"),
        ("learning-rate/learning-rate", "learning_rate"),
        ("grad-norm/grad-norm", "grad_norm"),
    ):
        points = events.Scalars(tag)
        assert [point.step for point in points] == list(range(1, 11))
        assert [point.value for point in points] == pytest.approx([row[key] for row in rows], rel=1e-6)
    assert [point.step for point in events.Scalars("lm-loss-training/lm loss vs tokens")] == list(range(32, 321, 32))


def test_checkpoints_of_a_run(straight: tuple[Path, Outcome]) -> None:
    saved = straight[0] / "saved"
    assert {path.name for path in saved.iterdir()} == {
        "iter_0000005",
        "iter_0000010",
        "latest_checkpointed_iteration.txt",
    }
    assert (saved / "latest_checkpointed_iteration.txt").read_text().strip() == "10"
    assert find(saved).index.state["progress"]["consumed_samples"] == 40


def test_a_run_in_two_parts_is_the_same_run(straight: tuple[Path, Outcome], data: str, tmp_path: Path) -> None:
    first = run(flags(data, tmp_path, exit_interval=5))
    assert first.code == 0, first.err
    assert "exiting program at iteration 5" in first.out
    assert "starting from scratch" in first.out
    assert untimed(metrics(tmp_path)) == untimed(metrics(straight[0]))[:6]  # five steps and a validation
    second = run(flags(data, tmp_path))
    assert second.code == 0, second.err
    assert "successfully loaded checkpoint" in second.out
    assert untimed(metrics(tmp_path)) == untimed(metrics(straight[0]))
    assert weights(tmp_path, 10) == weights(straight[0], 10)


def test_a_crash_between_two_saves_repeats_the_lost_iterations(
    straight: tuple[Path, Outcome], data: str, tmp_path: Path
) -> None:
    """The metrics file knows seven iterations, the checkpoint five."""
    assert run(flags(data, tmp_path, exit_interval=5)).code == 0
    rows = (straight[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(rows[:8]) + '{"iteration": 8, "lm lo')
    assert run(flags(data, tmp_path)).code == 0
    assert untimed(metrics(tmp_path)) == untimed(metrics(straight[0]))


def test_resumed_at_the_end_there_is_nothing_to_do(straight: tuple[Path, Outcome], data: str) -> None:
    out = straight[0]
    before = tree(out / "saved"), (out / "metrics.jsonl").read_bytes()
    outcome = run(flags(data, out))
    assert outcome.code == 0, outcome.err
    assert "already finished: iteration 10 of 10" in outcome.out
    assert "iteration       10/" not in outcome.out
    assert (tree(out / "saved"), (out / "metrics.jsonl").read_bytes()) == before


def test_no_time_left_means_one_iteration_and_a_checkpoint(data: str, tmp_path: Path) -> None:
    outcome = run(flags(data, tmp_path, exit_duration_in_mins=0))
    assert outcome.code == 0, outcome.err
    assert "exiting program after 0.0 minutes" in outcome.out
    assert (tmp_path / "saved/latest_checkpointed_iteration.txt").read_text().strip() == "1"
    assert [row["iteration"] for row in metrics(tmp_path)] == [1]


@pytest.mark.parametrize(
    "changes",
    [{"eval_interval": 10}, {"eval_iters": 1}, {"eval_interval": 2}, {"global_batch_size": 2, "train_iters": 9}],
)
def test_other_lengths_after_resuming(changes: dict[str, Value], data: str, tmp_path: Path) -> None:
    """More was consumed than the new flags would ever ask for."""
    before: dict[str, Value] = {"eval_interval": 1, "eval_iters": 3, "global_batch_size": 8, "exit_interval": 8}
    assert run(flags(data, tmp_path, **before)).code == 0
    outcome = run(flags(data, tmp_path, **changes))
    assert outcome.code == 0, outcome.err
    assert metrics(tmp_path)[-1]["iteration"] == changes.get("train_iters", 10)


def test_skip_train_only_evaluates(straight: tuple[Path, Outcome], data: str, tmp_path: Path) -> None:
    outcome = run(flags(data, tmp_path, skip_train=True, load=f"{straight[0]}/saved", save=None, save_interval=None))
    assert outcome.code == 0, outcome.err
    assert [row["iteration"] for row in metrics(tmp_path)] == [10, 10]
    # its validation starts where the run's own would go on, so only the test pass can be compared
    assert untimed(metrics(tmp_path))[-1] == untimed(metrics(straight[0]))[-1]


def test_finetune_takes_the_weights_and_starts_anew(straight: tuple[Path, Outcome], data: str, tmp_path: Path) -> None:
    outcome = run(flags(data, tmp_path, finetune=True, load=f"{straight[0]}/saved", exit_interval=1))
    assert outcome.code == 0, outcome.err
    (row,) = metrics(tmp_path)
    assert (row["iteration"], row["consumed_samples"], row["learning_rate"]) == (1, 4, 1e-3)
    # the same samples, other weights
    assert row["lm loss"] != metrics(straight[0])[0]["lm loss"]


# ---- several ranks


@pytest.mark.parametrize(
    "layout", [{"pipeline_model_parallel_size": 2}, {}, {"zero_stage": 1}], ids=["pp2", "dp2", "zero1"]
)
def test_dropout_does_not_depend_on_the_layout(
    layout: dict[str, Value], straight: tuple[Path, Outcome], data: str, tmp_path: Path
) -> None:
    printed = run_ranks(as_rank, 2, flags(data, tmp_path, exit_interval=3, **layout))
    expected = metrics(straight[0])[:3]
    for row, true in zip(metrics(tmp_path), expected, strict=True):
        assert row["lm loss"] == pytest.approx(true["lm loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(true["grad_norm"], rel=1e-4)
    assert "using world size: 2" in printed[0]
    assert " iteration        3/" in printed[1]
    assert " iteration        3/" not in printed[0]


def test_that_dropout_is_on(straight: tuple[Path, Outcome], data: str, tmp_path: Path) -> None:
    assert run(flags(data, tmp_path, exit_interval=1, hidden_dropout=0, attention_dropout=0)).code == 0
    assert abs(metrics(tmp_path)[0]["lm loss"] - metrics(straight[0])[0]["lm loss"]) > 1e-4


def wait_for_iterations(out: Path, count: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise TimeoutError(f"no {count} iterations within {seconds} s")


ENDLESS: dict[str, Value] = {"train_iters": 100_000, "eval_iters": 0, "save_interval": 100_000}


def check_stopped(out: Path, data: str) -> None:
    """What was saved is the last iteration that was reported, and another layout goes on from it."""
    last = metrics(out)[-1]
    index = find(out / "saved").index
    assert index.iteration == last["iteration"]
    assert index.state["progress"]["consumed_samples"] == last["consumed_samples"]
    assert not list((out / "saved").glob("*.tmp*"))
    outcome = run(flags(data, out, **ENDLESS, exit_duration_in_mins=0))
    assert outcome.code == 0, outcome.err
    assert metrics(out)[-1]["iteration"] == last["iteration"] + 1


def told_to_stop(argv: list[str], out: Path, ahead: int) -> str:
    """Run on every rank, so many steps ahead: train until rank 1, and only it, gets the signal."""

    def send() -> None:
        wait_for_iterations(out, 3)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.steps_ahead = lambda *_: ahead
    if os.environ["RANK"] == "1":
        threading.Thread(target=send, daemon=True).start()
    return as_rank(argv)


@pytest.mark.parametrize("ahead", [0, 1])
def test_one_rank_told_to_stop_stops_all(ahead: int, data: str, tmp_path: Path) -> None:
    argv = flags(data, tmp_path, **ENDLESS, tensor_model_parallel_size=2)
    with pytest.raises(RankFailed) as left:
        run_ranks(told_to_stop, 2, argv, tmp_path, ahead)
    assert left.value.exit_codes == (75, 75), left.value.traceback
    check_stopped(tmp_path, data)


@pytest.mark.slow
def test_torchrun_told_to_stop(data: str, tmp_path: Path) -> None:
    """torchrun passes the signal on and leaves with a code of its own; the ranks save meanwhile."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [*launch, str(ROOT / "pretrain_gpt.py"), *flags(data, tmp_path, **ENDLESS)]
    with (
        open(tmp_path / "printed", "w") as printed,
        subprocess.Popen(command, env=environment(), stdout=printed, stderr=subprocess.STDOUT) as torchrun,
    ):
        try:
            wait_for_iterations(tmp_path, 3)
            torchrun.send_signal(signal.SIGTERM)
            assert torchrun.wait(40) != 0
        finally:
            torchrun.kill()
    assert "successfully saved checkpoint" in (tmp_path / "printed").read_text()
    check_stopped(tmp_path, data)


def as_slurm_task(argv: list[str]) -> str:
    """Run on every rank: what `srun python pretrain_gpt.py` finds, which is SLURM's variables only."""
    rank, size = os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    os.environ.update(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS=size, SLURM_JOB_ID="7")
    return as_rank(argv)


def test_plain_srun(data: str, tmp_path: Path) -> None:
    printed = run_ranks(as_slurm_task, 2, flags(data, tmp_path, exit_interval=2, pipeline_model_parallel_size=2))
    assert "using world size: 2, data-parallel-size: 1" in printed[0]
    assert " iteration        2/" in printed[1]
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2]

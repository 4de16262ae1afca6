"""The host one step ahead of what it reads, forced on a CPU: the same run, and updates that must not be made."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ds.data.loader import MicrobatchLoader
from megatron_ds.errors import DataError
from megatron_ds.optim.buckets import Buckets
from megatron_ds.training import loop, step
from megatron_ds.training.loop import steps_ahead
from tests.helpers.ranks import run_ranks
from tests.helpers.recipe import Value, run, write_tokens
from tests.parity.harness import STYLES, arguments, batches, fresh, start, steps
from tests.training.test_end_to_end import flags, metrics, untimed, weights


def run_ahead(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Let the host run ahead by that many steps; what it launches, reads and saves from now on."""
    seen: list[str] = []
    launch, read, save = step.launch_step, step.PendingStep.result, loop.save_checkpoint

    def launched(engine: Any, schedule: Any, progress: Any, *others: Any, **rest: Any) -> step.PendingStep:
        seen.append("launch")
        return launch(engine, schedule, progress, *others, **rest)

    def result(self: step.PendingStep) -> step.StepResult:
        seen.append("read")
        return read(self)

    def saved(engine: Any, progress: Any) -> None:
        seen.append(f"save {progress.iteration}")
        save(engine, progress)

    monkeypatch.setattr(loop, "steps_ahead", lambda *_: count)
    monkeypatch.setattr(loop, "launch_step", launched)
    monkeypatch.setattr(step.PendingStep, "result", result)
    monkeypatch.setattr(loop, "save_checkpoint", saved)
    return seen


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 20 documents of 50 tokens."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    write_tokens(prefix)
    return str(prefix)


def test_the_run_is_the_same(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Value] = {"eval_interval": 4, "save_interval": 5, "bf16": True, "log_params_norm": True}
    expected = run(flags(data, tmp_path / "0", **changes))
    seen = run_ahead(monkeypatch, 1)
    found = run(flags(data, tmp_path / "1", **changes))
    assert expected.code == found.code == 0, found.err
    # Ten steps, of which 4, 5, 8 and 10 are read at once: somebody looks at the weights there.
    two = ["launch", "launch", "read", "read"]
    begin, go_on = ["launch", "launch", "read"], ["launch", "read"]
    one = ["launch", "read"]
    assert seen == [*begin, *go_on * 2, "read", *one, "save 5", *begin, *go_on, "read", *two, "save 10"]
    assert untimed(metrics(tmp_path / "1")) == untimed(metrics(tmp_path / "0"))
    for iteration in (5, 10):
        assert weights(tmp_path / "1", iteration) == weights(tmp_path / "0", iteration)
    steps_done = [row for row in metrics(tmp_path / "1") if "lm loss" in row]
    assert all(row["elapsed_ms"] > 0 for row in steps_done) and len(steps_done) == 10
    lines = [
        [line.split("|")[0] for line in outcome.out.splitlines() if line.startswith((" iteration", " valid"))]
        for outcome in (expected, found)
    ]
    assert lines[0] == lines[1]


def test_exit_interval_and_resume(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(flags(data, tmp_path / "0")).code == 0
    run_ahead(monkeypatch, 1)
    first = run(flags(data, tmp_path / "1", exit_interval=7))
    assert first.code == 0 and "exiting program at iteration 7" in first.out
    assert metrics(tmp_path / "1")[-1]["iteration"] == 7
    assert run(flags(data, tmp_path / "1")).code == 0
    assert untimed(metrics(tmp_path / "1")) == untimed(metrics(tmp_path / "0"))
    assert weights(tmp_path / "1", 10) == weights(tmp_path / "0", 10)


def test_resume_after_a_skipped_step(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the fourth is on its way nobody knows yet that it changes nothing; the fifth starts behind it all the same.

    Updates, by which Adam corrects its moments, are then one less than steps: on the device, in the checkpoint, and in
    the run that goes on from there.
    """
    run_ahead(monkeypatch, 1)
    updates: list[tuple[int, int, float]] = []
    save, wait, waited = loop.save_checkpoint, Buckets.wait, []

    def saved(engine: Any, progress: Any) -> None:
        updates.append((progress.iteration, progress.optimizer_steps, engine.optimizer.steps.item()))
        save(engine, progress)

    def spoilt(self: Buckets) -> None:
        wait(self)
        waited.append(1)
        if len(waited) == 4:
            next(iter(self)).shard_grads[3] = math.nan

    monkeypatch.setattr(loop, "save_checkpoint", saved)
    monkeypatch.setattr(Buckets, "wait", spoilt)
    changes: dict[str, Value] = {"save_interval": 6, "bf16": True, "eval_interval": 100}
    assert run(flags(data, tmp_path / "0", **changes)).code == 0
    assert [row["skipped"] for row in metrics(tmp_path / "0") if "lm loss" in row] == [i == 4 for i in range(1, 11)]
    assert updates == [(6, 5, 5.0), (10, 9, 9.0)]
    shutil.copytree(tmp_path / "0/saved/iter_0000006", tmp_path / "1/saved/iter_0000006")
    again = run(flags(data, tmp_path / "1", **changes))
    assert again.code == 0 and "at iteration 6" in again.out, again.err
    assert updates[2:] == [(10, 9, 9.0)] and len(waited) == 14
    assert weights(tmp_path / "1", 10) == weights(tmp_path / "0", 10)


def test_out_of_time_is_seen_one_step_later(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ahead(monkeypatch, 1)
    outcome = run(flags(data, tmp_path, exit_duration_in_mins=0))
    assert outcome.code == 0 and "exiting program after 0.0 minutes" in outcome.out
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "saved/latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_steps_before_a_fault_in_the_data_are_reported(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ahead(monkeypatch, 1)
    rightly, given = MicrobatchLoader.__next__, []

    def broken(self: MicrobatchLoader) -> Any:
        given.append(1)
        if len(given) > 6:  # two micro-batches a step
            raise DataError("a.bin", found="token id 999")
        return rightly(self)

    monkeypatch.setattr(MicrobatchLoader, "__next__", broken)
    outcome = run(flags(data, tmp_path))
    assert outcome.code == 3 and "token id 999" in outcome.err
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("device", "dynamic", "level", "meter", "expected"),
    [
        ("cuda", False, 0, False, 1),
        ("cpu", False, 0, False, 0),
        ("cuda", True, 0, False, 0),
        ("cuda", False, 1, False, 0),
        ("cuda", False, 0, True, 0),
    ],
)
def test_who_runs_ahead(device: str, dynamic: bool, level: int, meter: bool, expected: int) -> None:
    engine: Any = SimpleNamespace(
        loss_scaling=SimpleNamespace(dynamic=dynamic), run=SimpleNamespace(device=torch.device(device))
    )
    timers: Any = SimpleNamespace(level=level)
    assert steps_ahead(engine, timers, SimpleNamespace() if meter else None) == expected  # type: ignore[arg-type]


# ---- the numbers of a step, on the device


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
@pytest.mark.parametrize(
    ("targets", "squared_norm", "norm"),
    [(8.0, 0.25, 0.5 / 8 / 4), (8.0, 4e6, 2e3 / 32), (0.0, 0.0, None), (8.0, math.nan, None), (8.0, math.inf, None)],
)
def test_norm_and_scale(targets: float, squared_norm: float, norm: float | None, clip_grad: float) -> None:
    config = SimpleNamespace(
        model=SimpleNamespace(loss_names=("lm loss",)), optimizer=SimpleNamespace(clip_grad=clip_grad)
    )
    engine: Any = SimpleNamespace(run=SimpleNamespace(config=config), executor=SimpleNamespace(loss_scale=4.0))
    summed = torch.tensor([3.0, targets, squared_norm, 0.0, 0.0, 0.0], dtype=torch.float64)
    found, scale = step._norm_and_scale(engine, summed)
    assert scale.dtype == torch.float32
    if norm is None:
        assert not found.isfinite() and scale == 0
        return
    assert found.item() == pytest.approx(norm, rel=1e-14)
    clipped = min(1.0, clip_grad / (norm + 1e-6)) if clip_grad else 1.0
    assert scale.item() == pytest.approx(clipped / 32, rel=1e-7)


def state(engine: Any) -> list[torch.Tensor]:
    """All that an update changes."""
    optimizer = engine.optimizer
    moments = [t for segment in optimizer.segments for t in (segment.exp_avg, segment.exp_avg_sq, segment.master)]
    return [t.clone() for t in (*moments, *(bucket.params for bucket in engine.buckets), optimizer.steps)]


def poisoned(argv: list[str], poison: float) -> list[Any]:
    """Run on every rank: two steps, one in which the last rank has a gradient that is not finite, and another."""
    engine = start(argv)
    engine.initialise()
    given, wait = batches(STYLES["gpt2"], 4), engine.buckets.wait

    def spoilt() -> None:
        wait()
        if engine.run.parallel.world.rank == engine.run.parallel.world.size - 1:
            next(iter(engine.buckets)).shard_grads[3] = poison

    progress, _ = steps(engine, fresh(engine), given[:2])
    before = state(engine)
    engine.buckets.wait = spoilt  # type: ignore[method-assign]
    progress, share = steps(engine, progress, given[2:3])
    after = state(engine)
    engine.buckets.wait = wait  # type: ignore[method-assign]
    same = [torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    progress, further = steps(engine, progress, given[3:])
    moved = [torch.equal(a, b) for a, b in zip(state(engine), before, strict=True)]
    count = engine.optimizer.steps.item()
    return [all(same), any(moved), share.skipped + further.skipped, count, dataclasses.asdict(progress)]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["", "--bf16", "--fp16 --loss-scale 64"])
def test_a_gradient_that_is_not_finite_changes_nothing(precision: str, poison: float) -> None:
    found = run_ranks(poisoned, 2, arguments(STYLES["gpt2"], *f"--zero-stage 1 {precision}".split()), poison)
    for untouched, stuck, skipped, count, progress in found:
        assert untouched and not stuck
        assert skipped == [True, False]
        assert count == progress["optimizer_steps"] == 3
        assert progress["iteration"] == 4

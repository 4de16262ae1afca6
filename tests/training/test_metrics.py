"""What a run prints and writes, against the reference's lines written out by hand and files read by others' code."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest

from megatron_ds import log
from megatron_ds.training import config as config_module
from megatron_ds.training.config import LoggingConfig, logging_errors
from megatron_ds.training.metrics import Metrics, Position, StepRecord


def record(iteration: int, **changes) -> StepRecord:
    """An iteration of 8 samples of 64 tokens in half a second."""
    base = StepRecord(
        iteration=iteration,
        consumed_samples=iteration * 8,
        consumed_tokens=iteration * 512,
        losses={"lm loss": 2.0},
        grad_norm=1.25,
        learning_rate=1.5e-4,
        loss_scale=1.0,
        global_batch_size=8,
        skipped=False,
        nan=False,
        elapsed_s=0.5,
        tokens_per_s=1024.0,
        tflops=3.0,
    )
    return dataclasses.replace(base, **changes)


def metrics(start_iteration=0, writes=True, **flags) -> Metrics:
    config = LoggingConfig(**{"log_interval": 1, **flags})
    return Metrics(
        config, train_iters=100, world_size=4, sequence_length=64, writes=writes, start_iteration=start_iteration
    )


def test_log_line_is_megatron_deepspeeds(capsys):
    metrics().step(record(7))
    assert capsys.readouterr().out == (
        " iteration        7/     100 | consumed samples:           56 | consumed tokens:         3584 |"
        " elapsed time per iteration (ms): 500.0 | learning rate: 1.500E-04 | global batch size:     8 |"
        " lm loss: 2.000000E+00 | loss scale: 1.0 | grad norm: 1.250 | actual seqlen:    64 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 | samples per second: 16.000 |"
        " tokens per gpu per second (tgs): 256.000 | TFLOPs: 3.00 |\n"
    )


def test_optional_fields_stand_where_the_reference_puts_them(capsys):
    metrics().step(record(1, num_zeros=12.0, params_norm=34.5))
    assert " | grad norm: 1.250 | num zeros: 12.0 | params norm: 34.500 | actual" in capsys.readouterr().out
    metrics().step(record(1, grad_norm=None))
    assert "grad norm" not in capsys.readouterr().out


def test_interval_means(capsys):
    """Losses over the 2 iterations that were not skipped; times over all 4; rates by time, not by iteration."""
    subject = metrics(log_interval=4)
    subject.step(record(1, losses={"lm loss": 3.0}, elapsed_s=1.0, tokens_per_s=512.0, tflops=2.0))
    subject.step(record(2, losses={"lm loss": 100.0}, skipped=True))
    subject.step(record(3, losses={"lm loss": math.nan}, skipped=True, nan=True))
    assert capsys.readouterr().out == ""
    subject.step(record(4, losses={"lm loss": 5.0}, elapsed_s=2.0, tokens_per_s=256.0, tflops=1.0))
    line = capsys.readouterr().out
    assert " lm loss: 4.000000E+00 |" in line
    assert " number of skipped iterations:   2 | number of nan iterations:   1 |" in line
    assert " elapsed time per iteration (ms): 1000.0 |" in line  # (1 + .5 + .5 + 2) / 4
    assert " samples per second: 8.000 |" in line  # 4 * 8 / 4 s
    assert " tokens per gpu per second (tgs): 128.000 |" in line  # 4 * 512 / 4 s / 4 ranks
    assert " TFLOPs: 1.75 |" in line  # (2*1 + 3*.5 + 3*.5 + 1*2) / 4 s
    for iteration in (5, 6, 7, 8):
        subject.step(record(iteration, losses={"lm loss": 1.0}))
    line = capsys.readouterr().out
    assert " lm loss: 1.000000E+00 |" in line
    assert " number of skipped iterations:   0 |" in line


def test_a_loss_of_nan_shows_and_one_never_computed_does_not(capsys):
    metrics().step(record(1, losses={"lm loss": math.nan}, nan=True))
    assert " lm loss: NAN |" in capsys.readouterr().out
    metrics().step(record(1, skipped=True))
    assert "lm loss" not in capsys.readouterr().out


def test_validation_block(capsys):
    metrics().validation("iteration 10", {"lm loss": 2.0}, Position(10, 80, 5120))
    line = " validation loss at iteration 10 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    assert capsys.readouterr().out == f"{'-' * (len(line) + 1)}\n{line}\n{'-' * (len(line) + 1)}\n"
    metrics().validation("iteration 10", {"lm loss": 50.0}, Position(10, 80, 5120))
    assert "PPL: 4.851652E+08 |" in capsys.readouterr().out  # exp(20)


def test_only_the_last_rank_prints(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 0), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        metrics().step(record(1))
        assert len(capsys.readouterr().out.splitlines()) == lines


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_file_keeps_full_precision(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    subject = metrics(metrics_file=str(path))
    subject.step(record(1, losses={"lm loss": 0.1 + 0.2}, grad_norm=1 / 3, elapsed_s=0.25))
    assert read(path) == [  # readable while the run goes on
        {
            "iteration": 1,
            "consumed_samples": 8,
            "consumed_tokens": 512,
            "lm loss": 0.30000000000000004,
            "grad_norm": 0.3333333333333333,
            "learning_rate": 0.00015,
            "loss_scale": 1.0,
            "global_batch_size": 8,
            "skipped": False,
            "elapsed_ms": 250.0,
            "tokens_per_s": 1024.0,
            "tflops": 3.0,
        }
    ]
    subject.step(record(2, losses={"lm loss": math.nan}, grad_norm=math.inf, skipped=True, num_zeros=3.0))
    subject.validation("iteration 2", {"lm loss": 2.0}, Position(2, 16, 1024))
    subject.validation("iteration 2 on test set", {"lm loss": 0.0}, Position(2, 16, 1024), split="test")
    subject.close()
    second, validation, test = read(path)[1:]
    assert (second["lm loss"], second["grad_norm"], second["skipped"], second["num_zeros"]) == ("nan", "inf", True, 3.0)
    assert validation == {"iteration": 2, "validation lm loss": 2.0, "ppl": pytest.approx(7.38905609893065)}
    assert test == {"iteration": 2, "test lm loss": 0.0, "ppl": 1.0}


def test_resuming_leaves_every_iteration_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    subject = metrics(metrics_file=str(path))
    for iteration in range(1, 6):
        subject.step(record(iteration, losses={"lm loss": 1.0}))
    subject.validation("iteration 3", {"lm loss": 1.0}, Position(3, 24, 1536))
    subject.validation("iteration 5", {"lm loss": 1.0}, Position(5, 40, 2560))
    subject.close()
    with path.open("a") as file:
        file.write('{"iteration": 2, "lm lo')  # killed while writing
    subject = metrics(metrics_file=str(path), start_iteration=3)
    subject.step(record(4, losses={"lm loss": 9.0}))
    subject.close()
    assert [(row["iteration"], row.get("lm loss")) for row in read(path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (3, None),
        (4, 9.0),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_is_something_else_is_left_alone(tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("my only copy\n")
    subject = metrics(metrics_file=str(path))
    subject.step(record(1))
    subject.close()
    assert path.read_text() == "my only copy\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    assert "WARNING: --metrics-file:" in capsys.readouterr().out


def test_places_that_cannot_be_written_are_told_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    subject = metrics(metrics_file=str(tmp_path / "file" / "m.jsonl"), tensorboard_dir=str(tmp_path / "file" / "tb"))
    for iteration in (1, 2):
        subject.step(record(iteration))
    subject.close()
    out = capsys.readouterr().out
    assert out.count("WARNING: --metrics-file:") == 1
    assert out.count("WARNING: --tensorboard-dir:") == 1
    assert out.count(" lm loss: ") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_does_not_stop_the_training(capsys):
    subject = metrics(metrics_file="/dev/full")
    for iteration in (1, 2):
        subject.step(record(iteration))
    subject.close()
    out = capsys.readouterr().out
    assert out.count("WARNING: --metrics-file: [Errno 28]") == 1
    assert out.count(" lm loss: ") == 2


def test_ranks_that_do_not_write_open_nothing(tmp_path):
    subject = metrics(writes=False, metrics_file=str(tmp_path / "m"), tensorboard_dir=str(tmp_path / "tb"))
    subject.step(record(1))
    subject.close()
    assert list(tmp_path.iterdir()) == []


def points(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_tags_are_megatron_deepspeeds(tmp_path):
    subject = metrics(
        tensorboard_dir=str(tmp_path),
        log_interval=2,
        log_batch_size_to_tensorboard=True,
        log_timers_to_tensorboard=True,
        log_validation_ppl_to_tensorboard=True,
    )
    subject.step(record(1))
    subject.step(record(2, losses={"lm loss": 1.5}))
    subject.timers({"optimizer": 0.125}, Position(2, 16, 1024))
    subject.step(record(3, losses={"lm loss": math.inf}, grad_norm=None, skipped=True))
    subject.validation("iteration 3", {"lm loss": 0.0}, Position(3, 24, 1536))
    subject.close()
    found = points(tmp_path)
    assert found["lm-loss-training/lm loss"] == [(1, 2.0), (2, 1.5)]
    assert found["lm-loss-training/lm loss vs samples"] == [(8, 2.0), (16, 1.5)]
    assert found["lm-loss-training/lm loss vs tokens"] == [(512, 2.0), (1024, 1.5)]
    assert found["learning-rate/learning-rate"] == [(step, pytest.approx(1.5e-4)) for step in (1, 2, 3)]
    assert found["batch-size/batch-size vs samples"] == [(8, 8), (16, 8), (24, 8)]
    assert found["grad-norm/grad-norm"] == [(1, 1.25), (2, 1.25)]
    assert found["iteration-time/iteration-time"] == [(2, 0.5)]
    assert found["optimizer-time"] == [(2, 0.125)]
    assert found["lm-loss-validation/lm loss validation vs samples"] == [(24, 0.0)]
    assert found["lm-loss-validation/lm loss validation ppl"] == [(3, 1.0)]
    assert found["steps-vs-samples/y=steps,x=samples"] == [(8, 1), (16, 2), (24, 3)]
    assert found["steps-vs-tokens/y=tokens,x=steps"] == [(1, 512), (2, 1024), (3, 1536)]


def test_tensorboard_writes_what_was_asked_for(tmp_path):
    subject = metrics(tensorboard_dir=str(tmp_path), tensorboard_log_interval=2, log_learning_rate_to_tensorboard=False)
    for iteration in (1, 2, 3, 4):
        subject.step(record(iteration))
    subject.validation("iteration 4", {"lm loss": 0.0}, Position(4, 32, 2048))
    subject.close()
    found = points(tmp_path)
    assert [step for step, _ in found["grad-norm/grad-norm"]] == [2, 4]
    unwanted = ("learning-rate", "batch-size", "iteration-time", "optimizer-time")
    assert [tag for tag in found if tag.startswith(unwanted) or "ppl" in tag] == []


FAKE_WANDB = """
calls = []
class Run:
    def log(self, values, step): calls.append(("log", step, values))
    def finish(self): calls.append(("finish",))
def init(**given):
    calls.append(("init", given))
    return Run()
"""


def test_weights_and_biases(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    config = {"wandb_project": "p", "wandb_exp_name": "run 1", "wandb_save_dir": "here"}
    assert logging_errors(LoggingConfig(**config)) == []
    subject = metrics(**config)
    subject.step(record(1))
    subject.close()
    calls = sys.modules["wandb"].calls
    monkeypatch.delitem(sys.modules, "wandb")
    assert calls[0] == ("init", {"project": "p", "name": "run 1", "dir": "here"})
    assert calls[1][:2] == ("log", 1)
    assert calls[1][2]["lm-loss-training/lm loss"] == 2.0
    assert calls[1][2]["consumed_samples"] == 8
    assert calls[-1] == ("finish",)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    errors = logging_errors(LoggingConfig(tensorboard_dir="tb", wandb_project="p"))
    assert [(error.subject, error.fix.split(",")[0]) for error in errors] == [
        ("--tensorboard-dir", "pip install tensorboard"),
        ("--wandb-project", "pip install wandb"),
    ]
    assert logging_errors(LoggingConfig()) == []


def test_intervals_must_be_positive():
    errors = logging_errors(LoggingConfig(log_interval=0, tensorboard_log_interval=-1))
    assert [error.subject for error in errors] == ["--log-interval", "--tensorboard-log-interval"]


def test_live_line_is_for_terminals_only(capsys, monkeypatch):
    subject = metrics(log_interval=100)
    subject.step(record(40))
    assert capsys.readouterr().out == ""
    lines = []
    monkeypatch.setattr(log, "progress", lines.append)
    subject.step(record(40))
    assert lines == ["40/100 | lm loss 2.0000 | 1,024 tokens/s | 0:00:30 left"]

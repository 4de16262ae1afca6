"""Flags of the training run and of what it reports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from megatron_ds.cli import arg
from megatron_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training run."""

    micro_batch_size: int | None = arg(None, "Samples that one rank computes at once.")
    global_batch_size: int | None = arg(
        None, "Samples of one iteration; micro-batch size x data-parallel size if not given."
    )
    train_iters: int | None = arg(None, "Iterations to train; or give --train-samples.")
    train_samples: int | None = arg(None, "Samples to train on; or give --train-iters.")
    rampup_batch_size: tuple[int, ...] = arg(
        (), "Start the global batch at START and raise it by INCREMENT, evenly, over the first SAMPLES samples."
    )
    step_batch_size_schedule: str | None = arg(
        None, "Global batches by consumed tokens, such as '0:768 250B:1536'; instead of --global-batch-size."
    )
    decrease_batch_size_if_needed: bool = arg(
        False, "Round a batch that does not come out even down to whole micro-batches on all data-parallel ranks."
    )
    exit_interval: int | None = arg(None, "Save and leave when the iteration is a multiple of this.")
    exit_duration_in_mins: float | None = arg(None, "Save and leave after this many minutes.")
    eval_interval: int = arg(1000, "Iterations between validations.")
    eval_iters: int = arg(100, "Iterations of one validation or test; 0 does none.")
    skip_train: bool = arg(False, "Only validate and test.")
    seed: int = arg(1234, "Seed of initial weights, data order and dropout.")
    manual_gc: bool = arg(False, "Collect Python's garbage only when told, so that all ranks pause together.")
    manual_gc_interval: int = arg(0, "Iterations between collections with --manual-gc; 0 collects at validations only.")
    dry_run: bool = arg(False, "Print what every rank would hold and do, then leave.")
    print_config: bool = arg(False, "Print every value and where it came from, then leave.")
    verify_parallel: bool = arg(
        False, "Train a shrunk copy of the model in this layout and on one process, compare every gradient, then leave."
    )
    report_costs: bool = arg(
        False, "Print predicted and measured bytes, memory and idle time of every rank at the end of the run."
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging."""

    log_interval: int = arg(100, "Iterations between lines of the training log.")
    metrics_file: str | None = arg(None, "Write one JSON object per iteration to this file.", metavar="FILE")
    tensorboard_dir: str | None = arg(None, "Write TensorBoard events to this directory.", metavar="DIR")
    tensorboard_log_interval: int = arg(1, "Iterations between TensorBoard points.")
    tensorboard_queue_size: int = arg(1000, "TensorBoard points kept before they are written.")
    log_timers_to_tensorboard: bool = arg(False, "Write timers and the time per iteration to TensorBoard.")
    log_batch_size_to_tensorboard: bool = arg(False, "Write the batch size to TensorBoard.")
    log_validation_ppl_to_tensorboard: bool = arg(False, "Write the perplexity of validations to TensorBoard.")
    log_learning_rate_to_tensorboard: bool = arg(
        True,
        "Do not write the learning rate to TensorBoard.",
        "--no-log-learning-rate-to-tensorboard",
        "--no-log-learnig-rate-to-tensorboard",
    )
    log_params_norm: bool = arg(False, "Compute and log the L2 norm of all parameters.")
    log_num_zeros_in_grad: bool = arg(False, "Count and log the zeros in the gradient.")
    timing_log_level: Literal[0, 1, 2] = arg(
        0, "0: time the iteration only; 1: also its coarse phases; 2: also every micro-batch and message."
    )
    timing_log_option: Literal["max", "minmax", "all"] = arg("minmax", "What of each timer is printed across ranks.")
    wandb_project: str | None = arg(None, "Send metrics to this Weights & Biases project.", metavar="NAME")
    wandb_exp_name: str | None = arg(None, "Name of the run in Weights & Biases.", metavar="NAME")
    wandb_save_dir: str | None = arg(None, "Directory for Weights & Biases' own files.", metavar="DIR")


def logging_errors(config: LoggingConfig) -> list[ConfigError]:
    """What was asked for and cannot be logged here, or would never be logged."""
    errors = []
    for flag, value, package in (
        ("--tensorboard-dir", config.tensorboard_dir, "tensorboard"),
        ("--wandb-project", config.wandb_project, "wandb"),
    ):
        if value is not None and find_spec(package) is None:
            errors.append(
                ConfigError(
                    flag,
                    found=f"Python package {package} is not installed",
                    expected=f"a Python in which `import {package}` works",
                    fix=f"pip install {package}, or leave the flag out",
                )
            )
    for flag, interval in (
        ("--log-interval", config.log_interval),
        ("--tensorboard-log-interval", config.tensorboard_log_interval),
    ):
        if interval < 1:
            errors.append(ConfigError(flag, found=str(interval), expected="at least 1", fix=f"{flag} 1"))
    for flag, path, is_wrong, found, expected in (
        ("--metrics-file", config.metrics_file, os.path.isdir, "a directory", "a file"),
        ("--tensorboard-dir", config.tensorboard_dir, os.path.isfile, "a file", "a directory"),
    ):
        if path is not None and is_wrong(path):
            errors.append(ConfigError(flag, f"{path} is {found}", expected, f"{flag} {path}-of-this-run"))
    return errors

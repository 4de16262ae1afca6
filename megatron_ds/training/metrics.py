"""What a run reports: Megatron-DeepSpeed's log lines, a JSON line per iteration, TensorBoard, Weights & Biases.

All of it hangs on one record per iteration. Files and boards are written by one rank; a place that cannot be written is
reported once and left alone, since no report is worth a stopped run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from megatron_ds import log
from megatron_ds.training.config import LoggingConfig


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One iteration. Counters include it; `learning_rate` is the one that the step used.

    tokens_per_s: of all ranks together. tflops: of one rank.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    losses: Mapping[str, float]
    grad_norm: float | None
    learning_rate: float
    loss_scale: float
    global_batch_size: int
    skipped: bool
    nan: bool
    elapsed_s: float
    tokens_per_s: float
    tflops: float
    params_norm: float | None = None
    num_zeros: float | None = None

    @property
    def position(self) -> Position:
        """Where in the run this iteration ended."""
        return Position(self.iteration, self.consumed_samples, self.consumed_tokens)


class Position(NamedTuple):
    """A point of the run on its three axes."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int


class Metrics:
    """Reports every iteration and every validation of one run."""

    def __init__(
        self,
        config: LoggingConfig,
        *,
        train_iters: int,
        world_size: int,
        sequence_length: int,
        writes: bool,
        start_iteration: int = 0,
    ):
        self.config, self.train_iters, self.world_size = config, train_iters, world_size
        self.sequence_length, self.writes = sequence_length, writes
        self._interval = Interval()
        self._pace_s: float | None = None
        self._file: _Place[_JsonLines] | None = None
        self._boards: list[_Place[_Board]] = []
        if writes and (path := config.metrics_file) is not None:
            self._file = _Place("--metrics-file", lambda: _JsonLines(path, start_iteration))
        if writes and config.tensorboard_dir is not None:
            self._boards.append(_Place("--tensorboard-dir", lambda: _TensorBoard(config)))
        if writes and config.wandb_project is not None:
            self._boards.append(_Place("--wandb-project", lambda: _WandB(config)))

    def step(self, record: StepRecord) -> None:
        """Report one iteration: files and boards at their intervals, the log line at its own, the live line always."""
        self._interval.add(record)
        if self._file:
            row = _row(record)
            self._file.write(lambda file: file.append(row))
        if record.iteration % self.config.tensorboard_log_interval == 0:
            self._points(_step_points(record, self.config), record.position)
        if record.iteration % self.config.log_interval == 0:
            log.last(log_line(record, self._interval, self.train_iters, self.world_size, self.sequence_length))
            if self.config.log_timers_to_tensorboard:
                seconds = self._interval.elapsed_s / self._interval.iterations
                self._points({"iteration-time/iteration-time": seconds}, record.position)
            self._interval = Interval()
        if self.writes:
            log.progress(self._live_line(record))

    def validation(
        self,
        prefix: str,
        losses: Mapping[str, float],
        position: Position,
        split: Literal["validation", "test"] = "validation",
    ) -> None:
        """Report the mean losses of a validation or test pass; `prefix` tells when, for instance "iteration 100"."""
        log.last(validation_block(prefix, losses))
        ppl = {key: perplexity(loss) for key, loss in losses.items()}
        if self._file and losses:
            row = {"iteration": position.iteration, **{f"{split} {key}": loss for key, loss in losses.items()}}
            row["ppl"] = next(iter(ppl.values()))
            self._file.write(lambda file: file.append(row))
        points = {f"lm-loss-validation/{key} {split}": loss for key, loss in losses.items()}
        if self.config.log_validation_ppl_to_tensorboard:
            points |= {f"lm-loss-validation/{key} {split} ppl": value for key, value in ppl.items()}
        self._points(points, position)

    def timers(self, seconds: Mapping[str, float], position: Position) -> None:
        """Report seconds per iteration under each timer's name (TensorBoard, if asked for)."""
        if self.config.log_timers_to_tensorboard:
            self._points({f"{name}-time": value for name, value in seconds.items()}, position)

    def close(self) -> None:
        """Write out what is still queued."""
        log.clear_progress()
        if self._file:
            self._file.write(lambda file: file.close())
        for board in self._boards:
            board.write(lambda place: place.close())

    def _points(self, values: Mapping[str, float], position: Position) -> None:
        for board in self._boards:
            board.write(lambda place: place.points(values, position))

    def _live_line(self, record: StepRecord) -> str:
        # An average that forgets: one slow iteration should not move the estimate much, a lasting change should.
        pace = record.elapsed_s if self._pace_s is None else 0.9 * self._pace_s + 0.1 * record.elapsed_s
        self._pace_s = pace
        left = timedelta(seconds=round((self.train_iters - record.iteration) * pace))
        losses = "".join(f" | {key} {loss:.4f}" for key, loss in record.losses.items())
        return f"{record.iteration}/{self.train_iters}{losses} | {record.tokens_per_s:,.0f} tokens/s | {left} left"


@dataclass
class Interval:
    """Sums over the iterations since the last log line; a skipped iteration's loss is left out of the mean."""

    advanced: int = 0
    skipped: int = 0
    nan: int = 0
    elapsed_s: float = 0.0
    samples: int = 0
    tokens: float = 0.0
    tflop: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def iterations(self) -> int:
        """All iterations, skipped or not."""
        return self.advanced + self.skipped

    def add(self, record: StepRecord) -> None:
        """Count one iteration."""
        self.advanced += not record.skipped
        self.skipped += record.skipped
        self.nan += record.nan
        self.elapsed_s += record.elapsed_s
        self.samples += record.global_batch_size
        self.tokens += record.tokens_per_s * record.elapsed_s
        self.tflop += record.tflops * record.elapsed_s
        for key, loss in record.losses.items():
            self.losses[key] = self.losses.get(key, 0.0) + (0.0 if record.skipped else loss)


def log_line(record: StepRecord, interval: Interval, train_iters: int, world_size: int, sequence_length: int) -> str:
    """Megatron-DeepSpeed's training line, field by field, as the scripts that parse it expect."""
    elapsed = interval.elapsed_s
    fields = [
        f" iteration {record.iteration:8d}/{train_iters:8d}",
        f"consumed samples: {record.consumed_samples:12d}",
        f"consumed tokens: {record.consumed_tokens:12d}",
        f"elapsed time per iteration (ms): {elapsed * 1000 / interval.iterations:.1f}",
        f"learning rate: {record.learning_rate:.3E}",
        f"global batch size: {record.global_batch_size:5d}",
    ]
    means = {key: total / max(1, interval.advanced) for key, total in interval.losses.items()}
    # A mean of exactly 0 says that every iteration was skipped. NaN must show, so this is not `mean > 0`.
    fields += [f"{key}: {mean:.6E}" for key, mean in means.items() if not mean <= 0]
    fields.append(f"loss scale: {record.loss_scale:.1f}")
    if record.grad_norm is not None:
        fields.append(f"grad norm: {record.grad_norm:.3f}")
    if record.num_zeros is not None:
        fields.append(f"num zeros: {record.num_zeros:.1f}")
    if record.params_norm is not None:
        fields.append(f"params norm: {record.params_norm:.3f}")
    fields += [
        f"actual seqlen: {sequence_length:5d}",
        f"number of skipped iterations: {interval.skipped:3d}",
        f"number of nan iterations: {interval.nan:3d}",
        f"samples per second: {interval.samples / elapsed:.3f}",
        f"tokens per gpu per second (tgs): {interval.tokens / elapsed / world_size:.3f}",
        f"TFLOPs: {interval.tflop / elapsed:.2f}",
    ]
    return " | ".join(fields) + " |"


def validation_block(prefix: str, losses: Mapping[str, float]) -> str:
    """Megatron-DeepSpeed's validation line between two rules."""
    line = f" validation loss at {prefix} | "
    for key, loss in losses.items():
        line += f"{key} value: {loss:.6E} | {key} PPL: {perplexity(loss):.6E} | "
    rule = "-" * (len(line) + 1)
    return f"{rule}\n{line}\n{rule}"


def perplexity(loss: float) -> float:
    """exp(loss), bounded as in Megatron so that an untrained model does not print infinity."""
    return math.exp(min(loss, 20.0))  # in this order, NaN stays NaN


def _row(record: StepRecord) -> dict[str, Any]:
    row = {
        "iteration": record.iteration,
        "consumed_samples": record.consumed_samples,
        "consumed_tokens": record.consumed_tokens,
        **record.losses,
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
        "loss_scale": record.loss_scale,
        "global_batch_size": record.global_batch_size,
        "skipped": record.skipped,
        "elapsed_ms": record.elapsed_s * 1000,
        "tokens_per_s": record.tokens_per_s,
        "tflops": record.tflops,
    }
    optional = {"params_norm": record.params_norm, "num_zeros": record.num_zeros}
    return row | {key: value for key, value in optional.items() if value is not None}


def _step_points(record: StepRecord, config: LoggingConfig) -> dict[str, float]:
    """TensorBoard tags in Megatron-DeepSpeed's groups."""
    points = {}
    if config.log_learning_rate_to_tensorboard:
        points["learning-rate/learning-rate"] = record.learning_rate
    if config.log_batch_size_to_tensorboard:
        points["batch-size/batch-size"] = float(record.global_batch_size)
    if not record.skipped:
        points |= {f"lm-loss-training/{key}": loss for key, loss in record.losses.items()}
    optional = {
        "grad-norm/grad-norm": record.grad_norm,
        "num-zeros/num-zeros": record.num_zeros,
        "params-norm/params-norm": record.params_norm,
    }
    return points | {tag: value for tag, value in optional.items() if value is not None}


class _Board(Protocol):
    """Somewhere that draws curves."""

    def points(self, values: Mapping[str, float], position: Position) -> None: ...

    def close(self) -> None: ...


P = TypeVar("P")


class _Place(Generic[P]):
    """A place to report to; its first failure is told and is its last.

    Whatever a board's client raises (full disk, lost network, classes of its own), the training goes on.
    """

    def __init__(self, flag: str, open_place: Callable[[], P]):
        self._flag = flag
        self._place: P | None = None
        try:
            self._place = open_place()
        except Exception as error:
            self._give_up(error)

    def write(self, action: Callable[[P], None]) -> None:
        if self._place is None:
            return
        try:
            action(self._place)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._place = None
        log.last(f"WARNING: {self._flag}: {error}; nothing more is written there, training goes on")


class _JsonLines:
    """The metrics file: every iteration once, whatever was interrupted and resumed."""

    def __init__(self, path: str, start_iteration: int):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        if os.path.isfile(path):
            _drop_after(path, start_iteration)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, row: Mapping[str, Any]) -> None:
        plain = {key: _plain(value) for key, value in row.items()}
        try:
            self._file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers become the strings "nan", "inf" and "-inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: str, iteration: int) -> None:
    """Drop the lines of iterations that will be run again, and a last line cut short by a crash."""
    kept = f"{path}.tmp"
    with open(path, encoding="utf-8") as source, open(kept, "w", encoding="utf-8") as target:
        for number, line in enumerate(source):
            found = _iteration_of(line)
            if number == 0 and not line.startswith('{"iteration":'):
                os.remove(kept)
                raise ValueError(f"{path} exists and is not a metrics file")
            if found is not None and found <= iteration:
                target.write(line)
    os.replace(kept, path)


def _iteration_of(line: str) -> int | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    iteration = row.get("iteration") if isinstance(row, dict) else None
    return iteration if isinstance(iteration, int) and line.endswith("\n") else None


class _TensorBoard:
    """Every curve over iterations, samples and tokens."""

    def __init__(self, config: LoggingConfig):
        from torch.utils.tensorboard import SummaryWriter  # takes a second: only for those who asked

        self._writer = SummaryWriter(config.tensorboard_dir, max_queue=config.tensorboard_queue_size)
        self._iteration = -1

    def points(self, values: Mapping[str, float], position: Position) -> None:
        iteration, samples, tokens = position
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, iteration)
            self._writer.add_scalar(f"{tag} vs samples", value, samples)
            self._writer.add_scalar(f"{tag} vs tokens", value, tokens)
        if iteration > self._iteration:  # once, however many groups of points an iteration has
            self._writer.add_scalar("steps-vs-samples/y=steps,x=samples", iteration, samples)
            self._writer.add_scalar("steps-vs-samples/y=samples,x=steps", samples, iteration)
            self._writer.add_scalar("steps-vs-tokens/y=steps,x=tokens", iteration, tokens)
            self._writer.add_scalar("steps-vs-tokens/y=tokens,x=steps", tokens, iteration)
            self._iteration = iteration

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """The same curves in Weights & Biases, over iterations."""

    def __init__(self, config: LoggingConfig):
        import wandb

        self._run = wandb.init(project=config.wandb_project, name=config.wandb_exp_name, dir=config.wandb_save_dir)

    def points(self, values: Mapping[str, float], position: Position) -> None:
        at = {"consumed_samples": position.consumed_samples, "consumed_tokens": position.consumed_tokens}
        self._run.log({**values, **at}, step=position.iteration)

    def close(self) -> None:
        self._run.finish()

#!/usr/bin/env python3
"""Draw a pipeline schedule and tell what it costs: idle time, live micro-batches, messages, bytes on the wire.

python tools/show_schedule.py --pipeline-schedule zbh1 --pipeline-model-parallel-size 4 --num-microbatches 8
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# A clone that was never installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ds.cli import Parser, arg
from megatron_ds.errors import ConfigError, ConfigErrors, UserError
from megatron_ds.pipeline.draw import draw, svg
from megatron_ds.pipeline.schedule import COMMUNICATION, Actions, Kind, ScheduleName, build
from megatron_ds.pipeline.simulate import Report, check


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Schedule."""

    pipeline_schedule: ScheduleName | None = arg(
        None, "Order of passes on each stage. Default: 1f1b; interleaved with virtual stages."
    )
    pipeline_model_parallel_size: int = arg(4, "Stages.")
    num_virtual_stages_per_pipeline_rank: int = arg(1, "Chunks of layers that each stage holds (interleaved).")
    num_microbatches: int = arg(8, "Micro-batches of a step.")
    forward_time: float = arg(1.0, "Time of a micro-batch's forward on one stage, all its chunks together.")
    backward_time: float = arg(2.0, "Time of its backward.")
    weight_time: float | None = arg(None, "Part of it that weight gradients take (zbh1). Default: half of it.")
    svg: str | None = arg(None, "Draw the step into this file too.", metavar="FILE")

    @property
    def name(self) -> ScheduleName:
        """The schedule that was asked for."""
        return self.pipeline_schedule or ("interleaved" if self.num_virtual_stages_per_pipeline_rank > 1 else "1f1b")


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """Shape of a message, for its bytes."""

    seq_length: int | None = arg(None, "Positions of a sample.")
    micro_batch_size: int | None = arg(None, "Samples of a micro-batch.")
    hidden_size: int | None = arg(None, "Width of an activation.")
    bf16: bool = arg(False, "Activations take 2 bytes instead of 4.")
    fp16: bool = arg(False, "The same.")
    context_parallel_size: int = arg(1, "Ranks that share every sequence.")
    tensor_model_parallel_size: int = arg(1, "Ranks that share every layer.")
    sequence_parallel: bool = arg(False, "They share the positions of a message too.")

    @property
    def split(self) -> int:
        """Ranks over which the positions of one message are cut."""
        return self.context_parallel_size * (self.tensor_model_parallel_size if self.sequence_parallel else 1)

    @property
    def message_bytes(self) -> int | None:
        """Bytes of one message of one rank; None where no shape was given."""
        if self.seq_length is None or self.micro_batch_size is None or self.hidden_size is None:
            return None
        elements = self.seq_length // self.split * self.micro_batch_size * self.hidden_size
        return elements * (2 if self.bf16 or self.fp16 else 4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code."""
    try:
        parser = Parser("tools/show_schedule.py", "Draw a pipeline schedule and tell what it costs.")
        parser.add_config(ScheduleConfig)
        parser.add_config(WireConfig)
        words = sys.argv[1:] if argv is None else argv
        (config,) = parser.parse_configs([ScheduleConfig], words, {})
        (wire,) = parser.parse_configs([WireConfig], words, {})
        errors = [*check_schedule(config), *check_wire(wire)]
        if errors:
            raise ConfigErrors(errors)
        show(config, wire)
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


def check_schedule(config: ScheduleConfig) -> Iterator[ConfigError]:
    """Why there is no such schedule."""
    name, stages, chunks = config.name, config.pipeline_model_parallel_size, config.num_virtual_stages_per_pipeline_rank
    sizes = {
        "--pipeline-model-parallel-size": stages,
        "--num-virtual-stages-per-pipeline-rank": chunks,
        "--num-microbatches": config.num_microbatches,
    }
    yield from _positive({**sizes, "--forward-time": config.forward_time, "--backward-time": config.backward_time})
    if min(sizes.values()) < 1:
        return
    flag = f"--num-virtual-stages-per-pipeline-rank {chunks}"
    if chunks > 1 and name not in ("interleaved", "forward"):
        yield ConfigError(flag, f"--pipeline-schedule {name}", "interleaved", "give --pipeline-schedule interleaved")
    if chunks > 1 and stages == 1:
        yield ConfigError(flag, "1 stage", "at least 2", "raise --pipeline-model-parallel-size")
    if name == "interleaved" and config.num_microbatches % stages:
        below = config.num_microbatches // stages * stages
        nearest = " or ".join(str(number) for number in (below, below + stages) if number)
        yield ConfigError(
            f"--num-microbatches {config.num_microbatches}",
            f"interleaved on {stages} stages",
            "a multiple of the stages",
            f"give --num-microbatches {nearest}",
        )
    if config.weight_time is not None and name != "zbh1":
        yield ConfigError("--weight-time", f"--pipeline-schedule {name}", "zbh1, which alone splits the backward")
    elif config.weight_time is not None and not 0 < config.weight_time < config.backward_time:
        expected = f"a part of --backward-time {config.backward_time:g}"
        yield ConfigError("--weight-time", f"{config.weight_time:g}", expected)


def check_wire(wire: WireConfig) -> Iterator[ConfigError]:
    """Why there is no such message."""
    shape = {
        "--seq-length": wire.seq_length,
        "--micro-batch-size": wire.micro_batch_size,
        "--hidden-size": wire.hidden_size,
    }
    given = {flag: value for flag, value in shape.items() if value is not None}
    sizes = given | {
        "--context-parallel-size": wire.context_parallel_size,
        "--tensor-model-parallel-size": wire.tensor_model_parallel_size,
    }
    yield from _positive(sizes)
    if given and len(given) < len(shape):
        missing = " and ".join(flag for flag in shape if flag not in given)
        yield ConfigError(missing, "nothing", f"a number, since {' and '.join(given)} is given")
    if wire.bf16 and wire.fp16:
        yield ConfigError("--fp16", "--bf16 too", "one of them")
    if wire.seq_length and min(sizes.values()) > 0 and wire.seq_length % wire.split:
        yield ConfigError(
            f"--seq-length {wire.seq_length}", f"{wire.split} ranks share it", f"a multiple of {wire.split}"
        )


def _positive(values: dict[str, int] | dict[str, float]) -> Iterator[ConfigError]:
    for flag, value in values.items():
        if not value > 0:
            yield ConfigError(flag, f"{value:g}", "more than 0")


def show(config: ScheduleConfig, wire: WireConfig) -> None:
    """Print the chart and the table of stages; write the SVG."""
    name, stages, chunks = config.name, config.pipeline_model_parallel_size, config.num_virtual_stages_per_pipeline_rank
    actions = build(name, stages, chunks, config.num_microbatches)
    times, backward = (config.forward_time, config.backward_time, config.weight_time), name != "forward"
    report = check(actions, *times, backward)
    title = f"{name}: {_count(stages, 'stage')}, {_count(config.num_microbatches, 'micro-batch')}"
    title += f", {chunks} chunks per stage" if chunks > 1 else ""
    print(title)
    print(draw(actions, *times, backward, width=shutil.get_terminal_size((110, 24)).columns))
    print()
    print("\n".join(table(actions, report, wire.message_bytes)))
    if config.svg is not None:
        try:
            Path(config.svg).write_text(svg(actions, *times, backward, title), encoding="ascii")
        except OSError as exc:
            raise ConfigError(f"--svg {config.svg}", exc.strerror or str(exc), "a file that can be written") from exc
        print(f"\ndrawn into {config.svg}")


def table(actions: Sequence[Actions], report: Report, message_bytes: int | None) -> list[str]:
    """A line per stage; every rank of a stage (tp, cp) sends as much."""
    head = (
        "stage",
        "idle",
        "live",
        "buffers",
        "sends",
        "receives",
        *(() if message_bytes is None else ("bytes sent",)),
    )
    rows = [head]
    for stage, mine in enumerate(actions):
        sends = sum(action.kind in (Kind.SEND_F, Kind.SEND_B) for action in mine)
        receives = sum(action.kind in COMMUNICATION for action in mine) - sends
        row = [stage, f"{report.idle[stage]:.1%}", report.peak_live[stage], report.peak_waiting[stage], sends, receives]
        row += [] if message_bytes is None else [f"{sends * message_bytes:,}"]
        rows.append(tuple(map(str, row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(
        "idle: of the step; live: most micro-batches whose backward is to come; buffers: most messages at hand"
    )
    if message_bytes is not None:
        lines.append(f"a message of one rank has {message_bytes:,} bytes")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("ch") else "s")


if __name__ == "__main__":
    sys.exit(main())

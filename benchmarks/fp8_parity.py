"""Does FP8 train as bf16 does? Losses of one small GPT on real text, side by side.

    python benchmarks/fp8_parity.py --threads 1

Every side starts from the same weights and takes the same batches through the package's own training step; only the
products of the layers differ (with --head fp8 the output head's too). The text is the Python standard library of this
machine, byte by byte. Prints one JSON row: for each side the mean loss of the last 50 steps, and how far its means over
50 steps are from those of bf16 at most. fp32 is a yardstick: so far apart are runs that differ by the rounding of bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import pretrain_gpt
from benchmarks import machine
from benchmarks.peers_common import commit, write_row
from megatron_ds.config import parse
from megatron_ds.data.batch import GPTBatch
from megatron_ds.kernels.fp8 import GRADIENTS, RECIPES, fp8_products, unavailable
from megatron_ds.optim.lr import lr_schedule
from megatron_ds.parallel import launch
from megatron_ds.parallel.context import ParallelContext
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.plan import make_plan
from megatron_ds.timers import Timers
from megatron_ds.training.engine import build_engine
from megatron_ds.training.progress import Progress
from megatron_ds.training.run import Recipe, Run, chosen_kernels
from megatron_ds.training.step import train_step
from tools.build_corpus import documents

FP8 = [f"{format_}-{recipe}" for format_ in GRADIENTS for recipe in RECIPES]
SIDES = ("bf16", "fp32", *FP8)
BYTES = 256
WINDOW = 50
"""Steps over which losses are averaged."""


class Side:
    """One model in training."""

    def __init__(self, name: str, options: argparse.Namespace):
        precision = "" if name == "fp32" else "--bf16"
        config = parse(f"{_flags(options)} {precision}".split())
        plan = make_plan(config, 1, BYTES)
        device = torch.device(options.device)
        kernels = chosen_kernels(config, device).kernels
        if name in FP8:
            products = fp8_products(*name.split("-"), kernels.linear, device)
            head = products if options.head == "fp8" else kernels.head
            kernels = dataclasses.replace(kernels, linear=products, head=head)
        streams = DropoutStreams(0, 0, device.type)
        run = Run(config, plan, ParallelContext.solo(), kernels, device, None, streams)
        providers = pretrain_gpt.train_valid_test_datasets_provider, pretrain_gpt.model_provider
        self.engine = build_engine(run, Recipe(*providers, pretrain_gpt.forward_step))
        self.engine.initialise()
        self.engine.train(True)
        self.schedule = lr_schedule(config.lr, config.optimizer, None, plan.global_batch_size, options.steps)
        self.progress, self.seconds = Progress(), 0.0
        self.losses: list[float] = []

    def step(self, batch: GPTBatch) -> None:
        """One step on a batch."""
        begun = time.perf_counter()
        result = train_step(
            self.engine, self.schedule, self.progress, iter([batch]), Timers(), stop=False, out_of_time=False
        )
        self.seconds += time.perf_counter() - begun
        self.progress = self.progress.after_step(len(batch.tokens), result.skipped, result.next_loss_scale)
        self.losses.append(result.losses["lm loss"])

    def means(self) -> list[float]:
        """Mean losses, window by window."""
        windows = range(0, len(self.losses) - WINDOW + 1, WINDOW)
        return [sum(self.losses[first : first + WINDOW]) / WINDOW for first in windows]


def _flags(o: argparse.Namespace) -> str:
    return f"""--num-layers {o.layers} --hidden-size {o.hidden} --num-attention-heads {o.heads} --seq-length {o.seq}
        --micro-batch-size {o.batch} --global-batch-size {o.batch} --train-iters {o.steps} --lr {o.lr}
        --min-lr {o.lr / 10} --lr-decay-style cosine --lr-warmup-iters 20 --weight-decay 0.1 --adam-beta2 0.95
        --clip-grad 1.0 --hidden-dropout 0 --attention-dropout 0 --mock-data --device {o.device}"""


def standard_library() -> torch.Tensor:
    """The sources of this Python as bytes, a zero between two files."""
    root = Path(sysconfig.get_path("stdlib"))
    text = b"\0".join(text.encode() for _, text in documents(root, include_tests=False))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def draw(text: torch.Tensor, options: argparse.Namespace, number: int) -> GPTBatch:
    """Pieces of text from anywhere; which ones depends on the seed and the number of the step alone."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_000 + number)
    first = torch.randint(len(text) - options.seq, (options.batch, 1), generator=generator)
    rows = text[first + torch.arange(options.seq + 1)].long().to(options.device)
    ones = torch.ones(options.batch, options.seq, device=options.device)
    positions = torch.arange(options.seq, device=options.device).expand(options.batch, -1)
    return GPTBatch(rows[:, :-1], rows[:, 1:], ones, positions)


def compare(sides: dict[str, Side]) -> dict[str, Any]:
    """Every side's last mean, and the largest distance of its means from those of bf16."""
    base = sides["bf16"].means()
    rows: dict[str, Any] = {}
    for name, side in sides.items():
        apart = [ours - theirs for ours, theirs in zip(side.means(), base, strict=True)]
        rows[name] = {
            "last_mean_loss": round(side.means()[-1], 4),
            "last_minus_bf16": round(apart[-1], 4),
            "largest_minus_bf16": round(max(apart, key=abs), 4),
            "seconds": round(side.seconds, 1),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["fp32", "hybrid-tensorwise"], help="beside bf16")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the batches")
    parser.add_argument("--head", choices=("bf16", "fp8"), default="bf16", help="the output head's products")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="append the row to this file")
    options = parser.parse_args()
    if reason := unavailable(torch.device(options.device)):
        parser.error(reason)
    if options.steps < WINDOW:
        parser.error(f"--steps must be at least {WINDOW}")
    torch.set_num_threads(options.threads)
    launch.adopt_environment()
    text = standard_library()
    sides = {name: Side(name, options) for name in dict.fromkeys(["bf16", *options.sides])}
    for number in range(options.steps):
        batch = draw(text, options, number)
        for side in sides.values():
            side.step(batch)
        if (number + 1) % WINDOW == 0:
            now = "  ".join(f"{name} {side.means()[-1]:.4f}" for name, side in sides.items())
            print(f"step {number + 1}: {now}", file=sys.stderr, flush=True)
    row = {
        "benchmark": "fp8_parity",
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "steps": options.steps,
        "seed": options.seed,
        "head": options.head,
        "text_bytes": len(text),
        "tokens_per_step": options.batch * options.seq,
        "sides": compare(sides),
        "machine": machine.describe(),
    }
    write_row(row, options.output)


if __name__ == "__main__":
    main()

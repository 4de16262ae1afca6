"""Tokens per second and peak memory of one training step, beside a plain-torch peer in the same run.

    python benchmarks/train_step.py --workload W2 --dtype bf16 --threads 1 --rounds 5

Both sides train the same model on the same batches, each in a process of its own, one step in turn, so that a machine
whose speed drifts is unfair to neither. Prints one JSON row: medians, the ratio step by step, peak memory, counted
FLOPs and the share of the machine's own best matmul.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.peer import (
    BETAS,
    CLIP_GRAD,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    WORKLOADS,
    PeerStep,
    Workload,
    random_batch,
)


class OurStep:
    """The package's own training step on one process, fed like the peer."""

    def __init__(self, workload: Workload, dtype: str, device: str):
        import torch

        import pretrain_gpt
        from megatron_ds.config import parse
        from megatron_ds.kernels.table import Kernels
        from megatron_ds.optim.lr import lr_schedule
        from megatron_ds.parallel import launch
        from megatron_ds.parallel.context import ParallelContext
        from megatron_ds.parallel.rng import DropoutStreams
        from megatron_ds.plan import make_plan
        from megatron_ds.training.engine import build_engine
        from megatron_ds.training.flops import train_flops_per_sample
        from megatron_ds.training.progress import Progress
        from megatron_ds.training.run import Recipe, Run

        launch.adopt_environment()
        config = parse(_arguments(workload, dtype, device))
        plan = make_plan(config, 1, workload.vocab)
        self.device = torch.device(device)
        run = Run(config, plan, ParallelContext.solo(), Kernels(), self.device, None, DropoutStreams(0, 0))
        recipe = Recipe(
            pretrain_gpt.train_valid_test_datasets_provider, pretrain_gpt.model_provider, pretrain_gpt.forward_step
        )
        self.engine = build_engine(run, recipe)
        self.engine.initialise()
        self.flops_per_token = train_flops_per_sample(run, recipe) // run.plan.seq_length
        self.schedule = lr_schedule(config.lr, config.optimizer, None, plan.global_batch_size, 1000)
        self.progress, self.micro = Progress(), workload.micro
        self.positions = torch.arange(workload.seq, device=self.device).expand(workload.micro, -1)
        self.ones = torch.ones(workload.micro, workload.seq, device=self.device)

    def step(self, batch: tuple[Any, Any]) -> float:
        """One step on a global batch of tokens and labels."""
        from megatron_ds.data.batch import GPTBatch
        from megatron_ds.timers import Timers
        from megatron_ds.training.step import train_step

        parts = zip(*(part.split(self.micro) for part in batch), strict=True)
        batches = (GPTBatch(tokens, labels, self.ones, self.positions) for tokens, labels in parts)
        result = train_step(self.engine, self.schedule, self.progress, batches, Timers(), stop=False, out_of_time=False)
        self.progress = self.progress.after_step(len(batch[0]), result.skipped, result.next_loss_scale)
        self.grad_norm = result.grad_norm
        return result.losses["lm loss"]


def _arguments(w: Workload, dtype: str, device: str) -> list[str]:
    return f"""--num-layers {w.layers} --hidden-size {w.hidden} --num-attention-heads {w.heads} --seq-length {w.seq}
        --micro-batch-size {w.micro} --global-batch-size {w.global_} --train-iters 1000 --lr {LEARNING_RATE}
        --lr-decay-style constant --weight-decay {WEIGHT_DECAY} --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]}
        --adam-eps {EPS} --clip-grad {CLIP_GRAD} --hidden-dropout 0 --attention-dropout 0 --mock-data
        --device {device} {"--bf16" if dtype == "bf16" else ""}""".split()


def serve(side: str, workload: Workload, dtype: str, device: str, threads: int, pipe: Connection) -> None:
    """One side's process: a step for every message, answered with its seconds and its loss."""
    import torch

    torch.set_num_threads(threads)
    compiled = side == "compiled peer"
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    step: Any = OurStep(workload, dtype, device) if side == "ours" else PeerStep(workload, precision, compiled, device)
    pipe.send(getattr(step, "flops_per_token", None))
    while (seed := pipe.recv()) is not None:
        batch = tuple(part.to(device) for part in random_batch(workload, seed))
        begun = time.perf_counter()
        loss = step.step(batch)
        if device != "cpu":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - begun, loss))
    pipe.send(_peak_mb(device))


def _peak_mb(device: str) -> float:
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    sides: list[str], workload: Workload, dtype: str, device: str, threads: int, rounds: int, warmup: int
) -> dict[str, Any]:
    """All sides in turn, round by round."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    pipes, flops = {}, None
    for side in sides:
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(side, workload, dtype, device, threads, theirs), daemon=True).start()
        theirs.close()  # so that a side that dies is noticed here
        pipes[side] = ours
        flops = ours.recv() or flops
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(warmup + rounds):
        for side in sides:
            pipes[side].send(number)
            elapsed, loss = pipes[side].recv()
            if number >= warmup:
                seconds[side].append(elapsed)
                losses[side].append(loss)
    peaks = {}
    for side in sides:
        pipes[side].send(None)
        peaks[side] = pipes[side].recv()
    tokens = workload.global_ * workload.seq
    rows = {
        side: {
            "tokens_per_s": round(tokens / statistics.median(seconds[side]), 1),
            "best_tokens_per_s": round(tokens / min(seconds[side]), 1),
            "peak_mb": round(peaks[side]),
            "last_loss": round(losses[side][-1], 4),
        }
        for side in sides
    }
    for side in sides[1:]:
        ratios = [theirs / ours for ours, theirs in zip(seconds[sides[0]], seconds[side], strict=True)]
        rows[side]["ours_over_it"] = round(statistics.median(ratios), 3)
    return {"flops_per_token": flops, "sides": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="W2")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--compiled-peer", action="store_true", help="also the peer under torch.compile")
    parser.add_argument("--output", type=Path, help="append the row to this file")
    options = parser.parse_args()
    sides = ["ours", "peer"] + ["compiled peer"] * options.compiled_peer
    row = {
        "benchmark": "train_step",
        "commit": _commit(),
        "workload": options.workload,
        "dtype": options.dtype,
        "threads": options.threads,
        "rounds": options.rounds,
        **measure(
            sides,
            WORKLOADS[options.workload],
            options.dtype,
            options.device,
            options.threads,
            options.rounds,
            options.warmup,
        ),
        "machine": machine.describe(),
    }
    row["best_matmul"] = _add_share(row, options.device, options.threads)
    text = json.dumps(row)
    print(text)
    if options.output:
        with options.output.open("a") as file:
            file.write(text + "\n")


def _add_share(row: dict[str, Any], device: str, threads: int) -> dict[str, Any]:
    """Note beside each side's speed what share of the machine's own best matmul its counted FLOPs are."""
    import torch

    torch.set_num_threads(threads)
    matmul = machine.best_matmul(device)
    best = matmul[row["dtype"]]["best_gflops"]
    for side in row["sides"].values():
        side["matmul_share"] = round(side["tokens_per_s"] * row["flops_per_token"] / 1e9 / best, 3)
    return matmul


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()

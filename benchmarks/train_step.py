"""Tokens per second and peak memory of one training step, beside what a user would run instead, in the same run.

    python benchmarks/train_step.py --model gpt --workload W2 --dtype bf16 --threads 1 --rounds 5
    python benchmarks/train_step.py --model bert --our-variants='--kernels compile'

All sides train the same model from the same weights on the same batches, each in a process of its own, one step in
turn, so that a machine whose speed drifts is unfair to none. Prints one JSON row: medians, the ratio step by step,
peak memory, first losses and whether they agree, counted FLOPs and the share of the machine's own best matmul;
`over_best_peer` is what each side of ours makes of the fastest peer.
A side that cannot be built (torch.compile without a C++ compiler) is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.ours import OurStep
from benchmarks.peers_common import commit, last_line, peak_rss_mb, save_initial_weights, versions, write_row
from benchmarks.peers_single import PEERS
from benchmarks.workloads import DEFAULTS, WORKLOADS, Workload, random_batch

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Of the relative difference between two sides' losses in the first steps."""


class Task(NamedTuple):
    """What a process is told about its job."""

    side: str
    flags: str
    workload: Workload
    dtype: str
    device: str
    threads: int
    weights: Path | None


def serve(task: Task, pipe: Connection) -> None:
    """One side's process: a step for every seed, answered with its seconds, loss and gradient norm."""
    import torch

    torch.set_num_threads(task.threads)
    try:
        step = _build(task)
        pipe.send((getattr(step, "flops_per_token", 0), getattr(step, "parameters", 0)))
        while (seed := pipe.recv()) is not None:
            batch = tuple(part.to(task.device) for part in random_batch(task.workload, seed))
            begun = time.perf_counter()
            loss = step.step(batch)
            if task.device != "cpu":
                torch.cuda.synchronize()
            pipe.send((time.perf_counter() - begun, loss, step.grad_norm))
        pipe.send(peak_rss_mb() if task.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20)
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except Exception as error:
        pipe.send(last_line(error))


def _build(task: Task) -> Any:
    import torch

    if task.side.startswith("ours"):
        return OurStep(task.workload, task.dtype, task.device, task.weights, task.flags)
    from benchmarks.peers_single import build

    dtype = torch.bfloat16 if task.dtype == "bf16" else torch.float32
    return build(task.side, task.workload, dtype, task.device, task.weights)


class Side:
    """One side seen from the parent; `failed` is the last line of what went wrong."""

    def __init__(self, task: Task):
        self.failed: str | None = None
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(task, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that a side that dies is noticed here
        answer = self._answer()
        self.flops_per_token, self.parameters = (0, 0) if self.failed else answer

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            answer = "died"
        if isinstance(answer, str):
            self.failed = answer
        return answer

    def train(self, seed: int) -> None:
        """One step."""
        self.pipe.send(seed)
        answer = self._answer()
        if not self.failed:
            for numbers, found in zip((self.seconds, self.losses, self.norms), answer, strict=True):
                numbers.append(found)

    def finish(self) -> float:
        """Peak memory in MiB; the process ends."""
        self.pipe.send(None)
        peak = self._answer()
        self.process.join()
        return float(peak)


def measure(sides: dict[str, Side], workload: Workload, dtype: str, rounds: int, warmup: int) -> dict[str, Any]:
    """All sides in turn, round by round; the first one is ours."""
    for number in range(warmup + rounds):
        for side in sides.values():
            if not side.failed:
                side.train(number)
    rows: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        if side.failed:
            rows[name] = {"failed": side.failed}
            print(f"{name}: {side.failed}", file=sys.stderr)
            continue
        seconds = side.seconds[warmup:]
        rows[name] = {
            "tokens_per_s": round(workload.tokens_per_step / statistics.median(seconds), 1),
            "best_tokens_per_s": round(workload.tokens_per_step / min(seconds), 1),
            "peak_mb": round(side.finish()),
            "first_losses": [round(loss, 6) for loss in side.losses[:warmup]],
            "first_grad_norms": [round(norm, 6) for norm in side.norms[:warmup]],
            "last_loss": round(side.losses[-1], 4),
        }
    ours = next(iter(sides.values()))
    for name, side in list(sides.items())[1:]:
        if not side.failed and not ours.failed:
            rows[name] |= _beside(ours, side, warmup, TOLERANCE[dtype])
    return rows


def over_best_peer(sides: dict[str, Side], warmup: int) -> dict[str, float]:
    """Of each side of ours: the time of the fastest peer over its own, the median over steps."""
    seconds = {name: side.seconds[warmup:] for name, side in sides.items() if not side.failed}
    medians = {name: statistics.median(some) for name, some in seconds.items() if not name.startswith("ours")}
    if not medians:
        return {}
    best = seconds[min(medians, key=lambda name: medians[name])]
    return {
        name: round(statistics.median(theirs / mine for mine, theirs in zip(some, best, strict=True)), 3)
        for name, some in seconds.items()
        if name.startswith("ours")
    }


def _beside(ours: Side, side: Side, warmup: int, tolerance: float) -> dict[str, Any]:
    """A side's time over ours step by step, and whether it trains the same model."""
    ratios = [theirs / mine for mine, theirs in zip(ours.seconds, side.seconds, strict=True)][warmup:]
    pairs = zip(ours.losses[:warmup], side.losses[:warmup], strict=True)
    error = max((abs(mine - theirs) / abs(mine) for mine, theirs in pairs), default=0.0)
    return {
        "ours_over_it": round(statistics.median(ratios), 3),
        "largest_difference": float(f"{error:.1e}"),
        "agrees": error <= tolerance,
    }


def options_from(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with the workload and the peers that belong to the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=DEFAULTS, help="default: the workload's, gpt")
    parser.add_argument("--workload", choices=WORKLOADS, help=f"default: of each model {json.dumps(DEFAULTS)}")
    parser.add_argument("--peers", help="comma-separated, of those of the model; default: all")
    parser.add_argument("--our-flags", default="", help="more flags of the package: --our-flags='...'")
    parser.add_argument(
        "--our-variants",
        default="--kernels compile",
        help="flags of one more side of ours; several divided by ; (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first that counts; they show agreement")
    parser.add_argument("--output", type=Path, help="append the row to this file")
    options = parser.parse_args(argv)
    options.workload = options.workload or DEFAULTS[options.model or "gpt"]
    model = WORKLOADS[options.workload].model
    if options.model not in (None, model):
        parser.error(f"--workload {options.workload} is a {model}")
    asked = PEERS[model] if options.peers is None else tuple(filter(None, options.peers.split(",")))
    unknown = sorted(set(asked) - set(PEERS[model]))
    if unknown:
        parser.error(f"--peers {', '.join(unknown)}: of {model} there are {', '.join(PEERS[model])}")
    options.peers = asked
    return options


def main(argv: list[str] | None = None) -> int:
    """Print one row; 1 if ours failed or another side trains another model."""
    options = options_from(argv)
    workload = WORKLOADS[options.workload]
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    variants = [flags.strip() for flags in options.our_variants.split(";") if flags.strip()]
    flags = {"ours": options.our_flags} | {f"ours ({more})": f"{options.our_flags} {more}" for more in variants}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        save_initial_weights(workload, weights)
        shared = workload, options.dtype, options.device, options.threads, weights
        sides = {side: Side(Task(side, flags.get(side, ""), *shared)) for side in (*flags, *options.peers)}
    rows, fp32 = measure(sides, workload, options.dtype, options.rounds, options.warmup), options.dtype == "fp32"
    row = {
        "benchmark": "train_step",
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "workload": options.workload,
        "model": workload.model,
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "rounds": options.rounds,
        "our_flags": options.our_flags,
        "flops_per_token": sides["ours"].flops_per_token,
        "parameters": sides["ours"].parameters,
        "least_bytes_per_step": workload.least_bytes_per_step(sides["ours"].parameters, 4 if fp32 else 2),
        "sides": rows,
        "over_best_peer": over_best_peer(sides, options.warmup),
        "versions": versions(),
        "machine": machine.describe(),
    }
    if not sides["ours"].failed:
        row |= _with_shares(row, options.device, options.threads)
    write_row(row, options.output)
    return int(not all(side.get("agrees", name != "ours" or "failed" not in side) for name, side in rows.items()))


def _with_shares(row: dict[str, Any], device: str, threads: int) -> dict[str, Any]:
    """The machine's limits; beside each side's speed what share of its best matmul the counted FLOPs are."""
    import torch

    torch.set_num_threads(threads)
    limits = machine.limits(device)
    best = machine.best_gflops(limits["best_matmul"], row["dtype"])
    for side in row["sides"].values():
        if "failed" not in side:
            side["matmul_share"] = round(side["tokens_per_s"] * row["flops_per_token"] / 1e9 / best, 3)
    return limits


if __name__ == "__main__":
    sys.exit(main())

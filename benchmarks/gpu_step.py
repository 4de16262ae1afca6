"""One large model on one GPU: tokens per second, MFU and peak memory for growing micro-batches, beside a compiled peer.

    python benchmarks/gpu_step.py --workload G1.3B --seconds 240

Sides run one after the other, each alone on the GPU: ours in bf16, ours in FP8, the plain-torch peer under
torch.compile. Ours grow their micro-batch until the memory is full or the time is spent; the peer, which compiles for
minutes, runs at our best one, and at half of it for as long as that is too large. Prints one JSON row. planned_gib is
what --dry-run says. mfu is (6N + 12 L s h) x tokens/s over 989.5 TFLOP/s on H100 and H200, whatever the precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.peers_common import commit, last_line, peak_rss_mb, versions, write_row
from benchmarks.workloads import WORKLOADS, Workload, random_batch

PEAK_FLOPS = 989.5e12
SIDES = {"ours": "", "ours fp8": "--fp8-format hybrid", "torch compiled": ""}
WARMUP = 3
GIB = 2**30


class Task(NamedTuple):
    """What a side's process is told."""

    side: str
    flags: str
    workload: Workload
    micros: tuple[int, ...]
    steps: int
    device: str
    descends: bool
    """Whether the first micro-batch that fits is enough, instead of all that fit."""


def serve(task: Task, pipe: Connection) -> None:
    """A side's process: what each micro-batch gave, one message each, then None."""
    for micro in task.micros:
        workload = dataclasses.replace(task.workload, micro=micro)
        found, full = _try(workload, task)
        pipe.send((micro, found))
        gc.collect()
        if full != task.descends or ("failed" in found and not full):
            break
    pipe.send(None)


def _try(workload: Workload, task: Task) -> tuple[dict[str, Any], bool]:
    """Its figures, and whether the memory was too small."""
    import torch

    on_gpu = torch.device(task.device).type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        step = _build(workload, task)
        losses, seconds = [], []
        for number in range(WARMUP + task.steps):
            batch = tuple(part.to(task.device) for part in random_batch(workload, number))
            begun = time.perf_counter()
            losses.append(step.step(batch))
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else peak_rss_mb() / 1024
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}, True
    except Exception as error:
        return {"failed": last_line(error)}, False
    rate = workload.tokens_per_step / statistics.median(seconds[WARMUP:])
    parameters = getattr(step, "parameters", None) or step.num_parameters
    return {
        "tokens_per_s": round(rate, 1),
        "best_tokens_per_s": round(workload.tokens_per_step / min(seconds[WARMUP:]), 1),
        "tflops": round(rate * workload.formula_flops_per_token(parameters) / 1e12, 2),
        "peak_gib": round(peak, 2),
        **_planned(step),
        "parameters": parameters,
        "first_step_s": round(seconds[0], 1),
        "first_losses": [round(loss, 4) for loss in losses[:2]],
    }, False


def _planned(step: Any) -> dict[str, Any]:
    """What the plan says of our memory, or why it says nothing."""
    if not hasattr(step, "planned_bytes"):
        return {}
    try:
        return {"planned_gib": round(step.planned_bytes() / GIB, 2)}
    except Exception as error:
        return {"planned_failed": last_line(error)}


def _build(workload: Workload, task: Task) -> Any:
    import torch

    if task.side.startswith("ours"):
        from benchmarks.ours import OurStep

        return OurStep(workload, "bf16", task.device, flags=task.flags)
    from benchmarks.peers_single import build

    return build(task.side, workload, torch.bfloat16, task.device, None)


def run_side(task: Task, until: float) -> dict[str, Any]:
    """All that a side said before its time was up."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve, args=(task, theirs), daemon=True)
    process.start()
    theirs.close()
    found: dict[str, Any] = {"flags": task.flags, "by_micro": {}}
    try:
        while mine.poll(max(0.0, until - time.monotonic())):
            answer = mine.recv()
            if answer is None:
                break
            found["by_micro"][str(answer[0])] = answer[1]
            print(
                f"{task.workload.name} {task.side}, micro-batch {answer[0]}: {answer[1]}", file=sys.stderr, flush=True
            )
        else:
            found["stopped"] = "out of time"
    except EOFError:
        found["stopped"] = "died"
    process.terminate()
    process.join()
    return found


def best_micro(side: dict[str, Any]) -> int | None:
    """The fastest micro-batch."""
    rates = {int(micro): found.get("tokens_per_s", 0) for micro, found in side["by_micro"].items()}
    return max(rates, key=lambda micro: rates[micro]) if any(rates.values()) else None


def main(argv: list[str] | None = None) -> int:
    """Print one row; 1 if ours gave no figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="G1.3B")
    parser.add_argument("--micro-batches", default="2,4,8,16")
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--our-flags", default="", help="more flags of the package: --our-flags='...'")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=240, help="after which the rest is left out")
    parser.add_argument("--output", type=Path, help="append the row to this file")
    options = parser.parse_args(argv)
    begun, names = time.monotonic(), options.sides.split(",")
    micros = tuple(int(micro) for micro in options.micro_batches.split(","))
    workload = dataclasses.replace(WORKLOADS[options.workload], global_=options.global_batch_size)
    sides: dict[str, dict[str, Any]] = {}
    for number, side in enumerate(names):
        left = begun + options.seconds - time.monotonic()
        flags = f"{options.our_flags} {SIDES[side]}".strip() if side.startswith("ours") else ""
        best, descends = best_micro(sides.get("ours", {"by_micro": {}})), not side.startswith("ours")
        tried = tuple(sorted((m for m in micros if m <= (best or max(micros))), reverse=True)) if descends else micros
        task = Task(side, flags, workload, tried, options.steps, options.device, descends)
        share = left / (len(names) - number) if number + 1 < len(names) else left
        sides[side] = run_side(task, time.monotonic() + share)
    row = {
        "benchmark": "gpu_step",
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "workload": options.workload,
        "model": workload.model,
        "dtype": "bf16",
        "device": options.device,
        "threads": None,
        "our_flags": options.our_flags,
        "global_batch_size": options.global_batch_size,
        "sides": sides,
        **machine.limits(options.device, 0.3),
        "versions": versions(),
        "machine": machine.describe(),
    }
    _add_shares(row)
    write_row(row, options.output)
    return int(best_micro(sides[names[0]]) is None)


def _add_shares(row: dict[str, Any]) -> None:
    """MFU, the share of the box's own best product, the plan's error, and sides beside each other at their best."""
    best = row["best_matmul"]["bf16"]["best_gflops"] / 1e3
    hopper = any(name in gpu for gpu in row["machine"]["gpus"] for name in ("H100", "H200"))
    rates: dict[str, float] = {}
    for name, side in row["sides"].items():
        for found in side["by_micro"].values():
            if "tflops" in found:
                found["mfu"] = round(found["tflops"] * 1e12 / PEAK_FLOPS, 4) if hopper else None
                found["matmul_share"] = round(found["tflops"] / best, 4)
                rates[name] = max(rates.get(name, 0.0), found["tokens_per_s"])
            if found.get("planned_gib"):
                found["planned_over_peak"] = round(found["planned_gib"] / found["peak_gib"], 3)
    ours = rates.get("ours")
    row["ours_over_it"] = {n: round(ours / rate, 3) for n, rate in rates.items() if n != "ours"} if ours else {}


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    sys.exit(main())

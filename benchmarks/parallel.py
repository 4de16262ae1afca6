"""Two processes of one thread each: ours beside what a user would take instead, in the same run.

    python benchmarks/parallel.py --workload W2 --dtype bf16 --rounds 3 --steps 3 --only dp,zero1,zero2,tp,sp,pp

All sides of a configuration train one model from the same weights on the same global batches, with the same
micro-batches, AdamW and clipping. Each side is a pair of processes over gloo; the pairs take turns, a few steps at a
time, and who waits sleeps. Prints one JSON row per configuration: tokens per second (median step), tokens per second
of processor time, peak memory of each process, `ours_over_it` (median over rounds of its time over ours: above 1 ours
is faster), the losses of the first steps, and whether they agree. Exits with 1 if they do not, or if a side failed.

DeepSpeed and Megatron-Core are optional: rows say so where they are not installed. In an environment of its own:

    python -m venv VENV && VENV/bin/pip install torch==2.13.0 && VENV/bin/pip install -e .
    DS_BUILD_OPS=0 VENV/bin/pip install deepspeed ninja && VENV/bin/pip install --no-deps megatron-core==0.16.1
    VENV/bin/python benchmarks/parallel.py

DeepSpeed's first start compiles a library (g++ and ninja; minutes). Killed meanwhile it leaves behind
~/.cache/torch_extensions/*/deepspeed_shm_comm/lock, on which every later start waits for ever: remove it.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.peers_common import commit, peak_rss_mb, save_initial_weights, versions, write_row
from benchmarks.workloads import TINY, W2, Workload, random_batch

PROCESSES = 2
WORKLOADS = {"W2": W2, "tiny": dataclasses.replace(TINY, global_=8)}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Of the relative difference between two sides' losses and gradient norms in the first steps."""
PATIENCE_SECONDS = 900
"""With a side that does not answer; DeepSpeed's first start compiles."""

OURS = {
    "dp": "--zero-stage 0",
    "zero1": "--zero-stage 1",
    "zero2": "--zero-stage 2",
    "tp": "--tensor-model-parallel-size 2",
    "sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp": "--pipeline-model-parallel-size 2",
}
PEERS = {
    "dp": ("DDP (autocast)", "DDP (weights)"),
    "zero1": ("DDP + ZeroRedundancyOptimizer", "DeepSpeed ZeRO-1"),
    "zero2": ("DeepSpeed ZeRO-2", "DDP", "FSDP2"),
    "tp": ("Megatron-Core TP", "DTensor TP (autocast)", "DTensor TP (weights)"),
    "sp": ("DTensor TP + SP (autocast)", "DTensor TP + SP (weights)"),
    "pp": ("Megatron-Core PP", "pipelining 1F1B (autocast)", "pipelining 1F1B (weights)"),
}
"""In brackets how bf16 is computed where that is the user's choice: one of the two is the faster one."""


class Task(NamedTuple):
    """What a process is told about its job."""

    side: str
    workload: Workload
    dtype: str
    weights: Path
    our_flags: str
    rank: int
    port: int


def build(task: Task) -> Any:
    """This rank's side. Imports here, so that nobody's memory holds what only another side needs."""
    import torch

    dtype = torch.bfloat16 if task.dtype == "bf16" else torch.float32
    arguments = task.workload, dtype, task.weights
    side, _, bf16 = task.side.removesuffix(")").partition(" (")
    options: dict[str, Any] = {"bf16": bf16} if bf16 else {}
    if side == "ours":
        from benchmarks.ours import OurStep

        return OurStep(task.workload, task.dtype, "cpu", task.weights, task.our_flags, PROCESSES)
    if side.startswith("Megatron-Core"):
        from benchmarks.peers_megatron_core import MegatronCoreStep

        extent = {"TP": (PROCESSES, 1), "PP": (1, PROCESSES)}[side[-2:]]
        return MegatronCoreStep(*arguments, *extent)
    if side in ("DTensor TP", "DTensor TP + SP", "pipelining 1F1B"):
        from benchmarks import peers_model_parallel as model_parallel

        if side == "pipelining 1F1B":
            return model_parallel.PipelineStep(*arguments, **options)
        return model_parallel.TensorParallelStep(*arguments, sequence_parallel=side.endswith("SP"), **options)
    from benchmarks import peers_data_parallel as data_parallel

    if side.startswith("DeepSpeed"):
        return data_parallel.DeepSpeedStep(*arguments, stage=int(side[-1]))
    if side == "FSDP2":
        return data_parallel.FSDP2Step(*arguments)
    return (data_parallel.DDPStep if side == "DDP" else data_parallel.ZeroRedundancyStep)(*arguments, **options)


def work(task: Task, pipe: Connection) -> None:
    """One process: for every list of seeds, a step on each one's batch; answers with what each step took and gave."""
    os.dup2(2, 1)  # what libraries print is not a row
    os.environ.update(
        RANK=str(task.rank), LOCAL_RANK=str(task.rank), WORLD_SIZE=str(PROCESSES), LOCAL_WORLD_SIZE=str(PROCESSES),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(task.port), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        side = build(task)
        pipe.send("ready")
        while (seeds := pipe.recv()) is not None:
            answers = []
            for seed in seeds:
                batch = random_batch(task.workload, seed)
                dist.barrier()
                begun, begun_cpu = time.perf_counter(), time.process_time()
                loss = side.step(batch)
                seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - begun_cpu
                answers.append((seconds, cpu_seconds, loss, side.grad_norm))
            pipe.send(answers)
        pipe.send(peak_rss_mb())
        dist.destroy_process_group()
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except Exception:
        pipe.send(traceback.format_exc())


class SideFailed(Exception):
    """A side's process raised, died or did not answer."""


class Pair:
    """The two processes of one side, seen from the parent."""

    def __init__(self, side: str, workload: Workload, dtype: str, weights: Path, our_flags: str):
        self.side, self.seconds, self.cpu_seconds = side, [], []  # type: ignore[var-annotated]
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(PROCESSES):
            mine, theirs = context.Pipe()
            task = Task(side, workload, dtype, weights, our_flags, rank, port)
            process = context.Process(target=work, args=(task, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is noticed here
            self.pipes.append(mine)
            self.processes.append(process)
        self._answers()

    def _answers(self) -> list[Any]:
        """One answer of each process."""
        found = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answer = pipe.recv() if pipe.poll(PATIENCE_SECONDS) else f"no answer for {PATIENCE_SECONDS} s"
            except EOFError:
                answer = "died"
            if isinstance(answer, str) and answer != "ready":
                self.stop()
                raise SideFailed(f"{self.side}, rank {rank}: {answer}")
            found.append(answer)
        return found

    def train(self, seeds: list[int]) -> None:
        """A step for each seed; the slower process counts."""
        for pipe in self.pipes:
            pipe.send(seeds)
        steps = [list(zip(*answers, strict=True)) for answers in zip(*self._answers(), strict=True)]
        self.seconds.append([max(seconds) for seconds, *_ in steps])
        self.cpu_seconds += [sum(cpu) for _, cpu, *_ in steps]
        self.losses += [losses[0] for _, _, losses, _ in steps]
        self.grad_norms += [norms[0] for *_, norms in steps]

    def finish(self) -> list[int]:
        """Peak memory of each process in MiB; the processes end."""
        for pipe in self.pipes:
            pipe.send(None)
        peaks = [round(peak) for peak in self._answers()]
        self.stop()
        return peaks

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.join(5)
            process.terminate()


def measure(name: str, options: argparse.Namespace, weights: Path) -> dict[str, Any]:
    """All sides of one configuration in turn, round by round."""
    workload = WORKLOADS[options.workload]
    pairs: dict[str, Pair] = {}
    rows: dict[str, dict[str, Any]] = {}
    installed = versions()
    for side in ("ours", *_peers(name, options.dtype)):
        package = {"DeepSpeed": "deepspeed", "Megatron-Core": "megatron-core"}.get(side.split()[0])
        if package and installed[package] is None:
            rows[side] = {"left_out": f"{package} is not installed"}
            continue
        try:
            pairs[side] = Pair(side, workload, options.dtype, weights, f"{OURS[name]} {options.our_flags}")
        except SideFailed as failure:
            rows[side] = _failed(failure)
    seeds = iter(range(10**9))
    for count in [options.warmup] + [options.steps] * options.rounds:
        turn = [next(seeds) for _ in range(count)]
        for side, pair in list(pairs.items()):
            try:
                pair.train(turn)
            except SideFailed as failure:
                rows[side] = _failed(failure)
                del pairs[side]
    for side, pair in pairs.items():
        rows[side] = _summary(pair, options.warmup, workload)
    if "ours" in pairs:
        _compare(rows, pairs, TOLERANCE[options.dtype])
    return {"sides": rows}


def _failed(failure: SideFailed) -> dict[str, str]:
    print(failure, file=sys.stderr)
    return {"failed": str(failure).splitlines()[-1]}


def _peers(name: str, dtype: str) -> list[str]:
    """Sides beside ours; in fp32 the ways to compute in bf16 are one."""
    return list(PEERS[name]) if dtype == "bf16" else list(dict.fromkeys(side.split(" (")[0] for side in PEERS[name]))


def _summary(pair: Pair, warmup: int, workload: Workload) -> dict[str, Any]:
    seconds = [second for turn in pair.seconds[1:] for second in turn]
    return {
        "tokens_per_s": round(workload.tokens_per_step / statistics.median(seconds), 1),
        "best_tokens_per_s": round(workload.tokens_per_step / min(seconds), 1),
        "tokens_per_cpu_s": round(workload.tokens_per_step / statistics.median(pair.cpu_seconds[warmup:]), 1),
        "first_losses": [round(loss, 6) for loss in pair.losses[:warmup]],
        "first_grad_norms": [round(norm, 6) for norm in pair.grad_norms[:warmup]],
        "last_loss": round(pair.losses[-1], 4),
        "peak_mb": pair.finish(),
    }


def _compare(rows: dict[str, dict[str, Any]], pairs: dict[str, Pair], tolerance: float) -> None:
    """Add to every peer's row the ratio of its times to ours, and whether it trains the same model."""
    ours = pairs["ours"]  # the first of all
    for side, pair in list(pairs.items())[1:]:
        row = rows[side]
        ratios = [
            statistics.median(theirs) / statistics.median(mine)
            for mine, theirs in zip(ours.seconds[1:], pair.seconds[1:], strict=True)
        ]
        row["ours_over_it"] = round(statistics.median(ratios), 3)
        row["ours_over_it_by_round"] = [round(ratio, 3) for ratio in ratios]
        found = row["first_losses"] + row["first_grad_norms"]
        expected = rows["ours"]["first_losses"] + rows["ours"]["first_grad_norms"]
        error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
        row["largest_difference"], row["agrees"] = float(f"{error:.1e}"), error <= tolerance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="W2")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round, which show agreement")
    parser.add_argument("--only", default=",".join(OURS), help="configurations, comma-separated")
    parser.add_argument("--our-flags", default="", help="more flags of the package: --our-flags='...'")
    parser.add_argument("--output", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    good = True
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        save_initial_weights(WORKLOADS[options.workload], weights)
        for name in options.only.split(","):
            row = {
                "benchmark": "parallel",
                "configuration": name,
                "commit": commit(),
                "command": " ".join(["python", *sys.argv]),
                "workload": options.workload,
                "dtype": options.dtype,
                "processes": PROCESSES,
                "threads": 1,
                "our_flags": f"{OURS[name]} {options.our_flags}".strip(),
                **measure(name, options, weights),
                "versions": versions(),
                "machine": machine.describe(),
            }
            good &= all(side.get("agrees", "failed" not in side) for side in row["sides"].values())
            write_row(row, options.output)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

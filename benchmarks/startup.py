"""Seconds from a launch to its first step, with what this machine has and with no compiler, no Triton and no GPU.

    python benchmarks/startup.py --rounds 3
    python benchmarks/startup.py --launcher torchrun --flags='--num-layers 12 --hidden-size 768'

The two sides take turns, each launch is a process of its own, and both have to find the same losses to the last bit.
Prints one JSON row: medians until the first line and until the first step are on the screen. Leaves with 1 if the
losses differ.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.peers_common import commit, write_row

ROOT = Path(__file__).resolve().parents[1]
MODEL = """--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128
    --micro-batch-size 4 --global-batch-size 8 --tokenizer-type NullTokenizer --vocab-size 4095 --lr 1e-3
    --device cpu"""
RUN = "--mock-data --train-iters 3 --eval-iters 0 --log-interval 1 --seed 7"
LAUNCHERS = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "1"]}
WITHOUT_TRITON = 'import sys\n\nsys.modules["triton"] = None\n'
"""A sitecustomize.py: Python imports it before anything else, and takes a module that is None for one not there."""
FIRST_STEP = re.compile(r" iteration +1/")


class Launch(NamedTuple):
    """Seconds until a launch's first line and its first step were on the screen, and its losses."""

    first_line_s: float
    first_step_s: float
    losses: tuple[float, ...]


def bare(folder: Path, programs: Path | None = None) -> dict[str, str]:
    """This process's environment, but with no program on the PATH except those of a folder, no Triton and no GPU."""
    blocked, empty = folder / "python", folder / "bin"
    for each in (blocked, empty):
        each.mkdir(parents=True, exist_ok=True)
    (blocked / "sitecustomize.py").write_text(WITHOUT_TRITON)
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME")}
    path = os.pathsep.join([str(blocked), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"PATH": str(programs or empty), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def launch(words: Sequence[str], environment: Mapping[str, str], folder: Path, launcher: str = "python") -> Launch:
    """Start pretrain_gpt.py and read what it prints as it comes.

    Raises: RuntimeError with what it printed, if it fails or there is no first step
    """
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    command = [sys.executable, *LAUNCHERS[launcher], str(ROOT / "pretrain_gpt.py"), *words]
    command += [*RUN.split(), "--metrics-file", str(metrics)]
    environment = {**environment, "PYTHONUNBUFFERED": "1"}
    printed, seconds = [], []
    begun = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            seconds.append(time.perf_counter() - begun)
    steps = [passed for passed, line in zip(seconds, printed, strict=True) if FIRST_STEP.search(line)]
    if process.returncode or not steps:
        raise RuntimeError(f"{' '.join(command)}\nleft with {process.returncode}\n{''.join(printed)}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return Launch(seconds[0], steps[0], tuple(row["lm loss"] for row in rows if "lm loss" in row))


def summary(launches: Sequence[Launch]) -> dict[str, Any]:
    """Of one side: medians, and the slowest first step."""
    return {
        "first_line_s": round(statistics.median(each.first_line_s for each in launches), 2),
        "first_step_s": round(statistics.median(each.first_step_s for each in launches), 2),
        "slowest_first_step_s": round(max(each.first_step_s for each in launches), 2),
        "losses": launches[0].losses,
    }


def main() -> int:
    """Print one JSON row; 1 if two launches do not agree on the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="python")
    parser.add_argument("--flags", default="", help="for both sides, beside those of a small model")
    parser.add_argument("--output", type=Path, help="a .jsonl file to which the row is added")
    asked = parser.parse_args()
    words = [*MODEL.split(), *asked.flags.split()]
    found: dict[str, list[Launch]] = {"bare": [], "as_it_is": []}
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        environments = {"bare": bare(folder), "as_it_is": dict(os.environ)}
        for _ in range(asked.rounds):
            for side, environment in environments.items():
                found[side].append(launch(words, environment, folder, asked.launcher))
    same = len({each.losses for launches in found.values() for each in launches}) == 1
    row = {
        "benchmark": "startup",
        "commit": commit(),
        "command": " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]]),
        "launcher": asked.launcher,
        "flags": " ".join(words),
        "rounds": asked.rounds,
        "sides": {side: summary(launches) for side, launches in found.items()},
        "same_losses": same,
        "machine": machine.describe(),
    }
    write_row(row, asked.output)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

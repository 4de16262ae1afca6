"""Threads and memory of a CPU process: each tried in a process of its own, since both hold for the rest of one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.house.source import ROOT

CORES = 16
ON_CORES = f"cpu.os.sched_getaffinity = lambda _: range({CORES})\n"


def said(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MALLOC_", "LOCAL_"))}
    command = [sys.executable, "-c", f"from megatron_ds.training import cpu\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=clean | environment)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("asked", "environment", "threads"),
    [
        ("None", {}, CORES),
        ("None", {"LOCAL_WORLD_SIZE": str(2 * CORES)}, 1),
        ("None", {"OMP_NUM_THREADS": "1"}, 1),
        ("2", {"OMP_NUM_THREADS": "1"}, 2),
        # torchrun sets 1 itself, but not for a single rank
        ("None", {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}, 8),
        ("1", {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}, 1),
        ("None", {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1"}, 1),
        ("None", {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 1),
    ],
)
def test_threads_are_those_asked_for_or_a_fair_share(asked: str, environment: dict[str, str], threads: int) -> None:
    assert f"threads per rank: {threads}" in said(f"{ON_CORES}print(cpu.prepare({asked}))", **environment)


def test_what_torchrun_cannot_have_set_rules() -> None:
    """As far as torch follows it: with MKL it takes no more than the machine has cores."""
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
    own = said("import torch; print(torch.get_num_threads())", OMP_NUM_THREADS="2")
    assert own in ("1", "2")
    assert f"threads per rank: {own}" in said(f"{ON_CORES}print(cpu.prepare(None))", OMP_NUM_THREADS="2", **torchrun)


FAULTS = """
import resource, torch
{first}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3):
    last = faults()  # the heap grows at first
print(last)
"""


def test_freed_memory_is_not_cleared_again_by_the_kernel() -> None:
    pytest.importorskip("resource")
    before, after = (int(said(FAULTS.format(first=first))) for first in ("", "assert cpu.keep_freed_memory()"))
    assert after < before / 20


def test_malloc_variables_are_left_to_rule() -> None:
    assert said("print(cpu.keep_freed_memory())", MALLOC_ARENA_MAX="2") == "False"

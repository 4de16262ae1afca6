"""The Triton kernels: interpreted on the CPU, compiled for a GPU that is not there, and on one that is.

Triton reads once, when it is imported, whether it is to interpret. So the cases run in processes of their own, and no
other test meets interpreted kernels. One case by hand:
TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/norm_cases.py -k bf16
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
CASES = sorted(HERE.glob("*_cases.py"))
LOOPS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) or np.lib.NumpyVersion(np.__version__) < "2.4.0"
"""The interpreter of Triton 3.6 makes loop bounds of arrays with one element, as numpy allowed it to before 2.4."""


def run(files: list[Path], interpret: bool, cache: Path) -> int:
    """Number of cases, all of which passed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed is not None and "skipped" not in done.stdout, done.stdout
    return int(passed[1])


@pytest.mark.slow
@pytest.mark.skipif(not LOOPS, reason="this Triton cannot interpret loops with this numpy")
def test_interpreted(tmp_path: Path) -> None:
    assert run(CASES, True, tmp_path) >= 450


@pytest.mark.slow
def test_compiled_for_a_gpu_elsewhere(tmp_path: Path) -> None:
    assert run([HERE / "compilation.py"], False, tmp_path) >= 20


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device(tmp_path: Path) -> None:
    assert run(CASES, False, tmp_path) >= 450


def test_every_kernel_has_cases() -> None:
    kernels = {path.stem for path in (HERE.parents[2] / "megatron_ds/kernels/triton").glob("*.py")}
    assert kernels - {"__init__", "launch"} == {path.stem.removesuffix("_cases") for path in CASES}

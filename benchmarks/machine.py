"""What this machine is, how fast it multiplies and copies: `python benchmarks/machine.py` prints one JSON row.

A training rate means little without its machine; a share of the machine's own best matmul travels better.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Shape = tuple[int, int, int]

CPU_SHAPES: tuple[Shape, ...] = ((512, 512, 2048), (2048, 512, 2048), (2048, 2048, 2048))
GPU_SHAPES: tuple[Shape, ...] = ((4096, 1024, 4096), (4096, 4096, 4096), (8192, 8192, 8192))
"""Rows (tokens), inner size and columns of x W^T; first a small model's layer, last a large square."""

TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def describe() -> dict[str, Any]:
    """Hardware, software and settings on which speed depends."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "cpu_flags": [flag for flag in TELLING_FLAGS if flag in (_cpuinfo("flags") or _cpuinfo("Features")).split()],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def best_matmul(device: str = "cpu", seconds: float = 2.0, shapes: tuple[Shape, ...] | None = None) -> dict[str, Any]:
    """Best GFLOP/s of x W^T per dtype and shape, and the best of all shapes; about `seconds` for each figure."""
    shapes = shapes or (CPU_SHAPES if torch.device(device).type == "cpu" else GPU_SHAPES)
    result: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        rates = {"x".join(map(str, shape)): round(matmul_gflops(shape, dtype, device, seconds), 1) for shape in shapes}
        result[name] = {"best_gflops": max(rates.values()), "by_shape": rates}
    return result


def best_gflops(found: dict[str, Any], dtype: str) -> float:
    """The fastest product of a precision's numbers; those of bf16 may be multiplied in fp32 too, which holds all."""
    allowed = ("bf16", "fp32") if dtype == "bf16" else (dtype,)
    return max(float(found[name]["best_gflops"]) for name in allowed if name in found)


def limits(device: str = "cpu", seconds: float = 2.0) -> dict[str, Any]:
    """What no program can beat: the fastest products and the fastest copy."""
    return {"best_matmul": best_matmul(device, seconds), "copy_gb_per_s": round(best_copy(device, seconds), 1)}


def matmul_gflops(shape: Shape, dtype: torch.dtype, device: str = "cpu", seconds: float = 2.0) -> float:
    """GFLOP/s of the fastest of many multiplications; at least five are timed, however slow."""
    rows, inner, columns = shape
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    once = _timer(lambda: torch.mm(x, weight.t(), out=out), device)
    once()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        times.append(once())
    return 2e-9 * rows * inner * columns / min(times)


def best_copy(device: str = "cpu", seconds: float = 2.0, mib: int | None = None) -> float:
    """GB/s of the fastest copy of a buffer that no cache holds, what is read and what is written counted alike."""
    mib = mib or (256 if torch.device(device).type == "cpu" else 2048)
    source = torch.ones(mib * 2**18, device=device)
    target = torch.empty_like(source)
    once = _timer(lambda: target.copy_(source), device)
    once()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        times.append(once())
    return 2e-9 * source.nbytes / min(times)


def _timer(work: Callable[[], object], device: str) -> Callable[[], float]:
    """A function that does the work once and returns its seconds; a GPU's own clock leaves out the launch."""
    if torch.device(device).type != "cuda":

        def by_host_clock() -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return by_host_clock

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def by_device_clock() -> float:
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return by_device_clock


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _usable_cores() -> int:
    """Cores that this process may run on; a container or a job scheduler often allows fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def main() -> None:
    """Print one JSON row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps({"benchmark": "machine", **describe(), "device": device, **limits(device)}))


if __name__ == "__main__":
    main()

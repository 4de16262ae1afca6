"""What this machine has of other people's kernels and of what ours need; nothing is imported before it is asked."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

APEX_MODULES = (
    "apex.normalization",
    "apex.optimizers",
    "amp_C",
    "fused_layer_norm_cuda",
    "fused_weight_gradient_mlp_cuda",
    "scaled_masked_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
)
"""NVIDIA's own, which no other package of the name has; all but the first two are built with it or left out."""


FAST_HALF = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
"""Instructions of x86 processors that multiply half precision about as fast as fp32, or faster."""


class Package(NamedTuple):
    """One package: whether it can be used, and a sentence that says why not, or what is missing in it all the same."""

    name: str
    version: str | None
    usable: bool
    why: str


def has_module(name: str) -> bool:
    """Whether a module would be found; of a dotted name the parents are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # a parent may be missing, be no package, or break
        return False


@cache
def trouble(module: str) -> str | None:
    """Why a module cannot be imported, None where it can; asked once, for the answer costs an import."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name or module} is not installed"
    except Exception as error:  # built for another torch or CUDA, a module may raise anything
        return f"{module} breaks: {type(error).__name__}: {_first_line(error)}"
    return None


def slow_half(dtype: torch.dtype) -> str | None:
    """Why this processor multiplies numbers of a precision more slowly than the same numbers in fp32; None if not.

    Measured with torch 2.13, GFLOP/s of a thread in bf16 and fp32: a Xeon with AVX512-BF16 but no AMX 103 and 199, for
    Intel's dot products have half the rate of AMD's; without AVX512-BF16 36 and 193; with AVX2 alone 14 and 95.
    """
    wanted = FAST_HALF.get(dtype)
    if wanted is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    vendor, flags = _processor()
    by_intel = vendor == "GenuineIntel"
    if any(name in flags for name in wanted if not (by_intel and name == "avx512_bf16")):
        return None
    return f"products in {str(dtype).removeprefix('torch.')}: this CPU multiplies fp32 faster"


@cache
def _processor() -> tuple[str, frozenset[str]]:
    """Vendor and instruction sets of an x86 processor; nothing where the system has no /proc."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return said.get("vendor_id", ""), frozenset(said.get("flags", "").split())


def compiler() -> str | None:
    """The path of a C++ compiler, which torch.compile needs on CPUs."""
    return _first_program(os.environ.get("CXX"), "g++", "clang++")


def triton() -> Package:
    """Triton, which on a GPU needs a C compiler and Python's headers for its launchers.

    Source: triton/runtime/build.py, triton/backends/nvidia/driver.c
    """
    why = trouble("triton")
    if why is None and _first_program(os.environ.get("CC"), "gcc", "clang") is None:
        why = "no C compiler (CC, gcc, clang) to build its launchers with"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if why is None and not header.exists():
        why = f"no {header} to build its launchers with (python3-dev)"
    return _package("triton", "triton", why)


def apex() -> Package:
    """NVIDIA's apex; usable where any of its own modules is."""
    lacking = {module: why for module in APEX_MODULES if (why := trouble(module)) is not None}
    usable = len(lacking) < len(APEX_MODULES)
    why = "; ".join(dict.fromkeys(lacking.values()))
    folders = _folders("apex")
    if not usable and not folders:
        why = "apex is not installed"
    elif folders and not any(Path(folder, "normalization").exists() for folder in folders):
        why = "this apex is another project of the same name, not NVIDIA's"
    return _package("apex", "apex", why)._replace(usable=usable)


def flash_attn() -> Package:
    """FlashAttention 2."""
    return _package("flash_attn", "flash-attn", trouble("flash_attn"))


def flash_attn_3() -> Package:
    """FlashAttention 3, a package of its own for Hopper."""
    return _package("flash_attn_interface", "flash_attn_3", trouble("flash_attn_interface"))


def transformer_engine() -> Package:
    """NVIDIA's Transformer Engine, with its part for torch."""
    why = trouble("transformer_engine") or trouble("transformer_engine.pytorch")
    return _package("transformer_engine", "transformer-engine", why)


def liger() -> Package:
    """LinkedIn's kernels in Triton."""
    return _package("liger_kernel", "liger-kernel", trouble("triton") or trouble("liger_kernel.ops"))


def torchao() -> Package:
    """torchao; not imported, which takes seconds, since nothing of it is used."""
    return _package("torchao", "torchao", None if has_module("torchao") else "torchao is not installed")


def packages() -> tuple[Package, ...]:
    """All of the above."""
    return triton(), apex(), flash_attn(), flash_attn_3(), transformer_engine(), liger(), torchao()


def _folders(name: str) -> list[str]:
    """Where a package's files are; nothing is imported."""
    spec = importlib.util.find_spec(name)
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _package(name: str, distribution: str, why: str | None) -> Package:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return Package(name, version, not why, why or "")


def _first_program(*names: str | None) -> str | None:
    return next((path for name in names if name and (path := shutil.which(name)) is not None), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]

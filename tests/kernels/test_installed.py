"""What is found on made-up machines: packages that work, break, are absent, or are others of the same name."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ds.kernels import installed
from megatron_ds.kernels.installed import trouble
from tests.kernels.stand_ins import install

MADE_UP = (*installed.APEX_MODULES, "apex", "flash_attn", "flash_attn_interface", "transformer_engine", "liger_kernel")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages, the only one with any of the names above."""
    if any(installed.has_module(name) for name in MADE_UP):
        pytest.skip("the true packages are here")
    trouble.cache_clear()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in MADE_UP:
            del sys.modules[name]
    trouble.cache_clear()


INTEL, AMD = "GenuineIntel", "AuthenticAMD"


@pytest.mark.parametrize(
    ("vendor", "flags", "slow"),
    [
        (INTEL, "avx2", {torch.bfloat16, torch.float16}),
        (INTEL, "avx512f avx512_bf16 avx512_fp16", {torch.bfloat16}),
        (INTEL, "avx512_bf16 avx512_fp16 amx_tile amx_bf16", set()),
        (AMD, "avx2 f16c", {torch.bfloat16, torch.float16}),
        (AMD, "avx512f avx512_bf16", {torch.float16}),
        ("", "", {torch.bfloat16, torch.float16}),
    ],
)
def test_which_precisions_a_processor_multiplies_slowly(
    vendor: str, flags: str, slow: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "_processor", lambda: (vendor, frozenset(flags.split())))
    for machine, expected in (("x86_64", slow), ("aarch64", set())):
        monkeypatch.setattr(installed.platform, "machine", lambda machine=machine: machine)
        found = {dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if installed.slow_half(dtype)}
        assert found == expected


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc")
def test_the_processor_is_read() -> None:
    vendor, flags = installed._processor()
    assert ("sse2" in flags and vendor in (INTEL, AMD)) == (installed.platform.machine() == "x86_64")


def write(site: Path, name: str, text: str = "", version: str | None = None) -> None:
    folder = site.joinpath(*name.split("."))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(text)
    if version is not None:
        about = site / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_nothing_is_there(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed.apex() == ("apex", None, False, "apex is not installed")
    assert installed.flash_attn() == ("flash_attn", None, False, "flash_attn is not installed")
    assert not installed.flash_attn_3().usable
    assert installed.transformer_engine().why == "transformer_engine is not installed"
    assert not installed.has_module("apex") and not installed.has_module("apex.normalization")
    install(monkeypatch, "torchao")  # for the true one takes seconds
    assert {package.name for package in installed.packages()} >= {"triton", "apex", "torchao", "liger_kernel"}


def test_the_other_apex_is_told_apart(site: Path) -> None:
    write(site, "apex", "from .models import *", "0.9.10.dev0")
    write(site, "apex.models")
    found = installed.apex()
    assert (found.version, found.usable) == ("0.9.10.dev0", False)
    assert "another project" in found.why


def test_apex_of_nvidia_whole_and_in_part(site: Path) -> None:
    write(site, "apex", version="0.1")
    for name in installed.APEX_MODULES[:-1]:
        write(site, name)
    assert installed.apex() == ("apex", "0.1", True, f"{installed.APEX_MODULES[-1]} is not installed")
    trouble.cache_clear()
    write(site, installed.APEX_MODULES[-1])
    assert installed.apex() == ("apex", "0.1", True, "")


def test_apex_that_breaks_is_not_called_another(site: Path) -> None:
    write(site, "apex", "raise ImportError('undefined symbol: _ZN3c10')", "0.1")
    write(site, "apex.normalization")
    found = installed.apex()
    assert not found.usable
    assert "undefined symbol" in found.why and "another" not in found.why


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_a_broken_import_is_reported(site: Path, error: str) -> None:
    write(site, "flash_attn", f"raise {error}('built for torch 2.1\\nand more')", "2.8.3")
    found = installed.flash_attn()
    assert found == ("flash_attn", "2.8.3", False, f"flash_attn breaks: {error}: built for torch 2.1")


def test_a_package_that_another_one_lacks_is_named(site: Path) -> None:
    write(site, "flash_attn", "import no_such_package")
    assert installed.flash_attn().why == "no_such_package is not installed"


def test_it_is_asked_once(site: Path) -> None:
    write(site, "flash_attn_interface", "raise OSError('libcudart.so.11.0')")
    first = installed.flash_attn_3()
    write(site, "flash_attn_interface")
    assert installed.flash_attn_3() == first


def program(folder: Path, name: str) -> str:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert installed.compiler() is None
    clang = program(tmp_path, "clang++")
    assert installed.compiler() == clang
    gnu = program(tmp_path, "g++")
    assert installed.compiler() == gnu
    monkeypatch.setenv("CXX", program(tmp_path, "icpx"))
    assert installed.compiler() == shutil.which("icpx")


def test_triton_needs_a_compiler_and_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble.cache_clear()
    install(monkeypatch, "triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "C compiler" in installed.triton().why
    program(tmp_path, "gcc")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in installed.triton().why
    (tmp_path / "Python.h").write_text("")
    assert installed.triton().usable
    trouble.cache_clear()

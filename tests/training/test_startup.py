"""A launch needs neither compiler nor Triton nor GPU, and without them trains the same model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.startup import Launch, bare, launch
from tests.helpers.recipe import TINY, environment, words

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja", "ld")
CHOSEN_BY_RUN = ("train_iters", "eval_iters", "log_interval")


def run(variables: dict[str, str], folder: Path, **changes: str | bool) -> Launch:
    flags = {name: value for name, value in TINY.items() if name not in CHOSEN_BY_RUN} | changes
    return launch(words(flags), variables, folder)


@pytest.fixture
def traps(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of compilers that do not compile, and the file in which each call of one is written down."""
    programs, calls = tmp_path / "traps", tmp_path / "calls"
    programs.mkdir()
    for name in COMPILERS:
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> {calls}\nexit 1\n")
        (programs / name).chmod(0o755)
    return programs, calls


def test_same_losses_and_no_compiler_is_called(
    tmp_path: Path, traps: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, calls = traps
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    usual = run(environment(), tmp_path)
    assert len(usual.losses) == 3
    assert run(bare(tmp_path), tmp_path).losses == usual.losses
    assert run(bare(tmp_path, programs), tmp_path).losses == usual.losses
    assert not calls.exists()


def test_what_is_missing_is_missed(tmp_path: Path) -> None:
    for kernels in ("compile", "triton"):
        with pytest.raises(RuntimeError, match=f"{kernels}, and "):
            run(bare(tmp_path), tmp_path, kernels=kernels)
